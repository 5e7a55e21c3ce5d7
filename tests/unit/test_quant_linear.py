"""QuantLinear against a plain layer in float64, and what it must never do: keep the dequantized weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qrecipes.models.build import cast_
from qrecipes.quant.affine import AffineGrid, with_offset
from qrecipes.quant.dequantize import (
    dequantize_mm,
    dequantize_mm_grad_input,
    dequantize_mm_grad_input_reference,
    dequantize_mm_reference,
    dequantize_reference,
)
from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.linear import QuantLinear, dequantized_state_dict
from qrecipes.quant.primitives import sqnr_db
from qrecipes.quant.ranges import lp_grid, minmax_grid

FORMATS = [
    AffineFormat(bits=8),
    AffineFormat(bits=4, group_size=32),
    AffineFormat(bits=3, group_size=32, symmetric=False),
    AffineFormat(bits=2, group_size=16, symmetric=False, zero_point="float", scale_dtype="bfloat16"),
    NF4Format(),
    NF4Format(double_quantized=False, block_size=32),
]
ids = [f"{f.kind}{f.bits}-{i}" for i, f in enumerate(FORMATS)]
every_format = pytest.mark.parametrize("format", FORMATS, ids=ids)


def layer_of(format, K: int = 96, N: int = 40, bias: bool = True, dtype=torch.float32) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(K, N, bias=bias).to(dtype), format)


def payload_of(layer: QuantLinear) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}


def assert_payload(layer: QuantLinear, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in payload_of(layer).items():
        assert tensor.dtype is expected[name].dtype, name
        assert torch.equal(tensor.cpu(), expected[name]), name


@every_format
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96), (0, 96)])
def test_output_and_gradients_are_those_of_the_dequantized_layer_in_float64(format, bias, shape):
    layer = layer_of(format, bias=bias)
    twin = nn.Linear(96, 40, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        twin.weight.copy_(layer.dequantize(torch.float32))
        if bias:
            twin.bias.copy_(layer.bias)
    x = torch.randn(shape, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    y, y64 = layer(x), twin(x64)
    grad_y = torch.randn(y.shape)
    y.backward(grad_y)
    y64.backward(grad_y.double())
    # sums of 96 and 40 float32 products
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), twin.bias.grad, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for name, p in layer.named_parameters() if name != "bias")


@every_format
def test_output_equals_the_plain_layer_of_the_dequantized_weight_bit_for_bit(format):
    layer, x = layer_of(format), torch.randn(7, 96)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert plain.bias is layer.bias
    assert torch.equal(layer(x), plain(x))


@every_format
def test_only_the_payload_is_kept_for_the_backward_pass(format):
    """Neither the dequantized weight nor the input: every saved tensor is one of the layer's own."""
    layer, kept = layer_of(format), []
    x = torch.randn(5, 96, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in layer.payload}
    y.sum().backward()


