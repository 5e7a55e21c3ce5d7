"""An adapter's product is added to its base's before that is rounded: what is smaller than a unit in the last
place counts, on average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qrecipes.quant.dequantize import dequantize_mm, linear_with_addend, quantize_to_affine
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.ranges import minmax_grid
from qrecipes.transforms.base import TransformConfig
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.lora import LoRAConfig
from qrecipes.transforms.qa_lora import QALoRAConfig

T, K, N, RANK = 512, 128, 96, 4
CONFIGS: dict[str, TransformConfig] = {
    "LoRA": LoRAConfig(rank=RANK),
    "QLoRA": LoRAConfig(rank=RANK, base="nf4"),
    "QLoRA int4": LoRAConfig(rank=RANK, base="int4", group_size=32),
    "QA-LoRA": QALoRAConfig(rank=RANK),
}


def adapted(config: TransformConfig, *, bias: bool) -> nn.Module:
    """A layer of outputs near 1, in bfloat16, whose half units are 2e-3 to 4e-3 there."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=bias)
    with torch.no_grad():
        linear.weight.normal_(0.0, K**-0.5)
    layer = Chain.from_configs([config]).swap(nn.Sequential(linear.bfloat16()))[0]
    with torch.no_grad():
        layer.lora_b.normal_()
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_product_below_half_a_unit_in_the_last_place_is_not_lost(name, bias):
    """Of a thousandth, on average. The output with the adapter minus that without has, along the adapter's
    exact product, a slope of 1: of 49,152 outputs, each rounded at random, within 3%."""
    layer = adapted(CONFIGS[name], bias=bias)
    x = torch.randn(T, K).bfloat16()
    with torch.no_grad():
        layer.lora_b.mul_(1e-3 / product(layer, x.double()).std())
        exact, having = product(layer, x.double()), layer(x)
        layer.lora_b.zero_()
        slope = float(((having - layer(x)).double() * exact).sum() / exact.square().sum())
    assert abs(slope - 1) < 0.03, slope


def product(layer: nn.Module, x: Tensor) -> Tensor:
    config = layer.config
    if isinstance(config, QALoRAConfig):
        x = x.unflatten(-1, (-1, config.group_size)).sum(-1)
    return config.scaling * x @ layer.lora_a.double().t() @ layer.lora_b.double().t()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_sum_in_float64(name):
    layer = adapted(CONFIGS[name], bias=True).double()
    layer.lora_a.data, layer.lora_b.data = layer.lora_a.double(), layer.lora_b.double()
    x = torch.randn(2, 5, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, N, dtype=torch.float64)
    inputs = [x, layer.lora_a, layer.lora_b]
    found = torch.autograd.grad(layer(x), inputs, dy)
    weight = layer.base_weight(torch.float64)
    expected = torch.autograd.grad(x @ weight.t() + product(layer, x), inputs, dy)
    for given, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_the_addend_is_part_of_the_sum(bias):
    """By hand, in integers that bfloat16 has, but for the sum: 256 + 1/2 + 1/2."""
    x, weight, addend = torch.tensor([[1.0, 1.0]]), torch.tensor([[256.0, 0.5]]), torch.tensor([[0.75]])
    biases = torch.zeros(1) if bias else None
    given = [t.bfloat16() for t in (x, weight)], None if biases is None else biases.bfloat16()
    y = linear_with_addend(*given[0], given[1], addend.bfloat16())
    assert y.item() == 258.0  # 257.25 to a multiple of 2; 256.5 alone gives 256, and 256.75 that again


def test_the_operator_adds_it_and_its_fake_has_the_shape():
    torch.manual_seed(0)
    format = AffineFormat(bits=4, group_size=32, symmetric=False, zero_point="float")
    weight = torch.randn(N, K)
    payload = quantize_to_affine(weight, minmax_grid(weight, format), format)
    x, addend, bias = torch.randn(7, K), torch.randn(7, N), torch.randn(N)
    y = dequantize_mm(x, payload, format, bias, addend)
    torch.testing.assert_close(y, dequantize_mm(x, payload, format, bias) + addend)
    arguments = (x, list(payload), format.key, bias, addend)
    torch.library.opcheck(torch.ops.qrecipes.dequantize_mm.default, arguments)
