"""Low-bit weights with a low-rank product added: the Triton kernel against the reference in Triton's
interpreter and compiled for devices, and the operators against torch's rules.

The interpreter runs in a process of its own, so that no other test meets it. It truncates to bfloat16 where a
device rounds.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from compiling import SHARED_BYTES, compiled, needs_triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import outcomes_of, run_checks

from qrecipes.quant import dequantize as plain_operators
from qrecipes.quant import dequantize_low_rank as operators
from qrecipes.quant.dequantize import dequantize_reference, quantize_to_affine, quantize_to_nf4
from qrecipes.quant.dequantize_low_rank import (
    dequantize_low_rank,
    dequantize_low_rank_mm,
    dequantize_low_rank_mm_grad_input,
    dequantize_low_rank_reference,
    dequantize_low_rank_triton,
)
from qrecipes.quant.device import DeviceLimits
from qrecipes.quant.formats import AffineFormat, NF4Format, Payload, WeightFormat
from qrecipes.quant.ranges import minmax_grid

FORMATS: dict[str, WeightFormat] = {
    "nf4": NF4Format(double_quantized=False),
    "nf4 double": NF4Format(),
    "nf4 blocks of 24": NF4Format(block_size=24, scale_block_size=3),
    "int4 g32 offset": AffineFormat(bits=4, group_size=32, symmetric=False, zero_point="float"),
    "int4 g32 symmetric": AffineFormat(bits=4, group_size=32),
    "int4 g32 zero": AffineFormat(bits=4, group_size=32, symmetric=False),
    "int3 g32 offset": AffineFormat(bits=3, group_size=32, symmetric=False, zero_point="float"),
    "int3 row": AffineFormat(bits=3),
    "int2 g16 zero": AffineFormat(bits=2, group_size=16, symmetric=False, scale_dtype="bfloat16"),
    "int8 row": AffineFormat(bits=8),
}
H100 = DeviceLimits((9, 0), 132, SHARED_BYTES["H100"])
SCALING = 0.25


def payload_of(w: torch.Tensor, format: WeightFormat) -> Payload:
    if isinstance(format, NF4Format):
        return quantize_to_nf4(w, format)
    return quantize_to_affine(w, minmax_grid(w, format), format)


def width(format: WeightFormat, K: int) -> int:
    """A width near K that the format's groups divide."""
    size = (format.group_size or 1) if isinstance(format, AffineFormat) else 1
    return max(K // size, 1) * size


def case_of(format: WeightFormat, N: int, K: int, rank: int, whole: bool = False):
    """A payload, A and B; whole numbers over 8 are exact in bfloat16, and their products' sums in float32."""
    K = width(format, K)
    payload = payload_of(torch.randn(N, K) * 2.0 ** torch.randint(-5, 3, (N, 1)), format)
    shapes = (rank, K), (N, rank)
    a, b = (torch.randint(-3, 4, s) / 8 if whole else torch.randn(s) for s in shapes)
    return payload, a, b, K


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operators_are_their_formulas_in_float64(format, dtype):
    payload, a, b, K = case_of(format, 20, 70, 5)
    x, dy, bias = (torch.randn(shape).to(dtype) for shape in ((3, K), (3, 20), (20,)))
    low_a, low_b = a.to(dtype).double(), b.to(dtype).double()
    base = dequantize_reference(payload, format, K, torch.float64)
    exact, size = base + SCALING * low_b @ low_a, base.abs() + SCALING * low_b.abs() @ low_a.abs()
    weight = dequantize_low_rank(payload, a, b, SCALING, format, K, dtype)
    assert weight.dtype is dtype
    # rounded to its type once, from sums of six terms: in float32, as NF4's magnitudes always are
    of_sums = 0.0 if dtype is torch.float64 else 2.0**-21
    bound = torch.finfo(dtype).eps * exact.abs() + (of_sums + 1e-15) * size
    assert ((weight.double() - exact).abs() <= bound).all()
    y = dequantize_low_rank_mm(x, payload, a, b, SCALING, format, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    grad = dequantize_low_rank_mm_grad_input(dy, payload, a, b, SCALING, format, K)
    assert torch.equal(grad, dy @ weight)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_operators_keep_torchs_contract(format):
    """Schemas, fake tensors and aliasing, with torch's own checks."""
    payload, a, b, K = case_of(format, 20, 70, 5)
    parts = ([*payload], a, b, SCALING, format.key)
    for name, args in (
        ("dequantize_low_rank", (*parts, K, torch.bfloat16)),
        ("dequantize_low_rank_mm", (torch.randn(3, K), *parts, torch.randn(20))),
        ("dequantize_low_rank_mm_grad_input", (torch.randn(3, 20), *parts, K)),
    ):
        op = getattr(torch.ops.qrecipes, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_forming_the_weight_has_an_implementation_for_cuda():
    """The kernel would otherwise never be called, and nothing would say so; the products call it by the
    dispatcher."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qrecipes::dequantize_low_rank", "CUDA")


COMPILED = [
    ("nf4 double", 4096, 64, torch.bfloat16, 90),
    ("nf4", 4096, 16, torch.bfloat16, 80),
    ("int4 g32 offset", 4096, 64, torch.bfloat16, 90),
    ("int4 g32 zero", 4096, 256, torch.float16, 80),
    ("int3 g32 offset", 4096, 8, torch.bfloat16, 80),
    ("int8 row", 4096, 64, torch.bfloat16, 90),
    ("int2 g16 zero", 4096, 8, torch.float32, 80),
]
POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}


@needs_triton
@pytest.mark.parametrize(
    ("name", "K", "rank", "dtype", "capability"),
    COMPILED,
    ids=[f"{name}-{rank}-sm_{sm}" for name, _, rank, _, sm in COMPILED],
)
def test_the_kernel_compiles_to_tensor_cores_and_wide_stores(name, K, rank, dtype, capability):
    """And rounds every product and sum by itself, as the reference does. float32 is multiplied in full."""
    from qrecipes.quant import dequantize_low_rank_kernels as kernels
    from qrecipes.quant.dequantize_kernels import stored_weight

    payload, *_ = case_of(FORMATS[name], 8, K, 1)
    weight = stored_weight(payload, FORMATS[name], K)
    names = ("packed_ptr", "scale_ptr", "extra_ptr", "mean_ptr")
    types = {n: POINTERS[t.dtype] for n, t in zip(names, weight.tensors, strict=True) if t is not None}
    constants = {n: None for n, t in zip(names, weight.tensors, strict=True) if t is None}
    types |= dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), POINTERS[dtype])
    types |= dict.fromkeys(("N", "K", "R", "row_stride", "G"), "i32") | {"scaling": "fp32"}
    blocks = kernels.BLOCKS
    constants |= kernels.low_rank_constants(weight, rank, dtype, blocks)
    kernel = compiled(
        kernels._dequantize_low_rank_kernel,
        capability,
        types,
        constants,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=False,
    )
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_BYTES["RTX 4090"]
    assert "tf32" not in ptx
    assert "st.global.v4.b32" in ptx
    if dtype is not torch.float32:
        assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
        assert "fma.rn" not in ptx


# What follows the next line runs in the process that `interpreted` starts, not here.
def rounded(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 in `dtype` as the interpreter rounds it."""
    if dtype is not torch.bfloat16:
        return w.to(dtype)
    return (w.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def assert_references_bits(payload, a, b, format, K, dtype) -> None:
    wanted = dequantize_low_rank_reference(payload, a, b, SCALING, format, K, torch.float32)
    found = dequantize_low_rank_triton(payload, a, b, SCALING, format, K, dtype)
    assert found.dtype is dtype
    torch.testing.assert_close(found, rounded(wanted, dtype), rtol=0, atol=0, equal_nan=True)


formats = st.sampled_from(list(FORMATS.values()))
types = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=40, deadline=None, database=None, phases=[Phase.generate])
@given(formats, st.integers(1, 75), st.integers(1, 150), st.integers(1, 140), types)
def check_weights_have_the_references_bits_where_the_product_is_exact(format, N, K, rank, dtype):
    payload, a, b, K = case_of(format, N, K, rank, whole=True)
    assert_references_bits(payload, a, b, format, K, dtype)


@settings(max_examples=15, deadline=None, database=None, phases=[Phase.generate])
@given(formats, st.integers(1, 75), st.integers(1, 150), st.integers(1, 140), types)
def check_weights_are_the_references_but_for_the_order_of_sums(format, N, K, rank, dtype):
    """`rank` products summed in float32 differ by as many roundings at most, and may be rounded to the next
    number of the output's type then."""
    payload, a, b, K = case_of(format, N, K, rank)
    a, b = a.to(dtype), b.to(dtype)
    exact = dequantize_low_rank_reference(payload, a, b, SCALING, format, K, torch.float32)
    found = dequantize_low_rank_triton(payload, a, b, SCALING, format, K, dtype)
    sums = rank * 2.0**-23 * SCALING * b.double().abs() @ a.double().abs()
    bound = sums + torch.finfo(dtype).eps * exact.double().abs() + torch.finfo(dtype).tiny
    if dtype is torch.float16:
        bound = bound + 2.0**-24  # below its normal numbers
    assert ((found.double() - exact.double()).abs() <= bound).all()


def check_other_blocks_have_the_same_bits():
    """Repeats that do not divide the rows, stages, tiles wider than a row."""
    kernels = operators.kernels
    for name, N, K, rank in (
        ("nf4", 150, 200, 5),
        ("int4 g32 offset", 70, 96, 70),
        ("int3 row", 130, 37, 16),
    ):
        payload, a, b, K = case_of(FORMATS[name], N, K, rank, whole=True)
        for blocks in ((64, 128, 8, 4, 3), (128, 64, 4, 2, 1), (16, 256, 4, 1, 1), (32, 16, 4, 8, 2)):
            with mock.patch.object(kernels, "BLOCKS", kernels.LowRankBlocks(*blocks)):
                assert_references_bits(payload, a, b, FORMATS[name], K, torch.float32)


def check_bytes_at_any_address():
    """A device refuses to read words that are not aligned, and bytes inside a larger buffer may not be."""
    for name in ("nf4", "int8 row", "int3 row"):
        payload, a, b, K = case_of(FORMATS[name], 3, 64, 5, whole=True)
        packed, *rest = payload
        buffer = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
        shifted = buffer[1:].view(packed.shape).copy_(packed)
        assert_references_bits((shifted, *rest), a, b, FORMATS[name], K, torch.float32)


def check_factors_may_be_views_into_larger_tensors():
    """Of NaN, which must not be read."""
    payload, a, b, K = case_of(FORMATS["nf4"], 20, 70, 5, whole=True)

    def inside(t: torch.Tensor) -> torch.Tensor:
        larger = torch.full((t.shape[0] + 2, t.shape[1] + 3), torch.nan)
        larger[1:-1, 1:-2] = t
        return larger[1:-1, 1:-2]

    assert_references_bits(payload, inside(a), inside(b.t()).t(), FORMATS["nf4"], K, torch.float32)


def check_what_is_not_finite_shows_where_it_belongs():
    """A row of B, and a group's magnitude; nothing beside them."""
    payload, a, b, K = case_of(FORMATS["nf4"], 20, 140, 5, whole=True)
    b[3, 1], payload[1][7, 1] = torch.nan, torch.inf
    found = dequantize_low_rank_triton(payload, a, b, SCALING, FORMATS["nf4"], K, torch.float32)
    finite = torch.ones(20, K, dtype=torch.bool)
    finite[3] = finite[7, 64:128] = False
    at_zero = dequantize_reference(payload, FORMATS["nf4"], K, torch.float32)[7, 64:128].isnan()
    assert torch.equal(found.isfinite(), finite)
    assert torch.equal(found[7, 64:128].isnan(), at_zero)


def check_no_rows():
    format = FORMATS["int4 g32 offset"]
    payload, a, b, K = case_of(format, 5, 64, 3)
    none = tuple(t[:0] for t in payload)
    assert dequantize_low_rank_triton(none, a, b[:0], 1.0, format, K, torch.float32).shape == (0, 64)


def check_operators_choose_by_device_and_type():
    format = FORMATS["int4 g32 offset"]
    payload, a, b, K = case_of(format, 5, 64, 3, whole=True)
    for limits, dtype, used in (
        (H100, torch.float16, True),
        (H100, torch.float32, True),
        (H100, torch.float64, False),
        (DeviceLimits((7, 5), 72, 65_536), torch.float16, False),
    ):
        launch = mock.Mock(side_effect=operators.kernels.launch_dequantize_low_rank)
        with (
            mock.patch.object(plain_operators, "device_limits", lambda _, limits=limits: limits),
            mock.patch.object(operators.kernels, "launch_dequantize_low_rank", launch),
        ):
            found = operators._dequantize_cuda(list(payload), a, b, SCALING, format.key, K, dtype)
        assert launch.call_count == used, (limits, dtype)
        wanted = dequantize_low_rank_reference(payload, a, b, SCALING, format, K, dtype)
        assert torch.equal(found, wanted)


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return outcomes_of(__file__, timeout=200)


@pytest.mark.parametrize("name", CHECKS)
def test_kernel_in_the_interpreter(name, interpreted):
    assert interpreted[name] is None


if __name__ == "__main__":
    run_checks(CHECKS)
