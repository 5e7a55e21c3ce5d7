"""GPTQ's kernel: in Triton's interpreter the integers and errors of float64, compiled for devices.

The numbers are such that float32 rounds none of them: weights of few bits, scales that are powers of two, and
factors of -1, 0 and 1 with a diagonal of 1/2 or 1. So the kernel must agree with float64 bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from compiling import compiled, needs_triton
from interpreter import outcomes_of, run_checks

from qrecipes.quant import gptq_columns
from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.gptq import gptq
from qrecipes.quant.gptq_columns import (
    Columns,
    Levels,
    round_columns_reference,
    round_columns_triton,
)
from qrecipes.quant.packing import signed_range

KINDS = ("symmetric", "integer", "float")


def grid_of(kind: str, rows: int, bits: int) -> AffineGrid:
    """A grid [N, 1] whose scales are powers of two, some of them zero."""
    scale = 2.0 ** torch.randint(-3, 1, (rows, 1))
    scale[::7] = 0
    least, greatest = signed_range(bits)
    zero = torch.randint(least, greatest + 1, (rows, 1), dtype=torch.int8) if kind == "integer" else None
    offset = torch.randint(-8, 8, (rows, 1)) / 8.0 if kind == "float" else None
    return AffineGrid(scale, zero, offset)


def exact_problem(columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [S, N], and a factor that is a part of a wider matrix, so that its rows are not adjacent."""
    w = torch.randint(-32, 33, (columns, rows)) / 16.0
    off = (torch.rand(columns, columns) < 0.15) * torch.randint(-1, 2, (columns, columns))
    factor = torch.triu(off, 1) + torch.diag(0.5 + 0.5 * torch.randint(0, 2, (columns,)))
    wide = torch.full((columns, columns + 5), torch.nan)
    wide[:, 2:-3] = factor
    return w, wide[:, 2:-3]


def results(function, w, factor, grid, bits, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    q, error = torch.full(w.shape, 99, dtype=torch.int8), torch.full(w.shape, torch.nan, dtype=dtype)
    columns = Columns(w.to(dtype, copy=True), factor.to(dtype), q, error)
    function(columns, Levels.of(grid, bits, dtype))
    return q, error


def check_integers_and_errors_are_those_of_float64() -> None:
    for kind in KINDS:
        for columns, rows, bits in ((1, 5, 4), (24, 40, 3), (32, 64, 2), (64, 33, 8)):
            (w, factor), grid = exact_problem(columns, rows), grid_of(kind, rows, bits)
            ours = results(round_columns_triton, w, factor, grid, bits, torch.float32)
            theirs = results(round_columns_reference, w, factor, grid, bits, torch.float64)
            assert torch.equal(ours[0], theirs[0]), (kind, columns, bits)
            assert torch.equal(ours[1].double(), theirs[1]), (kind, columns, bits)


def check_halves_go_to_even() -> None:
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    q, _ = results(round_columns_triton, w, torch.ones(1, 1), AffineGrid(torch.ones(6, 1)), 4, torch.float32)
    assert q.tolist() == [[0, 2, 2, 0, -2, -2]]


def check_a_weight_far_beyond_the_grid_gets_its_last_level() -> None:
    w = torch.tensor([[1e30, -1e30, 5e6]])
    q, _ = results(
        round_columns_triton, w, torch.ones(1, 1), AffineGrid(torch.full((3, 1), 1e-3)), 4, torch.float32
    )
    assert q.tolist() == [[7, -8, 7]]


def check_a_whole_weight_is_the_reference_s() -> None:
    """Through `gptq`, with compensation across groups and blocks, on inputs of ordinary numbers."""
    x = torch.randn(400, 96) @ torch.randn(96, 96)
    w = torch.randn(40, 96) * 0.05
    for kind in KINDS:
        asymmetric = {"symmetric": False, "zero_point": kind} if kind != "symmetric" else {}
        format = AffineFormat(bits=4, group_size=32, **asymmetric)
        plain = gptq(w, x.T @ x / 400, format)
        gptq_columns.round_columns_reference, kept = round_columns_triton, round_columns_reference
        try:
            ours = gptq(w, x.T @ x / 400, format)
        finally:
            gptq_columns.round_columns_reference = kept
        # a product may be rounded into the sum or before, so a weight between two levels may fall otherwise
        assert (ours.q != plain.q).float().mean() < 0.01
        torch.testing.assert_close(ours.grid.scale, plain.grid.scale, rtol=0.05, atol=0)


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("capability", "columns"), [(80, 64), (90, 64), (90, 1)])
def test_kernel_compiles_and_keeps_its_columns_in_registers(capability, columns, kind):
    from qrecipes.quant.gptq_kernels import LEAST_COLUMNS, ROWS, _round_columns_kernel

    constants = {"COLUMNS": max(columns, LEAST_COLUMNS), "ROWS": ROWS}
    constants |= {} if kind == "integer" else {"zero_ptr": None}
    constants |= {} if kind == "float" else {"offset_ptr": None}
    constants |= {"S": 1} if columns == 1 else {}  # as Triton takes an integer that is 1
    types = {parameter.name: "*fp32" for parameter in _round_columns_kernel.params}
    types |= {"q_ptr": "*i8", "S": "i32 any", "N": "i32", "factor_stride": "i32"}
    types |= {"least": "fp32", "greatest": "fp32"}
    options = {"num_warps": 1, "enable_fp_fusion": False}
    ptx = compiled(_round_columns_kernel, capability, types, constants, **options).asm["ptx"]
    assert "ld.local" not in ptx
    assert "fma.rn.f32" not in ptx  # products and sums are rounded by themselves, as in the reference


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcomes():
    return outcomes_of(__file__)


@pytest.mark.parametrize("name", CHECKS)
def test_kernel_in_the_interpreter(outcomes, name):
    assert outcomes[name] is None, outcomes[name]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_in_float32_is_that_of_float64_where_nothing_is_rounded(kind):
    """What the kernel's checks stand on."""
    torch.manual_seed(0)
    (w, factor), grid = exact_problem(32, 16), grid_of(kind, 16, 4)
    single = results(round_columns_reference, w, factor, grid, 4, torch.float32)
    double = results(round_columns_reference, w, factor, grid, 4, torch.float64)
    assert torch.equal(single[0], double[0])
    assert torch.equal(single[1].double(), double[1])


if __name__ == "__main__":
    run_checks(CHECKS)
