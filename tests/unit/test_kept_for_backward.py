"""What a block with adapters keeps for the backward pass: activations, and no dequantized weight.

The blocks are compiled by AOTAutograd and its partitioner, which decide what is kept, without the time that
Inductor takes for code; one goes through `parallelize` as a run does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from harness import ALONE
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qrecipes.config.run import ModelSection, ParallelSection
from qrecipes.errors import ConfigError
from qrecipes.models.build import build
from qrecipes.parallel.apply import parallelize, recompute, recomputing_backend
from qrecipes.quant.linear import QuantLinear
from qrecipes.transforms.base import TransformConfig
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.lora import LoRAConfig, LoRALinear
from qrecipes.transforms.qa_lora import QALoRAConfig

WIDTH, HIDDEN, TOKENS, RANK = 64, 96, 20, 4
PARTITIONED = "aot_eager_decomp_partition"
WEIGHTS = {WIDTH * WIDTH, WIDTH * HIDDEN}
"""Sizes of the weights, which no activation has."""
CONFIGS: dict[str, TransformConfig] = {
    "LoRA": LoRAConfig(rank=RANK),
    "QLoRA": LoRAConfig(rank=RANK, base="nf4"),
    "QLoRA int4": LoRAConfig(rank=RANK, base="int4", group_size=32),
    "QLoRA with DoRA": LoRAConfig(rank=RANK, base="nf4", use_dora=True),
    "QA-LoRA": QALoRAConfig(rank=RANK),
    "QLoRA, merged forward": LoRAConfig(rank=RANK, base="nf4", merged_forward=True),
    "QA-LoRA, merged forward": QALoRAConfig(rank=RANK, merged_forward=True),
    "LoRA in INT8": LoRAConfig(rank=RANK, base_compute="int8", emulate=True),
    "QLoRA in INT8": LoRAConfig(rank=RANK, base="nf4", base_compute="int8", emulate=True),
    "QA-LoRA in INT8": QALoRAConfig(rank=RANK, base_compute="int8", emulate=True),
}


class Block(nn.Module):
    """A norm, two layers that read its output, an activation, and a layer that reads that: as in a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.square = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[T, WIDTH] -> [T, WIDTH]."""
        x = x + self.square(x)
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def adapted(config: TransformConfig) -> nn.Module:
    torch.manual_seed(0)
    return Chain.from_configs([config]).swap(nn.Sequential(Block()).to(torch.bfloat16))


def compiled(block: nn.Module, backend: str | Callable[..., Any] = PARTITIONED) -> None:
    block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)


def kept(model: nn.Module) -> list[Tensor]:
    """What a forward pass keeps for the backward pass, but for parameters, after a step that compiles."""
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    model(x).sum().backward()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return list(found.values())


def weight_sized(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors if t.numel() in WEIGHTS]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_dequantized_weight_is_kept(config, compile):
    """Nor under checkpointing, which recomputes the same function, and keeps its input alone."""
    model = adapted(config)
    if compile:
        compiled(model[0])
    found = kept(model)
    assert found
    assert not weight_sized(found)
    recompute(model[0])
    under_checkpointing = kept(model)
    assert [tuple(t.shape) for t in under_checkpointing] == [(TOKENS, WIDTH)]


@pytest.mark.parametrize("compile", [False, True])
def test_a_layer_that_dequantizes_in_plain_sight_is_noticed(compile, monkeypatch):
    """The test above can fail: torchtune's compiled QLoRA keeps its weights in this way."""

    def base_output_with(self: LoRALinear, input: Tensor, product: Tensor) -> Tensor:
        assert isinstance(self.base, QuantLinear)
        return nn.functional.linear(input, self.base.dequantize()) + product

    monkeypatch.setattr(LoRALinear, "base_output_with", base_output_with)
    model = adapted(CONFIGS["QLoRA"])
    if compile:
        compiled(model[0])
    assert len(weight_sized(kept(model))) == 4


@pytest.mark.parametrize("name", ["QLoRA", "QA-LoRA", "QLoRA, merged forward", "QA-LoRA, merged forward"])
def test_recomputing_pointwise_keeps_no_norm_and_no_product_of_the_gate(name):
    """Kept: the block's input, the residual, gate and up; of LoRA, beside these, nothing that is as wide."""
    normally, sparing = adapted(CONFIGS[name]), adapted(CONFIGS[name])
    compiled(normally[0])
    compiled(sparing[0], recomputing_backend(pointwise=True, backend=PARTITIONED))
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    gradients = []
    for model in (normally, sparing):
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(model(x).float().square().mean(), [x, *parameters]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    wide = [t for t in kept(sparing) if t.numel() >= TOKENS * WIDTH]
    assert sum(t.numel() for t in wide) <= TOKENS * (2 * WIDTH + 2 * HIDDEN)


def test_a_runs_compiled_blocks_keep_no_dequantized_weight():
    model = adapted(CONFIGS["QLoRA"])
    run = nn.Module()
    run.layers = nn.ModuleList([model[0], nn.Identity()])  # what `parallelize` takes for a stack of blocks
    parallelize(run, ParallelSection(compile=True, recompute_pointwise=True), ALONE, Chain())
    found = kept(model)
    assert found
    assert not weight_sized(found)
    recompute(model[0])
    assert [tuple(t.shape) for t in kept(model)] == [(TOKENS, WIDTH)]


def test_gradients_of_recomputation_in_the_graph_are_those_of_what_is_kept():
    """Bit for bit, in bfloat16, by generated code, where fused operators round as single ones do: what a
    Llama's block computes again is what its forward pass computed."""
    args = {"num_layers": 1, "embed_dim": 64, "num_heads": 2, "num_kv_heads": 2, "intermediate_dim": 96}
    args |= {"vocab_size": 64, "max_seq_len": 32}
    section = ModelSection(source="torchtune:llama2.llama2", args=args)
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    gradients = []
    for forward in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build(section, dtype=torch.bfloat16, device=torch.device("cpu"))
        model = Chain.from_configs([CONFIGS["LoRA"]]).swap(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:  # away from the start, where a factor of zeros hides the other
                parameter.add_(torch.randn_like(parameter) * 0.1)
        with inductor_config.patch(emulate_precision_casts=True):
            compiled(model.layers[0], recomputing_backend(forward=forward))
            gradients.append(torch.autograd.grad(model(tokens).float().square().mean(), trained))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("given", [{}, {"compile": True}, {"checkpointing": "full"}])
def test_recomputing_in_the_graph_needs_a_graph_and_checkpointing(given):
    with pytest.raises(ConfigError, match=r"recompute_in_graph: .*compile is .* and checkpointing"):
        ParallelSection(recompute_in_graph=True, **given)


def test_recomputing_pointwise_is_the_compilers():
    with pytest.raises(ConfigError, match="compile = true"):
        ParallelSection(recompute_pointwise=True)
