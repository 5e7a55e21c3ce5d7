"""GPTQ on a device: the sums of float64, the reference's integers, the loss of the CPU's."""

from __future__ import annotations

import pytest
import torch

from qrecipes.quant.affine import dequantize_affine
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.gptq import Hessian, gptq
from qrecipes.quant.gptq_columns import (
    MOST_COLUMNS,
    Columns,
    Levels,
    round_columns_reference,
    round_columns_triton,
)
from qrecipes.quant.ranges import minmax_grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessian_sums_exact_products_in_float32(dtype):
    hessian = Hessian(96, "cuda")
    inputs = [torch.randn(3, 700, 96, device="cuda").to(dtype) for _ in range(3)]
    for x in inputs:
        hessian.add(x)
    x = torch.cat(inputs).reshape(-1, 96).double()
    # sums of 6,300 products of about 1, in float32 or as tensor cores keep them (no less than 21 bits);
    # products rounded to bfloat16 would be off by 4e-3 / sqrt(6300) and a bfloat16 sum by 4e-3
    torch.testing.assert_close(hessian.matrix.double(), x.T @ x / len(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
@pytest.mark.parametrize(("columns", "bits"), [(1, 2), (32, 4), (MOST_COLUMNS, 3)])
def test_kernel_rounds_as_the_reference_does(kind, columns, bits):
    asymmetric = {"symmetric": False, "zero_point": kind} if kind != "symmetric" else {}
    format = AffineFormat(bits=bits, group_size=None, **asymmetric)
    w = torch.randn(columns, 1000, device="cuda")
    factor = torch.randn(columns, columns, device="cuda").mul_(0.1).triu_(1) + torch.eye(columns).cuda()
    levels = Levels.of(minmax_grid(w.t(), format), bits, torch.float32)
    results = []
    for function in (round_columns_triton, round_columns_reference):
        q = torch.empty(w.shape, dtype=torch.int8, device="cuda")
        error = torch.empty_like(w)
        function(Columns(w.clone(), factor, q, error), levels)
        results.append((q, error))
    (ours, our_error), (theirs, their_error) = results
    # PyTorch fuses a product into its sum, the kernel does not: rows in which a weight lay between two levels
    # go other ways from there on
    same = (ours == theirs).all(0)
    assert same.float().mean() > 0.98
    torch.testing.assert_close(our_error[:, same], their_error[:, same], rtol=1e-4, atol=1e-4)


def test_loss_on_the_device_is_that_on_the_cpu():
    torch.manual_seed(0)
    x = torch.randn(2000, 512) @ (torch.randn(512, 512) / 512**0.5)
    w, hessian = torch.randn(384, 512) * 0.05, x.T @ x / 2000
    format = AffineFormat(bits=3, group_size=32, symmetric=False, zero_point="float")
    losses = []
    for device in ("cuda", "cpu"):
        found = gptq(w.to(device), hessian.to(device), format)
        error = w.double() - dequantize_affine(found.q.cpu(), _on_cpu(found.grid), torch.float64)
        losses.append(float((error @ hessian.double() * error).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)  # some integers fall otherwise


def _on_cpu(grid):
    return type(grid)(*(None if t is None else t.cpu() for t in grid))
