"""The optimizer step: token weighting, clipping, what a transform may ask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from harness import ALONE
from torch import nn

from qrecipes.config.run import OptimSection, TaskSection
from qrecipes.data import IGNORE, Batch
from qrecipes.training.evaluate import evaluate
from qrecipes.training.optim import build_optimizer
from qrecipes.training.step import clip_gradients, train_step
from qrecipes.training.task import Task
from qrecipes.transforms.base import ParamGroup, StepContext
from qrecipes.transforms.chain import Chain

TASK = Task(TaskSection())


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7))


def ragged_batches() -> list[Batch]:
    """Micro-batches with very different numbers of targets that count."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for ignored in (1, 6, 11):
        inputs = torch.randint(7, (2, 6), generator=generator)
        targets = torch.randint(7, (2, 6), generator=generator)
        targets.view(-1)[:ignored] = IGNORE
        batches.append(Batch(inputs, targets))
    return batches


def run_step(model: nn.Module, batches: list[Batch], chain: Chain | None = None, clip_norm: float = 0.0):
    optimizer = build_optimizer(
        [ParamGroup("rest", list(model.parameters()))], OptimSection(name="sgd", lr=0.1)
    )
    return train_step(model, optimizer, chain or Chain(), batches, TASK, 0, clip_norm, ALONE)


def test_every_token_weighs_the_same_over_ragged_micro_batches():
    """Loss and update against one cross-entropy over all targets at once, in float64."""
    batches, model, twin = ragged_batches(), tiny_model(), tiny_model().double()
    logits = torch.cat([twin(b.inputs).flatten(0, 1) for b in batches])
    expected = F.cross_entropy(logits, torch.cat([b.targets.flatten() for b in batches]), ignore_index=IGNORE)
    expected.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = run_step(model, batches)
    assert abs(float(report.loss) - expected.item()) < 1e-6  # float32 sums
    assert (int(report.targets), int(report.computed)) == (36 - 18, 36)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        decay = 0.1 if p.ndim == 2 else 0.0
        moved = before[name].double() - 0.1 * (q.grad + decay * before[name].double())
        torch.testing.assert_close(p.detach().double(), moved, rtol=1e-5, atol=1e-7)


def test_a_batch_without_any_target_changes_nothing():
    model, twin = tiny_model(), tiny_model()
    batch = Batch(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), IGNORE))
    report, expected = run_step(model, [batch, *ragged_batches()]), run_step(twin, ragged_batches())
    assert (report.loss, report.grad_norm) == (expected.loss, expected.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_step_without_any_target_is_finite():
    report = run_step(tiny_model(), [Batch(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), IGNORE))])
    assert (float(report.loss), float(report.grad_norm)) == (0.0, 0.0)


class Hooked(Chain):
    """Notes when its hooks run, and replaces every gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def before_step(self, ctx: StepContext) -> None:
        self.seen.append("before" if all(p.grad is None for p in ctx.model.parameters()) else "late")

    def after_backward(self, ctx: StepContext) -> None:
        self.seen.append("after")
        for p in ctx.model.parameters():
            p.grad = torch.full_like(p, 5.0)


def test_hooks_run_before_the_forward_pass_and_before_clipping():
    model, chain = tiny_model(), Hooked()
    optim = OptimSection(name="sgd", lr=1.0, betas=(0.0, 0.9), weight_decay=0.0)
    optimizer = build_optimizer([ParamGroup("rest", list(model.parameters()))], optim)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer, chain, ragged_batches(), TASK, 0, 0.5, ALONE)
    assert chain.seen == ["before", "after"]
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.5), rtol=1e-3, atol=0)  # torch adds 1e-6 to the norm


class Draws(nn.Module):
    """Draws random numbers, as stochastic rounding does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_evaluation_puts_mode_and_random_state_back():
    model = nn.Sequential(nn.Embedding(7, 5), Draws(), nn.Linear(5, 7)).train()
    state = torch.get_rng_state()
    found = evaluate(model, ragged_batches(), TASK, ALONE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    torch.rand(5)
    assert evaluate(model, ragged_batches(), TASK, ALONE) == found


def test_clipping_scales_to_the_norm():
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 10
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm = clip_gradients(model, 0.5)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(
        after.norm(), torch.tensor(0.5), rtol=1e-4, atol=0
    )  # torch adds 1e-6 to the norm


def test_a_clip_norm_of_zero_leaves_gradients_alone():
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    clip_gradients(model, 0.0)
    assert all((p.grad == 3.0).all() for p in model.parameters())


class Asking(Chain):
    """A chain that asks for no update, and for a parameter's state to be forgotten."""

    def after_backward(self, ctx: StepContext) -> None:
        ctx.skip_update = True
        ctx.state_to_reset.append(next(ctx.model.parameters()))


def test_a_transform_can_skip_the_update_and_reset_state():
    model = tiny_model()
    optimizer = build_optimizer([ParamGroup("rest", list(model.parameters()))], OptimSection(lr=0.1))
    train_step(model, optimizer, Chain(), ragged_batches(), TASK, 0, 0.0, ALONE)
    first = next(model.parameters())
    assert first in optimizer.state
    before = [p.detach().clone() for p in model.parameters()]
    report = train_step(model, optimizer, Asking(), ragged_batches(), TASK, 1, 0.0, ALONE)
    assert report.skipped
    assert first not in optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_evaluation_weighs_every_token_the_same():
    """Brute force over all targets, against batches whose means differ."""
    model, batches = tiny_model(), ragged_batches()
    found = evaluate(model, batches, TASK, ALONE)
    targets = torch.cat([b.targets.flatten() for b in batches])
    logits = torch.cat([model(b.inputs).flatten(0, 1) for b in batches]).double()
    kept = targets != IGNORE
    loss = -logits.log_softmax(-1)[kept, targets[kept]].mean().item()
    assert abs(found["val_loss"] - loss) < 1e-6  # float32 cross-entropy
    assert abs(found["val_perplexity"] - math.exp(loss)) < 1e-5
    assert found["val_targets"] == int(kept.sum())
    assert found["val_accuracy"] == (logits[kept].argmax(-1) == targets[kept]).double().mean().item()


def test_label_smoothing_is_for_training_only():
    model, batch = tiny_model(), ragged_batches()[0]
    smooth = Task(TaskSection(label_smoothing=0.1))
    assert smooth.loss(model.train(), batch) != TASK.loss(model, batch)
    assert smooth.loss(model.eval(), batch) == TASK.loss(model, batch)
