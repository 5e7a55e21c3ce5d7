"""GPTQ against the optimal brain quantizer's explicit update in float64, and its promises."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qrecipes.quant.affine import AffineGrid, affine_grid, dequantize_affine, quantize_affine
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.gptq import (
    GPTQSettings,
    Hessian,
    gptq,
    inverse_factor,
    relative_output_error,
    relative_weight_error,
)
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.ranges import RANGES, minmax_grid, mse_grid

FORMATS = {
    "symmetric": AffineFormat(bits=4, group_size=16),
    "integer": AffineFormat(bits=3, group_size=32, symmetric=False),
    "float": AffineFormat(bits=2, group_size=16, symmetric=False, zero_point="float"),
    "rows": AffineFormat(bits=4),
    "wide": AffineFormat(bits=8, group_size=48, symmetric=False),
}


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose features are mixed, some far larger than others, as a transformer's are; float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    sizes = torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing * sizes


def problem(rows: int = 12, width: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs, in float64."""
    x = correlated(3 * width, width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.05, x.T @ x / len(x)


def loss(w: Tensor, found, hessian: Tensor) -> float:
    """tr(E H E^T), in float64."""
    error = w.double() - dequantize_affine(found.q, found.grid, torch.float64)
    return float((error @ hessian.double() * error).sum())


def rounded(w: Tensor, format: AffineFormat, ranges=minmax_grid):
    """Round to nearest, as `gptq` would return it."""
    grid = ranges(w, format)
    return type("Rounded", (), {"q": quantize_affine(w, grid, format.bits), "grid": grid})


def optimal_brain_quantizer(w: Tensor, hessian: Tensor, format: AffineFormat, damping: float, ranges):
    """The update of OBQ (arXiv 2208.11580), column by column.

    After column j is fixed, all the columns left move by -(w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_j,:, H_F being
    the Hessian of the columns not yet fixed, inverted anew each time; nothing is factorized, and there are no
    blocks.
    """
    w = w.clone()
    K = w.shape[1]
    size = format.group_size or K
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(K, dtype=hessian.dtype)
    q, grids = torch.empty(w.shape, dtype=torch.int8), []
    for j in range(K):
        if j % size == 0:
            grids.append(ranges(w[:, j : j + size], format))
        q[:, j : j + 1] = quantize_affine(w[:, j : j + 1], grids[-1], format.bits)
        value = dequantize_affine(q[:, j : j + 1], grids[-1], torch.float64)[:, 0]
        inverse = torch.linalg.inv(damped[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - value) / inverse[0, 0], inverse[0])
    return q, AffineGrid(*(None if p[0] is None else torch.cat(p, 1) for p in zip(*grids, strict=True)))


@pytest.mark.parametrize("ranges", ["rtn", "mse"])
@pytest.mark.parametrize("name", FORMATS)
def test_integers_and_grid_are_those_of_the_optimal_brain_quantizer(name, ranges):
    w, hessian = problem()
    format = replace(FORMATS[name], scale_dtype="float64", offset_dtype="float64")
    q, grid = optimal_brain_quantizer(w, hessian, format, 0.01, RANGES[ranges])
    found = gptq(w, hessian, format, ranges=RANGES[ranges])
    assert torch.equal(found.q, q)  # both in float64, so that no rounding falls otherwise
    for ours, theirs in zip(found.grid, grid, strict=True):
        if theirs is None:
            assert ours is None
        else:  # a float32 search of ranges starts from weights that differ by roundings of float64
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.sampled_from([16, 24, 32]),
    bits=st.sampled_from([2, 3, 4, 8]),
    kind=st.sampled_from(["symmetric", "integer", "float"]),
    block=st.sampled_from([8, 40, 128]),
)
def test_result_agrees_with_the_optimal_brain_quantizer_for_any_shape(
    seed, rows, groups, size, bits, kind, block
):
    w, hessian = problem(rows, groups * size, seed)
    asymmetric = {"symmetric": False, "zero_point": kind} if kind != "symmetric" else {}
    wide = {"scale_dtype": "float64", "offset_dtype": "float64"}
    format = AffineFormat(bits=bits, group_size=size, **asymmetric, **wide)
    # ranges in float64: in float32 a last bit might fall otherwise
    q, _ = optimal_brain_quantizer(w, hessian, format, 0.01, minmax_in_float64)
    found = gptq(w, hessian, format, ranges=minmax_in_float64, settings=GPTQSettings(block_size=block))
    assert torch.equal(found.q, q)


