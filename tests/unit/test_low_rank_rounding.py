"""Low-rank corrections inside the rounding against a dense twin in float64, with autograd's gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank_cases import Case, cases, dense_weight, leaves, make_case, z_in_float64
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qrecipes.quant import low_rank_reference
from qrecipes.quant.affine import AffineGrid, quantize_affine
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.low_rank_linear import low_rank_linear
from qrecipes.quant.low_rank_rounding import (
    low_rank_integers,
    low_rank_linear_grads,
    low_rank_weight,
    low_rank_weight_grads,
)
from qrecipes.quant.low_rank_storage import LowRankRounding, decode, encode, encode_weight, integer_zeros
from qrecipes.quant.ranges import lp_grid, minmax_grid

NAMES = ("a", "b", "scale", "zero")


def integers_of(case: Case, **options) -> torch.Tensor:
    return low_rank_integers(case.phi, case.a, case.b, case.rounding, **options)


def rounding(bits: int = 4, K: int = 96, **options) -> LowRankRounding:
    return LowRankRounding(bits=bits, in_features=K, **options)


def assert_grads(found, wanted, sizes) -> None:
    """float32 sums of some hundred terms: relative to the sum of magnitudes, which `sizes` are."""
    for name, gradient, exact, size in zip(NAMES, found, wanted, sizes, strict=True):
        assert (gradient is None) == (exact is None), name
        if gradient is not None:
            assert ((gradient.double() - exact).abs() <= 2e-6 * size + 1e-12).all(), name


def grads_of(case: Case, grad: torch.Tensor) -> tuple[list, list]:
    """By autograd on the dense twin, and the magnitudes that they are sums of."""
    twin = leaves(case)
    dense_weight(twin).backward(grad.double())
    magnitudes = leaves(case)
    with torch.no_grad():
        for t in (magnitudes.a, magnitudes.b):
            if t is not None:
                t.abs_()
    g = grad.double().abs()
    s = case.scale.double().repeat_interleave(grad.shape[1] // case.scale.shape[1], 1)
    grouped = g.unflatten(1, (case.rounding.num_groups, -1))
    reach = 2.0**case.rounding.bits
    sizes = [
        None if case.a is None else (g * s) @ magnitudes.b.detach().t(),
        None if case.a is None else magnitudes.a.detach().t() @ (g * s),
        grouped.sum(-1) * reach,
        None if case.zero is None else grouped.sum(-1) * case.scale,
    ]
    return [None if t is None else t.grad for t in (twin.a, twin.b, twin.scale, twin.zero)], sizes


@settings(deadline=None, max_examples=150)
@given(cases())
def test_integers_and_weights_are_those_of_float64_halves_included(case):
    """Z is exact in float32 here, so every bit must agree."""
    least, greatest = -(2 ** (case.rounding.bits - 1)), 2 ** (case.rounding.bits - 1) - 1
    wanted = np.rint(z_in_float64(case).numpy()).clip(least, greatest)
    q = integers_of(case)
    assert q.dtype is torch.int8
    np.testing.assert_array_equal(q.numpy(), wanted)
    assert torch.equal(integers_of(case, transposed=True), q.t())
    G = case.rounding.num_groups
    zero = 0 if case.zero is None else np.rint(case.zero.numpy()).clip(least, greatest)[..., None]
    levels = wanted.reshape(len(wanted), G, -1) - zero
    exact = (levels.astype(np.float32) * case.scale.numpy()[..., None]).reshape(wanted.shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(low_rank_weight(*case, dtype), torch.from_numpy(exact).to(dtype))


def test_the_cases_hold_halves_and_clipped_levels():
    case = make_case(rounding(K=512), 40, 8)
    z = z_in_float64(case)
    assert (z % 1 == 0.5).double().mean() > 0.01
    assert (z > 7.5).any()
    assert (z < -8.5).any()


@settings(deadline=None, max_examples=40)
@given(cases(exact=False))
def test_integers_differ_from_float64_only_next_to_a_half(case):
    z = z_in_float64(case)
    least, greatest = case.rounding.levels
    differs = integers_of(case) != z.round().clamp(least, greatest)
    # up to 70 products of about 1, and levels up to 2**7, each with 24 bits
    assert ((z - z.floor() - 0.5).abs()[differs] < 1e-4).all()


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(0, 2**31))
def test_gradients_are_those_of_autograd_on_a_dense_twin(case, seed):
    grad = torch.randn(
        case.phi.shape[0], case.rounding.in_features, generator=torch.Generator().manual_seed(seed)
    )
    found = low_rank_weight_grads(grad, *case)
    assert all(t is None or t.dtype is torch.float32 for t in found)
    assert_grads(found, *grads_of(case, grad))


def test_gradients_pass_where_the_rounded_value_is_a_level():
    """Half to even: -8.5 becomes -8 and passes, 7.5 becomes 8 and does not."""
    z = torch.tensor([[-9.0, -8.51, -8.5, -8.0, 0.3, 7.0, 7.49, 7.5, 8.0]])
    weight = rounding(K=9, storage="fp32")
    case = Case(encode(z, weight), torch.zeros(1, 1), torch.ones(1, 9), torch.ones(1, 1), None, weight)
    found = [low_rank_weight_grads(grad[None], *case).a.item() != 0 for grad in torch.eye(9)]
    assert found == [False, False, True, True, True, True, True, False, False]


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96), (0, 96)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rank", [0, 5])
def test_layer_and_all_its_gradients_equal_the_dense_twin_in_float64(shape, symmetric, rank):
    case = make_case(rounding(group_size=32, scaling=0.25), 40, rank, symmetric=symmetric)
    trained = [None if t is None else t.requires_grad_() for t in (case.a, case.b, case.scale, case.zero)]
    twin = leaves(case)
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(40, requires_grad=True)
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    y = low_rank_linear(x, case.phi, *trained, bias, case.rounding)
    y64 = torch.nn.functional.linear(x64, dense_weight(twin), bias64)
    grad_y = torch.randn(y.shape)
    y.backward(grad_y)
    y64.backward(grad_y.double())
    # sums of up to 96 float32 products of about 1
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(y.double(), y64, **close)
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)
    torch.testing.assert_close(bias.grad.double(), bias64.grad, **close)
    for name, found, wanted in zip(NAMES, trained, (twin.a, twin.b, twin.scale, twin.zero), strict=True):
        if found is not None:
            size = wanted.grad.abs().max().item()
            torch.testing.assert_close(
                found.grad.double(),
                wanted.grad,
                rtol=1e-5,
                atol=2e-6 * size,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    assert case.phi.grad is None


def test_bfloat16_layers_give_gradients_in_the_types_of_what_trains():
    case = make_case(rounding(), 24, 4, symmetric=False, dtype=torch.bfloat16)
    trained = [t.requires_grad_() for t in (case.a, case.b, case.scale, case.zero)]
    y = low_rank_linear(torch.randn(7, 96).bfloat16(), case.phi, *trained, None, case.rounding)
    y.sum().backward()
    assert y.dtype is torch.bfloat16
    assert [t.grad.dtype for t in trained] == [t.dtype for t in trained]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_fixed_point_is_that_of_the_paper(bits):
    """Q b.(8-b), against NumPy."""
    x = torch.randn(50, 96).double() * 2.0 ** (bits - 1)
    weight = rounding(bits)
    phi = encode(x, weight)
    least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    wanted = np.rint(x.numpy().clip(least, greatest) * 2 ** (8 - bits))
    assert phi.dtype is torch.int8
    np.testing.assert_array_equal(phi.numpy(), wanted)
    np.testing.assert_array_equal(decode(phi, weight).numpy(), wanted / 2 ** (8 - bits))


def test_integers_of_four_bits_share_a_byte():
    for bits, K in ((4, 6), (3, 6), (2, 7)):
        weight = rounding(bits, K, storage="int4")
        x = torch.randn(5, K) * 4
        phi = encode(x, weight)
        assert (tuple(phi.shape), phi.dtype) == weight.phi_spec(5) == ((5, (K + 1) // 2), torch.uint8)
        least, greatest = weight.levels
        assert torch.equal(decode(phi, weight), x.round().clamp(least, greatest))


@pytest.mark.parametrize(
    ("storage", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_floating_storage_is_a_cast_and_is_not_clipped(storage, dtype):
    weight, x = rounding(8, storage=storage), torch.randn(5, 96) * 300
    phi = encode(x, weight)
    assert phi.dtype is getattr(torch, dtype)
    assert torch.equal(decode(phi, weight), x.to(phi.dtype).float())


@pytest.mark.parametrize(
    ("bits", "ties", "changed"), [(2, 0.014, 0.0065), (3, 0.026, 0.013), (4, 0.054, 0.027)]
)
def test_double_rounding_is_as_frequent_as_in_the_reference_implementation(bits, ties, changed):
    """Rates that its released code gives for 64 x 256 of N(0, 0.02**2), with the ranges of least error to the
    fourth power; here of four times as many weights."""
    w = 0.02 * torch.randn(256, 256, generator=torch.Generator().manual_seed(bits))
    grid = lp_grid(w, AffineFormat(bits=bits), p=4.0)
    weight = rounding(bits, 256)
    phi = encode_weight(w, grid, weight)
    z = decode(phi, weight)
    plain = quantize_affine(w, grid, bits)
    q = low_rank_integers(phi, None, None, weight)
    for rate, wanted in (((z % 1 == 0.5), ties), ((q != plain), changed)):
        error = abs(rate.double().mean() - wanted)
        assert error < 3 * (wanted / 2**14) ** 0.5 + 0.0005  # three deviations of theirs, given to two digits
    assert (q - plain).abs().max() == 1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_without_a_correction_integers_are_those_of_rounding_to_nearest(bits, symmetric):
    """Stored as integers, all; in fixed point all but exact halves. An asymmetric grid needs its zero."""
    w = 0.02 * torch.randn(64, 96) + (0 if symmetric else 0.01)
    grid = minmax_grid(w, AffineFormat(bits=bits, group_size=32, symmetric=symmetric))
    plain = quantize_affine(w, grid, bits)
    for storage in ("int4", "fixed_point8", "fp32"):
        weight = rounding(bits, group_size=32, storage=storage)
        phi = encode_weight(w, grid, weight)
        q = low_rank_integers(phi, torch.zeros(64, 3), torch.randn(3, 96), weight)
        differs = q != plain
        if storage == "fixed_point8":
            assert (decode(phi, weight)[differs] % 1 == 0.5).all()
            assert differs.double().mean() < 0.05
        else:
            assert not differs.any()


def test_packed_integers_are_the_payload_of_a_quantized_layer():
    w = torch.randn(40, 96)
    format = AffineFormat(bits=4, group_size=32)
    layer = QuantLinear.from_linear(_linear(w), format)
    assert torch.equal(encode_weight(w, layer.grid, rounding(group_size=32, storage="int4")), layer.packed)


def _linear(w: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = w
    return linear


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_fused_layers_have_the_weights_of_training_bit_for_bit(bits, symmetric):
    """Also where the zero points that were learnt lie beyond the levels; 5 to 7 bits are stored in 8."""
    case = make_case(rounding(bits, group_size=32, storage="bf16"), 40, 5, symmetric=symmetric, exact=False)
    if not symmetric:
        case.zero[0, 0], case.zero[1, 0] = 1000.0, -1000.0
    format = AffineFormat(bits=bits if bits in (2, 3, 4) else 8, group_size=32, symmetric=symmetric)
    zero = None if symmetric else integer_zeros(case.zero, case.rounding).to(torch.int8)
    fused = QuantLinear.from_integers(integers_of(case), AffineGrid(case.scale, zero=zero), format)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(fused.dequantize(dtype), low_rank_weight(*case, dtype))


def test_rows_have_the_same_bits_alone_as_together(monkeypatch):
    """A rank's rows under FSDP2 round as the whole weight does."""
    case = make_case(rounding(K=513), 37, 16, exact=False)
    whole = integers_of(case)
    monkeypatch.setattr(low_rank_reference, "CHUNK_ELEMENTS", 2000)
    for rows in (slice(0, 1), slice(5, 37)):
        assert torch.equal(
            low_rank_integers(case.phi[rows], case.a[rows], case.b, case.rounding), whole[rows]
        )


