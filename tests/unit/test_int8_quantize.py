"""Quantization by rows and columns: the CPU operators against `quantize_int8`, the kernels against both.

The kernels run under Triton's interpreter, in a process of its own, so that no other test meets it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compiling import compiled, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import outcomes_of, run_checks

from qrecipes.quant import int8_quantize
from qrecipes.quant.int8_quantize import (
    quantize_columns,
    quantize_columns_triton,
    quantize_rows,
    quantize_rows_triton,
)
from qrecipes.quant.primitives import quantize_int8

REPOSITORY = Path(__file__).parents[2]
LAYOUTS = ("rows", "columns", "slice", "one row")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrix(M: int, K: int, layout: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random values of many magnitudes, with a row and a column of zeros; surrounded by a large value."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator) * 2.0 ** torch.randint(-9, 9, (M, 1), generator=generator)
    if min(M, K) > 2:
        x[1], x[:, 2] = 0, 0
    x = x.to(dtype)
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "slice":
        whole = torch.full((M + 2, K + 3), 1e4, dtype=dtype)
        whole[1 : M + 1, 1 : K + 1] = x
        return whole[1 : M + 1, 1 : K + 1]
    return x[:1].expand(M, K) if layout == "one row" and M > 0 else x


def expected(x: torch.Tensor) -> list[torch.Tensor]:
    (q, scale), (q_columns, scale_of_columns) = quantize_int8(x, 1), quantize_int8(x, 0)
    return [q, scale, q_columns.t(), scale_of_columns.t()]


def assert_equal(found: tuple[torch.Tensor, ...], wanted: list[torch.Tensor]) -> None:
    """Values, NaN included, types, and rows that start at multiples of 16 bytes."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        if a.dtype is torch.int8 and a.numel() > 0:
            assert a.stride() == (-(-a.shape[1] // 16) * 16, 1)


def assert_all_equal(x: torch.Tensor, rows, columns) -> None:
    wanted = expected(x)
    assert_equal(rows(x), wanted[:2])
    assert_equal(columns(x), wanted[2:])


def special_matrices() -> list[torch.Tensor]:
    """Halves between two steps, what is not finite, and scales that underflow."""
    halves = (torch.arange(-127, 128) / 2).repeat(3, 1)
    halves[:, 0] = 127
    poisoned = torch.randn(20, 40)
    poisoned[3, 4], poisoned[7, 9], poisoned[8, 30] = math.nan, math.inf, -math.inf
    return [halves, halves.t(), poisoned, torch.full((2, 4), 1e-44), torch.zeros(3, 5)]


@settings(max_examples=100, deadline=None)
@given(
    M=st.integers(0, 40),
    K=st.integers(0, 40),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_operators_give_what_quantize_int8_gives(M, K, layout, dtype, seed):
    x = matrix(M, K, layout, dtype, seed)
    assert_all_equal(x, quantize_rows, quantize_columns)


def test_operators_take_what_is_special():
    for x in special_matrices():
        assert_all_equal(x, quantize_rows, quantize_columns)


@pytest.mark.parametrize("name", ["quantize_rows", "quantize_columns"])
@pytest.mark.parametrize("seed", [None, 5])
def test_operators_satisfy_the_library_contract(name, seed):
    x = torch.randn(5, 7)
    operator = getattr(torch.ops.qrecipes, name).default
    torch.library.opcheck(operator, (x, None if seed is None else torch.tensor(seed)))


def test_stochastic_rounding_repeats_with_the_generator_and_leaves_it_advanced():
    x = torch.randn(9, 33)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    rows, columns, second = (
        function(x, stochastic_rounding=True)[0]
        for function in (quantize_rows, quantize_columns, quantize_rows)
    )
    torch.set_rng_state(state)
    assert torch.equal(quantize_rows(x, stochastic_rounding=True)[0], rows)
    assert torch.equal(quantize_columns(x, stochastic_rounding=True)[0], columns)
    assert not torch.equal(rows, second)


def assert_unbiased(q: torch.Tensor, exact: torch.Tensor) -> None:
    """Draws down the first dimension, their mean within six standard errors; only the two neighbors occur."""
    low, error = torch.floor(exact), 0.5 / math.sqrt(q.shape[0])
    assert ((q.double().mean(0) - exact).abs() < 6 * error).all()
    assert ((q == low) | (q == low + 1)).all()
    integers = exact == low
    assert (q[:, integers] == exact[integers]).all()


UNITS = torch.tensor([127.0, 3.25, -7.9, 0.01, -0.5, 12.0, -1.0, 0.0])
"""On the grid of scale 1, some between its steps."""


def check_unbiased(rows, columns, draws: int) -> None:
    """`draws` values each, in kernels that see some rows of many columns and the reverse."""
    wide = UNITS.repeat(draws // 100)[None].expand(100, -1).contiguous()
    for q in (rows(wide)[0], columns(wide.t().contiguous())[0]):
        assert q.shape == wide.shape
        assert_unbiased(q.reshape(draws, 8), UNITS.double())
        mixed = q[:, 1:2]
        assert mixed.float().std() > 0.3  # draws differ along rows, and below along columns
        assert q[0, 1::8].float().std() > 0.3


def test_stochastic_rounding_is_unbiased_and_keeps_integers():
    check_unbiased(
        lambda x: quantize_rows(x, stochastic_rounding=True),
        lambda x: quantize_columns(x, stochastic_rounding=True),
        draws=100_000,
    )


def test_compiles_to_one_graph():
    for x in (torch.randn(6, 10), torch.randn(6, 32)):  # rows by the operator, and in plain PyTorch
        assert_all_equal(
            x,
            *(
                torch.compile(f, fullgraph=True, backend="aot_eager")
                for f in (quantize_rows, quantize_columns)
            ),
        )


def test_wrong_matrices_are_refused():
    for function in (quantize_rows, quantize_columns):
        with pytest.raises(ValueError, match=r"x_MK: torch.float32 of shape \(3,\), .* flatten"):
            function(torch.zeros(3))
        with pytest.raises(ValueError, match=r"x_MK: torch.int8 .* convert it"):
            function(torch.zeros(3, 3, dtype=torch.int8))


@needs_triton
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_kernels_compile_to_wide_loads_and_two_fused_operations_a_quotient(name, capability, stochastic):
    """Other fused operations would round where the reference does not, other divisions would take long."""
    from qrecipes.quant import int8_quantize_kernels as kernels

    types = {"x_ptr": "*bf16", "q_ptr": "*i8", "words_ptr": "*i32", "scale_ptr": "*fp32", "work_ptr": "*i32"}
    types |= {"seed_ptr": "*i64", "M": "i32", "K": "i32", "LAG": "i32 any"}
    types |= dict.fromkeys(("stride_xm", "stride_qm", "stride_words"), "i32")
    rows, sizes = {"WHOLE": True, "BLOCK": 4096}, {"BLOCK_M": 128, "BLOCK_K": 64}
    kernel, constants, elements, num_warps = {
        "rows": (kernels._rows_kernel, rows, 4096, 8),
        "columns": (kernels._columns_kernel, sizes, 128 * 64, 2),
    }[name]
    seed = {} if stochastic else {"seed_ptr": None}
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    ptx = compiled(kernel, capability, types, constants | seed, **options).asm["ptx"]
    assert re.search(r"ld\.global\S*\.v4", ptx)
    assert ptx.count("fma.rn.f32") == 2 * elements // (32 * num_warps)
    assert ptx.count("div.rn.f32") == 2  # the scale and its reciprocal


# What follows the next line runs in the process that `interpreted` starts, not here.
KERNELS = (quantize_rows_triton, quantize_columns_triton)


def check_shapes_and_types():
    for M, K in [(1, 1), (3, 5), (17, 33), (130, 20), (20, 130), (0, 4), (4, 0)]:
        for dtype in DTYPES:
            assert_all_equal(matrix(M, K, "rows", dtype, seed=M), *KERNELS)


def check_layouts():
    for layout in LAYOUTS:
        assert_all_equal(matrix(21, 37, layout, torch.float32, seed=1), *KERNELS)


def check_special_matrices():
    for x in special_matrices():
        assert_all_equal(x, *KERNELS)


def check_rows_longer_than_a_program_holds():
    kernels = int8_quantize.kernels
    kernels.LONGEST_ROW = 32
    try:
        assert_all_equal(matrix(5, 100, "rows", torch.float32, seed=1), *KERNELS)
    finally:
        kernels.LONGEST_ROW = 16_384


def check_stochastic_rounding_is_unbiased():
    """With fewer draws than above: the interpreter is slow, and the next check has the noise bit for bit."""
    seed = torch.tensor(2**61 + 12_345)
    check_unbiased(
        lambda x: quantize_rows_triton(x, seed), lambda x: quantize_columns_triton(x, seed), draws=10_000
    )


def philox_words(seed: int, column: np.ndarray, row: np.ndarray, stream: int) -> list[np.ndarray]:
    """Philox4x32-7 of Salmon et al. 2011, from the paper's definition."""
    mask = np.uint64(0xFFFFFFFF)
    zero = np.zeros_like(column, dtype=np.uint64)
    c = [column.astype(np.uint64), row.astype(np.uint64), zero + np.uint64(stream), zero]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        low, high = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [
            (high >> shift) ^ c[1] ^ np.uint64(k[0]),
            high & mask,
            (low >> shift) ^ c[3] ^ np.uint64(k[1]),
            low & mask,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def check_noise_is_philox_of_row_and_column():
    seed, M, K = 2**61 + 12_345, 5, 24
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-126, 126, (M, K), generator=generator) + torch.rand(M, K, generator=generator)
    x[:, 0], x[0] = 127.0, 127.0  # every scale is 1
    rows, quads = np.meshgrid(np.arange(M), np.arange(K // 4), indexing="ij")
    for stream in (0, 1):
        words = np.stack(philox_words(seed, quads, rows, stream), -1).reshape(M, K)
        uniform = torch.from_numpy((words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24))
        wanted = (x.floor() + (uniform < x - x.floor())).to(torch.int8)
        q = KERNELS[stream](x, torch.tensor(seed))[0]
        assert torch.equal(q if stream == 0 else q.t(), wanted), stream


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
CHECKS.pop("check_unbiased")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_kernels_in_the_interpreter(name, interpreted):
    assert interpreted[name] is None


if __name__ == "__main__":
    run_checks(CHECKS)
