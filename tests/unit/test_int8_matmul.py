"""The scaled INT8 matmul against int64 NumPy arithmetic: the CPU operator, the reference, the Triton kernel.

The kernel runs under Triton's interpreter, in a process of its own, so that no other test meets it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import outcomes_of, run_checks
from torch._dynamo.testing import CompileCounter

from qrecipes.quant import device as device_module
from qrecipes.quant import int8_matmul
from qrecipes.quant.int8_matmul import (
    INT32_SAFE_K,
    SPLIT_K,
    TILES,
    Tiles,
    choose_tiles,
    scaled_int8_mm,
    scaled_int8_mm_reference,
    scaled_int8_mm_triton,
    tile_scaled_int8_mm,
    tile_scaled_int8_mm_reference,
    tile_scaled_int8_mm_triton,
    tune,
)

REPOSITORY = Path(__file__).parents[2]
LAYOUTS = ("rows", "columns", "slice", "every other", "one row")
LONG_K = 140_000


def int8_matrix(height: int, width: int, layout: str, generator: torch.Generator) -> torch.Tensor:
    """A random matrix whose memory is laid out as named, and surrounded by the largest value."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)

    if layout == "rows":
        return draw(height, width)
    if layout == "columns":
        return draw(width, height).t()
    if layout == "slice":
        whole = torch.full((height + 3, width + 5), 127, dtype=torch.int8)
        whole[1 : height + 1, 2 : width + 2] = draw(height, width)
        return whole[1 : height + 1, 2 : width + 2]
    if layout == "every other":
        whole = torch.full((2 * height, 2 * width), 127, dtype=torch.int8)
        whole[::2, ::2] = draw(height, width)
        return whole[::2, ::2]
    return draw(1, width).expand(height, width)


def operands(
    M: int, N: int, K: int, layout_a: str = "rows", layout_b: str = "columns", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = int8_matrix(M, K, layout_a, generator), int8_matrix(K, N, layout_b, generator)
    return a, b, torch.rand(M, 1, generator=generator), torch.randn(1, N, generator=generator)


def expected(a: torch.Tensor, b: torch.Tensor, row: torch.Tensor, col: torch.Tensor) -> torch.Tensor:
    """Exact sums in int64, then two float32 multiplications."""
    sums = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)
    return torch.from_numpy(sums.astype(np.float32) * row.float().numpy() * col.float().numpy())


