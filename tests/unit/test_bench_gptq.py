"""The benchmark of post-training quantization runs at its tiny shape, and says what it measured."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_gptq")


def test_gptq_is_timed_at_the_tiny_shape(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, TOOLS / "bench_gptq.py", "--shape", "tiny", "--cases", "GPTQ"]
    command += ["--samples", "4", "--length", "48", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(output.read_text())
    (found,) = document["results"]
    assert document["command"].startswith("tools/bench_gptq.py --shape tiny")
    assert found["settings"]["method"] == "gptq"
    assert found["samples"] == [4, 48]
    assert len(found["block_seconds"]) == found["layers"] == 2
    assert 0 < found["solving_seconds"] <= found["seconds"]
    assert sum(found["block_seconds"]) <= found["seconds"] + 0.01  # each is rounded to 1 ms
    assert 0 < found["output_error"] < found["weight_error"]  # which GPTQ trades for the former
    assert done.stdout.splitlines()[-1].startswith("GPTQ")


def test_a_block_s_seconds_end_with_its_last_layer(tool):
    assert tool.block_of("layers.3.attn.q_proj") == "layers.3"
    ended = [("layers.0", 2.0), ("layers.0", 5.0), ("layers.1", 6.0), ("layers.1", 9.0)]
    assert tool.block_seconds(ended, 1.0) == [4.0, 4.0]


def test_a_failed_case_has_its_line(tool):
    assert tool.table([{"case": "RTN", "failed": "a\nno such device\n"}]).endswith("failed: no such device")