def test_gradients_by_parts_are_those_of_the_whole(monkeypatch):
    case = make_case(rounding(group_size=32, scaling=0.5), 300, 5, symmetric=False)
    x, dy = torch.randn(50, 96), torch.randn(50, 300)
    whole = low_rank_weight_grads(dy.t() @ x, *case)
    rows = []
    one = low_rank_reference.low_rank_weight_grads_reference
    monkeypatch.setattr(low_rank_reference, "GRADIENT_BYTES", 2**15)
    spied = lambda grad, *parts: rows.append(len(grad)) or one(grad, *parts)  # noqa: E731
    parts = low_rank_reference.linear_grads(spied, dy, x, *case)
    assert rows == [128, 128, 44]
    found = low_rank_linear_grads(dy, x, *case)
    for name, a, b, c in zip(NAMES, whole, parts, found, strict=True):
        # the order of float32 sums of 50 and 300 terms
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * a.abs().max().item(), msg=name)
        assert torch.equal(b, c), name


def test_no_rows_have_empty_gradients_but_of_b():
    case = make_case(rounding(), 5, 3, symmetric=False)
    none = Case(case.phi[:0], case.a[:0], case.b, case.scale[:0], case.zero[:0], case.rounding)
    assert low_rank_weight(*none, torch.float32).shape == integers_of(none).shape == (0, 96)
    grads = low_rank_linear_grads(torch.randn(4, 0), torch.randn(4, 96), *none)
    assert [tuple(t.shape) for t in grads] == [(0, 3), (3, 96), (0, 1), (0, 1)]
    assert (grads.b == 0).all()


