"""Ctrl-C and SIGTERM finish the step, save, and end with 128 plus the signal; the run then goes on bit for
bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import command_line

CONFIG = ["--config", "tiny/llm", "steps=60", "log.progress=false"]


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The losses of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert not command_line("run", "train", *CONFIG, f"output={folder}/run")
    return losses(folder / "run")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_the_run_goes_on(tmp_path, unbroken, number, status):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "qrecipes.cli.main", "run", "train", *CONFIG, f"output={folder}"]
    child = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    while time.monotonic() < deadline and len(losses(folder)) < 3:
        time.sleep(0.01)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == status, said
    assert "finishing this step, then saving" in said
    (saved,) = (folder / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) == max(losses(folder)) < 60

    assert not command_line("run", "train", *CONFIG, f"output={folder}")
    assert losses(folder) == unbroken


def test_signal_under_torchrun_saves_once_for_both_ranks(tmp_path):
    """The launcher passes the signal on and waits; both ranks agree on the step after which they stop."""
    folder = tmp_path / "run"
    flags = ["--nproc-per-node", "2"]
    command = [sys.executable, "-m", "qrecipes.cli.main", "run", *flags, "train", *CONFIG, "steps=5000"]
    child = subprocess.Popen(
        [*command, f"output={folder}", "device=cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (folder / "metrics.jsonl").exists() and len(losses(folder)) > 2
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=90)
    assert child.returncode == 143, said
    (saved,) = (folder / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) == max(losses(folder)) < 5000
    assert sorted(p.name for p in saved.glob("rank_*")) == [
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
