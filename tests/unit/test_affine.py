"""Affine quantization against NumPy in float64, its bounds, and the conversions between its forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.quant.affine import (
    AffineGrid,
    affine_grid,
    dequantize_affine,
    float_zeros,
    offset_of_zeros,
    quantize_affine,
    signed_zeros,
    unsigned_zeros,
    with_offset,
)
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.packing import signed_range
from qrecipes.quant.ranges import minmax_grid

EPS = 2.0**-24
"""Half a step of float32 at 1."""


@st.composite
def cases(draw, scale_dtypes=("float32", "bfloat16")) -> tuple[torch.Tensor, AffineFormat]:
    symmetric, zero_point = draw(st.sampled_from([(True, "integer"), (False, "integer"), (False, "float")]))
    size = draw(st.sampled_from([None, 16, 24, 128]))
    format = AffineFormat(
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        group_size=size,
        symmetric=symmetric,
        zero_point=zero_point,
        scale_dtype=draw(st.sampled_from(scale_dtypes)),
    )
    K = draw(st.integers(1, 40)) if size is None else size * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(draw(st.integers(1, 5)), K, generator=generator)
    w = w * draw(st.sampled_from([1e-20, 0.02, 1.0, 1e20])) + draw(st.sampled_from([0.0, 0.05, -3.0]))
    w[0] *= draw(st.sampled_from([0, 1]))  # a row of zeros
    return w.to(draw(st.sampled_from([torch.float32, torch.bfloat16]))), format


def in_float64(w: torch.Tensor, grid: AffineGrid, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(W - b) / s + z before rounding, and W_hat as a function of q, in NumPy's float64."""
    spread = lambda t: np.repeat(t.double().numpy(), w.shape[1] // t.shape[1], axis=1)  # noqa: E731
    s = spread(grid.scale)
    z = spread(grid.zero) if grid.zero is not None else 0.0
    b = spread(grid.offset) if grid.offset is not None else 0.0
    exact = (w.double().numpy() - b) / np.where(s == 0, 1, s) + z
    q = quantize_affine(w, grid, bits).double().numpy()
    return exact, s * (q - z) + b


@settings(deadline=None, max_examples=150)
@given(cases())
def test_quantize_and_dequantize_equal_float64(case):
    w, format = case
    grid = minmax_grid(w, format)
    least, greatest = signed_range(format.bits)
    exact, restored = in_float64(w, grid, format.bits)
    q = quantize_affine(w, grid, format.bits)
    assert q.dtype is torch.int8
    # the nearest level; of two that are equally near up to float32's rounding of the quotient, either
    clipped = exact.clip(least, greatest)
    slack = 4 * EPS * (np.abs(exact) + _magnitudes(w, grid))
    assert (np.abs(q.double().numpy() - clipped) <= 0.5 + slack).all()
    # one rounding for a product, two with an offset, relative to the larger of product and offset
    terms = np.abs(restored) + 2 * _spread_abs(grid.offset, w)
    error = np.abs(dequantize_affine(q, grid, torch.float32).double().numpy() - restored)
    assert (error <= 2 * EPS * terms + 1e-45).all()


def _spread_abs(t: torch.Tensor | None, w: torch.Tensor) -> np.ndarray:
    return (
        np.zeros(w.shape) if t is None else np.repeat(t.double().abs().numpy(), w.shape[1] // t.shape[1], 1)
    )


def _magnitudes(w: torch.Tensor, grid: AffineGrid) -> np.ndarray:
    """How large the operands of (W - b) / s are, in steps."""
    s = _spread_abs(grid.scale, w)
    return (np.abs(w.double().numpy()) + _spread_abs(grid.offset, w)) / np.where(s == 0, 1, s)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_error_within_the_grid_is_at_most_half_a_step(case):
    w, format = case
    grid = minmax_grid(w, format)
    q = quantize_affine(w, grid, format.bits)
    restored = dequantize_affine(q, grid, torch.float32).double()
    least, greatest = signed_range(format.bits)
    corners = [
        dequantize_affine(torch.full(w.shape, level, dtype=torch.int8), grid, torch.float32)
        for level in (least, greatest)
    ]
    inside = (w >= corners[0]) & (w <= corners[1])
    step = grid.scale.double().repeat_interleave(w.shape[1] // grid.scale.shape[1], 1)
    # roundings of b, s * q and the sum, each relative to the group's largest term, and denormal scales
    slack = 8 * EPS * torch.from_numpy(_magnitudes(w, grid)) * step.clamp(min=1e-38) + 1e-44
    error = (w.double() - restored).abs()
    assert (error[inside] <= (step / 2 + slack)[inside]).all()
    # min-max ranges lose no more outside: half a step for an integer zero point's rounding, none otherwise
    assert (error <= step * (1 if format.has_zero else 0.5) + slack).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_half_to_even(bits):
    least, greatest = signed_range(bits)
    halves = torch.arange(least, greatest).double() + 0.5
    expected = torch.tensor([round(value) for value in halves.tolist()])  # Python's rounds half to even
    grid = AffineGrid(torch.ones(1, 1))
    assert torch.equal(quantize_affine(halves.float()[None], grid, bits)[0].long(), expected)
    offset = grid._replace(offset=torch.full((1, 1), 0.25))
    assert torch.equal(quantize_affine(halves.float()[None] + 0.25, offset, bits)[0].long(), expected)


def test_an_integer_zero_point_is_added_after_rounding():
    """round(w / s) + z, not round(w / s + z): they differ at ties where z is odd."""
    grid = AffineGrid(torch.ones(1, 1), zero=torch.ones(1, 1, dtype=torch.int8))
    assert quantize_affine(torch.tensor([[0.5, 1.5, 2.5]]), grid, 4).tolist() == [[1, 3, 3]]


def test_symmetric_ranges_reach_the_highest_level_and_wider_values_the_lowest():
    format = AffineFormat(bits=4)
    grid = affine_grid(torch.tensor([[-0.7]]), torch.tensor([[0.3]]), format)
    assert grid.scale.item() == pytest.approx(0.1)  # 0.7 / 7
    q = quantize_affine(torch.tensor([[-5.0, -0.8, -0.7, 0.7, 0.8, 5.0]]), grid, 4)
    assert q.tolist() == [[-8, -8, -7, 7, 7, 7]]


@settings(deadline=None, max_examples=60)
@given(cases(scale_dtypes=("float32",)))
def test_quantizing_what_was_dequantized_changes_nothing(case):
    w, format = case
    grid = minmax_grid(w, format)
    q = quantize_affine(w, grid, format.bits)
    if grid.offset is not None and (_magnitudes(w, grid) > 2**20).any():
        return  # offsets so large against the step that float32 cannot tell levels apart
    again = quantize_affine(dequantize_affine(q, grid, torch.float32), grid, format.bits)
    assert torch.equal(again[grid_is_there(grid, w)], q[grid_is_there(grid, w)])


def grid_is_there(grid: AffineGrid, w: torch.Tensor) -> torch.Tensor:
    return (grid.scale > 1e-30).repeat_interleave(w.shape[1] // grid.scale.shape[1], 1)


@pytest.mark.parametrize("zero_point", ["integer", "float"])
def test_zero_is_exact_with_an_integer_zero_point_and_the_low_end_with_a_float_one(zero_point):
    w = torch.rand(4, 32) + 0.5
    w[:, 0] = 0.0 if zero_point == "integer" else w.amin()
    format = AffineFormat(bits=3, symmetric=False, zero_point=zero_point)
    grid = minmax_grid(w, format)
    restored = dequantize_affine(quantize_affine(w, grid, 3), grid, torch.float32)
    # float: s * -4 + (low + 4 s), three roundings
    torch.testing.assert_close(restored[:, 0], w[:, 0], rtol=0 if zero_point == "integer" else 1e-6, atol=0)


@settings(deadline=None, max_examples=80)
@given(cases(scale_dtypes=("float32",)))
def test_forms_convert_into_each_other(case):
    w, format = case
    grid = minmax_grid(w, format)
    q = quantize_affine(w, grid, format.bits)
    restored = dequantize_affine(q, grid, torch.float64)
    exact = dequantize_affine(q, with_offset(grid, torch.float64), torch.float64)
    # b = -s * z in float32 where nothing is float64; q, z <= 256 steps
    step = grid.scale.double().repeat_interleave(w.shape[1] // grid.scale.shape[1], 1)
    assert ((restored - exact).abs() <= 512 * EPS * step + 1e-45).all()
    if (grid.scale == 0).any():
        return
    zeros = float_zeros(grid)
    back = AffineGrid(grid.scale, offset=offset_of_zeros(grid.scale, zeros))
    bound = 4 * EPS * (step + _spread(grid, w))
    assert ((dequantize_affine(q, back, torch.float64) - restored).abs() <= bound * 256 + 1e-44).all()


def _spread(grid: AffineGrid, w: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(_spread_abs(grid.offset, w))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unsigned_levels_and_zeros_give_the_same_weight(bits):
    """GPTQ's s * (u - z_u) with u = q + 2**(bits - 1)."""
    w = torch.randn(3, 32)
    grid = minmax_grid(w, AffineFormat(bits=bits, symmetric=False))
    q = quantize_affine(w, grid, bits)
    u, z_u = q.int() + 2 ** (bits - 1), unsigned_zeros(grid.zero, bits)
    assert u.min() >= 0
    assert z_u.min() >= 0
    assert z_u.max() < 2**bits
    assert torch.equal(grid.scale * (u - z_u), dequantize_affine(q, grid, torch.float32))
    assert torch.equal(signed_zeros(z_u, bits), grid.zero)
    quarter = torch.tensor([0.25])
    assert torch.equal(signed_zeros(unsigned_zeros(quarter, bits), bits), quarter)


def test_constant_groups_are_exact():
    """A float offset holds any constant; 0 is held by every form, with a scale of 0."""
    w = torch.tensor([[0.3] * 16 + [0.0] * 16])
    for symmetric, zero_point, columns in (
        (True, "integer", 16),
        (False, "integer", 16),
        (False, "float", 0),
    ):
        format = AffineFormat(group_size=16, symmetric=symmetric, zero_point=zero_point)
        grid = minmax_grid(w, format)
        restored = dequantize_affine(quantize_affine(w, grid, 4), grid, torch.float32)
        assert torch.equal(restored[:, columns:], w[:, columns:])


def test_an_offset_without_a_scale_has_no_zero_point():
    grid = AffineGrid(torch.zeros(1, 1), offset=torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"float_zeros.grid: a group of scale 0 has an offset"):
        float_zeros(grid)


@pytest.mark.parametrize(
    "format",
    [AffineFormat(), AffineFormat(symmetric=False), AffineFormat(symmetric=False, zero_point="float")],
    ids=["symmetric", "integer", "float"],
)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_after_dequantization(format, poison):
    w = torch.randn(3, 32)
    w[1, 5] = poison
    grid = minmax_grid(w, format)
    restored = dequantize_affine(quantize_affine(w, grid, 4), grid, torch.float32)
    assert not torch.isfinite(restored[1]).any()
    assert torch.isfinite(restored[[0, 2]]).all()


def test_bfloat16_scales_are_rounded_up_and_then_divided_by():
    w = torch.randn(64, 32)
    exact = minmax_grid(w, AffineFormat(bits=4)).scale
    grid = minmax_grid(w, AffineFormat(bits=4, scale_dtype="bfloat16"))
    assert grid.scale.dtype is torch.bfloat16
    assert (grid.scale.float() >= exact).all()
    assert (grid.scale.float() <= exact * (1 + 2.0**-7)).all()
    by_hand = torch.round(w / grid.scale.float()).clamp(-8, 7)
    assert torch.equal(quantize_affine(w, grid, 4).float(), by_hand)


def test_float64_is_kept():
    """An offset of 1 + 2**-40 is lost in float32."""
    grid = AffineGrid(torch.ones(1, 1), offset=torch.full((1, 1), 1 + 2.0**-40, dtype=torch.float64))
    q = torch.ones(1, 16, dtype=torch.int8)
    assert (dequantize_affine(q, grid, torch.float64) == 2 + 2.0**-40).all()
    symmetric = AffineGrid(torch.full((1, 1), 0.1))
    exact = 3 * float(np.float32(0.1))
    assert dequantize_affine(3 * q, symmetric, torch.float64)[0, 0].item() == exact


def test_dequantize_rounds_once():
    """float32 arithmetic, then one conversion; bfloat16 arithmetic would differ."""
    grid = minmax_grid(torch.randn(8, 64), AffineFormat(symmetric=False, zero_point="float", group_size=16))
    q = torch.randint(-8, 8, (8, 64), dtype=torch.int8)
    exact = dequantize_affine(q, grid, torch.float32)
    assert torch.equal(dequantize_affine(q, grid, torch.bfloat16), exact.bfloat16())


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"quantize_affine.w_NK: shape \(2, 10\) and scales of shape \(2, 3\)"
    ):
        quantize_affine(torch.zeros(2, 10), AffineGrid(torch.ones(2, 3)), 4)
    with pytest.raises(ValueError, match=r"dequantize_affine.q_NK: shape \(2, 9\)"):
        dequantize_affine(torch.zeros(2, 9, dtype=torch.int8), AffineGrid(torch.ones(1, 3)), torch.float32)


def test_compiled_quantization_equals_eager():
    """LR-QAT and exports rely on the integers being equal to the bit."""
    w = torch.randn(16, 64)
    grid = minmax_grid(w, AffineFormat(group_size=16, symmetric=False, scale_dtype="bfloat16"))
    compiled = torch.compile(quantize_affine, fullgraph=True)(w, grid, 4)
    assert torch.equal(compiled, quantize_affine(w, grid, 4))