def extremes(K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands whose sums leave int32 in both directions, and not by a round number."""
    a = torch.full((3, K), 127, dtype=torch.int8)
    a[1] = -127
    a[2, ::7] = 3
    b = torch.full((K, 2), 127, dtype=torch.int8)
    b[:: K // 3, 1] = -128
    return a, b, torch.tensor([[1.0], [0.5], [3e-7]]), torch.tensor([[1.0, -0.3]])


@settings(max_examples=150, deadline=None)
@given(
    M=st.integers(0, 40),
    N=st.integers(0, 40),
    K=st.integers(0, 70),
    layout_a=st.sampled_from(LAYOUTS),
    layout_b=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_every_shape_and_layout_is_exact(M, N, K, layout_a, layout_b, seed):
    arguments = operands(M, N, K, layout_a, layout_b, seed)
    result = scaled_int8_mm(*arguments)
    assert result.shape == (M, N)
    assert torch.equal(result, expected(*arguments))
    assert torch.equal(scaled_int8_mm_reference(*arguments), expected(*arguments))


@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (5, 1, 3), (5, 3, 1), (2, 2, 2), (129, 65, 33)])
def test_sizes_of_one_are_exact_in_every_layout(shape, layout_a, layout_b):
    arguments = operands(*shape, layout_a, layout_b)
    assert torch.equal(scaled_int8_mm(*arguments), expected(*arguments))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 4, 0), (0, 4, 0)])
def test_empty_operands_give_empty_or_zeros(shape):
    M, N, _ = shape
    assert torch.equal(scaled_int8_mm(*operands(*shape)), torch.zeros(M, N))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_output_is_rounded_once_from_float32(out_dtype, scale_dtype):
    a, b, row, col = operands(17, 19, 64)
    row, col = (row / 1000).to(scale_dtype), col.to(scale_dtype)  # small enough for float16
    result = scaled_int8_mm(a, b, row, col, out_dtype=out_dtype)
    assert torch.equal(result, expected(a, b, row, col).to(out_dtype))
    assert torch.equal(scaled_int8_mm_reference(a, b, row, col, out_dtype=out_dtype), result)


@pytest.mark.parametrize("K", [INT32_SAFE_K, INT32_SAFE_K + 1, 2 * SPLIT_K + 1, LONG_K])
def test_long_sums_do_not_overflow(K):
    arguments = extremes(K)
    assert K < LONG_K or abs(arguments[0].long() @ arguments[1].long()).max() > 2**31
    assert torch.equal(scaled_int8_mm(*arguments), expected(*arguments))
    assert torch.equal(scaled_int8_mm_reference(*arguments), expected(*arguments))


def test_longest_unsplit_sum_fits_int32():
    a = torch.full((2, INT32_SAFE_K), -128, dtype=torch.int8)
    ones = torch.ones(2, 1), torch.ones(1, 2)
    assert torch.equal(scaled_int8_mm(a, a.t(), *ones), torch.full((2, 2), float(INT32_SAFE_K * 128 * 128)))
    assert INT32_SAFE_K * 128 * 128 <= 2**31 - 1 < (INT32_SAFE_K + 1) * 128 * 128


@pytest.mark.parametrize("shape", [(33, 17, 100), (5, 7, 1025), (2, 3, 5000)])
def test_processors_without_vnni_get_the_same(shape, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    arguments = operands(*shape)
    assert torch.equal(scaled_int8_mm(*arguments), expected(*arguments))


def test_float32_parts_are_exact_before_scaling(monkeypatch):
    """Where one sum of 127 * 127 * 5001, which has more bits than float32, would not be."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    largest = torch.full((3, 5001), 127, dtype=torch.int8)
    assert bool((int8_matmul._int32_mm(largest, largest.t()) == 127 * 127 * 5001).all())


def test_scales_that_are_not_finite_are_not_hidden():
    a, b, row, col = operands(3, 4, 8)
    row[1] = float("nan")
    col[0, 2] = float("inf")
    result = scaled_int8_mm(torch.zeros_like(a), b, row, col)
    assert torch.isnan(result[1]).all()
    assert torch.isnan(result[:, 2]).all()
    assert not result[[0, 2]][:, [0, 1, 3]].any()


def test_operator_satisfies_the_library_contract():
    arguments = operands(5, 6, 7)
    torch.library.opcheck(torch.ops.qrecipes.scaled_int8_mm.default, (*arguments, torch.bfloat16))


def test_compiles_to_one_graph_for_every_shape():
    counter = CompileCounter()
    compiled = torch.compile(scaled_int8_mm, fullgraph=True, backend=counter, dynamic=True)
    for shape in [(5, 6, 7), (8, 9, 10), (3, 20, 33)]:
        arguments = operands(*shape)
        assert torch.equal(compiled(*arguments), expected(*arguments))
    assert counter.frame_count == 1


def tile_scaled_operands(M: int, N: int, K: int) -> list[torch.Tensor]:
    a, b, *_ = operands(M, N, K)
    return [a, b, torch.rand(M, -(-K // 128)), torch.randn(-(-K // 128), -(-N // 128))]


@settings(max_examples=30, deadline=None)
@given(M=st.integers(0, 20), N=st.integers(0, 300), K=st.integers(0, 400))
def test_tile_scaled_product_is_that_of_dequantized_operands(M, N, K):
    a, b, a_scale, b_scale = tile_scaled_operands(M, N, K)
    a_exact = a.double() * a_scale.double().repeat_interleave(128, 1)[:, :K]
    b_exact = b.double() * b_scale.double().repeat_interleave(128, 0)[:K].repeat_interleave(128, 1)[:, :N]
    result = tile_scaled_int8_mm(a, b, a_scale, b_scale)
    # some float32 roundings of at most four terms, each below 128 * 127 * 127 * |scale|
    torch.testing.assert_close(result.double(), a_exact @ b_exact, rtol=0, atol=1.0)
    assert torch.equal(tile_scaled_int8_mm_reference(a, b, a_scale, b_scale), result)


def test_tile_scaled_sums_longer_than_int32_holds_are_not_wrapped():
    """Each tile's sum is exact; float32 adds 1,041 equal ones with an error of at most 2**-24 each."""
    K = LONG_K
    a, b = (torch.full(shape, -128, dtype=torch.int8) for shape in ((2, K), (K, 3)))
    ones = torch.ones(2, -(-K // 128)), torch.ones(-(-K // 128), 1)
    wanted = torch.full((2, 3), K * 2.0**14)
    torch.testing.assert_close(tile_scaled_int8_mm(a, b, *ones), wanted, rtol=K / 128 * 2.0**-24, atol=0)


def test_tile_scales_that_are_not_finite_are_not_hidden():
    a, b, a_scale, b_scale = tile_scaled_operands(3, 130, 300)
    a_scale[1, 2], b_scale[0, 1] = float("nan"), float("inf")
    result = tile_scaled_int8_mm(torch.zeros_like(a), b, a_scale, b_scale)
    assert torch.isnan(result[1]).all()
    assert torch.isnan(result[:, 128:]).all()
    assert not result[[0, 2], :128].any()


def test_tile_scaled_operator_satisfies_the_library_contract_and_refuses_other_scales():
    a, b, a_scale, b_scale = tile_scaled_operands(5, 6, 130)
    operator = torch.ops.qrecipes.tile_scaled_int8_mm.default
    torch.library.opcheck(operator, (a, b, a_scale, b_scale, torch.bfloat16))
    with pytest.raises(ValueError, match=r"a_scale: .* of shape \(5, 1\), where .* \(5, 2\) are needed"):
        tile_scaled_int8_mm(a, b, a_scale[:, :1], b_scale)
    with pytest.raises(ValueError, match=r"b_scale: .* of shape \(1, 2\), where .* \(2, 1\) are needed"):
        tile_scaled_int8_mm(a, b, a_scale, b_scale.t())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scalar", [(), (2,), (3,), (2, 3)])
def test_bias_is_added_before_the_one_rounding_and_scales_may_be_scalar(scalar, out_dtype):
    arguments = list(operands(17, 19, 64))
    for position in scalar:
        arguments[position] = arguments[position][:1, :1]
    bias = torch.randn(19)
    wanted = (expected(*arguments).numpy() + bias.numpy()).astype(np.float32)
    result = scaled_int8_mm(*arguments, bias_N=bias, out_dtype=out_dtype)
    assert torch.equal(result, torch.from_numpy(wanted).to(out_dtype))
    assert torch.equal(scaled_int8_mm_reference(*arguments, bias_N=bias, out_dtype=out_dtype), result)


def test_bias_that_does_not_fit_is_refused():
    for bias, message in [
        (torch.ones(1, 4), r"of shape \(1, 4\), where .* \(4,\) are needed"),
        (torch.ones(4, dtype=torch.int32), "bias_N: torch.int32"),
        (torch.ones(4, device="meta"), "bias_N: on meta, but a_MK is on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            scaled_int8_mm(*operands(3, 4, 5), bias_N=bias)


def replaced(position: int, value: torch.Tensor) -> list[torch.Tensor]:
    arguments = list(operands(3, 4, 5))
    arguments[position] = value
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (replaced(0, torch.zeros(3, 5)), "a_MK: torch.float32 of shape .* int8 matrix is needed; quantize"),
        (replaced(0, torch.zeros(3, dtype=torch.int8)), "a_MK: torch.int8 of shape .* flatten"),
        (
            replaced(1, torch.zeros(4, 5, dtype=torch.int8)),
            "b_KN: 4 rows, where a_MK has 5 columns .* transpose",
        ),
        (replaced(1, torch.zeros(5, 4, dtype=torch.uint8)), "b_KN: torch.uint8 of shape .* int8 matrix"),
        (
            replaced(2, torch.ones(3)),
            r"row_scale_M1: .* of shape \(3,\), where .* \(3, 1\) are needed; reshape",
        ),
        (replaced(2, torch.ones(2, 1)), r"row_scale_M1: .* of shape \(2, 1\)"),
        (replaced(3, 0.5), r"col_scale_1N: 0.5, where a tensor of scales .* is needed; use torch.tensor"),
        (replaced(2, torch.ones(3, 1, dtype=torch.int32)), "row_scale_M1: torch.int32"),
        (replaced(3, torch.ones(4, 1)), r"col_scale_1N: .* of shape \(4, 1\), where .* \(1, 4\) are needed"),
        (replaced(3, torch.ones(1, 4, device="meta")), "col_scale_1N: on meta, but a_MK is on cpu; move it"),
    ],
)
@pytest.mark.parametrize("function", [scaled_int8_mm, scaled_int8_mm_reference, scaled_int8_mm_triton])
def test_wrong_operands_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=f"{function.__name__}.{message}"):
        function(*arguments)


def test_tuning_on_a_cpu_is_refused():
    with pytest.raises(RuntimeError, match=r"tune.device: cpu has no TMA; only kernels on a CUDA device"):
        tune(16, 16, 16, "cpu")


def test_integer_output_is_refused():
    with pytest.raises(
        ValueError, match=r"out_dtype: torch.int32 cannot hold scaled sums; use a floating type"
    ):
        scaled_int8_mm(*operands(3, 4, 5), out_dtype=torch.int32)


def test_kernel_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr(device_module, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"Triton is not installed.*install"):
        scaled_int8_mm_triton(*operands(3, 4, 5))


H100, A100, RTX4090 = (232_448, 132), (166_912, 108), (101_376, 128)


@pytest.mark.parametrize("device", [H100, A100, RTX4090])
@settings(max_examples=100, deadline=None)
@given(M=st.integers(1, 40_000), N=st.integers(1, 40_000))
def test_chosen_tiles_fit_the_device_and_cover_the_product(device, M, N):
    tiles = choose_tiles(M, N, *device)
    assert tiles.shared_bytes <= device[0]
    assert tiles.blocks(M, N) * tiles.block_m * tiles.block_n >= M * N
    # a larger tile that fits would leave more than a quarter of the processors without work
    size = tiles.block_m * tiles.block_n * tiles.block_k
    for alternatives in TILES:
        larger = min(alternatives, key=lambda t: t.blocks(M, N))
        if larger.block_m * larger.block_n * larger.block_k > size:
            assert larger.shared_bytes > device[0] or larger.blocks(M, N) < 0.75 * device[1]


def test_large_products_on_hopper_get_the_tiles_of_the_search():
    assert choose_tiles(8192, 8192, *H100) == Tiles(128, 256, 128, 3, 8)
    assert choose_tiles(300, 40_000, *H100) == Tiles(128, 256, 128, 3, 8)
    assert choose_tiles(40_000, 300, *H100) == Tiles(256, 128, 128, 3, 8)


# What follows the next line runs in the process that `interpreted` starts, not here.
SMALL = Tiles(16, 32, 32, 1, 1)


def check_ragged_shapes():
    for M, N, K in [
        (1, 1, 1),
        (16, 32, 32),
        (17, 33, 31),
        (40, 70, 96),
        (5, 7, 100),
        (3, 2, 65),
        (80, 20, 128),
    ]:
        arguments = operands(M, N, K)
        assert torch.equal(scaled_int8_mm_triton(*arguments, tiles=SMALL), expected(*arguments)), (M, N, K)


def check_layouts():
    for layout_a in LAYOUTS:
        for layout_b in LAYOUTS:
            arguments = operands(21, 37, 45, layout_a, layout_b)
            result = scaled_int8_mm_triton(*arguments, tiles=SMALL)
            assert torch.equal(result, expected(*arguments)), (layout_a, layout_b)


def check_every_tile_of_the_table():
    arguments = operands(70, 66, 72)
    for tiles in [t for alternatives in TILES for t in alternatives]:
        assert torch.equal(scaled_int8_mm_triton(*arguments, tiles=tiles), expected(*arguments)), tiles
    assert torch.equal(scaled_int8_mm_triton(*arguments), expected(*arguments))


def check_more_blocks_than_one_group():
    """Block rows beyond GROUP_M, and a last group that is not full."""
    arguments = operands(16 * int8_matmul.GROUP_M + 20, 70, 32)
    assert torch.equal(scaled_int8_mm_triton(*arguments, tiles=SMALL), expected(*arguments))


def check_empty_operands():
    for M, N, K in [(0, 3, 4), (3, 0, 4), (3, 4, 0)]:
        assert torch.equal(scaled_int8_mm_triton(*operands(M, N, K), tiles=SMALL), torch.zeros(M, N))


def check_tma_shapes_and_layouts():
    for persistent in (0, 1, 2):
        tiles = Tiles(16, 32, 32, 1, 1, persistent)
        for shape in [(1, 1, 1), (17, 33, 31), (40, 70, 96), (150, 70, 32)]:
            for layout_a, layout_b in [("rows", "columns"), ("slice", "slice"), ("one row", "every other")]:
                arguments = operands(*shape, layout_a, layout_b)
                result = scaled_int8_mm_triton(*arguments, tiles=tiles, tma=True)
                assert torch.equal(result, expected(*arguments)), (persistent, shape, layout_a)
    for shape in [(0, 3, 4), (3, 0, 4), (3, 4, 0)]:
        result = scaled_int8_mm_triton(*operands(*shape), tiles=SMALL, tma=True)
        assert torch.equal(result, torch.zeros(shape[:2]))


def check_tma_long_sums():
    arguments = extremes(LONG_K)
    wide = Tiles(16, 16, 1024, 1, 1)
    assert torch.equal(scaled_int8_mm_triton(*arguments, tiles=wide, tma=True), expected(*arguments))


def check_bias_and_scalar_scales():
    a, b, row, col = operands(17, 33, 31)
    bias = torch.randn(66)[::2]
    for tma in (False, True):
        for scales in [(row, col), (row[:1], col), (row, col[:, :1]), (row[:1], col[:, :1])]:
            for offset in (None, bias, bias.half()):
                how = {"bias_N": offset, "out_dtype": torch.float32}
                result = scaled_int8_mm_triton(a, b, *scales, **how, tiles=SMALL, tma=tma)
                assert torch.equal(result, scaled_int8_mm_reference(a, b, *scales, **how)), (tma, offset)


def check_tile_scaled():
    for M, N, K in [(1, 1, 1), (5, 130, 128), (70, 40, 300), (3, 4, 0), (0, 4, 5)]:
        arguments = tile_scaled_operands(M, N, K)
        result = tile_scaled_int8_mm_triton(*arguments)
        assert torch.equal(result, tile_scaled_int8_mm_reference(*arguments)), (M, N, K)
    for layout_a, layout_b in [("slice", "columns"), ("every other", "slice"), ("one row", "rows")]:
        a, b, *_ = operands(21, 37, 145, layout_a, layout_b)
        scales = torch.rand(42, 4)[::2, ::2], torch.randn(2, 1).bfloat16()
        result = tile_scaled_int8_mm_triton(a, b, *scales)
        assert torch.equal(result, tile_scaled_int8_mm_reference(a, b, *scales)), (layout_a, layout_b)


def check_tile_scaled_is_not_finite_where_its_scales_are():
    a, b, a_scale, b_scale = tile_scaled_operands(3, 130, 300)
    a_scale[1, 2], b_scale[0, 1] = float("nan"), float("inf")
    arguments = torch.zeros_like(a), b, a_scale, b_scale
    result, wanted = tile_scaled_int8_mm_triton(*arguments), tile_scaled_int8_mm_reference(*arguments)
    torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


def check_scales_that_are_not_finite():
    a, b, row, col = operands(20, 40, 33)
    row[1], col[0, 2] = float("nan"), float("inf")
    for tma in (False, True):
        result = scaled_int8_mm_triton(torch.zeros_like(a), b, row, col, tiles=SMALL, tma=tma)
        assert torch.isnan(result[1]).all()
        assert torch.isnan(result[:, 2]).all()


def check_long_sums():
    wide = Tiles(16, 16, 1024, 1, 1)
    for K in (INT32_SAFE_K, LONG_K):
        arguments = extremes(K)
        assert torch.equal(scaled_int8_mm_triton(*arguments, tiles=wide), expected(*arguments)), K


def check_every_output_is_written():
    """Memory that nobody wrote reads as NaN, or as the largest integer, and shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.isnan(torch.zeros(1).new_empty(3)).all()
    for M, N, K, tiles in [(19, 35, 40, SMALL), (3, 5, LONG_K, Tiles(16, 16, 1024, 1, 1))]:
        arguments = operands(M, N, K)
        assert torch.equal(scaled_int8_mm_triton(*arguments, tiles=tiles), expected(*arguments)), K
    torch.use_deterministic_algorithms(False)


def check_output_types():
    a, b, row, col = operands(20, 30, 40)
    row /= 1000
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        result = scaled_int8_mm_triton(a, b, row, col.bfloat16(), out_dtype=dtype, tiles=SMALL)
        assert result.dtype is dtype
        # the interpreter truncates to bfloat16, a device rounds: one step of 2**-7 instead of half
        rtol = 2.0**-7 if dtype is torch.bfloat16 else 0.0
        torch.testing.assert_close(
            result, expected(a, b, row, col.bfloat16()).to(dtype), rtol=rtol, atol=0, msg=str(dtype)
        )


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_kernel_in_the_interpreter(name, interpreted):
    assert interpreted[name] is None
    assert os.environ.get("TRITON_INTERPRET") is None, "the interpreter has leaked into the test process"


if __name__ == "__main__":
    run_checks(CHECKS)
