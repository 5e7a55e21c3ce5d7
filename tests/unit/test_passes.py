"""Recorded passes train as those that Python runs: what is recorded, replayed and recorded anew."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from harness import ALONE, Repeats, Trial, tiny_run
from torch import nn

from qrecipes.config import parse, rules
from qrecipes.config.run import OptimSection, ParallelSection, TaskSection
from qrecipes.data import Batch
from qrecipes.errors import ConfigError
from qrecipes.parallel.process import Process
from qrecipes.quant.stored_int8 import StoredInt8
from qrecipes.training import passes as module
from qrecipes.training.optim import build_optimizer
from qrecipes.training.passes import WARMUP, Passes, RecordedPasses, passes_for
from qrecipes.training.step import train_step
from qrecipes.training.task import Task
from qrecipes.transforms.base import ParamGroup
from qrecipes.transforms.chain import Chain

TASK = Task(TaskSection())


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))


def batches(*lengths: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(11, (2, length + 1), generator=generator) for length in lengths]
    return [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def trained(passes: Passes, lengths: list[tuple[int, ...]], between=None) -> tuple[list[float], nn.Module]:
    """Losses of steps over micro-batches of these lengths, and the model afterwards."""
    model = model_of()
    optimizer = build_optimizer([ParamGroup("rest", list(model.parameters()))], OptimSection(lr=0.05))
    losses = []
    for step, of_step in enumerate(lengths):
        report = train_step(model, optimizer, Chain(), batches(*of_step), TASK, step, 1.0, ALONE, passes)
        losses.append(float(report.loss))
        if between is not None:
            between(step, model, optimizer)
    return losses, model


def same(found: tuple[list[float], nn.Module], wanted: tuple[list[float], nn.Module]) -> bool:
    weights = zip(found[1].parameters(), wanted[1].parameters(), strict=True)
    return found[0] == wanted[0] and all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize(
    ("lengths", "recorded"),
    [
        ([(8,)] * 6, 1),
        ([(8, 8)] * 4, 1),
        ([(8, 5), (5, 8), (8, 5), (8, 8), (5, 5)], 2),
        ([(8,)] * WARMUP, 0),
    ],
    ids=["one", "accumulated", "two shapes", "too few"],
)
def test_trains_bit_for_bit_as_python_does(lengths, recorded):
    recorder = Repeats()
    assert same(trained(RecordedPasses(recorder), lengths), trained(Passes(ALONE.device), lengths))
    assert recorder.recorded == recorded


def test_gradients_stay_where_they_are():
    passes = RecordedPasses(Repeats())
    seen = []

    def between(step, model, optimizer):
        passes(model, TASK, batches(8)[0], torch.tensor(16.0))
        seen.append([p.grad.data_ptr() for p in model.parameters()])
        optimizer.zero_grad()

    trained(passes, [(8,)] * 4, between)
    assert all(addresses == seen[0] for addresses in seen)


def test_a_gradient_that_someone_put_there_is_added_to():
    model, passes = model_of(), RecordedPasses(Repeats())
    batch, divisor = batches(8)[0], torch.tensor(16.0)
    for _ in range(WARMUP + 1):
        model.zero_grad()
        passes(model, TASK, batch, divisor)
    once = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    passes(model, TASK, batch, divisor)
    for p, g in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 1 + g)


def test_losses_stay_what_they_were():
    model, passes = model_of(), RecordedPasses(Repeats())
    losses = [passes(model, TASK, batch, torch.tensor(1.0)) for batch in batches(*[8] * (WARMUP + 3))]
    assert losses == [TASK.loss(model, batch) for batch in batches(*[8] * (WARMUP + 3))]
    assert len(set(map(float, losses))) == len(losses)


def replace_parameter(model):
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())


def move_parameter(model):
    model[1].weight.data = model[1].weight.data.clone()


def freeze(model):
    model[1].bias.requires_grad_(False)


def move_part(model):
    model[1].weight.q = model[1].weight.q.clone()


def test_what_a_stored_weight_is_made_of_is_looked_at_too():
    model, recorder = model_of(), Repeats()
    model[1].weight = nn.Parameter(StoredInt8.of(model[1].weight.detach()))
    passes = RecordedPasses(recorder)
    for change in (lambda model: None, move_part):
        change(model)
        for _ in range(WARMUP + 1):
            passes(model, TASK, batches(8)[0], torch.tensor(1.0))
    assert recorder.recorded == 2


@pytest.mark.parametrize("change", [replace_parameter, move_parameter, freeze])
def test_what_was_replaced_is_recorded_anew(change):
    model, recorder = model_of(), Repeats()
    passes = RecordedPasses(recorder)
    batch, divisor = batches(8)[0], torch.tensor(16.0)
    for changed in (False, True):
        if changed:
            change(model)
        for _ in range(WARMUP + 1):
            model.zero_grad()
            loss = passes(model, TASK, batch, divisor)
        wanted = Passes(ALONE.device)(twin := model_of(), TASK, batch, divisor)
        assert loss == wanted
        assert torch.equal(model[1].weight.grad, twin[1].weight.grad)
    assert (recorder.recorded, recorder.finished) == (2, 1)
    assert (model[1].bias.grad is None) == (change is freeze)


def test_a_hook_that_changes_the_passes_has_them_recorded_anew():
    class Changing(Chain):
        def before_step(self, ctx):
            ctx.passes_changed = ctx.step == 4

    model, recorder = model_of(), Repeats()
    passes = RecordedPasses(recorder)
    optimizer = build_optimizer([ParamGroup("rest", list(model.parameters()))], OptimSection())
    for step in range(4 + WARMUP + 1):
        train_step(model, optimizer, Changing(), batches(8), TASK, step, 0.0, ALONE, passes)
    assert recorder.recorded == 2


def test_shapes_beyond_the_most_are_run_by_python(monkeypatch):
    monkeypatch.setattr(module, "MOST_GRAPHS", 1)
    recorder = Repeats()
    lengths = [(8,)] * 3 + [(5,)] * 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(RecordedPasses(recorder), lengths)
    assert same(found, trained(Passes(ALONE.device), lengths))
    assert recorder.recorded == 1
    (said,) = [str(w.message) for w in caught if "cuda_graphs" in str(w.message)]
    assert "(2, 5)" in said


def test_every_field_of_a_batch_is_copied():
    """The model sees what is given, also where documents share rows."""
    seen = []

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of()

        def forward(self, tokens, mask, input_pos):
            seen.append((tokens.clone(), mask.clone(), input_pos.clone()))
            return self.inner(tokens)

    model, passes = Sees(), RecordedPasses(Repeats())
    for number in range(WARMUP + 2):
        tokens = torch.full((1, 4), number)
        documents = torch.tensor([[0, 0, 1, min(number, 1)]], dtype=torch.int32)
        passes(model, TASK, Batch(tokens, tokens, documents, tokens + 1), torch.tensor(4.0))
    for number, (tokens, mask, positions) in enumerate(seen):
        assert tokens.eq(number).all()
        assert positions.eq(number + 1).all()
        assert mask[0, 3].tolist() == (
            [True, True, False, True] if number == 0 else [False, False, True, True]
        )


def test_where_graphs_cannot_be_they_are_refused(monkeypatch):
    parallel = ParallelSection(cuda_graphs=True)
    optimizer = build_optimizer([ParamGroup("rest", list(model_of().parameters()))], OptimSection())
    with pytest.raises(ConfigError, match=r"parallel\.cuda_graphs: true, but the device is cpu; set it to"):
        passes_for(parallel, ALONE, optimizer)
    together = Process(0, 2, torch.device("cuda", 0), object())
    with pytest.raises(ConfigError, match=r"but 2 processes train together"):
        passes_for(parallel, together, optimizer)
    in_backward = OptimSection(in_backward=True, clip_norm=0.0)
    optimizer = build_optimizer([ParamGroup("rest", list(model_of().parameters()))], in_backward)
    with pytest.raises(ConfigError, match=r"but the optimizer updates in the backward pass"):
        passes_for(parallel, dataclasses.replace(ALONE, device=torch.device("cuda", 0)), optimizer)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['device="cpu"'], r"parallel\.cuda_graphs: true, and device is 'cpu'"),
        (
            ["optim.in_backward=true", "optim.clip_norm=0"],
            r"optim\.in_backward: True updates in the backward",
        ),
        (['parallel.checkpointing="full"'], r"parallel.*cuda_graphs: true, but checkpointing 'full' reads"),
    ],
)
def test_runs_that_contradict_them_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        rules.check(parse.load("tiny/llm", ["parallel.cuda_graphs=true", *overrides]))


def test_a_run_without_them_is_run_by_python():
    assert type(Trial.of(tiny_run("llm", None)).passes) is Passes
