"""INT8 quantization against a NumPy model of it, and the SQNR against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.quant.primitives import _round_up_to_bfloat16, dequantize_int8, quantize_int8, sqnr_db

DRAWS = 100_000


def quantized_in_numpy(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in float32 as the contract says."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(127)
    return np.rint(x / np.where(scale == 0, np.float32(1), scale)), scale


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 40),
    dim=st.sampled_from([0, 1, -1]),
    magnitude=st.integers(-20, 20),
    seed=st.integers(0, 2**31),
)
def test_quantize_equals_its_definition(rows, cols, dim, magnitude, seed):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    q, scale = quantize_int8(x, dim)
    expected_q, expected_scale = quantized_in_numpy(x.numpy(), dim)
    assert q.dtype is torch.int8
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(q.numpy(), expected_q)


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_any_dimension_keeps_its_place(dim):
    x = torch.randn(3, 5, 7)
    q, scale = quantize_int8(x, dim)
    moved_q, moved_scale = quantize_int8(x.movedim(dim, -1).contiguous())
    assert torch.equal(q, moved_q.movedim(-1, dim))
    assert torch.equal(scale, moved_scale.movedim(-1, dim))


def test_halves_go_to_the_even_neighbour():
    q, scale = quantize_int8(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]))
    assert scale.item() == 1.0
    assert q.tolist() == [127, 0, 2, 2, 0, -2, -126]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step_of_the_stored_scale(x_dtype, scale_dtype):
    x = torch.randn(64, 333).to(x_dtype)
    q, scale = quantize_int8(x, scale_dtype=scale_dtype)
    assert scale.dtype is scale_dtype
    error = (q.double() * scale.double() - x.double()).abs()
    assert bool((error <= scale.double() * (0.5 + 1e-5)).all())  # 1e-5: float32 quotients of up to 127


def test_bfloat16_scale_is_the_next_value_upwards():
    x = torch.randn(4096, 8)
    exact = x.abs().amax(-1, keepdim=True) / 127
    _, scale = quantize_int8(x, scale_dtype=torch.bfloat16)
    below = torch.nextafter(scale, torch.zeros_like(scale))
    assert bool(((below.float() < exact) & (exact <= scale.float())).all())


def test_representable_bfloat16_scale_is_kept():
    """So that quantizing what is already on the grid changes nothing."""
    stored = torch.tensor([[1.0], [0.0078125], [1.5], [3.0e-5]], dtype=torch.bfloat16)
    on_grid = torch.tensor([127.0, -3.0, 64.0]) * stored.float()
    q, scale = quantize_int8(on_grid, scale_dtype=torch.bfloat16)
    assert torch.equal(scale, stored)
    assert torch.equal(q, torch.tensor([[127, -3, 64]], dtype=torch.int8).expand(4, 3))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_stochastic_rounding_is_unbiased(scale_dtype):
    """With respect to the stored scale, the largest value of a slice included."""
    x = torch.tensor([1.2345, -1.2345, 0.6789, -0.3333, 0.001, -0.001, 0.0, 0.9]) * 1.7
    q, scale = quantize_int8(x.expand(DRAWS, 8), scale_dtype=scale_dtype, stochastic_rounding=True)
    bias = (q.double() * scale.double()).mean(0) - x.double()
    step = scale[0].double()
    # a draw deviates by at most half a step; six standard errors fail once in 10**8
    assert bool((bias.abs() < 6 * 0.5 * step / math.sqrt(DRAWS)).all()), bias / step


def test_stochastic_rounding_takes_both_neighbours_with_the_right_frequency():
    x = torch.tensor([127.0, 2.25, -2.25]).expand(DRAWS, 3)
    q, _ = quantize_int8(x, stochastic_rounding=True)
    assert set(q[:, 1].tolist()) == {2, 3}
    assert set(q[:, 2].tolist()) == {-3, -2}
    # frequency 1/4: six standard errors of sqrt(3/16 / DRAWS)
    assert abs((q[:, 1] == 3).double().mean().item() - 0.25) < 6 * math.sqrt(3 / 16 / DRAWS)


def test_stochastic_rounding_leaves_the_grid_alone():
    on_grid = torch.arange(-127, 128).float().expand(2000, 255)
    q, scale = quantize_int8(on_grid, stochastic_rounding=True)
    assert torch.equal(q.float(), on_grid)
    assert bool((scale == 1).all())


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_zeros_and_the_tiniest_values_stay_finite(stochastic_rounding):
    x = torch.tensor([[0.0, 0.0, -0.0], [1e-45, 0.0, -1e-45], [1e-38, -3e-38, 2e-38]])
    q, scale = quantize_int8(x, stochastic_rounding=stochastic_rounding)
    assert not q[:2].any()
    assert not scale[:2].any()  # 1e-45 / 127 is below every float32
    restored = dequantize_int8(q, scale, torch.float32)
    torch.testing.assert_close(restored, x, rtol=0, atol=3e-38 / 127)  # one step of the last row


@pytest.mark.parametrize(
    ("shape", "dim", "scale_shape"),
    [((0, 5), 1, (0, 1)), ((0, 5), 0, (1, 5)), ((5, 0), 1, (5, 1)), ((5, 0), 0, (1, 0)), ((0,), 0, (1,))],
)
def test_empty_dimensions_give_zero_scales(shape, dim, scale_shape):
    q, scale = quantize_int8(torch.empty(shape), dim)
    assert q.shape == shape
    assert scale.shape == scale_shape
    assert not scale.any()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_after_dequantization(poison, stochastic_rounding, scale_dtype):
    x = torch.randn(3, 16)
    x[1, 5] = poison
    q, scale = quantize_int8(x, scale_dtype=scale_dtype, stochastic_rounding=stochastic_rounding)
    restored = dequantize_int8(q, scale, torch.float32)
    assert not torch.isfinite(restored[1]).any()
    assert torch.isfinite(restored[[0, 2]]).all()


def test_every_nan_stays_one_in_a_bfloat16_scale():
    """On the bits of NVIDIA's NaN, 0x7FFFFFFF, rounding up by addition overflows to a zero."""
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert torch.isnan(_round_up_to_bfloat16(nans)).all()


