"""Triton kernels of low-rank rounding: against the reference in Triton's interpreter, compiled for devices.

The interpreter runs in a process of its own, so that no other test meets it. It truncates to bfloat16 where a
device rounds.
"""

from __future__ import annotations

from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from compiling import compiled, needs_triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import outcomes_of, run_checks
from low_rank_cases import Case, cases, make_case, z_in_float64

from qrecipes.quant import low_rank_rounding as operators
from qrecipes.quant.device import DeviceLimits
from qrecipes.quant.low_rank_reference import (
    low_rank_integers_reference,
    low_rank_weight_grads_reference,
    low_rank_weight_reference,
)
from qrecipes.quant.low_rank_rounding import (
    low_rank_integers_triton,
    low_rank_weight_grads_triton,
    low_rank_weight_triton,
)
from qrecipes.quant.low_rank_storage import LowRankRounding

if find_spec("triton") is not None:
    from qrecipes.quant.low_rank_kernels import Blocks

H100, RTX4090 = 232_448, 101_376
"""Shared memory that a block can have."""
STEP = 2.0**-13
"""How near two parts of bfloat16 are to a float32, if each is truncated."""
POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
COMPILED = [
    (make_case(LowRankRounding(bits=4, in_features=4096), 64, 32, dtype=torch.bfloat16), torch.bfloat16, 90),
    (make_case(LowRankRounding(bits=4, in_features=4096, storage="int4"), 64, 32), torch.bfloat16, 90),
    (
        make_case(
            LowRankRounding(bits=2, in_features=4096, storage="bf16", group_size=128),
            64,
            128,
            symmetric=False,
            dtype=torch.bfloat16,
        ),
        torch.bfloat16,
        90,
    ),
    (
        make_case(
            LowRankRounding(bits=3, in_features=96, storage="int4", group_size=24), 64, 8, symmetric=False
        ),
        torch.float32,
        80,
    ),
    (make_case(LowRankRounding(bits=4, in_features=4096), 64, 64, dtype=torch.bfloat16), torch.bfloat16, 80),
    (make_case(LowRankRounding(bits=4, in_features=4096), 64, 256), torch.bfloat16, 90),
    (
        make_case(LowRankRounding(bits=8, in_features=4096, storage="fp32"), 64, 0, symmetric=False),
        torch.float16,
        80,
    ),
]
compiled_cases = pytest.mark.parametrize(
    ("case", "dtype", "capability"),
    COMPILED,
    ids=[f"{c.rounding.storage}-{0 if c.a is None else c.a.shape[1]}-sm_{sm}" for c, _, sm in COMPILED],
)


def compiled_case(kernel, case: Case, capability: int, pointers: dict, constants: dict, **options: int):
    """A kernel as its launch specializes it for aligned tensors."""
    pointers = dict(zip(("phi", "a", "b", "scale", "zero"), case[:5], strict=True)) | pointers
    types = {f"{name}_ptr": POINTERS[t.dtype] for name, t in pointers.items() if t is not None}
    constants = constants | {f"{name}_ptr": None for name, t in pointers.items() if t is None}
    types |= dict.fromkeys(("N", "K", "R", "phi_stride"), "i32")
    types |= {"blocks_of_split": "i32 any", "splits": "i32 any", "scaling": "fp32"}
    return compiled(kernel, capability, types, constants, **options, enable_fp_fusion=False)


def multiplies_as_it_should(ptx: str, case: Case, capability: int) -> bool:
    """On tensor cores, in bfloat16; TF32 would round A and B to 11 bits."""
    if case.a is None:
        return "mma" not in ptx
    return ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx and "tf32" not in ptx


@needs_triton
@compiled_cases
def test_weights_compile_without_contracted_sums(case, dtype, capability):
    """An FMA would round Z once where another kernel rounds twice."""
    from qrecipes.quant import low_rank_kernels as kernels

    out = torch.empty(0, dtype=dtype)
    blocks = kernels.blocks_of(kernels.WEIGHT_BLOCKS, case.rounding, case.a)
    constants = kernels.weight_constants(case.rounding, case.a)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    kernel = compiled_case(kernels._weight_kernel, case, capability, {"out": out}, constants, **options)
    ptx = kernel.asm["ptx"]
    assert multiplies_as_it_should(ptx, case, capability)
    assert kernel.metadata.shared <= RTX4090
    assert "fma.rn" not in ptx


