"""Trained grids: where they start, the numbers that stand for scales, and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.learned_grid import (
    SCALE_FLOOR,
    TrainedFormat,
    collapsed_scales,
    initial_grid,
    lsq_factor,
    round_zero,
    to_parameter,
    to_scale,
    trained_grid,
)
from qrecipes.quant.packing import signed_range


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_of_every_bits_reach_the_range(bits, symmetric):
    """Ranges by hand: the largest magnitude, or both ends widened to hold 0."""
    w = torch.randn(5, 64) + 0.5
    format = TrainedFormat(bits=bits, group_size=32, symmetric=symmetric)
    grid = initial_grid(w, format, "rtn", 4.0, "here")
    groups = w.unflatten(1, (2, 32))
    least, greatest = signed_range(bits)
    if symmetric:
        torch.testing.assert_close(grid.scale, groups.abs().amax(-1) / greatest)
        assert grid.zero is None
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        torch.testing.assert_close(grid.scale, (high - low) / (2**bits - 1))
        torch.testing.assert_close(grid.zero, (least - low / grid.scale).round())
    assert format.stored.bits == (bits if bits in (2, 3, 4, 8) else 8)


@pytest.mark.parametrize("bits", [2, 5, 7])
def test_a_searched_range_loses_less(bits):
    w = torch.randn(8, 128).pow(3)
    format = TrainedFormat(bits=bits)
    errors = {}
    for ranges in ("rtn", "mse", "lp"):
        scale = initial_grid(w, format, ranges, 2.0, "here").scale
        errors[ranges] = (w - (w / scale).round().clamp(*signed_range(bits)) * scale).square().sum()
    assert errors["mse"] == errors["lp"] < errors["rtn"]


def test_a_stored_grid_keeps_its_numbers():
    format = TrainedFormat(bits=4, symmetric=False)
    stored = AffineGrid(torch.tensor([[0.5], [0.0]]), zero=torch.tensor([[-3], [2]], dtype=torch.int8))
    grid = trained_grid(stored, format, 64)
    assert grid.scale.flatten().tolist() == [0.5, 0.5]  # a scale of zero would never leave it
    assert grid.zero.flatten().tolist() == [-3.0, 2.0]
    symmetric = trained_grid(AffineGrid(torch.ones(2, 1)), format, 64)
    assert symmetric.zero.flatten().tolist() == [0.0, 0.0]


@given(st.floats(1e-6, 1e3), st.sampled_from(["linear", "log"]), st.floats(0.01, 1.0))
@settings(max_examples=40, deadline=None)
def test_gradients_of_scales_are_those_of_their_domain_times_the_factor(value, domain, factor):
    scale = torch.tensor([[value]])
    parameter = to_parameter(scale, domain).requires_grad_()
    found = to_scale(parameter, domain, factor)
    torch.testing.assert_close(found.detach(), scale, rtol=2e-6, atol=0)  # log, then exp, in float32
    assert torch.equal(found.detach(), to_scale(parameter, domain).detach())  # a factor moves no bit
    found.backward()
    expected = factor * (value if domain == "log" else 1.0)
    assert parameter.grad.item() == pytest.approx(expected, rel=1e-5)


def test_lsq_factor_is_the_papers():
    assert lsq_factor(4, 128) == pytest.approx(1 / math.sqrt(128 * 7))


@pytest.mark.parametrize("domain", ["linear", "log"])
def test_scales_stop_at_their_floor_without_gradient_and_are_counted(domain):
    low = -1.0 if domain == "linear" else -30.0
    parameter = torch.tensor([[low, math.nan, math.inf, 0.5]]).requires_grad_()
    scale = to_scale(parameter, domain)
    assert scale[0, 0].item() == pytest.approx(SCALE_FLOOR)
    assert scale[0, 1].isnan()
    scale[0, 0].backward()
    assert not parameter.grad[0, 0]
    assert collapsed_scales(parameter, domain) == 3


@given(st.integers(2, 8), st.floats(-300, 300))
@settings(max_examples=60, deadline=None)
def test_zero_points_are_integers_of_the_bits_and_pass_gradients_within_them(bits, value):
    least, greatest = signed_range(bits)
    zero = torch.tensor([[value]], requires_grad=True)
    rounded = round_zero(zero, bits)
    expected = min(max(round(zero.item()), least), greatest)
    assert rounded.item() == expected
    rounded.backward()
    assert zero.grad.item() == (least <= round(zero.item()) <= greatest)


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="bits: 9; use 2 to 8"):
        TrainedFormat(bits=9)
    with pytest.raises(ValueError, match="no multiple of 8"):
        TrainedFormat(bits=5, group_size=20)
    with pytest.raises(ValueError, match="here: holds weights that are not finite"):
        initial_grid(torch.full((2, 16), math.nan), TrainedFormat(bits=4), "rtn", 4.0, "here")
    assert isinstance(TrainedFormat(bits=5).stored, AffineFormat)


def test_scales_of_logarithms_are_the_nearest_to_the_exact_ones():
    """To all bits, compiled as well: a merged layer has the scales of training, on whatever device."""
    parameter = torch.empty(200, 50).uniform_(-16, 2)
    exact = torch.from_numpy(np.exp(parameter.double().numpy()).astype(np.float32))
    assert torch.equal(to_scale(parameter, "log"), exact)
    assert not torch.equal(parameter.exp(), exact)  # float32 functions miss some by a last bit
    compiled = torch.compile(lambda p: to_scale(p, "log"), fullgraph=True)
    assert torch.equal(compiled(parameter), exact)
