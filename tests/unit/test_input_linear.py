"""Layers that quantize their input: integers, gradients, types and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qrecipes.quant.activations import fake_quantize
from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.input_linear import InputFormat, QuantInputLinear
from qrecipes.quant.linear import QuantLinear

INTEGER = InputFormat(bits=8, integer=True)


def layers(input_format: InputFormat, bits: int = 4, **format) -> tuple[QuantInputLinear, QuantLinear]:
    torch.manual_seed(0)
    base = QuantLinear.from_linear(nn.Linear(96, 40), AffineFormat(bits=bits, **format))
    return QuantInputLinear.of(base, input_format), base


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_the_integer_product_is_exact(bits):
    layer, base = layers(InputFormat(bits=bits, integer=True))
    x = torch.randn(2, 3, 96)
    x[0, 0] = 0
    rows = x.reshape(6, 96)
    scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = torch.where(scale == 0, 0.0, rows / scale).round()
    sums = (codes.long() @ base.integers().long().t()).float()  # int64: exact
    expected = sums * scale * base.scale.t() + base.bias
    assert torch.equal(layer(x), expected.reshape(2, 3, 40))


@pytest.mark.parametrize(
    "wanted", [InputFormat(bits=8), InputFormat(bits=4, symmetric=False), InputFormat(bits=8, integer=True)]
)
def test_products_and_gradients_are_those_of_the_rounded_input(wanted):
    layer, base = layers(wanted)
    x = torch.randn(5, 96, requires_grad=True)
    y = layer(x)
    rounded = fake_quantize(x.detach(), wanted.bits, symmetric=wanted.symmetric).double().requires_grad_()
    expected = nn.functional.linear(rounded, base.dequantize(torch.float64), base.bias.double())
    grad = torch.randn(5, 40)
    y.backward(grad)
    expected.backward(grad.double())
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 96 terms
    torch.testing.assert_close(y.double(), expected, **tolerance)
    kept = 1.0
    if not wanted.symmetric:  # a value that is clipped has no gradient
        leaf = x.detach().clone().requires_grad_()
        fake_quantize(leaf, wanted.bits, symmetric=False).sum().backward()
        kept = leaf.grad.double()
    torch.testing.assert_close(x.grad.double(), rounded.grad * kept, **tolerance)
    assert layer.bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_computes_in_the_models_type_and_keeps_its_input(dtype):
    layer, _ = layers(INTEGER)
    moved = copy.deepcopy(layer).to(dtype)
    assert moved(torch.randn(2, 96, dtype=dtype)).dtype is dtype
    assert moved.input_format == INTEGER
    assert moved.scale.dtype is torch.float32
    with pytest.raises(ValueError, match="the layer computes in"):
        moved(torch.randn(2, 96))
    again = moved.with_grid(moved.grid, moved.format)
    assert isinstance(again, QuantInputLinear)
    assert again.input_format == INTEGER


def test_compiled_whole_equals_eager():
    layer, _ = layers(INTEGER)
    x = torch.randn(9, 96, requires_grad=True)
    found = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(
        found, layer(x), rtol=1e-5, atol=1e-3
    )  # a compiled division may round otherwise


def test_what_is_not_finite_shows():
    layer, _ = layers(INTEGER)
    x = torch.randn(3, 96)
    x[1, 4] = torch.inf
    y = layer(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_what_has_no_integer_product_is_refused():
    for format in (AffineFormat(bits=4, group_size=32), AffineFormat(bits=4, symmetric=False)):
        base = QuantLinear.from_linear(nn.Linear(96, 40), format)
        with pytest.raises(ValueError, match="integer products scale whole rows of symmetric integers"):
            QuantInputLinear.of(base, INTEGER)
        assert QuantInputLinear.of(base, InputFormat()).input_format == InputFormat()
    with pytest.raises(ValueError, match="which has no integers"):
        QuantInputLinear.of(QuantLinear.from_linear(nn.Linear(96, 40), NF4Format()), INTEGER)
    with pytest.raises(ValueError, match="asymmetric input has a zero point"):
        InputFormat(integer=True, symmetric=False)
    with pytest.raises(ValueError, match=r"InputFormat.bits: 1; use 2 to 8"):
        InputFormat(bits=1)
