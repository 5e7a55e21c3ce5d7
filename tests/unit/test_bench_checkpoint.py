"""The benchmark of checkpoints runs at its tiny shape in both modes; its sizes are those of the tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "bench_checkpoint.py"


def test_both_modes_are_measured(tmp_path):
    output, folder = tmp_path / "found.json", tmp_path / "checkpoints"
    folder.mkdir()
    command = [
        sys.executable,
        TOOL,
        "--shape",
        "tiny",
        "--layers",
        "1",
        "--folder",
        folder,
        "--output",
        output,
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    once, rebuild = json.loads(output.read_text())["results"]
    assert (once["mode"], rebuild["mode"]) == ("once", "rebuild")
    width, hidden, vocabulary, rank = 128, 384, 500, 8
    # NF4 takes half a byte a weight, 8 bits a block of 64 more, and little else; the embedding and the head
    # are in bfloat16, as they were
    low_bit = 4 * width * width + 3 * width * hidden
    frozen = low_bit * (0.5 + 1 / 64) + 2 * 2 * vocabulary * width
    assert once["frozen_bytes"] == pytest.approx(frozen, rel=0.1)  # headers and scales of scales
    assert rebuild["frozen_bytes"] == 0
    adapters = 4 * rank * (4 * 2 * width + 3 * (width + hidden))  # float32
    for result in (once, rebuild):
        assert result["files"]["model.safetensors"] == pytest.approx(adapters, rel=0.1)  # and a header
    assert once["files"] == {**rebuild["files"], "state.json": once["files"]["state.json"]}
    assert not any(folder.iterdir())
    assert done.stdout.splitlines()[-1].startswith("rebuild")