def test_compiled_bfloat16_scales_are_the_ones_divided_by():
    """A fused kernel may leave the rounding of the scale out of the division; the integers would differ."""
    x = torch.randn(300, 64)
    q, scale = quantize_int8(x, scale_dtype=torch.bfloat16)
    compiled_q, compiled_scale = torch.compile(quantize_int8, fullgraph=True)(x, scale_dtype=torch.bfloat16)
    assert torch.equal(scale, compiled_scale)
    assert torch.equal(q, compiled_q)


def test_dequantize_rounds_once():
    q = torch.arange(-127, 128, dtype=torch.int8)
    scale = torch.tensor([0.0123], dtype=torch.bfloat16)
    expected = torch.from_numpy(q.numpy() * scale.float().numpy())
    assert torch.equal(dequantize_int8(q, scale, torch.float32), expected)
    assert torch.equal(dequantize_int8(q, scale, torch.bfloat16), expected.bfloat16())


def test_wrong_types_are_refused():
    with pytest.raises(ValueError, match=r"quantize_int8.x: torch.int32 .* x.float\(\)"):
        quantize_int8(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"scale_dtype: torch.float16 is not float32 or bfloat16; use"):
        quantize_int8(torch.zeros(3), scale_dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sqnr_of_a_tenth_off_is_20_db(dtype):
    reference = torch.randn(1000, dtype=dtype)
    assert sqnr_db(reference, reference * 1.1) == pytest.approx(20.0, abs=1e-4)  # float32 products


def test_sqnr_does_not_lose_small_noise_beside_large_signal():
    value = 1e4 + 2.0**-12
    reference = torch.full((10,), value, dtype=torch.float64)
    approximation = reference.clone()
    approximation[0] += 2.0**-10  # less than half a step of float32
    assert sqnr_db(reference, approximation) == pytest.approx(
        10 * math.log10(10 * value**2 * 2**20), abs=1e-9
    )


def test_sqnr_at_its_ends():
    x = torch.tensor([1.0, -2.0])
    assert sqnr_db(x, x.clone()) == math.inf
    assert sqnr_db(torch.zeros(2), torch.zeros(2)) == math.inf
    assert sqnr_db(torch.empty(0), torch.empty(0)) == math.inf
    assert sqnr_db(torch.zeros(2), x) == -math.inf
    assert sqnr_db(x, torch.tensor([1.0, math.nan])) == -math.inf
    assert sqnr_db(x, torch.tensor([1.0, math.inf])) == -math.inf
    assert math.isnan(sqnr_db(torch.tensor([1.0, math.nan]), x))
    poisoned = torch.tensor([1.0, math.inf])
    assert math.isnan(sqnr_db(poisoned, poisoned))


def test_sqnr_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"approximation: shape \(3, 1\) is not the reference's \(3,\)"):
        sqnr_db(torch.zeros(3), torch.zeros(3, 1))
