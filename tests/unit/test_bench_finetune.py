"""The benchmark of fine-tuning steps runs at its tiny shape, and a case that fails costs only itself."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("step_timing")


def test_a_case_is_built_and_stepped(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, TOOLS / "bench_finetune.py", "--shapes", "tiny", "--eager", "--layers", "1"]
    command += ["--steps", "2", "--cases", "QLoRA INT8", "--optimizer", "adamw", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (found,) = json.loads(output.read_text())["results"]
    assert found["layers"] == 1
    assert found["per_s"] == pytest.approx(2 * 32 / (found["step_ms"] / 1e3), rel=0.01)  # printed rounded
    assert found["last_loss"] < found["first_loss"]
    assert done.stdout.splitlines()[-1].startswith("tiny    QLoRA INT8")


def test_steps_are_timed_after_the_warmup(timing):
    done = []

    def step() -> torch.Tensor:
        done.append(1)
        return torch.tensor(float(len(done)))

    found = timing.timed_steps(step, 3, 10, torch.device("cpu"))
    assert len(done) == timing.WARMUP + 3
    assert (found["first_loss"], found["last_loss"]) == (1.0, timing.WARMUP + 3)
    assert found["graphs"] >= found["graphs_after_step_3"] == 0


def test_a_worker_that_fails_says_why(timing, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import sys\nprint('a line')\nsys.exit('no such device')\n")
    assert "no such device" in timing.in_own_process(str(script), [], 60)["failed"]
    script.write_text("import time\ntime.sleep(60)\n")
    assert "longer than 1 s" in timing.in_own_process(str(script), [], 1)["failed"]
