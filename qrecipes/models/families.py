"""Hugging Face's decoder families in torchtune's terms, one table row a family.

A row says which builder makes the model, which of its arguments config.json's values become, which values
torchtune has no argument for and so must be the ones that it computes with, and what the tensors are called.

Llama, Mistral and Gemma rotate queries and keys in another order of rows than torchtune does: within a head,
Hugging Face keeps the first components of all rotated pairs, then the second ones; torchtune keeps each pair
together. torchtune's Qwen2 and Phi-3 keep Hugging Face's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qrecipes.errors import WeightsError

Config = Mapping[str, Any]
"""The content of config.json."""

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "hidden_size": "embed_dim",
    "intermediate_size": "intermediate_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "attention_dropout": "attn_dropout",
    "rope_theta": "rope_base",
}
"""Arguments of every builder, by their names in config.json."""
_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_DEFAULTS = {"rms_norm_eps": 1e-6, "attention_dropout": 0.0, "tie_word_embeddings": False}
"""What transformers takes where config.json is silent; a family adds its own."""
QUANTIZATION = "quantization_config"
"""Where config.json tells how weights are stored in fewer bits."""
_PINNED = {"partial_rotary_factor": (1.0,), QUANTIZATION: ()}
"""Values that every builder computes with; absent and null are always right."""

_LAYER = "model.layers.{}."
_ATTENTION = {
    _LAYER + "self_attn.q_proj.weight": ("layers.{}.attn.q_proj.weight",),
    _LAYER + "self_attn.k_proj.weight": ("layers.{}.attn.k_proj.weight",),
    _LAYER + "self_attn.v_proj.weight": ("layers.{}.attn.v_proj.weight",),
}
_BIASES = {
    _LAYER + "self_attn.q_proj.bias": ("layers.{}.attn.q_proj.bias",),
    _LAYER + "self_attn.k_proj.bias": ("layers.{}.attn.k_proj.bias",),
    _LAYER + "self_attn.v_proj.bias": ("layers.{}.attn.v_proj.bias",),
}
_GATED = {
    _LAYER + "mlp.gate_proj.weight": ("layers.{}.mlp.w1.weight",),
    _LAYER + "mlp.up_proj.weight": ("layers.{}.mlp.w3.weight",),
}
_REST = {
    HF_EMBEDDING: (EMBEDDING,),
    _LAYER + "self_attn.o_proj.weight": ("layers.{}.attn.output_proj.weight",),
    _LAYER + "mlp.down_proj.weight": ("layers.{}.mlp.w2.weight",),
    _LAYER + "input_layernorm.weight": ("layers.{}.sa_norm.scale",),
    _LAYER + "post_attention_layernorm.weight": ("layers.{}.mlp_norm.scale",),
    "model.norm.weight": ("norm.scale",),
    HF_OUTPUT: (OUTPUT,),
}
_LLAMA = _ATTENTION | _GATED | _REST


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture of transformers is built and filled."""

    architecture: str
    """The class in config.json's `architectures`."""
    model_type: str
    builder: Callable[[Config], str]
    """torchtune's builder for a config, "FAMILY.BUILDER"."""
    names: Mapping[str, tuple[str, ...]]
    """Hugging Face's name of a tensor -> torchtune's, `{}` standing for the layer. Several are stacked by
    rows in one tensor of Hugging Face."""
    pairs: bool
    """Whether torchtune keeps rotated pairs together, so that rows of queries and keys change places."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """More arguments, by their names in config.json."""
    defaults: Config = field(default_factory=dict)
    pinned: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Key of config.json -> values that torchtune computes with, having no argument for it."""
    window: Callable[[Config], int | None] = lambda config: None
    """Length of a sliding window that config.json asks for and the builder lacks, in tokens."""
    problem: Callable[[Config], str | None] = lambda config: None
    """What else of a config torchtune cannot compute, in words."""
    derives_head_dim: bool = True
    """Whether the builder divides the width by the heads, instead of taking `head_dim`."""


def family_of(config: Config, where: object) -> Family:
    """The row for a config.json.

    Raises:
        WeightsError: if there is none, naming the architecture and those that there are. `where` is the place
        that the message begins with.
    """
    architectures = config.get("architectures") or [config.get("model_type")]
    for family in FAMILIES:
        if family.architecture in architectures or (
            not config.get("architectures") and config.get("model_type") == family.model_type
        ):
            return family
    raise WeightsError(
        f"{where}: architecture {architectures[0]} is not supported; supported: "
        + ", ".join(family.architecture for family in FAMILIES)
    )


