"""Low-rank rounding on a device: the reference's integers, float64's gradients, one result, nothing kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank_cases import Case, cases, make_case, z_in_float64
from torch.utils.checkpoint import checkpoint

from qrecipes.quant import low_rank_reference
from qrecipes.quant.low_rank_linear import low_rank_linear
from qrecipes.quant.low_rank_reference import (
    low_rank_integers_reference,
    low_rank_weight_grads_reference,
    low_rank_weight_reference,
)
from qrecipes.quant.low_rank_rounding import (
    low_rank_integers,
    low_rank_linear_grads,
    low_rank_mm,
    low_rank_weight,
    low_rank_weight_grads,
)
from qrecipes.quant.low_rank_storage import LowRankRounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STORAGES = [
    ("fixed_point8", 4),
    ("fixed_point8", 2),
    ("int4", 4),
    ("int4", 3),
    ("bf16", 8),
    ("fp16", 6),
    ("fp32", 8),
]
SHAPES = [(1, 1), (3, 37), (70, 768), (257, 1100), (4096, 4096)]
NAMES = ("a", "b", "scale", "zero")


def on_gpu(case: Case) -> Case:
    return Case(*(None if t is None else t.cuda() for t in case[:5]), case.rounding)


def case_of(N: int, K: int, storage: str = "fixed_point8", bits: int = 4, rank: int = 32, **options) -> Case:
    weight = {"group_size": options.pop("group_size", None), "scaling": options.pop("scaling", 0.5)}
    rounding = LowRankRounding(bits=bits, in_features=K, storage=storage, **weight)
    return make_case(rounding, N, rank, **{"dtype": torch.bfloat16} | options)


def integers_of(case: Case, **options) -> torch.Tensor:
    return low_rank_integers(*case[:3], case.rounding, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("storage", "bits"), STORAGES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_have_the_references_bits_where_sums_are_exact(shape, storage, bits, symmetric, dtype):
    case = case_of(*shape, storage, bits, symmetric=symmetric, dtype=dtype)
    wanted = low_rank_integers_reference(*case[:3], case.rounding)
    found = on_gpu(case)
    assert torch.equal(integers_of(found).cpu(), wanted)
    assert torch.equal(integers_of(found, transposed=True).cpu(), wanted.t())
    for out in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(low_rank_weight(*found, out).cpu(), low_rank_weight_reference(*case, out))


@settings(max_examples=60, deadline=None)
@given(cases(most_rows=150), st.integers(0, 2**31))
def test_every_rounding_and_ragged_shape(case, seed):
    found = on_gpu(case)
    assert torch.equal(integers_of(found).cpu(), low_rank_integers_reference(*case[:3], case.rounding))
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(case.phi.shape[0], case.rounding.in_features, generator=generator)
    assert_grads(low_rank_weight_grads(grad.cuda(), *found), grad, case, bound=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [8, 32, 256])
def test_integers_differ_from_the_references_only_next_to_a_half(rank, dtype):
    """As many as Z lie so near to one: at most 4 in a million."""
    case = case_of(4096, 4096, "fp32", rank=rank, dtype=dtype, exact=False, scaling=1 / rank)
    found = integers_of(on_gpu(case)).cpu()
    differs = found != low_rank_integers_reference(*case[:3], case.rounding)
    z = z_in_float64(case)
    assert ((z - z.floor() - 0.5).abs()[differs] < 2e-6).all()
    assert differs.double().mean() < 4e-6


def assert_grads(found, grad: torch.Tensor, case: Case, bound: float) -> None:
    """Relative to the norm of each."""
    wanted = low_rank_weight_grads_reference(grad.double(), *case)
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            error = (a.cpu().double() - b).norm() / b.norm().clamp(min=1e-9)
            assert error < bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("group_size", [None, 16, 24, 128])
@pytest.mark.parametrize(("storage", "bits"), STORAGES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_are_those_of_float64(group_size, storage, bits, symmetric, grad_dtype):
    K = 384 if group_size else 1100
    case = case_of(257, K, storage, bits, symmetric=symmetric, group_size=group_size)
    grad = torch.randn(257, K).to(grad_dtype)
    # the float32 factors of bfloat16 gradients have 16 bits; sums of 1100 products
    assert_grads(low_rank_weight_grads(grad.cuda(), *on_gpu(case)), grad, case, bound=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 16, 64, 65, 256])
def test_gradients_of_every_rank_and_type(rank, dtype):
    case = case_of(1030, 2048, rank=rank, dtype=dtype, symmetric=False)
    grad = torch.randn(1030, 2048).bfloat16()
    assert_grads(low_rank_weight_grads(grad.cuda(), *on_gpu(case)), grad, case, bound=2e-5)


@pytest.mark.parametrize("rank", [16, 32, 100])
def test_all_kernels_round_the_same_bits(rank):
    """Gradients of whole numbers are exact sums of Q, and so is what passes through the mask."""
    case = on_gpu(case_of(512, 2048, "fp32", 3, rank=rank, exact=False))
    q = integers_of(case)
    grad = torch.randint(-2, 3, q.shape, device="cuda").bfloat16()
    found = low_rank_weight_grads(grad, *case)
    assert torch.equal(found.scale[:, 0], (grad.float() * q).sum(1))
    exact = (q.float() * case.scale).bfloat16()
    assert torch.equal(low_rank_weight(*case, torch.bfloat16), exact)
    assert torch.equal(integers_of(case, transposed=True), q.t())


def test_results_repeat_bit_for_bit():
    case = on_gpu(case_of(1024, 4096, symmetric=False, group_size=128, exact=False))
    x, dy = (torch.randn(300, n, device="cuda", dtype=torch.bfloat16) for n in (4096, 1024))
    first = [low_rank_weight(*case, torch.bfloat16), *low_rank_linear_grads(dy, x, *case)]
    for _ in range(20):
        again = [low_rank_weight(*case, torch.bfloat16), *low_rank_linear_grads(dy, x, *case)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_have_the_same_bits_alone_as_together():
    case = on_gpu(case_of(1000, 4096, exact=False))
    whole = integers_of(case)
    for rows in (slice(0, 1), slice(300, 999)):
        part = low_rank_integers(case.phi[rows], case.a[rows], case.b, case.rounding)
        assert torch.equal(part, whole[rows])


def test_gradients_by_parts_are_those_of_the_whole(monkeypatch):
    """More rows than GRADIENT_BYTES hold."""
    monkeypatch.setattr(low_rank_reference, "GRADIENT_BYTES", 2**26)
    case = case_of(4096, 11_008)
    x, dy = torch.randn(64, 11_008).bfloat16(), torch.randn(64, 4096).bfloat16()
    assert case.phi.numel() * x.element_size() > 2**26
    grads = low_rank_linear_grads(dy.cuda(), x.cuda(), *on_gpu(case))
    # dL/dW_hat is rounded to bfloat16, independently: 2**-9 of each of the terms, which add up as random ones
    assert_grads(grads, dy.double().t() @ x.double(), case, bound=3e-3)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_memory_is_bounded_and_nothing_of_a_weights_size_is_kept(is_compiled):
    layers, width, T = 6, 4096, 256
    case = on_gpu(case_of(width, width))
    trained = [t.requires_grad_() for t in (case.a, case.b, case.scale)]

    def stack(x: torch.Tensor) -> torch.Tensor:
        for _ in range(layers):
            x = low_rank_linear(x, case.phi, *case[1:5], None, case.rounding)
        return x

    run = torch.compile(stack, fullgraph=True) if is_compiled else stack
    x = torch.randn(T, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    run(x).sum().backward()  # compiles, and leaves what libraries keep
    for t in (x, *trained):
        t.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = run(x)
    output = 2 * T * width
    assert torch.cuda.memory_allocated() - before <= layers * output + 2**20
    y.sum().backward()
    # one gradient and what sums it up, or one weight; activations and their gradients; all dA, dB, ds
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 1.5 * 2**26 + (layers + 4) * output + 2**24


def test_compiled_and_checkpointed_layers_equal_plain_ones():
    case = on_gpu(case_of(512, 512, symmetric=False, group_size=128, exact=False))
    trained = [t.requires_grad_() for t in case[1:5]]
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return low_rank_linear(x, *case[:5], None, case.rounding)

    def outcome(function) -> list[torch.Tensor]:
        y = function(x)
        return [y, *torch.autograd.grad(y, [x, *trained], torch.ones_like(y))]

    plain = outcome(run)
    for function in (torch.compile(run, fullgraph=True), lambda x: checkpoint(run, x, use_reentrant=False)):
        for found, wanted in zip(outcome(function), plain, strict=True):
            assert torch.equal(found, wanted)


def test_forward_and_backward_do_not_wait_for_the_device():
    case = on_gpu(case_of(512, 512, symmetric=False))
    for t in case[1:5]:
        t.requires_grad_()
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    low_rank_linear(x, *case[:5], None, case.rounding).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        low_rank_linear(x, *case[:5], None, case.rounding).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_int32_reach_the_right_weights():
    """A weight of more than 2**31 elements, checked at its ends."""
    N, K = 70_000, 32_768
    rounding = LowRankRounding(bits=4, in_features=K, storage="int4")
    phi = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    q = low_rank_integers(phi, None, None, rounding)
    for rows in (slice(0, 50), slice(N - 50, N)):
        assert torch.equal(q[rows].cpu(), low_rank_integers_reference(phi[rows].cpu(), None, None, rounding))


def test_products_are_those_of_the_weight():
    case = on_gpu(case_of(512, 768))
    x = torch.randn(33, 768, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    found = low_rank_mm(x, *case[:5], bias, case.rounding)
    assert torch.equal(found, torch.nn.functional.linear(x, low_rank_weight(*case, torch.bfloat16), bias))
