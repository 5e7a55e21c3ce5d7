"""Frozen bases multiplied in INT8, alone and in `lora` and `qa_lora`, against float64 formulas."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qrecipes.errors import ConfigError, ProbeError
from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.frozen_int8 import frozen_int8_linear
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.primitives import sqnr_db
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.frozen import AdaptedLinear, noise_of_both
from qrecipes.transforms.lora import LoRAConfig
from qrecipes.transforms.qa_lora import QALoRAConfig

FORMATS = {
    "plain": None,
    "nf4": NF4Format(),
    "int4": AffineFormat(bits=4, group_size=16, symmetric=False, zero_point="float"),
}
CONFIGS = [
    LoRAConfig(rank=4, base_compute="int8", emulate=True),
    LoRAConfig(rank=4, base="nf4", base_compute="int8", emulate=True),
    LoRAConfig(rank=4, base="nf4", use_dora=True, base_compute="int8", emulate=True),
    QALoRAConfig(rank=4, group_size=16, base_compute="int8", emulate=True),
]


def frozen(kind: str, in_features: int, out_features: int, bias: bool) -> nn.Linear | QuantLinear:
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.weight.requires_grad_(False)
    format = FORMATS[kind]
    return linear if format is None else QuantLinear.from_linear(linear, format)


def known_weight(layer: nn.Linear | QuantLinear) -> torch.Tensor:
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.dequantize()


def rounded(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """What a matrix's INT8 stands for, in float64, with a scale for each slice along `dim`."""
    scale = matrix.float().abs().amax(dim, keepdim=True) / 127
    q = torch.where(scale == 0, 0.0, matrix.float() / torch.where(scale == 0, 1.0, scale)).round()
    return q.double() * scale.double()


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(list(FORMATS)),
    bias=st.booleans(),
    groups=st.integers(1, 3),
    rows=st.integers(1, 20),
    tokens=st.lists(st.integers(0, 3), max_size=2),
)
def test_products_are_those_of_rounded_operands(kind, bias, groups, rows, tokens):
    torch.manual_seed(0)
    layer = frozen(kind, 16 * groups, rows, bias)
    x = torch.randn(*tokens, 16 * groups, requires_grad=True)
    y = frozen_int8_linear(x, layer)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight, x_TK, dy_TN = known_weight(layer), x.detach().reshape(-1, 16 * groups), dy.reshape(-1, rows)
    expected = rounded(x_TK, 1) @ rounded(weight, 1).t()
    expected = expected if layer.bias is None else expected + layer.bias.detach().double()
    grad_x = rounded(dy_TN, 1) @ rounded(weight, 0)
    # sums are exact; scales and the result are rounded to float32
    torch.testing.assert_close(y.reshape(-1, rows).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.reshape(grad_x.shape).double(), grad_x, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dy_TN.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_the_exact_products(kind, dtype):
    """Against the layer itself: only the rounding to 8 bits is between them."""
    torch.manual_seed(0)
    layer = frozen(kind, 96, 80, True).to(dtype)
    x = torch.randn(40, 96, dtype=dtype, requires_grad=True)
    dy = torch.randn(40, 80, dtype=dtype)
    y = frozen_int8_linear(x, layer)
    (grad,) = torch.autograd.grad(y, x, dy)
    exact = layer(x)
    (exact_grad,) = torch.autograd.grad(exact, x, dy)
    assert y.dtype is grad.dtype is dtype
    assert sqnr_db(exact, y) > 35  # uniform rounding of two normal operands of 100: 40 dB
    assert sqnr_db(exact_grad, grad) > 35
    assert not torch.equal(exact, y)


@pytest.mark.parametrize("compile", [False, True])
def test_only_what_is_stored_is_kept(compile):
    layer = frozen("int4", 64, 48, True)
    x = torch.randn(24, 64, requires_grad=True)
    call = partial(frozen_int8_linear, layer=layer)
    if compile:
        call = torch.compile(call, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(x)
    assert kept
    assert {t.data_ptr() for t in kept} <= {p.data_ptr() for p in layer.parameters()}


def test_compiled_equals_eager():
    layer = frozen("int4", 64, 48, True)
    x = torch.randn(24, 64, requires_grad=True)

    def twice(x: torch.Tensor) -> torch.Tensor:
        return frozen_int8_linear(x * 2, layer)

    found = torch.compile(twice, fullgraph=True, backend="aot_eager_decomp_partition")(x)
    (grad,) = torch.autograd.grad(found.sum(), x)
    expected = twice(x)
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    # a compiled division may be off by the last bit, and rounding by it: one step of 127 in a few places
    assert sqnr_db(expected, found) > 40
    assert sqnr_db(expected_grad, grad) > 40


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__} {getattr(c, 'base', '')}")
def test_adapters_train_as_they_would_beside_a_base_in_high_precision(config):
    """A, B and the magnitudes get the very gradients, but for what the rest of the layer hands them."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    chain = Chain.from_configs([config])
    layer = chain.swap(nn.Sequential(linear))[0]
    with torch.no_grad():
        layer.lora_b.normal_(0, 0.3)
    high = copy.deepcopy(layer)
    high.config = replace(config, base_compute="model")
    x = torch.randn(24, 64)
    dy = torch.randn(24, 48)
    found, expected = layer(x), high(x)
    found.backward(dy)
    expected.backward(dy)
    assert not torch.equal(found, expected)
    assert sqnr_db(expected, found) > 35  # as above
    for name in ("lora_a", "lora_b"):
        ours, theirs = getattr(layer, name).grad, getattr(high, name).grad
        if getattr(config, "use_dora", False):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(ours, theirs), name
    assert all(p.grad is None for p in layer.base.parameters())


@pytest.mark.parametrize("config", CONFIGS[:2] + CONFIGS[3:], ids=lambda c: type(c).__name__)
def test_probe_holds_layers_to_both_roundings(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 48))
    x = torch.randn(32, 64)
    Chain.from_configs([config]).swap(model, loss=lambda m: m(x).square().mean())


@pytest.mark.parametrize(("times", "admitted"), [(50, True), (1000, False)])
def test_probe_admits_channels_as_large_as_a_pretrained_model_s(times, admitted):
    """With a channel of c among others of 1, and no weight for it, a step is c / 127 and its noise that over
    sqrt(12): 20 log10(127 sqrt(12) / c) dB are left, 19 at 50, as in SmolLM2's worst layer, -7 at 1000."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(64, 64)
    x[:, 5] = times
    with torch.no_grad():
        model[0].weight[:, 5] *= 1e-3
    chain = Chain.from_configs([CONFIGS[0]])
    if admitted:
        chain.swap(model, loss=lambda m: m(x).square().mean())
        (row,) = chain.receipt.layers
        assert 12 < row.sqnr_db["output"] < 20
    else:
        with pytest.raises(ProbeError, match="output has an SQNR"):
            chain.swap(model, loss=lambda m: m(x).square().mean())


def test_noise_of_two_roundings_adds_up():
    assert noise_of_both(20.0, 20.0) == pytest.approx(20 - 10 * math.log10(2))
    assert noise_of_both(12.0, 200.0) == pytest.approx(12.0)


def test_probe_tells_that_int8_is_not_on(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48))
    x = torch.randn(32, 64)
    monkeypatch.setattr(AdaptedLinear, "base_output", lambda self, input: self.base(input))
    with pytest.raises(ProbeError, match="bit-equal"):
        Chain.from_configs([CONFIGS[0]]).swap(model, loss=lambda m: m(x).square().mean())