def complete(family: Family, config: Config, where: object) -> dict[str, Any]:
    """config.json with transformers' defaults and one form of the rotary settings: `rope_theta`, `rope_type`
    and the type's own.

    Raises:
        WeightsError: if what cannot be guessed is missing.
    """
    missing = [key for key in _REQUIRED if not isinstance(config.get(key), int)]
    if missing:
        raise WeightsError(f"{where}: config.json lacks {', '.join(missing)}")
    known = {key: value for key, value in config.items() if value is not None}
    # transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`
    rope = {"rope_theta": 10_000.0} | known
    rope |= known.get("rope_scaling") or {}
    rope |= known.get("rope_parameters") or {}
    heads = known["num_attention_heads"]
    derived = {
        "num_key_value_heads": heads,
        "head_dim": known["hidden_size"] // heads,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    # null is a value of its own where a family has a default: no window, no cap
    nulls = {key: None for key in family.defaults if key in config and config[key] is None}
    return (
        dict(_DEFAULTS) | derived | dict(family.defaults) | rope | nulls | {"rope_type": derived["rope_type"]}
    )


def builder_arguments(
    family: Family, config: Config, where: object
) -> tuple[str, dict[str, Any], str | None]:
    """The builder for a `complete`d config, its arguments, and a limit on the length that was set, in words.

    Raises:
        WeightsError: naming what torchtune cannot compute.
    """
    problems = list(_problems(family, config))
    if problems:
        raise WeightsError(
            f"{where}: config.json asks for what torchtune's {family.model_type} does not compute: "
            + "; ".join(problems)
        )
    builder = family.builder(config)
    names = _ARGUMENTS | dict(family.arguments)
    if builder == "llama3_2.llama3_2":
        names |= {"tie_word_embeddings": "tie_word_embeddings"}
    arguments = {ours: _whole(config[theirs]) for theirs, ours in names.items()}
    if builder == "llama3_2.llama3_2":
        arguments["scale_factor"] = _whole(config["factor"]) if config["rope_type"] == "llama3" else 1
    window = family.window(config)
    limit = None
    if window is not None and window < arguments["max_seq_len"]:
        limit = (
            f"sliding_window is {window}, and torchtune's {family.model_type} attends to all that came "
            f"before; max_seq_len is {window} of {arguments['max_seq_len']}, where both are the same"
        )
        arguments["max_seq_len"] = window
    return builder, arguments, limit


def overridden(family: Family, args: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's names of the builder's arguments in `args`, but for the length, which is no limit of the
    weights."""
    names = {ours: theirs for theirs, ours in (_ARGUMENTS | dict(family.arguments)).items()}
    return {names[ours]: value for ours, value in args.items() if ours in names and ours != "max_seq_len"}


def rotary_frequencies(config: Config) -> Tensor:
    """Rotary frequencies of a `complete`d config, [head_dim // 2]: plain ones, or Llama 3.1's scaled ones."""
    head_dim = config["head_dim"]
    frequencies = config["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if config["rope_type"] == "llama3":
        low, high = config["low_freq_factor"], config["high_freq_factor"]
        turns = config["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / config["factor"] + smooth * frequencies
    return frequencies.float()


def _problems(family: Family, config: Config) -> list[str]:
    """What torchtune cannot compute, each with the value that it can."""
    found = []
    for key, values in {**_PINNED, **family.pinned}.items():
        value = config.get(key)
        if value is not None and value not in values:
            allowed = " or ".join(map(_shown, values))
            found.append(f"{key} {_shown(value)}" + (f" (only {allowed})" if values else ""))
    kind = config["rope_type"]
    allowed_kinds = ("default", "llama3") if family.architecture == "LlamaForCausalLM" else ("default",)
    if kind not in allowed_kinds:
        found.append(f"rotary embeddings of type {kind!r} (only {' or '.join(allowed_kinds)})")
    elif kind == "llama3":
        found += _llama3_problems(config)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if family.derives_head_dim and config["head_dim"] * heads != width:
        found.append(
            f"head_dim {config['head_dim']} (only hidden_size / num_attention_heads, {width / heads:g})"
        )
    if "max_position_embeddings" not in config:
        found.append("no max_position_embeddings")
    found += [f"{key} null" for key in family.arguments if config[key] is None]
    other = family.problem(config)
    return [*found, other] if other else found


def _llama3_problems(config: Config) -> list[str]:
    """torchtune fixes three of the four parameters of Llama 3.1's scaling."""
    fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    found = [
        f"rope scaling with {key} {config.get(key)} (only {value})"
        for key, value in fixed.items()
        if config.get(key) != value
    ]
    if not isinstance(_whole(config.get("factor")), int):
        found.append(f"rope scaling with factor {config.get('factor')} (only whole numbers)")
    return found


def _whole(value: Any) -> Any:
    """An integer where the value is one: config.json writes 10000.0 for what builders take as an int."""
    return int(value) if isinstance(value, float) and value.is_integer() and value > 1 else value


def _shown(value: Any) -> str:
    return "{...}" if isinstance(value, dict) else str(value)


def _llama_builder(config: Config) -> str:
    """Any Llama: only the builder of 3.2 ties its output and scales its rotation, and with a factor of 1 it
    does not scale."""
    plain = config["rope_type"] == "default" and not config["tie_word_embeddings"]
    return "llama2.llama2" if plain else "llama3_2.llama3_2"


def _qwen2_window(config: Config) -> int | None:
    layers = config.get("layer_types")
    if layers is not None:
        slides = "sliding_attention" in layers
    else:
        slides = config["num_hidden_layers"] > (config["max_window_layers"] or 0)
    return config.get("sliding_window") if config.get("use_sliding_window") and slides else None


def _gemma2_problem(config: Config) -> str | None:
    layers = config.get("layer_types")
    alternating = [
        "full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    if layers is not None and layers != alternating:
        return "layer_types (only sliding and full attention in turn)"
    return None


_GELU = "gelu_pytorch_tanh"
_GEMMA_PINNED = {
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
    "tie_word_embeddings": (True,),
}
_TIED = {name: ours for name, ours in _LLAMA.items() if name != HF_OUTPUT}

FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        builder=_llama_builder,
        names=_LLAMA,
        pairs=True,
        pinned={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    ),
    Family(
        architecture="MistralForCausalLM",
        model_type="mistral",
        builder=lambda config: "llama3_2.llama3_2" if config["tie_word_embeddings"] else "mistral.mistral",
        names=_LLAMA,
        pairs=True,
        pinned={"hidden_act": ("silu",), "layer_types": ()},
        defaults={"sliding_window": 4096},
        window=lambda config: config.get("sliding_window"),
    ),
    Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        builder=lambda config: "qwen2.qwen2",
        names=_LLAMA | _BIASES,
        pairs=False,
        arguments={"tie_word_embeddings": "tie_word_embeddings"},
        defaults={"sliding_window": 4096, "max_window_layers": 28},
        pinned={"hidden_act": ("silu",)},
        window=_qwen2_window,
    ),
    Family(
        architecture="GemmaForCausalLM",
        model_type="gemma",
        builder=lambda config: "gemma.gemma",
        names=_TIED,
        pairs=True,
        arguments={"head_dim": "head_dim"},
        defaults={"head_dim": 256, "tie_word_embeddings": True},
        # transformers, too, takes "gelu" to mean its tanh approximation in a Gemma
        pinned=_GEMMA_PINNED | {"hidden_act": (_GELU, "gelu")},
        derives_head_dim=False,
    ),
    Family(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        builder=lambda config: "gemma2.gemma2",
        names=_TIED
        | {
            "model.norm.weight": ("norm.rms_norm.scale",),
            _LAYER + "post_attention_layernorm.weight": ("layers.{}.sa_scale.scale",),
            _LAYER + "pre_feedforward_layernorm.weight": ("layers.{}.mlp_norm.scale",),
            _LAYER + "post_feedforward_layernorm.weight": ("layers.{}.mlp_scale.scale",),
        },
        pairs=True,
        arguments={
            "head_dim": "head_dim",
            "query_pre_attn_scalar": "query_pre_attn_scalar",
            "attn_logit_softcapping": "hidden_capping_value",
            "final_logit_softcapping": "final_capping_value",
            "sliding_window": "sliding_window_size",
        },
        defaults={
            "head_dim": 256,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        pinned=_GEMMA_PINNED | {"hidden_activation": (_GELU,)},
        problem=_gemma2_problem,
        derives_head_dim=False,
    ),
    Family(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        builder=lambda config: "phi3.phi3",
        names=_REST
        | {
            _LAYER + "self_attn.qkv_proj.weight": tuple(
                f"layers.{{}}.attn.{name}_proj.weight" for name in "qkv"
            ),
            _LAYER + "mlp.gate_up_proj.weight": ("layers.{}.mlp.w1.weight", "layers.{}.mlp.w3.weight"),
        },
        pairs=False,
        defaults={"rms_norm_eps": 1e-5},
        pinned={
            "hidden_act": ("silu",),
            "tie_word_embeddings": (False,),
            "resid_pdrop": (0.0,),
            "embd_pdrop": (0.0,),
        },
        window=lambda config: config.get("sliding_window"),
    ),
)
"""Every family that can be loaded and saved."""
