"""Dequantization and products by Triton kernels against the reference, and the rule that picks a kernel.

The kernels run under Triton's interpreter, in a process of its own, so that no other test meets it. It
truncates to bfloat16 where a device rounds.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreter import outcomes_of, run_checks

from qrecipes.quant import dequantize as operators
from qrecipes.quant.dequantize import (
    dequantize_mm_triton,
    dequantize_reference,
    dequantize_triton,
    quantize_to_affine,
    quantize_to_nf4,
)
from qrecipes.quant.dequantize_tiles import (
    LEAST_SPLIT,
    MAX_FUSED_TOKENS,
    MAX_SPLITS,
    MatrixTiles,
    VectorTiles,
    choose_tiles,
)
from qrecipes.quant.device import DeviceLimits
from qrecipes.quant.formats import AffineFormat, NF4Format, Payload, WeightFormat
from qrecipes.quant.ranges import minmax_grid

REPOSITORY = Path(__file__).parents[2]
H100 = DeviceLimits((9, 0), 132, 232_448)
TYPES = (torch.float32, torch.float16, torch.bfloat16)

affine_formats = st.builds(
    lambda bits, group_size, zero, floats: AffineFormat(
        bits=bits,
        group_size=group_size,
        symmetric=zero is None,
        zero_point=zero or "integer",
        scale_dtype=floats[0],
        offset_dtype=floats[1],
    ),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([None, 16, 24, 32, 256]),
    st.sampled_from([None, "integer", "float"]),
    st.sampled_from([("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]),
)
nf4_formats = st.builds(
    NF4Format,
    block_size=st.sampled_from([16, 24, 64]),
    double_quantized=st.booleans(),
    scale_block_size=st.sampled_from([3, 256]),
)


def payload_of(w: torch.Tensor, format: WeightFormat) -> Payload:
    if isinstance(format, NF4Format):
        return quantize_to_nf4(w, format)
    return quantize_to_affine(w, minmax_grid(w, format), format)


@st.composite
def weights(draw) -> tuple[Payload, WeightFormat, int]:
    """A payload of a random weight of ragged shape, its format and K; rows differ in magnitude."""
    format = draw(st.one_of(affine_formats, nf4_formats))
    N, K = draw(st.integers(1, 5)), draw(st.integers(1, 75))
    if isinstance(format, AffineFormat) and format.group_size:
        K = format.group_size * (1 + K // 40)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(N, K, generator=generator) * 2.0 ** torch.randint(-9, 3, (N, 1), generator=generator)
    w[0, : K // 2] = 0
    return payload_of(w, format), format, K


def test_a_product_has_one_way_to_be_computed_whatever_the_sizes():
    for T in (1, 2, 16, 17, MAX_FUSED_TOKENS, MAX_FUSED_TOKENS + 1, 4096):
        for N, K in [(1, 1), (4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (32, 100_000)]:
            for dtype in TYPES:
                tiles = choose_tiles(T, N, K, dtype, H100)
                fused = T == 1 or (T <= MAX_FUSED_TOKENS and dtype is not torch.float32)
                assert (tiles is not None) == fused
                if tiles is None:
                    continue
                assert isinstance(tiles, VectorTiles) == (T == 1)
                assert T == 1 or tiles.block_t >= T
                assert 1 <= tiles.splits <= MAX_SPLITS
                assert tiles.splits == 1 or tiles.splits * LEAST_SPLIT <= K


def test_small_products_are_split_and_large_ones_are_not():
    for T in (1, 8):
        assert choose_tiles(T, 1024, 16_384, torch.bfloat16, H100).splits > 1
        assert choose_tiles(T, 32_000, 16_384, torch.bfloat16, H100).splits == 1


def test_operators_have_implementations_for_cuda():
    """The kernels would otherwise never be called, and nothing would say so."""
    for name in ("dequantize", "dequantize_mm", "dequantize_mm_grad_input"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qrecipes::{name}", "CUDA")


# What follows the next line runs in the process that `interpreted` starts, not here.
def rounded(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 in `dtype` as the interpreter rounds it."""
    if dtype is not torch.bfloat16:
        return w.to(dtype)
    return (w.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def assert_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def assert_close_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> None:
    """Against float64 of the weights in the type of x: float32 sums of 1000 products at most."""
    exact = x.double() @ w.to(x.dtype).double().t() + bias.double()
    scale = x.double().abs() @ w.double().abs().t() + bias.double().abs()
    step = torch.finfo(y.dtype).eps  # of the output's rounding
    assert ((y.double() - exact).abs() <= 1e-5 * scale + step * exact.abs() + 1e-30).all()


@settings(max_examples=40, deadline=None, database=None, phases=[Phase.generate])
@given(weights(), st.sampled_from(TYPES))
def check_weights_have_the_references_bits(weight, dtype):
    payload, format, K = weight
    found = dequantize_triton(payload, format, K, dtype)
    assert_equal(found, rounded(dequantize_reference(payload, format, K, torch.float32), dtype))


def check_rows_longer_than_a_program():
    for format in (AffineFormat(bits=4, symmetric=False), AffineFormat(bits=3), NF4Format()):
        payload = payload_of(torch.randn(2, 2500), format)
        wanted = dequantize_reference(payload, format, 2500, torch.float32)
        assert_equal(dequantize_triton(payload, format, 2500, torch.float32), wanted)


def check_bytes_at_any_address():
    """A device refuses to read words that are not aligned, and bytes inside a larger buffer may not be."""
    for bits in (2, 3, 4, 8):
        format = AffineFormat(bits=bits, group_size=32)
        packed, *rest = payload_of(torch.randn(3, 64), format)
        buffer = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
        shifted = buffer[1:].view(packed.shape).copy_(packed)
        assert shifted.data_ptr() % 2 == 1
        wanted = dequantize_reference((packed, *rest), format, 64, torch.float32)
        assert_equal(dequantize_triton((shifted, *rest), format, 64, torch.float32), wanted)


def check_what_is_not_finite_stays_in_its_group():
    for format in (AffineFormat(bits=4, group_size=16), NF4Format(block_size=16, double_quantized=False)):
        K, bias = 37 if isinstance(format, NF4Format) else 48, torch.zeros(3)
        payload = payload_of(torch.randn(3, K), format)
        payload[1][0, 1], payload[1][1, 2] = float("nan"), float("inf")
        wanted = dequantize_reference(payload, format, K, torch.float32)
        assert_equal(dequantize_triton(payload, format, K, torch.float32), wanted)
        for T, tiles in ((1, VectorTiles(repeats=1)), (2, MatrixTiles(16, 16, 32))):
            y = dequantize_mm_triton(torch.ones(T, K), payload, format, bias, tiles)
            assert torch.equal(y.isfinite(), torch.ones(T, K).matmul(wanted.t()).isfinite())


def check_the_end_of_a_ragged_row_adds_nothing():
    """The lowest level is stored there, one below any that a symmetric weight has: in float16 perhaps inf."""
    format, x = AffineFormat(bits=4), torch.full((2, 37), 1e-4, dtype=torch.float16)
    payload = payload_of(torch.full((3, 37), 60_000.0), format)
    assert 8 * payload[1].min() > torch.finfo(torch.float16).max
    for T, tiles in ((1, VectorTiles(repeats=1)), (2, MatrixTiles(16, 16, 32))):
        y = dequantize_mm_triton(x[:T], payload, format, None, tiles)
        assert (y.float() / (37 * 6.0) - 1).abs().max() < 0.01  # float16 of 1e-4 has 7 bits


@settings(max_examples=25, deadline=None, database=None, phases=[Phase.generate])
@given(
    weights(),
    st.sampled_from([torch.float32, torch.float16]),  # bfloat16 weights would be truncated
    st.sampled_from(
        [
            (1, VectorTiles()),
            (1, VectorTiles(block_n=4, num_warps=2, repeats=1)),
            (1, VectorTiles(repeats=1, splits=2)),
            (1, MatrixTiles(16, 16, 16)),
            (3, MatrixTiles(16, 16, 32)),
            (16, MatrixTiles(16, 32, 16, splits=4)),
            (19, MatrixTiles(32, 16, 64)),
        ]
    ),
    st.booleans(),
)
def check_products_are_those_of_the_references_weights(weight, dtype, plan, has_bias):
    (payload, format, K), (T, tiles) = weight, plan
    generator = torch.Generator().manual_seed(K)
    x = torch.randn(T, K, generator=generator).to(dtype)
    bias = torch.randn(payload[0].shape[0], generator=generator).to(dtype)
    y = dequantize_mm_triton(x, payload, format, bias if has_bias else None, tiles)
    assert y.dtype is dtype
    w = dequantize_reference(payload, format, K, torch.float32)
    assert_close_product(y, x, w, bias if has_bias else torch.zeros_like(bias))


def check_splits_cover_long_rows_and_may_be_empty():
    format = AffineFormat(bits=4, group_size=32, symmetric=False)
    payload = payload_of(torch.randn(5, 1056), format)
    x, bias = torch.randn(2, 1056), torch.randn(5)
    w = dequantize_reference(payload, format, 1056, torch.float32)
    for splits in (2, 4, 8):
        for T, tiles in (
            (1, VectorTiles(repeats=1, splits=splits)),
            (2, MatrixTiles(16, 16, 128, splits=splits)),
        ):
            assert_close_product(dequantize_mm_triton(x[:T], payload, format, bias, tiles), x[:T], w, bias)


def record_launches(launched: list[str]) -> list[mock._patch]:
    """Patches under which every launch adds its name."""
    patches = []
    for name in ("dequantize", "vector", "matrix"):
        launch = getattr(operators.kernels, f"launch_{name}")

        def recorded(*arguments, launch=launch, name=name):
            launched.append(name)
            launch(*arguments)

        patches.append(mock.patch.object(operators.kernels, f"launch_{name}", recorded))
    return patches


def check_operators_choose_by_tokens_type_and_device():
    format = AffineFormat(bits=4, group_size=32, symmetric=False)
    payload, key = list(payload_of(torch.randn(5, 64), format)), format.key
    w = dequantize_reference(tuple(payload), format, 64, torch.float32)
    for T, dtype, device, expected in [
        (0, torch.float16, H100, ["dequantize"]),
        (1, torch.float16, H100, ["vector"]),
        (1, torch.float32, H100, ["vector"]),
        (5, torch.float16, H100, ["matrix"]),
        (5, torch.float32, H100, ["dequantize"]),
        (200, torch.float16, H100, ["dequantize"]),
        (5, torch.float64, H100, []),
        (1, torch.float16, DeviceLimits((7, 5), 72, 65_536), []),
    ]:
        x, dy, bias = (torch.randn(size).to(dtype) for size in ((T, 64), (T, 5), (5,)))
        launched: list[str] = []
        with ExitStack() as stack:
            stack.enter_context(
                mock.patch.object(operators, "device_limits", lambda _, device=device: device)
            )
            for patch in record_launches(launched):
                stack.enter_context(patch)
            y = operators._mm_cuda(x, payload, key, bias)
            assert launched == expected, (T, dtype, launched)
            launched.clear()
            grad = operators._mm_grad_input_cuda(dy, payload, key, 64)
            assert launched == ["dequantize"] * bool(expected), (T, dtype, launched)
        assert_close_product(y, x, w, bias)
        assert_close_product(grad, dy, w.t(), torch.zeros(64))


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return outcomes_of(__file__, timeout=200)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name, interpreted):
    assert interpreted[name] is None


if __name__ == "__main__":
    run_checks(CHECKS)
