"""Stored weights on a CUDA device: the CPU's properties, with kernels, fused and compiled steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qrecipes.config.run import OptimSection
from qrecipes.quant.stored_int8 import StoredInt8
from qrecipes.training.optim import OPTIMIZERS, build_optimizer
from qrecipes.transforms.base import ParamGroup
from qrecipes.transforms.int8_weights import Int8WeightConfig, Int8WeightLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def stored(rows: int, columns: int, group_size: int | None = None) -> nn.Parameter:
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    return nn.Parameter(StoredInt8.of(weight, group_size).to("cuda"))


def optimizer_of(*params: nn.Parameter, **optim: object) -> torch.optim.Optimizer:
    return build_optimizer([ParamGroup("rest", list(params))], OptimSection(**optim))


@pytest.mark.parametrize("group_size", [None, 64])
def test_rounding_on_the_device_equals_the_cpu(group_size):
    weight = torch.randn(129, 320)
    cpu, device = StoredInt8.of(weight, group_size), StoredInt8.of(weight.cuda(), group_size)
    assert torch.equal(device.q.cpu(), cpu.q)
    assert torch.equal(device.scale.cpu(), cpu.scale)
    assert torch.equal(device.dequantize().cpu(), cpu.dequantize())


@pytest.mark.parametrize("group_size", [None, 64])
def test_its_own_value_changes_no_bit(group_size):
    weight = stored(512, 1024, group_size)
    q, scale = weight.q.clone(), weight.scale.clone()
    weight.requantize_(weight.dequantize(), stochastic=True)
    assert torch.equal(weight.q, q)
    assert torch.equal(weight.scale, scale)


def test_stochastic_rounding_is_right_on_average():
    row = torch.tensor([1.7, 0.31, -0.017, -1.1, 0.5, 0.0], device="cuda")
    draws = 1 << 16
    weight = StoredInt8.of(torch.zeros(draws, 6, device="cuda"))
    weight.requantize_(row.expand(draws, 6).contiguous(), stochastic=True)
    bias = weight.dequantize().double().mean(0) - row.double()
    assert (bias.abs() < 6 * 0.5 * (1.7 / 127) / math.sqrt(draws)).all()  # six standard errors


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "schedule_free_adamw"])
def test_every_optimizer_steps_as_on_a_float32_twin(name):
    p = stored(256, 512)
    twin = nn.Parameter(p.dequantize().clone())
    ours, plain = (optimizer_of(q, name=name, lr=3e-3, weight_decay=0.5) for q in (p, twin))
    grad = torch.randn(256, 512, device="cuda").bfloat16()
    p.grad, twin.grad = grad, grad.float()
    ours.step()
    plain.step()
    assert ((p.dequantize() - twin.detach()).abs() <= p.scale + 1e-5).all()  # one step of the grid


def test_a_step_holds_little_more_than_its_bucket_and_leaves_nothing():
    """Peak above what stays: 4 bytes for the stand-in, 4 for its gradient, 8 for the raised moments, and what
    rounding takes; far from 8 x 4 bytes for each of the 8 weights."""
    params = [stored(4096, 4096) for _ in range(8)]  # a bucket each
    optimizer = optimizer_of(*params)
    for p in params:
        p.grad = torch.ones(p.shape, dtype=torch.bfloat16, device="cuda")
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    weights = 4096 * 4096
    assert torch.cuda.memory_allocated() <= before + 4096
    assert torch.cuda.max_memory_allocated() - before <= 32 * weights
    states = 8 * weights * (1 + 2 + 4)
    assert before <= states * 1.05 + (64 << 20)  # weights, gradients and moments: 7 bytes a weight


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("tokens", [3, 300])
def test_a_layer_multiplies_the_weight_that_is_stored(group_size, compile, tokens):
    """Forward and backward, by kernels that dequantize: few tokens inside the product."""
    linear = nn.Linear(512, 384, dtype=torch.bfloat16, device="cuda")
    layer = Int8WeightLinear.from_linear(linear, Int8WeightConfig(group_size=group_size))
    if compile:
        layer.compile(fullgraph=True)
    x = torch.randn(tokens, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    grad = torch.randn(tokens, 384, dtype=torch.bfloat16, device="cuda")
    y = layer(x)
    y.backward(grad)
    weight = layer.weight.dequantize().bfloat16().double()
    expected = {
        "output": (y, x.double() @ weight.t() + linear.bias.double()),
        "grad_input": (x.grad, grad.double() @ weight),
        "grad_weight": (layer.weight.grad, grad.double().t() @ x.double()),
    }
    for name, (found, exact) in expected.items():
        # bfloat16 rounds a result by 2**-9 of it at most
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-8, (name, float(error))