def layer_of(case: Case):
    def run(x: torch.Tensor) -> torch.Tensor:
        return low_rank_linear(x, case.phi, case.a, case.b, case.scale, case.zero, None, case.rounding)

    return run


@pytest.mark.parametrize("is_compiled", [False, True])
def test_nothing_of_a_weights_size_is_kept_but_phi_itself(is_compiled):
    case = make_case(rounding(K=512), 256, 4, symmetric=False)
    for t in (case.a, case.b, case.scale, case.zero):
        t.requires_grad_()
    run = layer_of(case)
    if is_compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    x, kept = torch.randn(3, 512, requires_grad=True), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(x)
    y.sum().backward()
    large = [t for t in kept if t.numel() >= 256 * 512]
    assert all(t.data_ptr() == case.phi.data_ptr() for t in large)
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    assert len(large) == 1


def test_compiled_and_checkpointed_layers_equal_plain_ones_bit_for_bit():
    case = make_case(rounding(group_size=32, storage="int4", scaling=0.5), 96, 5, symmetric=False)
    trained = [t.requires_grad_() for t in (case.a, case.b, case.scale, case.zero)]
    run, x = layer_of(case), torch.randn(7, 96, requires_grad=True)

    def outcome(function) -> list[torch.Tensor]:
        y = function(function(x))
        return [y, *torch.autograd.grad(y.square().sum(), [x, *trained])]

    plain = outcome(run)
    compiled = torch.compile(run, fullgraph=True)
    for function in (compiled, lambda x: checkpoint(run, x, use_reentrant=False)):
        for found, wanted in zip(outcome(function), plain, strict=True):
            assert torch.equal(found, wanted)