def minmax_in_float64(w: Tensor, format: AffineFormat) -> AffineGrid:
    return affine_grid(w.amin(1, keepdim=True), w.amax(1, keepdim=True), format)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["symmetric", "integer", "float", "rows"]),
    bits=st.sampled_from([2, 3, 4]),
    static=st.booleans(),
)
def test_output_error_is_no_more_than_that_of_rounding_to_nearest(seed, name, bits, static):
    """On correlated inputs whose sizes span a factor of 100, with 48 rows: a single row may be unlucky.

    Not with 2 bits and min-max ranges of groups as they have become: compensation widens the ranges.
    """
    w, hessian = problem(48, 96, seed)
    format = replace(FORMATS[name], bits=bits)
    settings = GPTQSettings(static_groups=static or bits == 2)
    found = gptq(w.float(), hessian.float(), format, settings=settings)
    assert loss(w, found, hessian) <= loss(w, rounded(w.float(), format), hessian)


def test_float32_loses_nothing_to_float64():
    """Single integers may differ, where a weight lies between two levels; the loss does not."""
    w, hessian = problem(64, 128)
    for format in FORMATS.values():
        if format.group_size not in (None, 16, 32):
            continue
        single = gptq(w.float(), hessian.float(), format)
        double = gptq(w, hessian, format)
        assert (single.q != double.q).float().mean() < 0.01
        assert loss(w, single, hessian) == pytest.approx(loss(w, double, hessian), rel=0.02)


def test_with_uncorrelated_inputs_it_is_rounding_to_nearest():
    w, _ = problem()
    hessian = torch.diag(torch.rand(96, dtype=torch.float64) + 0.5)
    for format in FORMATS.values():
        expected = rounded(w, format)
        found = gptq(w, hessian, format)
        assert torch.equal(found.q, expected.q)
        for ours, theirs in zip(found.grid, expected.grid, strict=True):
            assert theirs is None or torch.equal(ours, theirs)


def test_static_groups_keep_the_ranges_of_the_original_weight():
    w, hessian = problem()
    format = FORMATS["integer"]
    static = gptq(w, hessian, format, ranges=mse_grid, settings=GPTQSettings(static_groups=True))
    for ours, theirs in zip(static.grid, mse_grid(w, format), strict=True):
        assert theirs is None or torch.equal(ours, theirs)
    dynamic = gptq(w, hessian, format, ranges=mse_grid)
    assert not torch.equal(dynamic.grid.scale, static.grid.scale)


def test_rows_do_not_depend_on_each_other():
    w, hessian = problem()
    whole = gptq(w, hessian, FORMATS["integer"])
    part = gptq(w[3:7], hessian, FORMATS["integer"])
    assert torch.equal(whole.q[3:7], part.q)
    assert torch.equal(whole.grid.scale[3:7], part.grid.scale)


def test_dead_inputs_are_rounded_to_nearest_and_change_nothing_else():
    w, hessian = problem()
    dead = torch.tensor([0, 17, 40, 95])
    hessian[dead] = 0
    hessian[:, dead] = 0
    format = FORMATS["symmetric"]
    static = GPTQSettings(static_groups=True)  # ranges that hold the dead columns' weights, too
    found = gptq(w, hessian, format, settings=static)
    assert torch.equal(found.q[:, dead], rounded(w, format).q[:, dead])
    other = w.clone()
    other[:, dead] *= 0.5
    again = gptq(other, hessian, replace(format, group_size=None), settings=static)
    grid = AffineGrid(again.grid.scale)
    alive = [j for j in range(96) if j not in dead]
    same_range = gptq(w, hessian, replace(format, group_size=None), ranges=lambda w, format: grid)
    assert torch.equal(same_range.q[:, alive], again.q[:, alive])


def test_dead_inputs_alone_do_not_make_a_hessian_singular():
    w, hessian = problem()
    hessian[17] = 0
    hessian[:, 17] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gptq(w, hessian, FORMATS["symmetric"], settings=GPTQSettings(damping=0)).damping == 0