@needs_triton
@compiled_cases
def test_gradients_fit_the_shared_memory_of_a_block(case, dtype, capability):
    """Of an H100, and of the devices of capability 8 that have the least. No atomics: sums have one order."""
    from qrecipes.quant import low_rank_kernels as kernels

    grad, part = torch.empty(0, dtype=dtype), torch.empty(0)
    pointers = {"grad": grad, "parts": part}
    constants = kernels.grads_constants(case.rounding, case.a)
    if constants["ROUNDED"]:
        case = case._replace(phi=torch.empty(0, dtype=torch.bfloat16))
    bound = H100 if capability == 90 else RTX4090
    stages = kernels.num_stages(grad, kernels.Operands(*case[:5]), constants, bound)
    warps = kernels.blocks_of(kernels.GRADS_BLOCKS, case.rounding, case.a).num_warps
    options = {"num_warps": warps, "num_stages": stages}
    kernel = compiled_case(kernels._grads_kernel, case, capability, pointers, constants, **options)
    assert kernel.metadata.shared <= bound
    assert multiplies_as_it_should(kernel.asm["ptx"], case, capability)
    assert not {"atom.", "red."} & {word[:4] for word in kernel.asm["ptx"].split()}


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_sums_of_parts_compile_to_wide_loads(capability):
    """Eight parts at once, 16 bytes a thread; and products and sums are rounded by themselves."""
    from qrecipes.quant import low_rank_kernels as kernels

    case = make_case(LowRankRounding(bits=4, in_features=2048, group_size=128), 64, 16, symmetric=False)
    constants = kernels.grads_constants(case.rounding, case.a) | {"BLOCK": kernels.SUMS_BLOCK}
    grads = {f"grad_{name}": torch.empty(0) for name in ("a", "b", "scale", "zero")}
    ptx = compiled_case(
        kernels._sums_kernel, case, capability, {"parts": torch.empty(0)} | grads, constants, num_warps=4
    ).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") >= 16  # of dA and of dB
    assert "fma.rn" not in ptx


@needs_triton
@pytest.mark.parametrize(("rank", "repeats"), [(0, True), (64, True), (65, False)])
def test_no_loop_over_blocks_of_the_rank_is_inside_another(rank, repeats):
    from qrecipes.quant import low_rank_kernels as kernels

    case = make_case(LowRankRounding(bits=4, in_features=256), 64, rank, dtype=torch.bfloat16)
    constants = kernels.weight_constants(case.rounding, case.a)
    assert (constants["REPEATS"] > 1) == repeats
    assert (constants["RANK_BLOCKS"] <= 1) == repeats


