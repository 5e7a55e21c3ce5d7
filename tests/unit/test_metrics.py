"""What a run writes while it runs."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

import pytest
import torch
from harness import ALONE, Trial, build_plain, tiny_run

from qrecipes.errors import ConfigError, TrainingError
from qrecipes.parallel.process import Process
from qrecipes.training import metrics
from qrecipes.training.metrics import Log, keep_until, training_flops
from qrecipes.training.step import StepReport


def report(loss: float, norm: float = 1.0) -> StepReport:
    return StepReport(torch.tensor(loss), torch.tensor(norm), torch.tensor(40), torch.tensor(64), False)


@pytest.fixture
def run(tmp_path):
    return tiny_run("llm", None, output=str(tmp_path), steps=3, log__progress=False)


def lines(run) -> list[dict]:
    with open(f"{run.output}/metrics.jsonl") as file:
        return [json.loads(line, parse_constant=refuse) for line in file]


def refuse(constant: str) -> None:
    """JSON knows no NaN, and strict readers stop at one."""
    raise ValueError(constant)


def test_every_step_is_one_line(run):
    with Log(run, ALONE, 0, 1e6) as log:
        for step in (1, 2, 3):
            log.step(step, 1e-3, report(1.0 / step))
    found = lines(run)
    assert [(line["step"], round(line["loss"], 4)) for line in found] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    wanted = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "step_s", "peak_memory_bytes"}
    assert all(wanted <= set(line) for line in found)


QUEUED = Process(0, 1, torch.device("meta"), None)
"""A device whose steps are held back, as a GPU's are."""


@pytest.mark.parametrize("crash", [False, True])
def test_the_step_held_back_is_written_when_the_run_ends(run, crash):
    with suppress(KeyError), Log(run, QUEUED, 0, 1e6) as log:
        log.step(1, 1e-3, report(1.0))
        log.step(2, 1e-3, report(1.0))
        assert [line["step"] for line in lines(run)] == [1]
        if crash:
            raise KeyError("crash")
    assert [line["step"] for line in lines(run)] == [1, 2]


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_a_loss_or_norm_that_is_not_finite_stops_the_run(run, loss, norm):
    with pytest.raises(TrainingError, match="step 2: loss is"), Log(run, ALONE, 0, 1e6) as log:
        log.step(1, 1e-3, report(1.0))
        log.step(2, 1e-3, report(loss, norm))
        log.flush()
    assert [line["step"] for line in lines(run)] == [1, 2]  # the bad step is on record, as valid JSON
    assert log.confirmed_step == 1


def test_a_resumed_run_writes_later_steps_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    keep_until(path, 1)
    assert path.read_text() == '{"step": 1, "loss": 2}\n'


def test_mfu_is_the_share_of_the_stated_peak(run, monkeypatch):
    clock = iter([0.0, 0.5, 0.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    run = tiny_run("llm", None, output=run.output, log__progress=False, log__peak_tflops=1e-3)
    with Log(run, ALONE, 0, 2e6) as log:
        log.step(1, 1e-3, report(1.0))
        log.flush()
    # 64 tokens x 2e6 operations in 0.5 s, of 1e9 a second
    assert lines(run)[0]["mfu"] == pytest.approx(64 * 2e6 / 0.5 / 1e9)


def test_the_last_step_has_its_own_time_though_it_is_read_with_the_one_before(run, monkeypatch):
    """On a GPU that is faster than what feeds it, both are done when the last has been queued."""
    clock = iter([0.0, 1.0, 2.0, 2.0, 2.001])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_memory", lambda device: 0)
    run = tiny_run("llm", None, output=run.output, log__progress=False, log__peak_tflops=1.0)
    with Log(run, Process(0, 1, torch.device("cuda"), None), 0, 1.0) as log:
        log.step(1, 1e-3, report(1.0))
        log.step(2, 1e-3, report(1.0))
    assert [line["step_s"] for line in lines(run)] == [2.0, 1.0]


def test_training_flops_count_every_multiplied_weight():
    """Against torch's own counter over one forward and backward pass of the tiny decoder."""
    from torch.utils.flop_counter import FlopCounterMode

    run = tiny_run("llm", None)
    model, length = build_plain(run), 64
    tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).float().sum().backward()
    counted = counter.get_total_flops() / length
    attention = 6 * length * 64 * 2  # 6 x length x width x blocks; the counter does not know the CPU's kernel
    assert training_flops(model, length) - attention == counted


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_training_flops_of_frozen_weights_lack_their_gradient(name):
    """Two thirds of a trained weight's, in however few bits it is kept; adapters cost what they hold."""
    plain, run = build_plain(tiny_run("llm", None)), tiny_run("llm", name)
    adapted = Trial.of(run).model
    embedding = plain.tok_embeddings.weight.numel()
    weights = sum(p.numel() for p in plain.parameters() if p.ndim >= 2)  # the embedding is the head, too
    adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert embedding < weights
    attention = 6 * 64 * 64 * 2
    assert training_flops(adapted, 64) == 4 * weights + 6 * adapters + attention


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_reaches_the_terminal_and_a_plain_log(run, monkeypatch, capsys, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    run = tiny_run("llm", None, output=run.output, steps=3)
    with Log(run, ALONE, 0, 1e6) as log:
        log.step(1, 1e-3, report(2.5))
        log.step(3, 1e-3, report(1.5))
        log.flush()
        log.write({"step": 3, "val_loss": 1.25})
    shown = capsys.readouterr().err
    assert "loss 1.5000" in shown
    assert "val_loss 1.2500" in shown
    assert ("\r" in shown) == is_terminal


def test_tensorboard_gets_the_same_numbers(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tiny_run("llm", None, output=run.output, log__progress=False, log__sinks=("tensorboard",))
    with Log(run, ALONE, 0, 1e6) as log:
        log.step(1, 1e-3, report(2.5))
    events = accumulator.EventAccumulator(f"{run.output}/tensorboard")
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5)]


def test_a_missing_sink_names_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tiny_run("llm", None, output=run.output, log__progress=False, log__sinks=("wandb",))
    with pytest.raises(
        ConfigError, match=r"'wandb' needs a package that is missing; pip install 'qrecipes\[wandb\]'"
    ):
        Log(run, ALONE, 0, 1e6)


def test_several_sinks_at_once(run, monkeypatch):
    """A stand-in for wandb, since the real one needs an account."""
    logged = []
    fake = type(sys)("wandb")
    session = type(
        "Session", (), {"log": lambda self, d, step: logged.append((step, d["loss"])), "finish": lambda s: 0}
    )
    fake.init = lambda **_: session()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    pytest.importorskip("tensorboard")
    run = tiny_run("llm", None, output=run.output, log__progress=False, log__sinks=("tensorboard", "wandb"))
    with Log(run, ALONE, 0, 1e6) as log:
        log.step(1, 1e-3, report(2.5))
    assert logged == [(1, 2.5)]
