"""Steps of LoRA and QLoRA as transformers with peft and bitsandbytes take them, and as torchtune does.

Both get random weights and tokens; what they keep in which type, and their optimizers, are those of their own
recipes: peft's adapters are float32 under autocast and updated by bitsandbytes' 8-bit AdamW, torchtune's are
bfloat16 and updated by the fused AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from step_timing import Step, random_tokens
from torch import Tensor, nn

from qrecipes.errors import ConfigError

LEARNING_RATE = 1e-4
STD = 0.02


@dataclass(frozen=True)
class LlamaShape:
    """A Llama, and the batch that it is trained on."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int
    rows: int
    length: int


@dataclass(frozen=True)
class Adapters:
    """LoRA on every linear layer of the blocks."""

    rank: int
    alpha: float


def peft_step(
    shape: LlamaShape, adapters: Adapters, device: torch.device, *, quantized: bool, checkpointing: bool
) -> Step:
    """A step of transformers' Llama with peft's adapters, over NF4 with double quantization if `quantized`.

    Raises:
        ConfigError: if a library is missing.
    """
    try:
        import bitsandbytes
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ConfigError(f"the peer needs transformers, peft and bitsandbytes: {error}") from error
    make_config: Any = LlamaConfig  # whose signature tells less than it takes
    config = make_config(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(4096, shape.length),
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    for fqn, layer in list(model.named_modules()):
        if quantized and isinstance(layer, nn.Linear) and fqn != "lm_head":
            model.set_submodule(fqn, _nf4_layer(layer, device, bitsandbytes))
    _materialize(model, device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(
        model,
        LoraConfig(
            r=adapters.rank,
            lora_alpha=int(adapters.alpha),
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if device.type == "cuda":
        optimizer: Any = bitsandbytes.optim.AdamW8bit(trained, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)  # bitsandbytes' states need a GPU
    batch = random_tokens(shape.rows, shape.length, shape.vocabulary, device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=batch.inputs, labels=batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _nf4_layer(linear: nn.Linear, device: torch.device, bitsandbytes: Any) -> nn.Module:
    """A layer of random weights on the device, where bitsandbytes quantizes them."""
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device).normal_(0.0, STD)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return layer.to(device)


@torch.no_grad()
def _materialize(model: nn.Module, device: torch.device) -> None:
    """Random matrices and vectors of ones, frozen, in the place of parameters on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made.normal_(0.0, STD) if made.ndim > 1 else made.fill_(1.0)
                setattr(module, name, nn.Parameter(made, requires_grad=False))


def torchtune_step(
    shape: LlamaShape, adapters: Adapters, device: torch.device, *, quantized: bool, checkpointing: bool
) -> Step:
    """A step of torchtune's Llama 2 with its adapters, each layer compiled, over NF4 if `quantized`."""
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules import TransformerSelfAttentionLayer
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import set_activation_checkpointing

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = lora_llama2(
                ["q_proj", "k_proj", "v_proj", "output_proj"],
                apply_lora_to_mlp=True,
                vocab_size=shape.vocabulary,
                num_layers=shape.layers,
                num_heads=shape.heads,
                num_kv_heads=shape.heads,
                embed_dim=shape.width,
                intermediate_dim=shape.hidden,
                max_seq_len=max(4096, shape.length),
                lora_rank=adapters.rank,
                lora_alpha=int(adapters.alpha),
                lora_dropout=0.0,
                quantize_base=quantized,
            )
    finally:
        torch.set_default_dtype(before)
    set_trainable_params(model, get_adapter_params(model))
    if checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    for layer in model.layers:
        layer.compile()
    compute_loss: Any = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(compute_loss.num_output_chunks)
    compute_loss.compute_cross_entropy = torch.compile(compute_loss.compute_cross_entropy)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    batch = random_tokens(shape.rows, shape.length, shape.vocabulary, device)

    def step() -> Tensor:
        loss = compute_loss(model(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