def test_without_tensor_cores_it_is_refused():
    config = LoRAConfig(base_compute="int8")
    chain = Chain.from_configs([config])
    with pytest.raises(ConfigError, match=r"lora\.base_compute: .*emulate"):
        chain.check_device(torch.device("cpu"))
    layer = chain.swap(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(ConfigError, match="emulate"):
        layer(torch.randn(2, 16))
    Chain.from_configs([replace(config, emulate=True)]).check_device(torch.device("cpu"))
    Chain.from_configs([LoRAConfig()]).check_device(torch.device("cpu"))


def test_other_types_are_refused():
    layer = frozen("nf4", 16, 16, False)
    with pytest.raises(ValueError, match="bfloat16"):
        frozen_int8_linear(torch.randn(2, 16, dtype=torch.float64), layer)
    with pytest.raises(ValueError, match="bfloat16"):
        frozen_int8_linear(torch.randn(2, 16, dtype=torch.float64), layer.to(torch.float64))


def test_second_derivatives_are_refused():
    layer = frozen("plain", 16, 16, False)
    x = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(frozen_int8_linear(x, layer).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    layer = frozen("int4", 16, 16, False)
    x = torch.randn(4, 16)
    x[1, 3] = bad
    y = frozen_int8_linear(x, layer)
    assert not y[1].isfinite().any()
    assert y[[0, 2, 3]].isfinite().all()
