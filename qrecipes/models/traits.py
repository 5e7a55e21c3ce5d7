"""What a decoder computes that the names and shapes of its parameters do not show."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def traits(model: Any) -> dict[str, Any]:
    """Heads, norms, activation, rotation, caps and windows of a torchtune decoder, by config.json's names
    where it has one. Two decoders of equal traits, rotary frequencies and parameters compute the same."""
    attentions = [module for module in model.modules() if _is_attention(module)]
    first, norm = attentions[0], getattr(model.norm, "rms_norm", model.norm)
    return {
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "rms_norm_eps": norm.eps,
        "norms": type(norm).__name__,
        "embedding": type(model.tok_embeddings).__name__,
        "hidden_act": repr(model.layers[0].mlp.activation),
        "rotary embeddings": _rotary_kind(first.pos_embeddings),
        "scale of attention scores": getattr(first, "scaling", first.head_dim**-0.5),
        "attn_logit_softcapping": getattr(first, "softcapping", None),
        "final_logit_softcapping": getattr(model.output, "cap", None),
        "sliding_window": tuple(getattr(module, "sliding_window_size", None) for module in attentions),
    }


def rotary_theta(model: Any) -> Tensor:
    """Rotary frequencies of a torchtune decoder, [head_dim // 2], float32 on the CPU."""
    attention = next(module for module in model.modules() if _is_attention(module))
    return attention.pos_embeddings.theta.float().cpu()


def _is_attention(module: Any) -> bool:
    return hasattr(module, "num_kv_heads") and hasattr(module, "pos_embeddings")


def _rotary_kind(rotary: Any) -> str:
    """Llama 3.1's scales its frequencies, which are compared by value, and is otherwise the plain one."""
    name = type(rotary).__name__
    return "RotaryPositionalEmbeddings" if name == "Llama3ScaledRoPE" else name
