"""The offloaded optimizer, with the CPU in place of the GPU: copies, order and state are the same."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import ALONE, Trial, tiny_run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from qrecipes.config.run import OptimSection, TaskSection
from qrecipes.data import Batch
from qrecipes.errors import ConfigError
from qrecipes.training import checkpoint, optim
from qrecipes.training.offload import Offloaded
from qrecipes.training.optim import build_optimizer, set_lr
from qrecipes.training.step import train_step
from qrecipes.training.task import Task
from qrecipes.transforms.base import ParamGroup
from qrecipes.transforms.chain import Chain

TASK = Task(TaskSection())
WHERE = ["state", "state_and_gradients"]


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Build the optimizer for a model on the CPU, too."""
    monkeypatch.setattr(optim, "_check_offload", lambda settings, section: None)


def model_of(dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 16), nn.Linear(16, 7)).to(dtype)


def batches(number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch(*(torch.randint(7, (2, 6), generator=generator) for _ in range(2))) for _ in range(number)]


def train(model, section: OptimSection, steps: int = 5):
    """The reports of some steps, at rates that rise."""
    optimizer = build_optimizer([ParamGroup("rest", list(model.parameters()))], section)
    reports = []
    for step, batch in enumerate(batches(steps)):
        set_lr(optimizer, section.lr * (step + 1))
        reports.append(train_step(model, optimizer, Chain(), [batch], TASK, step, section.clip_norm, ALONE))
    return reports


@pytest.mark.parametrize("offload", WHERE)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_float32_weights_get_the_ordinary_update(no_gpu_needed, name, offload):
    settings = {"name": name, "lr": 1e-2, "clip_norm": 0.0}
    here, there = model_of(torch.float32), model_of(torch.float32)
    expected = train(here, OptimSection(**settings))
    found = train(there, OptimSection(**settings, offload=offload))
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)  # the CPU's fused kernel rounds otherwise
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)  # as do five updates


def test_parameters_that_come_later_are_refused(no_gpu_needed):
    """They would have no host memory, and never train."""
    optimizer = build_optimizer(
        [ParamGroup("rest", list(model_of(torch.float32).parameters()))], OptimSection(offload="state")
    )
    with pytest.raises(NotImplementedError, match=r"Offloaded.add_param_group: .* with build_optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 2  # decayed and not


def test_clipping_reaches_the_offloaded_update(no_gpu_needed):
    settings = {"name": "sgd", "betas": (0.0, 0.9), "lr": 1.0, "weight_decay": 0.0, "offload": "state"}
    model = model_of(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, OptimSection(**settings, clip_norm=0.01), steps=1)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.01), rtol=1e-3, atol=0)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("offload", WHERE)
def test_bfloat16_weights_are_those_of_a_float32_copy(no_gpu_needed, offload):
    """100 updates of 1e-4 to weights at 1, each of which bfloat16 would lose."""
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    section = OptimSection(lr=1e-4, weight_decay=0.0, clip_norm=0.0, offload=offload)
    optimizer = build_optimizer([ParamGroup("rest", [p])], section)
    copy = nn.Parameter(p.detach().float())
    reference = torch.optim.AdamW([copy], lr=1e-4, betas=section.betas, weight_decay=0.0, fused=True)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        copy.grad = torch.ones_like(copy)
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    assert torch.equal(optimizer.state[p]["weight"], copy)
    assert torch.equal(p, copy.bfloat16())
    assert float(p.detach()[0, 0]) < 1


def test_gradients_leave_during_the_backward_pass(no_gpu_needed):
    model = model_of(torch.float32)
    section = OptimSection(clip_norm=0.0, offload="state_and_gradients")
    optimizer = build_optimizer([ParamGroup("rest", list(model.parameters()))], section)
    assert isinstance(optimizer, Offloaded)
    left = []
    step = optimizer.step
    optimizer.step = lambda: (left.extend(p.grad for p in model.parameters()), step())
    train_step(model, optimizer, Chain(), batches(1), TASK, 0, 0.0, ALONE)
    assert left == [None] * 5


@pytest.mark.parametrize("offload", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(no_gpu_needed, tmp_path, offload, dtype):
    changes = {"optim__clip_norm": 0.0, "optim__offload": offload, "output": str(tmp_path)}
    run = tiny_run("llm", None, steps=6, **changes)
    unbroken = Trial.of(run, dtype=dtype)
    expected = unbroken.advance(6)
    first = Trial.of(run, dtype=dtype)
    beginning = first.advance(3)
    folder = checkpoint.save(run, 3, first.model, first.optimizer, first.data.state_dict(), first.process)
    second = Trial.of(run, dtype=dtype)
    second.advance(1)  # its float32 copies must be overwritten, too
    second.done, position = checkpoint.restore(folder, run, second.model, second.optimizer, second.process)
    second.data.load_state_dict(position)
    assert beginning + second.advance(3) == expected
    assert all(map(torch.equal, second.model.parameters(), unbroken.model.parameters()))


def test_resuming_with_another_place_of_the_state_is_refused(no_gpu_needed, tmp_path):
    run = tiny_run("llm", None, output=str(tmp_path), optim__offload="state")
    trial = Trial.of(run)
    trial.advance(1)
    folder = checkpoint.save(run, 1, trial.model, trial.optimizer, trial.data.state_dict(), trial.process)
    other = tiny_run("llm", None, output=str(tmp_path))
    trial = Trial.of(other)
    with pytest.raises(checkpoint.CheckpointError, match=r"optim\.offload is 'float32"):
        checkpoint.restore(folder, other, trial.model, trial.optimizer, trial.process)


def test_a_forgotten_state_begins_with_the_weight_on_the_device(no_gpu_needed):
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = build_optimizer([ParamGroup("rest", [p])], OptimSection(offload="state", lr=0.5))
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state.pop(p)
    p.data.fill_(7.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1
    torch.testing.assert_close(p.detach(), torch.full((3, 3), 7 * (1 - 0.5 * 0.1)))  # the decay alone


def test_a_state_dict_says_how_to_restore(no_gpu_needed):
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = build_optimizer([ParamGroup("rest", [p])], OptimSection(offload="state"))
    with pytest.raises(NotImplementedError, match=r"checkpoint\.restore"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_a_model_on_the_cpu_is_refused():
    with pytest.raises(ConfigError, match=r'optim\.offload: .*is on the CPU; set offload = "none"'):
        build_optimizer([ParamGroup("rest", [nn.Parameter(torch.ones(3))])], OptimSection(offload="state"))


def test_a_sharded_model_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ConfigError, match=r"optim\.offload: 'state' is for one GPU"):
            build_optimizer([ParamGroup("rest", [nn.Parameter(sharded)])], OptimSection(offload="state"))
    finally:
        dist.destroy_process_group()
