"""Dynamic quantization of tokens against a NumPy model of its formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.quant.activations import (
    SCALE_FLOOR,
    clipped,
    dequantize,
    fake_quantize,
    quantize,
    symmetric_scale,
)
from qrecipes.quant.packing import pack, unpack

GRIDS = [(True, "integer"), (False, "integer"), (False, "float")]
STORED = GRIDS[:2]
BITS = range(2, 9)


def model(x: np.ndarray, bits: int, symmetric: bool, zero_point: str) -> tuple[np.ndarray, np.ndarray]:
    """The module's table, in the type of `x`: values and whether they were clipped."""
    top = x.dtype.type(2**bits - 1)
    if symmetric:
        half = x.dtype.type(2 ** (bits - 1) - 1)
        scale = np.maximum(np.abs(x).max(-1, keepdims=True) / half, x.dtype.type(SCALE_FLOOR))
        return np.rint(x / scale) * scale, np.zeros(x.shape, bool)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if zero_point == "integer":
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = np.maximum((high - low) / top, x.dtype.type(SCALE_FLOOR))
    zero = np.rint(-low / scale) if zero_point == "integer" else -low / scale
    levels = np.rint(x / scale) + zero
    return scale * (np.clip(levels, 0, top) - zero), (levels < 0) | (levels > top)


def tokens(seed: int, rows: int, width: int, magnitude: int = 0, shift: float = 0.0) -> torch.Tensor:
    noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise + shift) * 10.0**magnitude


cases = given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    width=st.integers(1, 70),
    bits=st.sampled_from(BITS),
    magnitude=st.integers(-12, 12),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    grid=st.sampled_from(GRIDS),
)


@settings(max_examples=150, deadline=None)
@cases
def test_fake_quantize_equals_its_formula(seed, rows, width, bits, magnitude, shift, grid):
    symmetric, zero_point = grid
    x = tokens(seed, rows, width, magnitude, shift)
    for dtype in (torch.float64, torch.float32):
        given_x = x.to(dtype)
        found = fake_quantize(given_x, bits, symmetric=symmetric, zero_point=zero_point)
        expected, _ = model(given_x.numpy(), bits, symmetric, zero_point)
        assert found.dtype is dtype
        np.testing.assert_array_equal(found.numpy(), expected)


@settings(max_examples=100, deadline=None)
@cases
def test_gradient_passes_where_nothing_was_clipped(seed, rows, width, bits, magnitude, shift, grid):
    symmetric, zero_point = grid
    x = tokens(seed, rows, width, magnitude, shift).requires_grad_(True)
    grad = torch.randn_like(x)
    fake_quantize(x, bits, symmetric=symmetric, zero_point=zero_point).backward(grad)
    _, outside = model(x.detach().numpy(), bits, symmetric, zero_point)
    np.testing.assert_array_equal(x.grad.numpy(), np.where(outside, 0, grad.numpy()))
    mask = clipped(x.detach(), bits, symmetric=symmetric, zero_point=zero_point)
    assert (not outside.any()) if mask is None else np.array_equal(mask.numpy(), outside)


def test_both_ends_of_a_range_rounded_up_clip_the_top():
    """-1.5 and 13.5 steps: both go away from zero, 17 levels for 16, so the top has no gradient."""
    x = torch.tensor([-1.5, 0.0, 5.0, 13.5], requires_grad=True)
    fake_quantize(x, 4).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 70),
    bits=st.sampled_from(BITS),
    magnitude=st.integers(-12, 12),
    grid=st.sampled_from(STORED),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_dequantized_integers_are_the_fake_quantized_values(seed, width, bits, magnitude, grid, dtype):
    symmetric, zero_point = grid
    x = tokens(seed, 3, width, 0 if dtype is torch.float16 else magnitude).to(dtype)
    codes, scale, zero = stored = quantize(x, bits, symmetric=symmetric, zero_point=zero_point)
    assert (codes.dtype, scale.shape, zero is None) == (torch.int8, (3, 1), symmetric)
    least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for integers in (codes, zero) if zero is not None else (codes,):
        assert ((least <= integers) & (integers <= greatest)).all()
    found = dequantize(stored, dtype)
    assert torch.equal(found, fake_quantize(x, bits, symmetric=symmetric, zero_point=zero_point))
    if bits in (2, 3, 4, 8):
        assert torch.equal(unpack(pack(codes, bits), bits, width), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("symmetric", "zero_point"), GRIDS)
