"""Parameter groups, optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qrecipes.config.run import OptimSection, ScheduleSection
from qrecipes.errors import ConfigError
from qrecipes.quant.sharded import parts
from qrecipes.training.optim import OPTIMIZERS, build_optimizer, lr_ratio, set_lr
from qrecipes.transforms.base import ParamGroup


def test_vectors_are_never_decayed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(
        [ParamGroup("rest", list(model.parameters()))], OptimSection(weight_decay=0.3)
    )
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): (0.3 if p.ndim == 2 else 0.0) for p in model.parameters()}


def test_a_group_may_state_its_own_decay_and_scale():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        [ParamGroup("scales", [p, q], lr_scale=0.1, weight_decay=0.0)],
        OptimSection(lr=1e-2, weight_decay=0.3),
    )
    set_lr(optimizer, 1e-3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(pytest.approx(1e-4), 0.0)]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="nothing trains"):
        build_optimizer([], OptimSection())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_minimizes(name):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)  # 4096 weights, the least that 8-bit moments quantize
    x, y = torch.randn(256, 64), torch.randn(256, 64)
    optimizer = build_optimizer(
        [ParamGroup("rest", list(layer.parameters()))], OptimSection(name=name, lr=1e-2)
    )
    found = []
    for _ in range(10):
        loss = (layer(x) - y).square().mean()
        loss.backward()
        found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0]


BYTES = {
    "adamw": (4, 8),
    "stochastic_adamw": (6, 8),
    "schedule_free_adamw": (12, 12),
    "adamw8bit": (2 + 2 * 4 / 256, 2 + 2 * 4 / 256),  # codes of 8 bits, a float32 scale a block
    "adamw4bit": (1 + 2 * 4 / 128, 1 + 2 * 4 / 128),
    "adamw_fp8": (2 + 2 * 4 / 256, 2 + 2 * 4 / 256),
    "sgd": (2, 4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_takes_the_bytes_that_the_documentation_says(name, monkeypatch):
    """Bytes of state a bfloat16 and a float32 weight, as in the docstring of `OptimSection.name`."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao's: compiling takes long
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(torch.ones(256, 256, dtype=dtype))
        optimizer = build_optimizer([ParamGroup("rest", [p])], OptimSection(name=name))
        p.grad = torch.ones_like(p)
        optimizer.step()
        tensors = [part for value in optimizer.state[p].values() for part in parts(value).values()]
        found.append(sum(t.numel() * t.element_size() for t in tensors) / p.numel())
    # lookup tables of codes and counters of steps: at most 4 KB, over 65,536 weights
    assert found == pytest.approx(BYTES[name], abs=4096 / 65536)


def test_adamw_follows_its_formula():
    """One step against the paper's update (arXiv 1711.05101, algorithm 2), in float64."""
    p = nn.Parameter(torch.tensor([[0.5, -2.0]], dtype=torch.float64))
    gradient = torch.tensor([[0.1, -0.3]], dtype=torch.float64)
    optim = OptimSection(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    before = p.detach().clone()
    optimizer = build_optimizer([ParamGroup("rest", [p])], optim)
    p.grad = gradient.clone()
    optimizer.step()
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=0)


warmups, finals = st.integers(0, 20), st.floats(0, 1)
schedules = st.one_of(
    st.builds(
        ScheduleSection,
        kind=st.sampled_from(["cosine", "linear", "constant"]),
        warmup_steps=warmups,
        final_ratio=finals,
    ),
    st.builds(
        ScheduleSection,
        kind=st.just("wsd"),
        warmup_steps=warmups,
        decay_steps=st.integers(1, 20),
        final_ratio=finals,
    ),
)


@given(schedule=schedules, steps=st.integers(41, 200))
def test_schedules_rise_then_fall_within_bounds(schedule, steps):
    ratios = [lr_ratio(schedule, step, steps) for step in range(steps)]
    warm = schedule.warmup_steps
    assert all(0 < r <= 1 for r in ratios[:warm])
    assert ratios[:warm] == sorted(ratios[:warm])
    assert ratios[warm:] == sorted(ratios[warm:], reverse=True)
    assert all(schedule.final_ratio - 1e-12 <= r <= 1 for r in ratios[warm:])
    if warm:
        assert ratios[warm - 1] == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_final_ratio(kind):
    schedule = ScheduleSection(kind=kind, warmup_steps=5, decay_steps=10 * (kind == "wsd"), final_ratio=0.2)
    assert lr_ratio(schedule, 99, 100) == pytest.approx(0.2)


def test_cosine_is_the_cosine():
    schedule = ScheduleSection(kind="cosine", warmup_steps=0, final_ratio=0.0)
    assert lr_ratio(schedule, 24, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))


def test_wsd_is_flat_until_its_decay():
    schedule = ScheduleSection(kind="wsd", warmup_steps=10, decay_steps=20, final_ratio=0.0)
    ratios = [lr_ratio(schedule, step, 100) for step in range(100)]
    assert set(ratios[9:80]) == {1.0}
    assert ratios[80] == pytest.approx(0.95)