@pytest.mark.parametrize("format", [FORMATS[1], FORMATS[2], FORMATS[4]], ids=["int4", "int3", "nf4"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_keep_only_payloads_too(format, recompute):
    """Traced through, the partitioner may keep what the backward pass needs again: the dequantized weight."""
    model = nn.Sequential(layer_of(format, 96, 96), nn.GELU(), layer_of(format, 96, 96))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    run = (lambda x: checkpoint(compiled, x, use_reentrant=False)) if recompute else compiled
    kept: list[torch.Tensor] = []
    x = torch.randn(5, 96, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(x)
    y.square().sum().backward()
    weights = [t for t in kept if t.numel() >= 96 * 96 // 2 and t.is_floating_point()]
    assert not weights, [tuple(t.shape) for t in weights]
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)  # other kernels for gelu


def test_compiled_layers_equal_eager():
    model = nn.Sequential(layer_of(FORMATS[2], 96, 64), nn.ReLU(), layer_of(FORMATS[4], 64, 16))
    x = torch.randn(5, 96, requires_grad=True)
    expected = model(x)
    (grad,) = torch.autograd.grad(expected.sum(), x)
    found = torch.compile(model, fullgraph=True)(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], grad)
    weight = torch.compile(lambda layer: layer.dequantize() * 1, fullgraph=True)(model[0])
    assert torch.equal(weight, model[0].dequantize())


@every_format
def test_operators_equal_their_references(format):
    layer, x, dy = layer_of(format), torch.randn(3, 96), torch.randn(3, 40)
    payload = layer.payload
    assert torch.equal(
        dequantize_mm(x, payload, format, layer.bias),
        dequantize_mm_reference(x, payload, format, layer.bias),
    )
    assert torch.equal(
        dequantize_mm_grad_input(dy, payload, format, 96),
        dequantize_mm_grad_input_reference(dy, payload, format, 96),
    )
    assert torch.equal(layer.dequantize(), dequantize_reference(payload, format, 96, torch.float32))


@every_format
def test_operators_keep_torchs_contract(format):
    """Schemas, fake tensors and aliasing, with torch's own checks."""
    layer = layer_of(format)
    payload, key = [t.detach() for t in layer.payload], format.key
    for name, args in (
        ("dequantize", (payload, key, 96, torch.bfloat16)),
        ("dequantize_mm", (torch.randn(3, 96), payload, key, None)),
        ("dequantize_mm_grad_input", (torch.randn(3, 40), payload, key, 96)),
    ):
        op = getattr(torch.ops.qrecipes, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversions_change_what_is_computed_and_never_the_payload(format, dtype):
    layer = layer_of(format)
    before, exact = payload_of(layer), layer.dequantize(torch.float64)
    layer.to(dtype)
    assert_payload(layer, before)
    assert layer.compute_dtype is layer.bias.dtype is layer.dequantize().dtype is dtype
    assert layer(torch.randn(2, 96, dtype=dtype)).dtype is dtype
    layer.to(torch.float32)
    assert_payload(layer, before)
    assert torch.equal(layer.dequantize(torch.float64), exact)
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16, nn.Module.float):
        convert(nn.Sequential(layer))
        assert_payload(layer, before)
    cast_(nn.Sequential(layer), dtype, buffers=True)
    assert_payload(layer, before)
    assert layer.compute_dtype is dtype


@every_format
def test_weights_of_bfloat16_are_dequantized_in_float32_and_rounded_once(format):
    layer = layer_of(format, dtype=torch.bfloat16)
    assert layer.compute_dtype is torch.bfloat16
    exact = layer.dequantize(torch.float32)
    assert torch.equal(layer.dequantize(), exact.bfloat16())


@every_format
def test_copies_and_pickles_are_equal_and_apart(format):
    layer, x = layer_of(format), torch.randn(3, 96)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(stored, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        assert twin.format == layer.format
        twin.packed.zero_()
        assert not torch.equal(twin.packed, layer.packed)


@every_format
def test_state_dicts_are_plain_and_restore_every_bit(format):
    source, target = layer_of(format), QuantLinear(96, 40, format)
    stored = io.BytesIO()
    torch.save(source.state_dict(), stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    assert set(loaded) == {*format.payload_spec(40, 96), "bias"}
    assert all(type(t) is torch.Tensor for t in loaded.values())
    x = torch.randn(3, 96)
    for assign in (False, True):
        target.load_state_dict(loaded, assign=assign)
        assert torch.equal(target(x), source(x))
        assert not any(t.requires_grad for t in target.payload)


def test_a_state_dict_of_another_format_is_refused():
    source = layer_of(AffineFormat(group_size=32, scale_dtype="bfloat16"))
    with pytest.raises(RuntimeError, match=r"scale is torch.bfloat16 there, torch.float32 here"):
        QuantLinear(96, 40, AffineFormat(group_size=32)).load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        QuantLinear(96, 40, AffineFormat(bits=3, group_size=32)).load_state_dict(
            layer_of(AffineFormat(group_size=32)).state_dict()
        )


@every_format
def test_meta_layers_have_the_payloads_of_real_ones(format):
    """Exports and FSDP2 fill them from a state dict."""
    with torch.device("meta"):
        meta = QuantLinear.from_linear(nn.Linear(96, 40), format)
    real = layer_of(format)
    for (name, wanted), (found_name, found) in zip(
        real.named_parameters(), meta.named_parameters(), strict=True
    ):
        assert found.is_meta
        assert (name, wanted.shape, wanted.dtype) == (found_name, found.shape, found.dtype)
    meta.to_empty(device="cpu")
    meta.load_state_dict(real.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(meta(x), real(x))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 90), st.integers(1, 9), st.sampled_from([2, 3, 4, 8, "nf4"]))
def test_every_width_survives(K, N, kind):
    """Ragged rows: per channel of any width, NF4 with a shorter last block."""
    format = NF4Format() if kind == "nf4" else AffineFormat(bits=kind, symmetric=False)
    layer = layer_of(format, K, N)
    assert layer.packed.shape[0] == N
    x = torch.randn(2, K)
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=0, atol=0)


@every_format
def test_quantization_error_is_that_of_the_bits(format):
    """SQNR of uniform weights: 6 dB a bit less what 3 or fewer bits lose at the ends; NF4 is made for normal
    ones."""
    linear = nn.Linear(256, 256, bias=False)
    layer = QuantLinear.from_linear(linear, format)
    assert sqnr_db(linear.weight, layer.dequantize()) > {8: 46, 4: 19, 3: 14, 2: 9}[format.bits]


def test_ranges_choose_the_grid():
    linear = nn.Linear(64, 16, bias=False)
    with torch.no_grad():
        linear.weight[:, 0] *= 10
    format = AffineFormat(bits=3, group_size=64)
    whole, searched = (QuantLinear.from_linear(linear, format, ranges=r) for r in (minmax_grid, lp_grid))
    assert torch.equal(searched.grid.scale, lp_grid(linear.weight, format).scale)
    assert (searched.grid.scale <= whole.grid.scale).all()
    assert not torch.equal(searched.grid.scale, whole.grid.scale)


def test_integers_and_grids_go_in_and_out():
    q = torch.randint(-4, 4, (6, 32), dtype=torch.int8)
    grid = AffineGrid(torch.rand(6, 2) + 0.1, zero=torch.randint(-4, 4, (6, 2), dtype=torch.int8))
    layer = QuantLinear.from_integers(q, grid, AffineFormat(bits=3, group_size=16, symmetric=False))
    assert torch.equal(layer.integers(), q)
    assert torch.equal(layer.grid.scale, grid.scale)
    assert torch.equal(layer.grid.zero, grid.zero)
    expected = grid.scale.repeat_interleave(16, 1) * (q - grid.zero.repeat_interleave(16, 1))
    assert torch.equal(layer.dequantize(), expected)


def test_another_grid_keeps_the_integers():
    """How an adapter folds into offsets: q and s stay, b moves; exactly in float64."""
    layer = layer_of(AffineFormat(bits=4, group_size=32, symmetric=False)).double()
    delta = torch.randn(40, 3, dtype=torch.float64) * 1e-3
    grid = with_offset(layer.grid, torch.float64)
    format = AffineFormat(bits=4, group_size=32, symmetric=False, zero_point="float", offset_dtype="float64")
    moved = layer.with_grid(grid._replace(offset=grid.offset + delta), format)
    assert torch.equal(moved.packed, layer.packed)
    assert torch.equal(moved.grid.scale, layer.grid.scale)
    expected = layer.dequantize() + delta.repeat_interleave(32, 1)
    torch.testing.assert_close(moved.dequantize(), expected, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match=r"with_grid.format: 3 bits; the integers have 4"):
        layer.with_grid(layer.grid, AffineFormat(bits=3, group_size=32))


def test_dequantized_state_dict_is_that_of_a_plain_model():
    model = nn.Sequential(nn.Linear(8, 96), layer_of(FORMATS[2]), layer_of(NF4Format(), 40, 4, bias=False))
    plain = nn.Sequential(nn.Linear(8, 96), nn.Linear(96, 40), nn.Linear(40, 4, bias=False))
    plain.load_state_dict(dequantized_state_dict(model))
    x = torch.randn(3, 8)
    assert torch.equal(plain(x), model(x))
    assert set(dequantized_state_dict(model[1])) == {"weight", "bias"}


@every_format
def test_weights_that_are_not_finite_show(format):
    linear = nn.Linear(96, 40)
    with torch.no_grad():
        linear.weight[3, 5] = torch.nan
    layer = QuantLinear.from_linear(linear, format)
    assert torch.isnan(layer(torch.ones(96))[3])


def test_wrong_requests_are_refused():
    linear = nn.Linear(100, 4)
    with pytest.raises(ValueError, match=r"^layers.0: group_size 32 does not divide 100 input features; use"):
        QuantLinear.from_linear(linear, AffineFormat(group_size=32), name="layers.0")
    with pytest.raises(ValueError, match=r"^QuantLinear: group_size 32 does not divide"):
        QuantLinear(100, 4, AffineFormat(group_size=32))
    layer = layer_of(AffineFormat(group_size=32))
    with pytest.raises(ValueError, match=r"QuantLinear.input: torch.bfloat16, but the layer computes in"):
        layer(torch.randn(2, 96).bfloat16())
    layer.scale.data = layer.scale.data.bfloat16()
    with pytest.raises(
        ValueError, match=r"QuantLinear.scale: torch.bfloat16, but .* leave param_dtype out of"
    ):
        layer(torch.randn(2, 96))
    with pytest.raises(ValueError, match=r"QuantLinear.integers: the weight is NF4Format"):
        layer_of(NF4Format()).integers()
    q, grid = torch.full((2, 16), 8), AffineGrid(torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"holds 8 to 8; signed integers of 4 bits are -8 to 7; subtract 8"):
        QuantLinear.from_integers(q, grid, AffineFormat())
    with pytest.raises(ValueError, match=r"grid: has scale of shape .* takes scale, zero of shape \(2, 1\)"):
        QuantLinear.from_integers(q - 8, grid, AffineFormat(symmetric=False))
    with pytest.raises(ValueError, match=r"QuantLinear.scale: torch.float64 of shape \(2, 1\)"):
        payload = (torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.float64))
        QuantLinear.from_payload(payload, AffineFormat(), 16)


def test_second_derivatives_are_refused():
    layer, x = layer_of(AffineFormat(group_size=32)), torch.randn(2, 96, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_repr_shows_the_format():
    shown = repr(layer_of(AffineFormat(bits=3, group_size=32)))
    assert "in_features=96, out_features=40, bias=True" in shown
    assert "bits=3, group_size=32" in shown