def test_error_is_at_most_half_a_step(bits, symmetric, zero_point):
    x = tokens(0, 50, 64)
    error = (fake_quantize(x, bits, symmetric=symmetric, zero_point=zero_point) - x).abs()
    span = 2 * x.abs().amax(-1) if symmetric else x.amax(-1) - x.amin(-1)
    levels = 2**bits - 2 if symmetric else 2**bits - 1
    # an integer zero point may leave the top half a step more below the range's end
    steps = 1.0 if zero_point == "integer" and not symmetric else 0.5
    bound = steps * (1 + 1e-9) / levels  # 1e-9: float64 division
    assert ((error / span[:, None]) <= bound).all()


def test_float_zero_point_gives_a_clipped_end_exactly_which_is_no_integer_multiple():
    """-1.4 to 13.6 steps: 13.6 goes to 14, beyond the top, and comes back to 13.6."""
    x = torch.tensor([-1.4, 0.0, 5.0, 13.6], dtype=torch.float64)
    found = fake_quantize(x, 4, zero_point="float")
    torch.testing.assert_close(
        found, torch.tensor([-1.0, 0.0, 5.0, 13.6], dtype=torch.float64), rtol=1e-14, atol=0
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), bits=st.sampled_from(BITS), shift=st.sampled_from([0.0, 5.0, -5.0]))
def test_zero_is_a_level_of_an_integer_zero_point(seed, bits, shift):
    x = tokens(seed, 4, 9, shift=shift)
    x[:, 3] = 0
    assert (fake_quantize(x, bits)[:, 3] == 0).all()
    codes, _, zero = quantize(x, bits)
    assert torch.equal(codes[:, 3], zero[:, 0])


@pytest.mark.parametrize(("symmetric", "zero_point"), GRIDS)
def test_a_token_of_zeros_stays_zero_and_one_of_a_single_value_keeps_it(symmetric, zero_point):
    for bits in BITS:
        zeros = torch.zeros(2, 5)
        assert torch.equal(fake_quantize(zeros, bits, symmetric=symmetric, zero_point=zero_point), zeros)
        equal = torch.full((2, 5), 0.7)
        found = fake_quantize(equal, bits, symmetric=symmetric, zero_point=zero_point)
        torch.testing.assert_close(found, equal, rtol=1e-6, atol=0)  # one division and product in float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("symmetric", "zero_point"), GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_token(bad, symmetric, zero_point, dtype):
    x = torch.randn(3, 8).to(dtype)
    x[1, 4] = bad
    found = fake_quantize(x, 8, symmetric=symmetric, zero_point=zero_point)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()
    if (symmetric, zero_point) in STORED:
        stored = dequantize(quantize(x, 8, symmetric=symmetric), dtype)
        assert not stored[1].isfinite().any()
        assert torch.equal(stored[[0, 2]], found[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("symmetric", "zero_point"), GRIDS)
def test_arithmetic_is_in_float32_and_rounded_once(symmetric, zero_point, dtype):
    x = tokens(3, 20, 64).to(dtype)
    found = fake_quantize(x, 8, symmetric=symmetric, zero_point=zero_point)
    exact = fake_quantize(x.float(), 8, symmetric=symmetric, zero_point=zero_point)
    assert torch.equal(found, exact.to(dtype))


def test_the_scale_is_the_one_that_symmetric_integers_have():
    x = torch.randn(4, 16)
    assert torch.equal(symmetric_scale(x, 8), quantize(x, 8, symmetric=True).scale)
    assert torch.equal(symmetric_scale(x, 8)[:, 0], x.abs().amax(-1) / 127)


@pytest.mark.parametrize(("symmetric", "zero_point"), GRIDS)
def test_compiles_without_a_break_and_gives_the_same_bits(symmetric, zero_point):
    def step(x):
        return fake_quantize(x, 4, symmetric=symmetric, zero_point=zero_point) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 12, requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    found, expected = compiled(x), step(y)
    assert torch.equal(found, expected)
    grad = torch.randn(3, 12)
    found.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: fake_quantize(x, 1), r"bits: 1 is out of range; use 2 to 8"),
        (lambda x: quantize(x, 9), r"bits: 9 is out of range"),
        (lambda x: fake_quantize(x.int(), 8), r"torch.int32 is not a floating type"),
        (lambda x: fake_quantize(x, 8, zero_point="round"), r"'round' is unknown"),
        (lambda x: quantize(x, 8, zero_point="float"), r"no integer stands for; use 'integer'"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.randn(2, 4))