def test_a_second_derivative_is_refused():
    case = make_case(rounding(), 8, 3)
    x = torch.randn(2, 96, requires_grad=True)
    y = layer_of(case._replace(a=case.a.requires_grad_()))(x)
    with pytest.raises(RuntimeError, match=r"LowRankRoundedLinear: .*create_graph.* no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_operators_keep_torchs_contract(symmetric, rank):
    case = make_case(rounding(group_size=32, storage="int4"), 12, rank, symmetric=symmetric)
    x, dy, key = torch.randn(3, 96), torch.randn(3, 12), case.rounding.key
    tensors = case[:5]
    for name, args in (
        ("low_rank_weight", (*tensors, key, torch.bfloat16)),
        ("low_rank_integers", (*case[:3], key, False)),
        ("low_rank_integers", (*case[:3], key, True)),
        ("low_rank_mm", (x, *tensors, torch.randn(12), key)),
        ("low_rank_mm_grad_input", (dy, *tensors, key)),
        ("low_rank_weight_grads", (dy.t() @ x, *tensors, key)),
        ("low_rank_linear_grads", (dy, x, *tensors, key)),
    ):
        operator = getattr(torch.ops.qrecipes, name).default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qrecipes::{name}", "CUDA")


def test_what_is_not_finite_shows_in_its_row():
    case = make_case(rounding(), 5, 3)
    case.a[2, 0] = torch.nan
    w = low_rank_weight(*case, torch.bfloat16)
    assert w[2].isnan().all()
    assert w[[0, 1, 3, 4]].isfinite().all()
    assert (integers_of(case)[2] == 0).all()
    phi = encode(torch.tensor([[torch.nan, 1.0, torch.inf]]), rounding(K=3))
    assert decode(phi, rounding(K=3)).tolist() == [[0.0, 1.0, 7.0]]


def test_a_scale_of_zero_gives_weights_of_zero():
    w = torch.randn(3, 96)
    w[1] = 0
    grid = minmax_grid(w, AffineFormat(bits=4))
    phi = encode_weight(w, grid, rounding())
    restored = low_rank_weight(phi, None, None, grid.scale, None, rounding(), torch.float32)
    assert (restored[1] == 0).all()
    assert restored.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bits": 8},
            r"LowRankRounding.bits: 8, but storage 'fixed_point8' takes 2 to 7; use bf16, fp16 or fp32",
        ),
        ({"bits": 5, "storage": "int4"}, r"bits: 5, but storage 'int4' takes 2 to 4; use fixed_point8, bf16"),
        ({"bits": 1}, r"bits: 1; use 2 to 8"),
        ({"storage": "int8"}, r"storage: 'int8'; use one of fixed_point8, int4, bf16, fp16, fp32"),
        ({"group_size": 40}, r"group_size: 40 is no multiple of 8 that divides 96 input features; use 32"),
        ({"group_size": 12}, r"group_size: 12 is no multiple of 8"),
        ({"scaling": float("inf")}, r"scaling: inf; alpha / rank is a finite number"),
        ({"K": 0}, r"in_features: 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rounding(**options)


def test_wrong_tensors_are_refused():
    case = make_case(rounding(group_size=32), 8, 3, symmetric=False)
    for wrong, message in (
        (
            {"phi": case.phi.float()},
            r"low_rank_weight.phi: torch.float32 .* keeps torch.int8 of shape \(8, 96\)",
        ),
        ({"a": None}, r"a_NR: A and B come together"),
        ({"a": case.a[:, :2]}, r"a_NR: A is .* give 8 x rank and rank x 96 of one type"),
        ({"a": case.a.bfloat16()}, r"a_NR: .* of one type"),
        ({"scale": case.scale[:, :1]}, r"scale_NG: .* each of the 3 groups of 8 rows"),
        ({"zero": case.zero.to(torch.int8)}, r"zero_NG: torch.int8 .* floating"),
    ):
        with pytest.raises(ValueError, match=message):
            low_rank_weight(*case._replace(**wrong), torch.float32)
    with pytest.raises(ValueError, match=r"low_rank_linear.x: shape \(2, 95\); its last dimension"):
        layer_of(case)(torch.randn(2, 95))
    with pytest.raises(ValueError, match=r"encode.levels_NK: torch.int8 of shape .* divide the weight by"):
        encode(torch.zeros(2, 96, dtype=torch.int8), case.rounding)
    grid = AffineGrid(torch.ones(8, 3), offset=torch.ones(8, 3))
    with pytest.raises(ValueError, match=r"encode_weight.grid: has float offsets"):
        encode_weight(torch.randn(8, 96), grid, case.rounding)
    with pytest.raises(ValueError, match=r"encode_weight.grid: scales of shape \(8, 1\)"):
        encode_weight(torch.randn(8, 96), AffineGrid(torch.ones(8, 1)), case.rounding)


def test_a_rounding_survives_as_the_string_that_operators_take():
    from qrecipes.quant.low_rank_storage import rounding_of_key

    weight = rounding(3, scaling=1 / 3, group_size=32, storage="int4")
    assert rounding_of_key(weight.key) == weight
    assert '"' not in weight.key
    assert rounding_of_key(replace(weight, bits=2).key) != weight
