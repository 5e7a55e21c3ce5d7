"""Every optimizer, chosen by overrides on the command line: it learns, resumes exactly, and exports what was
judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import ALONE, command_line

from qrecipes import load_export
from qrecipes.config import parse
from qrecipes.data import build_validation_data
from qrecipes.training.evaluate import evaluate
from qrecipes.training.optim import OPTIMIZERS
from qrecipes.training.task import Task

CONSTANT = 'schedule.kind="constant"'
EARLY = ("optim.in_backward=true", "optim.clip_norm=0")
NAMES = [(f'optim.name="{name}"',) for name in OPTIMIZERS]
UNUSUAL = [('optim.name="schedule_free_adamw"',), EARLY, ('optim.name="schedule_free_adamw"', *EARLY)]


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """torchao's steps as they are: compiling them takes long."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def train(output: Path, *overrides: str) -> tuple[list[dict], list[dict]]:
    """Lines of metrics of the run's steps, and of its evaluations, without what a clock measured."""
    common = [f"output={output}", "steps=6", CONSTANT, "log.evaluate_every=3", "data.batch_size=4"]
    assert not command_line("run", "train", "--config", "tiny/llm", *common, "export.at_end=true", *overrides)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    measured = ("tokens_per_s", "step_s", "peak_memory_bytes")
    rows = [{key: value for key, value in row.items() if key not in measured} for row in rows]
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


@pytest.mark.parametrize("choice", [*NAMES, EARLY], ids=" ".join)
def test_what_is_exported_is_what_was_judged(tmp_path, choice):
    steps, held_out = train(tmp_path / "run", *choice)
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"]
    assert all(row["grad_norm"] > 0 for row in steps)
    run = parse.load(str(tmp_path / "run" / "run.toml"))
    data = build_validation_data(run.data, None, task=run.task, seed=run.seed, rank=0, world=1)
    judged = evaluate(load_export(tmp_path / "run" / "export"), data, Task(run.task), ALONE)
    assert judged["val_loss"] == held_out[-1]["val_loss"]


@pytest.mark.parametrize("choice", UNUSUAL, ids=" ".join)
def test_evaluations_saves_and_going_on_change_nothing(tmp_path, choice):
    """Optimizers that exchange weights, or step at another time."""
    found = train(tmp_path / "run", *choice, "checkpoint.every=3")
    undisturbed, _ = train(tmp_path / "undisturbed", *choice, "log.evaluate_every=0")
    assert found[0] == undisturbed
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    assert train(tmp_path / "run", *choice, "checkpoint.every=3") == found


def test_offload_without_a_gpu_says_so(tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["run", "train", "--config", "tiny/llm", f"output={tmp_path}/run", 'optim.offload="state"']
    assert command_line(*command) == 2
    assert 'is on the CPU; set offload = "none"' in capfd.readouterr().err
