"""Updates in the backward pass: the ordinary run's results to the bit, one gradient at a time."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from harness import ALONE, Trial, tiny_run
from torch import nn

from qrecipes.config.run import OptimSection, TaskSection
from qrecipes.data import Batch
from qrecipes.errors import TrainingError
from qrecipes.quant.sharded import parts
from qrecipes.training import checkpoint
from qrecipes.training.in_backward import InBackward
from qrecipes.training.optim import build_optimizer, set_lr
from qrecipes.training.optimizer_verbs import evaluation_weights, taking_gradients
from qrecipes.training.step import train_step
from qrecipes.training.task import Task
from qrecipes.transforms.base import ParamGroup, StepContext
from qrecipes.transforms.chain import Chain

TASK = Task(TaskSection())


def tiny(tmp_path, name: str, in_backward: bool, **changes):
    return tiny_run(
        "llm",
        None,
        output=str(tmp_path / "run"),
        steps=6,
        schedule__kind="constant",
        optim__name=name,
        optim__clip_norm=0.0,
        optim__in_backward=in_backward,
        **changes,
    )


def weights(trial: Trial) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trial.model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw", "sgd"])
def test_equals_the_ordinary_run_bit_for_bit(tmp_path, name):
    """Losses, gradient norms, weights and states."""
    early, late = (Trial.of(tiny(tmp_path, name, in_backward)) for in_backward in (True, False))
    assert isinstance(early.optimizer, InBackward)
    assert early.advance(4) == late.advance(4)
    assert_equal(early.model, early.optimizer, late.model, late.optimizer)


def test_quantized_moments_equal_the_ordinary_ones_bit_for_bit():
    trained = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64, bias=False))  # 4096 weights: quantized
        optimizer = optimizer_of(model, in_backward, name="adamw8bit")
        for step in range(2):
            train_step(model, optimizer, Chain(), [batch()], TASK, step, 0.0, ALONE)
        assert any("codes" in parts(optimizer.state[p]["exp_avg"]) for p in model.parameters())
        trained += [model, optimizer]
    assert_equal(*trained)


def assert_equal(model, optimizer, other_model, other_optimizer) -> None:
    """Weights and states, to the bit."""
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)
        state, other_state = optimizer.state[p], other_optimizer.state[q]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            found, expected = parts(value), parts(other_state[key])
            assert all(torch.equal(found[part], expected[part]) for part in expected), key


def optimizer_of(model: nn.Module, in_backward: bool = True, **settings):
    section = OptimSection(clip_norm=0.0, in_backward=in_backward, **settings)
    return build_optimizer([ParamGroup("rest", list(model.parameters()))], section)


def test_stochastic_rounding_learns_and_repeats_itself(tmp_path):
    """It draws in the order of the backward pass, and so differs from the ordinary run."""
    run = tiny(tmp_path, "stochastic_adamw", True)
    found = Trial.of(run, dtype=torch.bfloat16).advance(6)
    assert found == Trial.of(run, dtype=torch.bfloat16).advance(6)
    assert found[-1][0] < found[0][0]


@pytest.mark.parametrize("saved_in_backward", [True, False])
@pytest.mark.parametrize("name", ["adamw", "stochastic_adamw"])
def test_resumes_exactly_also_from_an_ordinary_run(tmp_path, name, saved_in_backward):
    run, other = tiny(tmp_path, name, True), tiny(tmp_path, name, saved_in_backward)
    unbroken = Trial.of(run)
    expected = unbroken.advance(6)
    first = Trial.of(other)
    beginning = first.advance(3)
    folder = checkpoint.save(other, 3, first.model, first.optimizer, first.data.state_dict(), first.process)
    second = Trial.of(run)
    second.advance(2)
    second.done, position = checkpoint.restore(folder, run, second.model, second.optimizer, second.process)
    second.data.load_state_dict(position)
    assert beginning + second.advance(3) == expected
    assert all(map(torch.equal, weights(second), weights(unbroken)))


def deep_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 16), *(nn.Linear(16, 16, bias=False) for _ in range(6)), nn.Linear(16, 7, False)
    )


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(*(torch.randint(7, (2, 6), generator=generator) for _ in range(2)))


def most_gradients_alive(in_backward: bool) -> int:
    """Most gradient tensors that exist at once whenever one arrives, of eight matrices."""
    model, alive, most = deep_model(), [], [0]

    def arrive(p: torch.Tensor) -> None:
        alive.append(weakref.ref(p.grad))
        most[0] = max(most[0], sum(reference() is not None for reference in alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(arrive)  # before the optimizer's own
    optimizer = optimizer_of(model, in_backward)
    train_step(model, optimizer, Chain(), [batch()], TASK, 0, 0.0, ALONE)
    assert len(alive) == 8
    assert all(p.grad is None for p in model.parameters())
    return most[0]


def test_one_gradient_exists_at_a_time():
    assert most_gradients_alive(in_backward=True) == 1
    assert most_gradients_alive(in_backward=False) == 8


def stepped(chain: Chain, in_backward: bool):
    """A model, its optimizer and the last report, after an ordinary step and one with `chain`."""
    model = deep_model()
    optimizer = optimizer_of(model, in_backward, lr=0.1)
    for step, hooks in enumerate((Chain(), chain)):
        report = train_step(model, optimizer, hooks, [batch()], TASK, step, 0.0, ALONE)
    return model, optimizer, report


class Skipping(Chain):
    def before_step(self, ctx: StepContext) -> None:
        ctx.skip_update = True


class Resetting(Chain):
    def before_step(self, ctx: StepContext) -> None:
        ctx.state_to_reset.append(next(ctx.model.parameters()))


@pytest.mark.parametrize("chain", [Skipping(), Resetting()])
def test_what_a_transform_asks_before_the_step_is_done(chain):
    early, optimizer, report = stepped(chain, in_backward=True)
    late, ordinary, expected = stepped(chain, in_backward=False)
    assert (report.skipped, report.grad_norm) == (expected.skipped, expected.grad_norm)
    for p, q in zip(early.parameters(), late.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is None
        assert float(optimizer.state[p]["step"]) == float(ordinary.state[q]["step"])


def test_a_backward_pass_outside_of_a_step_leaves_its_gradients():
    model = deep_model()
    optimizer = optimizer_of(model)
    before = copy.deepcopy(model)
    TASK.loss(model, batch()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    optimizer.step()  # and a step uses what is there
    assert not any(map(torch.equal, model.parameters(), before.parameters()))


def test_a_gradient_in_two_parts_is_an_error():
    """Half of it was used: the other half must not pass for a whole one."""
    model = deep_model()
    optimizer = optimizer_of(model)
    with taking_gradients(optimizer):
        TASK.loss(model, batch()).backward()
        with pytest.raises(TrainingError, match="came in two parts"):
            TASK.loss(model, batch()).backward()


def test_a_state_dict_is_taken_over():
    first, second = deep_model(), deep_model()
    ours, theirs = (optimizer_of(model, name="schedule_free_adamw") for model in (first, second))
    train_step(first, ours, Chain(), [batch()], TASK, 0, 0.0, ALONE)
    second.load_state_dict(first.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for model, optimizer in ((first, ours), (second, theirs)):
        set_lr(optimizer, 0.01)  # reaches the groups that were loaded
        train_step(model, optimizer, Chain(), [batch()], TASK, 1, 0.0, ALONE)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    with evaluation_weights(ours):
        assert not any(map(torch.equal, first.parameters(), second.parameters()))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_every_group_keeps_its_rate_and_decay():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = [ParamGroup("a", [p], lr_scale=0.5), ParamGroup("b", [q], weight_decay=0.25)]
    optimizer = build_optimizer(
        groups, OptimSection(lr=1.0, clip_norm=0.0, in_backward=True, weight_decay=0.1)
    )
    found = [(g["params"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [([p], 0.5, 0.1), ([q], 1.0, 0.25)]