def test_inputs_that_are_all_zero_give_rounding_to_nearest():
    w, hessian = problem()
    found = gptq(w, torch.zeros_like(hessian), FORMATS["symmetric"])
    assert torch.equal(found.q, rounded(w, FORMATS["symmetric"]).q)


def test_factor_is_the_cholesky_factor_of_the_damped_inverse():
    _, hessian = problem()
    factor, used = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-8, atol=1e-10)  # condition number of 1e5, in float64
    assert used == 0.01


def test_fewer_tokens_than_features_need_no_more_than_the_usual_damping():
    x = correlated(20, 96).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gptq(problem()[0].float(), x.T @ x / 20, FORMATS["symmetric"])
    assert found.damping == 0.01


def test_singular_hessian_raises_the_damping_and_says_so():
    column = torch.ones(96, 1)
    with pytest.warns(UserWarning, match=r"layers\.3: the Hessian has no inverse with damping 0; used 0\.01"):
        found = gptq(
            problem()[0].float(),
            column @ column.T,
            FORMATS["symmetric"],
            settings=GPTQSettings(damping=0),
            name="layers.3",
        )
    assert found.damping == 0.01


def test_hessian_without_inverse_is_refused_by_name():
    w, hessian = problem()
    with pytest.raises(
        ValueError, match=r"layers\.3: the Hessian has no inverse, even with .* leave the layer out"
    ):
        gptq(w, -hessian, FORMATS["symmetric"], name="layers.3")


def test_what_is_not_finite_or_does_not_fit_is_refused_by_name():
    w, hessian = problem()
    spoilt = hessian.clone()
    spoilt[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"q_proj: the Hessian is not finite"):
        gptq(w, spoilt, FORMATS["symmetric"], name="q_proj")
    with pytest.raises(ValueError, match=r"q_proj: the weight is not finite"):
        gptq(w / 0, hessian, FORMATS["symmetric"], name="q_proj")
    with pytest.raises(ValueError, match=r"q_proj: a Hessian of shape \(95, 95\) for 96"):
        gptq(w, hessian[1:, 1:], FORMATS["symmetric"], name="q_proj")
    with pytest.raises(ValueError, match=r"q_proj: group_size 40 does not divide 96 .*use group_size 32"):
        gptq(w, hessian, AffineFormat(group_size=40), name="q_proj")
    with pytest.raises(ValueError, match=r"GPTQSettings\.damping: -1"):
        GPTQSettings(damping=-1)
    with pytest.raises(ValueError, match=r"GPTQSettings\.block_size: 0"):
        GPTQSettings(block_size=0)


def test_hessian_is_the_mean_of_outer_products_over_all_leading_dimensions():
    x = torch.randn(3, 5, 8)
    hessian = Hessian(8)
    with pytest.raises(ValueError, match="no inputs were counted"):
        _ = hessian.matrix
    hessian.add(x[:1])
    hessian.add(x[1:].bfloat16().float())
    x[1:] = x[1:].bfloat16().float()
    expected = torch.einsum("bti,btj->ij", x.double(), x.double()) / 15
    torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-6)  # float32 sums
    assert hessian.tokens == 15


def test_relative_errors_are_those_of_weights_and_outputs():
    x, w = correlated(50, 32).float(), torch.randn(6, 32)
    w_hat = w + 0.01 * torch.randn(6, 32)
    expected = float((x @ (w - w_hat).T).norm() / (x @ w.T).norm())
    assert relative_output_error(w, w_hat, x.T @ x / 50) == pytest.approx(expected, rel=1e-4)  # float32
    assert relative_weight_error(w, w_hat) == pytest.approx(float((w - w_hat).norm() / w.norm()))
    assert relative_output_error(w, w, x.T @ x) == 0


def test_layer_of_its_integers_multiplies_with_its_grid():
    w, hessian = problem()
    for format in FORMATS.values():
        found = gptq(w.float(), hessian.float(), format)
        layer = QuantLinear.from_integers(found.q, found.grid, format)
        assert torch.equal(layer.dequantize(), dequantize_affine(found.q, found.grid, torch.float32))
        assert torch.equal(layer.integers(), found.q)
