"""Range searches against brute force in NumPy, the specified values of LR-QAT, and torchao's HQQ."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

from qrecipes.quant import ranges
from qrecipes.quant.affine import affine_grid, dequantize_affine, quantize_affine
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.packing import signed_range
from qrecipes.quant.ranges import hqq_grid, lp_grid, minmax_grid, mse_grid

SYMMETRIC = AffineFormat(bits=4)
INTEGER = AffineFormat(bits=3, symmetric=False)
FLOAT = AffineFormat(bits=3, symmetric=False, zero_point="float")


def heavy_tailed(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Weights with outliers, which clipping pays for."""
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(rows, width, generator=generator).pow(3)


def loss(w: torch.Tensor, grid, bits: int, p: float) -> torch.Tensor:
    """Sum of |W - W_hat|**p over each group, in float64."""
    restored = dequantize_affine(quantize_affine(w, grid, bits), grid, torch.float64)
    return (w.double() - restored).abs().pow(p).unflatten(1, (grid.scale.shape[1], -1)).sum(-1)


def scales(grid) -> list[float]:
    return grid.scale.flatten().tolist()


def test_scales_are_those_of_the_reference_implementation_of_lr_qat():
    """Values that its released code gives for 4 bits; its MSE widens the range by 0.5 before the search."""
    w = torch.tensor([[0.9, -0.31, 0.12, -0.05, 0.47, -0.72, 0.03, 0.2]])
    w = torch.cat([w, torch.tensor([[-0.08, 0.02, 0.3, -0.11, 0.07, -0.25, 0.16, 0.04]])])
    exact = {"rel": 1e-6}  # float32
    assert scales(lp_grid(w, SYMMETRIC, p=4.0)) == pytest.approx([0.12214285, 0.04114285], **exact)
    assert scales(lp_grid(w, SYMMETRIC, p=2.4)) == pytest.approx([0.12214285, 0.04114285], **exact)
    assert scales(minmax_grid(w, SYMMETRIC)) == pytest.approx([0.12857142, 0.04285714], **exact)
    assert scales(mse_grid(w, SYMMETRIC, margin=0.5)) == pytest.approx([0.15, 0.04114286], **exact)
    blocks = lp_grid(w.reshape(4, 4), SYMMETRIC, p=4.0)  # block 4, below the sizes that a format allows
    assert scales(blocks) == pytest.approx([0.12857142, 0.09154286, 0.04114286, 0.03178571], **exact)


@pytest.mark.parametrize("p", [2.0, 2.4, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_search_finds_the_best_candidate(p, bits):
    """By brute force in NumPy's float64 over every threshold."""
    w = heavy_tailed(6, 64)
    format = AffineFormat(bits=bits, group_size=32)
    found = loss(w, lp_grid(w, format, p=p, candidates=40), bits, p).numpy()
    least, greatest = signed_range(bits)
    x = w.double().numpy().reshape(6, 2, 32)
    top = np.abs(x).max(-1, keepdims=True)
    errors = []
    for k in range(1, 41):
        s = top * k / 40 / greatest
        errors.append((np.abs(x - s * np.rint(x / s).clip(least, greatest)) ** p).sum(-1))
    # scales are rounded to float32 here and not there
    np.testing.assert_allclose(found, np.min(errors, axis=0), rtol=1e-4)


@pytest.mark.parametrize("format", [INTEGER, FLOAT], ids=["integer", "float"])
def test_asymmetric_search_is_near_the_best_of_all_pairs_of_ends(format):
    """Ends are searched together and then one by one; all 40 x 40 pairs are at most a little better."""
    w = heavy_tailed(8, 32) + 0.01
    found = loss(w, lp_grid(w, format, p=2.0, candidates=40), 3, 2.0)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    center = (low + high) / 2 if format.has_offset else torch.zeros_like(low)
    pairs = itertools.product(range(1, 41), repeat=2)
    losses = [
        loss(
            w,
            affine_grid(center + i / 40 * (low - center), center + j / 40 * (high - center), format),
            3,
            2.0,
        )
        for i, j in pairs
    ]
    best = torch.stack(losses).amin(0)
    assert (found >= best * (1 - 1e-6)).all()
    assert found.sum() <= 1.15 * best.sum()  # coordinate by coordinate finds a local minimum; here 1.0 to 1.1
    assert (found <= loss(w, minmax_grid(w, format), 3, 2.0)).all()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(True, "integer"), (False, "integer"), (False, "float")]),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([2.0, 3.5, 4.0]),
    st.integers(0, 1000),
)
def test_a_search_is_never_worse_than_the_whole_range(zero, bits, p, seed):
    w = heavy_tailed(4, 48, seed)
    format = AffineFormat(bits=bits, group_size=16, symmetric=zero[0], zero_point=zero[1])
    found = loss(w, lp_grid(w, format, p=p, candidates=20), bits, p)
    whole = loss(w, minmax_grid(w, format), bits, p)
    # the search compares errors in float32, each off by a rounding of a weight: so is their p-norm, at most
    rounding = 2.0**-23 * w.double().abs().unflatten(1, (3, 16)).amax(-1) * 16 ** (1 / p)
    assert (found.pow(1 / p) <= whole.pow(1 / p) + 2 * rounding).all()


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", [SYMMETRIC, INTEGER, FLOAT], ids=["symmetric", "integer", "float"])
def test_errors_in_a_search_are_those_of_quantization_bit_for_bit(format, scale_dtype):
    w = heavy_tailed(9, 64)
    w[0] = 0
    format = replace(format, group_size=16, scale_dtype=scale_dtype, offset_dtype=scale_dtype)
    grid = minmax_grid(0.7 * w, format)
    expected = w - dequantize_affine(quantize_affine(w, grid, format.bits), grid, torch.float32)
    assert torch.equal(ranges._error(w.reshape(9, 4, 16), grid, format.bits).flatten(1), expected)


