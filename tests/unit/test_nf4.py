"""NF4 against its definition by quantiles, brute force in float64, and torchao's own."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor, to_nf4

from qrecipes.quant.nf4 import (
    NF4_LEVELS,
    dequantize_nf4,
    double_dequantize,
    double_quantize,
    quantize_nf4,
)

widest_gap = max(high - low for low, high in pairwise(NF4_LEVELS))


def test_levels_are_the_quantiles_of_the_definition():
    """Section 3 and appendix E: 8 quantiles of each side of N(0, 1), evenly spaced from `outermost` to 1/2,
    without the middle on the negative side, with it (as 0) on the other; divided by the greatest."""
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(outermost + (0.5 - outermost) * i / 8) for i in range(8)]
    negative = [-quantile(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    levels = sorted([*negative, 0.0, *positive])
    expected = torch.tensor(levels, dtype=torch.float64) / max(levels)
    # the published ones were taken at probabilities rounded to float32, whose quantiles are off by up to 3e-7
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), expected, rtol=0, atol=4e-7)


def test_levels_are_float32_numbers():
    assert torch.tensor(NF4_LEVELS).double().tolist() == list(NF4_LEVELS)


matrices = st.tuples(
    st.integers(0, 5), st.integers(1, 200), st.sampled_from([16, 64, 256]), st.integers(0, 2**31)
).map(lambda c: (torch.randn(c[0], c[1], generator=torch.Generator().manual_seed(c[3])) * 0.02, c[2]))


@settings(deadline=None, max_examples=100)
@given(matrices)
def test_codes_are_the_nearest_levels_of_ragged_blocks(case):
    """By brute force in float64; blocks start anew in every row, and the last may be short."""
    w, size = case
    codes, absmax = quantize_nf4(w, size)
    assert codes.dtype is torch.uint8
    assert absmax.shape == (w.shape[0], math.ceil(w.shape[1] / size))
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    for i in range(absmax.shape[1]):
        block = w[:, i * size : (i + 1) * size].double()
        magnitude = block.abs().amax(1, keepdim=True)
        assert torch.equal(absmax[:, i : i + 1].double(), magnitude)
        distance = (block / magnitude.clamp(min=1e-38)).unsqueeze(-1).sub(levels).abs()
        chosen = distance.gather(-1, codes[:, i * size : (i + 1) * size].long().unsqueeze(-1))
        assert (chosen.squeeze(-1) <= distance.amin(-1) + 2e-7).all()  # float32 quotient and boundaries


@settings(deadline=None, max_examples=60)
@given(matrices)
def test_dequantized_is_within_half_a_gap_and_quantizes_to_itself(case):
    w, size = case
    codes, absmax = quantize_nf4(w, size)
    restored = dequantize_nf4(codes, absmax, size, torch.float32)
    magnitude = absmax.repeat_interleave(size, 1)[:, : w.shape[1]]
    assert ((restored - w).abs() <= magnitude * (widest_gap / 2 + 1e-6)).all()
    again, same = quantize_nf4(restored, size)
    assert torch.equal(again, codes)
    assert torch.equal(same, absmax)


def test_ties_go_down_as_in_bitsandbytes():
    """0.03979014977812767 is its threshold between 0 and the level above; only more than that goes up."""
    threshold = torch.tensor(0.03979014977812767)
    above = torch.nextafter(threshold, torch.tensor(1.0))
    codes, _ = quantize_nf4(torch.stack([threshold, above, torch.tensor(1.0)])[None], 16)
    assert codes.tolist() == [[7, 8, 15]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 9), st.integers(1, 90), st.sampled_from([1, 7, 256]), st.integers(0, 2**31))
def test_double_quantization_is_off_by_at_most_half_a_step(N, G, size, seed):
    absmax = torch.rand(max(N, 1), G, generator=torch.Generator().manual_seed(seed)) * 0.1
    q, scale, mean = double_quantize(absmax, size)
    assert q.dtype is torch.int8
    assert q.shape == absmax.shape
    assert scale.shape == (math.ceil(absmax.numel() / size),)
    exact_mean = absmax.double().mean()
    centred = absmax.double().flatten() - exact_mean
    for i, block in enumerate(centred.split(size)):
        assert scale[i].item() == pytest.approx(block.abs().max().item() / 127, rel=1e-4, abs=1e-9)
    restored = double_dequantize(q, scale, mean, size)
    step = scale.repeat_interleave(size)[: absmax.numel()].reshape(absmax.shape)
    assert ((restored - absmax).abs() <= step / 2 + 3e-8).all()  # float32 sums with the mean, below 0.1


def torchao_nf4(w: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> NF4Tensor:
    """torchao's NF4 with the published levels: its own are rounded to four digits."""
    nearest = NF4Tensor.quantize_tensor_nearest
    levels = torch.tensor(NF4_LEVELS)
    monkeypatch.setattr(
        NF4Tensor, "quantize_tensor_nearest", staticmethod(lambda value, nf4: nearest(value, levels))
    )
    return to_nf4(w, 64, 256)


def test_codes_and_blocks_are_torchaos(monkeypatch):
    """Blocks along a row are those of the flattened matrix; torchao has the first weight in the high half."""
    w = torch.randn(128, 384) * 0.02
    theirs = torchao_nf4(w, monkeypatch)
    codes, absmax = quantize_nf4(w)
    pairs = codes.flatten().unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0] << 4 | pairs[:, 1], theirs.quantized_data.flatten())
    _, scale, mean = double_quantize(absmax)
    torch.testing.assert_close(mean[0], theirs.scaler_mean, rtol=1e-6, atol=0)
    # the greatest magnitude is 127 steps here and 128 there
    torch.testing.assert_close(scale * 127, 128 / theirs.quantization_factor, rtol=1e-5, atol=0)


def test_dequantized_weights_are_torchaos_within_the_second_level(monkeypatch):
    w = torch.randn(128, 384) * 0.02
    theirs = torchao_nf4(w, monkeypatch)
    theirs.nf4 = torch.tensor(NF4_LEVELS)
    codes, absmax = quantize_nf4(w)
    q, scale, mean = double_quantize(absmax)
    ours = dequantize_nf4(codes, double_dequantize(q, scale, mean), 64, torch.float32)
    # each magnitude is off by at most half a step here, and there by one where 128 is clipped to 127
    assert (ours - theirs.get_original_weight()).abs().max() <= 1.6 * scale.max()
    error = [(restored - w).square().mean() for restored in (ours, theirs.get_original_weight())]
    assert error[0] <= error[1] * 1.001


def test_a_block_of_zeros_is_zero_and_what_is_not_finite_shows():
    w = torch.randn(3, 128)
    w[0] = 0
    w[1, 3] = math.nan
    w[2, 70] = math.inf
    codes, absmax = quantize_nf4(w)
    restored = dequantize_nf4(codes, absmax, 64, torch.float32)
    assert torch.equal(restored[0], w[0])
    assert not torch.isfinite(restored[1, :64]).any()
    assert not torch.isfinite(restored[2, 64:]).any()
    assert torch.isfinite(restored[1, 64:]).all()
    assert torch.isfinite(restored[2, :64]).all()
    assert torch.isnan(double_dequantize(*double_quantize(absmax))).all()