# What follows the next line runs in the process that `interpreted` starts, not here.
def rounded(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 in `dtype` as the interpreter rounds it."""
    if dtype is not torch.bfloat16:
        return w.to(dtype)
    return (w.view(torch.int32) & -65536).view(torch.float32).bfloat16()


@settings(max_examples=25, deadline=None, database=None, phases=[Phase.generate])
@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def check_weights_and_integers_have_the_references_bits(case, dtype):
    """Halves included, since Z is exact here."""
    wanted = low_rank_weight_reference(*case, torch.float32)
    found = low_rank_weight_triton(*case, dtype)
    assert found.dtype is dtype
    assert torch.equal(found, rounded(wanted, dtype))
    parts = (*case[:3], case.rounding)
    q = low_rank_integers_triton(*parts)
    assert torch.equal(q, low_rank_integers_reference(*parts))
    assert torch.equal(low_rank_integers_triton(*parts, transposed=True), q.t())


@settings(max_examples=10, deadline=None, database=None, phases=[Phase.generate])
@given(cases(exact=False))
def check_integers_differ_from_the_reference_only_next_to_a_half(case):
    parts = (*case[:3], case.rounding)
    differs = low_rank_integers_triton(*parts) != low_rank_integers_reference(*parts)
    z = z_in_float64(case)
    assert ((z - z.floor() - 0.5).abs()[differs] < 1e-4).all()  # float32 sums of up to 70 products of about 1
    assert differs.double().mean() < 0.01


def assert_close_grads(grad: torch.Tensor, case: Case) -> None:
    """Relative to the magnitudes that are summed: float32 sums of some hundred, and STEP in products."""
    found = low_rank_weight_grads_triton(grad, *case)
    wanted = low_rank_weight_grads_reference(grad, *case)
    absolute = [None if t is None else t.abs() for t in case[:5]]
    size = grad.double().abs()
    s = case.scale.double().repeat_interleave(case.rounding.in_features // case.rounding.num_groups, 1)
    grouped = size.unflatten(1, (case.rounding.num_groups, -1)).sum(-1)
    sizes = [
        None if case.a is None else (size * s) @ absolute[2].double().t(),
        None if case.a is None else absolute[1].double().t() @ (size * s),
        grouped * 2.0**case.rounding.bits,
        None if case.zero is None else grouped * case.scale,
    ]
    for name, a, b, bound in zip(found._fields, found, wanted, sizes, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype is torch.float32
            assert ((a - b).abs().double() <= (4e-6 + STEP * (name in ("a", "b"))) * bound + 1e-12).all(), (
                name
            )


@settings(max_examples=25, deadline=None, database=None, phases=[Phase.generate])
@given(cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def check_gradients_are_the_references(case, dtype):
    grad = torch.randn(case.phi.shape[0], case.rounding.in_features).to(dtype)
    assert_close_grads(grad, case)


def check_many_blocks_of_rows_and_columns():
    """Splits of the rows with several blocks, a last block that is not full, and several tiles of columns."""
    for group_size, K, rank, numbers_of_programs in ((None, 136, 5, (1, 4, 512)), (136, 272, 70, (4,))):
        weight = LowRankRounding(bits=4, in_features=K, group_size=group_size, scaling=0.5)
        case = make_case(weight, 140, rank, symmetric=False)
        grad = torch.randn(140, K)
        for programs in numbers_of_programs:
            with mock.patch.object(operators.kernels, "GRADIENT_PROGRAMS", programs):
                assert_close_grads(grad, case)
        wanted = low_rank_weight_reference(*case, torch.float32)
        assert torch.equal(low_rank_weight_triton(*case, torch.float32), wanted)


def check_other_blocks_have_the_same_bits():
    """Repeats that do not divide the rows, stages, other tiles; sums are of whole numbers, of any order."""
    K, N = 144, 330
    for storage, rank in (("fixed_point8", 5), ("int4", 70), ("bf16", 0)):
        case = make_case(LowRankRounding(bits=4, in_features=K, storage=storage, scaling=0.5), N, rank)
        case = case._replace(scale=torch.full_like(case.scale, 0.25))
        for name in ("a", "b") if rank else ():
            case = case._replace(**{name: torch.randint(-2, 3, getattr(case, name).shape).float()})
        grad = torch.randint(-2, 3, (N, K)).float()
        w = low_rank_weight_reference(*case, torch.float32)
        grads = [t for t in low_rank_weight_grads_reference(grad, *case) if t is not None]
        for blocks in (Blocks(64, 128, 8, 4), Blocks(128, 64, 4, 3, 1), Blocks(64, 32, 4, 2, 3)):
            table = {"": blocks}
            with mock.patch.multiple(operators.kernels, WEIGHT_BLOCKS=table, GRADS_BLOCKS=table):
                assert torch.equal(low_rank_weight_triton(*case, torch.float32), w)
                found = [t for t in low_rank_weight_grads_triton(grad, *case) if t is not None]
            for a, b in zip(found, grads, strict=True):
                assert torch.equal(a, b), (storage, blocks)


def check_parts_are_added_up_one_after_the_other():
    """The order that makes results repeat, for more parts than are loaded at once, in groups, and dz."""
    N, K, R, splits, per_group = 7, 24, 5, 19, 11
    tiles, G = 2 * per_group, 2
    a, b, s, z = (torch.randn(*shape) for shape in ((tiles, N, R), (splits, R, K), (tiles, N), (tiles, N)))
    scale, zero = torch.rand(N, G), torch.randn(N, G) * 10
    grads = [torch.empty(shape) for shape in ((N, R), (R, K), (N, G), (N, G))]
    numbers = [-(-n // 16) for n in (N * R, R * K, N * G)]
    parts = torch.cat([t.flatten() for t in (a, b, s, z)])
    constants = {"BITS": 4, "TILES_OF_GROUP": per_group, "TILES_OF_ROW": tiles, "BLOCK": 16}
    operators.kernels._sums_kernel[(sum(numbers),)](parts, scale, zero, *grads, N, K, R, splits, **constants)

    def in_order(terms: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(terms.shape[1:])
        for term in terms:
            total = total + term
        return total

    by_group = [torch.stack([in_order(t) for t in x.view(G, per_group, N)], 1) for x in (s, z)]
    is_trained = (zero.round() >= -8) & (zero.round() <= 7)
    d_zero = torch.where(is_trained, -scale * by_group[1], 0.0)
    assert not is_trained.all()
    for found, wanted in zip(grads, (in_order(a), in_order(b), by_group[0], d_zero), strict=True):
        assert torch.equal(found, wanted)


def check_scale_gradients_are_exact_sums_of_the_integers_of_the_forward_pass():
    """Whole numbers, exact in float32: any other Q than that of `low_rank_integers` would show."""
    case = make_case(LowRankRounding(bits=4, in_features=200), 70, 16, exact=False)
    grad = torch.randint(-2, 3, (70, 200)).float()
    q = low_rank_integers_triton(*case[:3], case.rounding)
    found = low_rank_weight_grads_triton(grad, *case).scale
    assert torch.equal(found[:, 0], (grad * q).sum(1))


def check_memory_outside_does_not_matter():
    """Tensors inside larger ones of NaN, as views, and gradients that are transposed."""
    case = make_case(LowRankRounding(bits=4, in_features=37, storage="fp32"), 5, 3, symmetric=False)

    def inside(t: torch.Tensor) -> torch.Tensor:
        larger = torch.full((t.shape[0] + 2, t.shape[1] + 3), torch.nan)
        larger[1:-1, 1:-2] = t
        return larger[1:-1, 1:-2]

    strided = Case(*(inside(t) for t in case[:5]), case.rounding)
    assert torch.equal(
        low_rank_weight_triton(*strided, torch.float32), low_rank_weight_triton(*case, torch.float32)
    )
    grad = torch.randn(37, 5).t()
    for a, b in zip(
        low_rank_weight_grads_triton(grad, *strided),
        low_rank_weight_grads_triton(grad.contiguous(), *case),
        strict=True,
    ):
        assert torch.equal(a, b)


def check_what_is_not_finite_shows_in_its_row():
    case = make_case(LowRankRounding(bits=4, in_features=40), 5, 3)
    case.a[2, 0], case.scale[4] = torch.nan, torch.inf
    w = low_rank_weight_triton(*case, torch.float32)
    wanted = low_rank_weight_reference(*case, torch.float32)
    torch.testing.assert_close(w, wanted, rtol=0, atol=0, equal_nan=True)
    assert (low_rank_integers_triton(*case[:3], case.rounding)[2] == 0).all()
    grads = low_rank_weight_grads_triton(torch.ones(5, 40), *case)
    assert grads.scale[2].isnan().all()
    assert grads.scale[:2].isfinite().all()


def check_no_rows_and_no_programs():
    case = make_case(LowRankRounding(bits=4, in_features=40), 5, 3, symmetric=False)
    none = Case(
        *(t if name == "b" else t[:0] for name, t in zip(Case._fields, case[:5], strict=False)), case.rounding
    )
    assert low_rank_weight_triton(*none, torch.float32).shape == (0, 40)
    grads = low_rank_weight_grads_triton(torch.empty(0, 40), *none)
    assert grads.b.abs().sum() == 0
    assert grads.a.shape == (0, 3)


def check_operators_choose_by_device_and_type():
    case = make_case(LowRankRounding(bits=4, in_features=40), 5, 3, symmetric=False)
    wide = case._replace(scale=case.scale.double())
    grad = torch.randn(5, 40)
    for limits, weight, used in (
        (DeviceLimits((9, 0), 132, H100), case, True),
        (DeviceLimits((8, 9), 128, RTX4090), case, True),
        (DeviceLimits((9, 0), 132, H100), wide, False),
        (DeviceLimits((7, 5), 72, 65_536), case, False),
    ):
        launched: list[str] = []
        add = launched.append
        patches = [mock.patch.object(operators, "device_limits", lambda _, limits=limits: limits)]
        for name in ("launch_weight", "launch_grads"):
            launch = getattr(operators.kernels, name)

            def recorded(*arguments, add=add, launch=launch, name=name, **options):
                add(name)
                return launch(*arguments, **options)

            patches.append(mock.patch.object(operators.kernels, name, recorded))
        for patch in patches:
            patch.start()
        found = operators._weight_on_cuda(*weight, torch.float32)
        grads = operators._weight_grads_on_cuda(grad, *weight)
        for patch in patches:
            patch.stop()
        assert launched == ["launch_weight", "launch_grads"] * used, (limits, launched)
        torch.testing.assert_close(found, low_rank_weight_reference(*weight, torch.float32), rtol=0, atol=0)
        for a, b in zip(grads, low_rank_weight_grads_reference(grad, *weight), strict=True):
            torch.testing.assert_close(a, b)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return outcomes_of(__file__, timeout=200)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name, interpreted):
    assert interpreted[name] is None


if __name__ == "__main__":
    run_checks(CHECKS)