def test_memory_is_bounded_and_chunks_do_not_matter(monkeypatch):
    w = heavy_tailed(33, 64)
    format = AffineFormat(bits=3, group_size=32, symmetric=False)
    float_format = AffineFormat(bits=3, group_size=32, symmetric=False, zero_point="float")
    whole = [*lp_grid(w, format, candidates=10)[:2], hqq_grid(w, float_format).offset]
    sizes = []
    search = ranges._search
    monkeypatch.setattr(ranges, "CHUNK_ELEMENTS", {"cpu": 300})
    monkeypatch.setattr(ranges, "_search", lambda part, *a: sizes.append(part.numel()) or search(part, *a))
    parts = [*lp_grid(w, format, candidates=10)[:2], hqq_grid(w, float_format).offset]
    assert max(sizes) <= 300
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_one_range_for_the_tensor():
    w = torch.randn(5, 32)
    grid = minmax_grid(w, AffineFormat(group_size=16), per_tensor=True)
    assert grid.scale.shape == (5, 2)
    assert grid.scale.unique().item() == pytest.approx(w.abs().max().item() / 7)


def test_groups_of_zeros_and_of_nan_do_not_stop_a_search():
    w = torch.randn(3, 32)
    w[0], w[1, 4] = 0, torch.nan
    for format in (SYMMETRIC, INTEGER, FLOAT):
        for grid in (lp_grid(w, format, candidates=5), minmax_grid(w, format)):
            restored = dequantize_affine(quantize_affine(w, grid, format.bits), grid, torch.float32)
            assert torch.equal(restored[0], w[0])
            assert torch.isnan(restored[1]).all()
            assert torch.isfinite(restored[2]).all()


def test_bfloat16_scales_are_searched_as_they_are_stored():
    w = heavy_tailed(16, 64)
    format = AffineFormat(bits=3, scale_dtype="bfloat16")
    grid = mse_grid(w, format)
    rounded = mse_grid(w, AffineFormat(bits=3))
    late = affine_grid(-3 * rounded.scale, 3 * rounded.scale, format)
    assert grid.scale.dtype is torch.bfloat16
    assert loss(w, grid, 3, 2).sum() <= loss(w, late, 3, 2).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_quadratic_offsets_are_as_good_as_torchaos(bits):
    """Sum of |e|**0.7, which both minimize; theirs stops when the mean over all groups grows, and rounds the
    zero point to begin with at 4 bits only."""
    w = heavy_tailed(32, 128)
    format = AffineFormat(bits=bits, group_size=64, symmetric=False, zero_point="float")
    ours = loss(w, hqq_grid(w, format), bits, 0.7).sum()
    q, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        w, bits, 64, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    spread = lambda t: t.double().repeat_interleave(64, 1)  # noqa: E731
    theirs = (w - (q.double() - spread(zero)) * spread(scale)).abs().pow(0.7).sum()
    assert ours <= theirs


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_half_quadratic_offsets_improve_on_both_of_their_starts(bits):
    w = 0.02 * torch.randn(32, 128)
    format = AffineFormat(bits=bits, group_size=64, symmetric=False, zero_point="float")
    starts = [minmax_grid(w, f) for f in (format, AffineFormat(bits=bits, group_size=64, symmetric=False))]
    start = torch.stack([loss(w, grid, bits, 0.7) for grid in starts]).amin(0)
    found = loss(w, hqq_grid(w, format), bits, 0.7)
    assert (found <= start * (1 + 1e-5)).all()  # errors are compared in float32
    assert found.sum() < 0.99 * start.sum()  # normal weights: 1.4 to 2.6% over three seeds and all widths


def test_wrong_requests_are_refused():
    w = torch.randn(2, 40)
    with pytest.raises(
        ValueError, match=r"ranges.w_NK: group_size 32 does not divide 40 input features; use"
    ):
        minmax_grid(w, AffineFormat(group_size=32))
    with pytest.raises(ValueError, match=r"lp_grid.p: 1.0; use 2 to 5"):
        lp_grid(w, SYMMETRIC, p=1.0)
    with pytest.raises(ValueError, match=r"lp_grid.candidates: 0"):
        lp_grid(w, SYMMETRIC, candidates=0)
    with pytest.raises(ValueError, match=r"hqq_grid.format: .* has no float zero point"):
        hqq_grid(w, INTEGER)
    with pytest.raises(ValueError, match=r"hqq_grid.p: 2"):
        hqq_grid(w, FLOAT, p=2.0)
