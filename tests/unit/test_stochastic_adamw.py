"""AdamW with stochastic rounding: AdamW where nothing is rounded, and AdamW on average where it is."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import Trial, tiny_run
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qrecipes.training import checkpoint
from qrecipes.training.stochastic_adamw import StochasticAdamW, round_to_bfloat16_stochastically

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def reference(p, grads, *, lr, betas, eps, weight_decay):
    """AdamW by its formulas, in float64."""
    p, m, v = p.double(), 0.0, 0.0
    for step, g in enumerate(grads, start=1):
        g = g.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        update = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        p = p - lr * weight_decay * p - lr * update
    return p


def trained(p, grads, **settings):
    parameter = nn.Parameter(p.clone())
    optimizer = StochasticAdamW([parameter], **settings)
    for g in grads:
        parameter.grad = g.to(p.dtype)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def test_float32_weights_get_adamws_update():
    p, grads = torch.randn(7, 5), [torch.randn(7, 5) for _ in range(20)]
    found, _ = trained(p, grads, **SETTINGS)
    # float32 against float64 over 20 steps
    torch.testing.assert_close(found.double(), reference(p, grads, **SETTINGS), rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_get_it_on_average():
    """100 updates of 1e-4, none of which changes a 1.0 when rounded to nearest."""
    p, settings = torch.ones(20_000, dtype=torch.bfloat16), SETTINGS | {"lr": 1e-4, "weight_decay": 0.0}
    grads = [torch.ones(20_000, dtype=torch.bfloat16)] * 100
    found, state = trained(p, grads, **settings)
    expected = 1 - 100 * 1e-4
    # a walk of steps of 2^-8 with probability 0.0256: its mean over 20,000 has a standard error of 4.5e-5
    assert abs(found.double().mean() - expected) < 2.5e-4
    nearest = torch.optim.AdamW([q := nn.Parameter(p.clone())], **settings)
    q.grad = grads[0]
    nearest.step()
    assert torch.equal(q.detach(), p), "the reason for all this"
    assert state["exp_avg_sq"].dtype is torch.float32
    assert state["exp_avg"].dtype is torch.bfloat16


def test_the_second_moment_decays_as_it_should_with_a_large_beta2():
    """In bfloat16, 0.999 v rounds back to v."""
    p, settings = torch.zeros(4, dtype=torch.bfloat16), SETTINGS | {"betas": (0.9, 0.999)}
    grads = [torch.ones(4)] + [torch.zeros(4)] * 200
    _, state = trained(p, grads, **settings)
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((4,), 1e-3 * 0.999**200), rtol=1e-4, atol=0)


@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
def test_rounding_gives_a_neighbour(value):
    x = torch.full((64,), value, dtype=torch.float32)
    rounded = round_to_bfloat16_stochastically(x)
    bits = x[0].view(torch.int32).item()
    below = torch.tensor(bits & ~0xFFFF, dtype=torch.int32).view(torch.float32)
    above = torch.tensor((bits & ~0xFFFF) + (1 << 16), dtype=torch.int32).view(torch.float32)
    allowed = {below.item(), above.item()} if bits & 0xFFFF else {value}
    assert set(rounded.float().tolist()) <= allowed


def test_rounding_is_unbiased_and_keeps_what_is_not_finite():
    x = torch.full((100_000,), 1 + 0.3 * 2**-7)
    mean = round_to_bfloat16_stochastically(x).double().mean()
    assert abs(mean - x[0].double()) < 5 * 2**-7 * (0.3 * 0.7 / 100_000) ** 0.5  # five standard errors
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    rounded = round_to_bfloat16_stochastically(special)
    assert rounded[3:].float().equal(special[3:])
    assert rounded[:2].float().equal(special[:2])
    assert rounded[2].isnan()


def test_the_same_generator_gives_the_same_weights():
    p, grads = torch.randn(50, dtype=torch.bfloat16), [torch.randn(50)] * 3
    torch.manual_seed(1)
    first, _ = trained(p, grads, **SETTINGS)
    torch.manual_seed(1)
    second, _ = trained(p, grads, **SETTINGS)
    third, _ = trained(p, grads, **SETTINGS)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_first_moment_does_not_come_to_rest_early():
    """A constant gradient of 1 with beta1 = 0.99: to nearest, the moment would stay at 0.805."""
    p = torch.ones(4096, dtype=torch.bfloat16)
    _, state = trained(p, [torch.ones_like(p)] * 1000, **SETTINGS | {"lr": 1e-6, "betas": (0.99, 0.999)})
    # 1 - 0.99^1000 is 0.99996, held between two bfloat16 values 2^-8 apart
    assert abs(state["exp_avg"].double().mean() - 1) < 2**-8


def test_a_state_dict_keeps_its_types():
    p, q = (nn.Parameter(torch.ones(5, dtype=torch.bfloat16)) for _ in range(2))
    first, second = StochasticAdamW([p], **SETTINGS), StochasticAdamW([q], **SETTINGS)
    p.grad = torch.full_like(p, 0.3)
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[q]["exp_avg_sq"].dtype is torch.float32
    assert all(torch.equal(second.state[q][key], value) for key, value in first.state[p].items())


def test_parameters_without_a_gradient_stay(monkeypatch):
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = StochasticAdamW([p, q], **SETTINGS)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(q, torch.ones(3))
    assert not optimizer.state[q]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)


def test_a_resumed_run_draws_what_an_unbroken_one_draws(tmp_path):
    run = tiny_run("llm", None, output=str(tmp_path), steps=6, optim__name="stochastic_adamw")
    unbroken = Trial.of(run, dtype=torch.bfloat16)
    expected = unbroken.advance(6)
    first = Trial.of(run, dtype=torch.bfloat16)
    beginning = first.advance(3)
    saved = checkpoint.save(run, 3, first.model, first.optimizer, first.data.state_dict(), first.process)
    torch.rand(5)
    second = Trial.of(run, dtype=torch.bfloat16)
    second.done, position = checkpoint.restore(saved, run, second.model, second.optimizer, second.process)
    second.data.load_state_dict(position)
    assert beginning + second.advance(3) == expected
