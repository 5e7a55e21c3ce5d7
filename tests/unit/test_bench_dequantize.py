"""The benchmark of dequantization runs at a tiny size, and prints the constant that is to be set."""

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
def tiles(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("dequantize_low_rank_tiles")


def test_weights_with_a_low_rank_product_are_timed(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, TOOLS / "bench_dequantize.py", "--low-rank", "8", "--shapes", "64x96"]
    command += ["--formats", "nf4", "int4 g32 offset", "--tokens", "3", "--repeats", "1", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    plain, with_offsets = json.loads(output.read_text())["low_rank"]
    assert set(with_offsets["us"]) - set(plain["us"]) == {"offsets", "merged by offsets"}
    assert all(us > 0 for us in with_offsets["us"].values())
    assert done.stdout.splitlines()[-1].startswith("64 x 96         int4 g32 offset       8     3")


def test_the_best_tiles_are_those_of_a_whole_block_of_layers(tiles):
    """The first choice is best for the shape that a block has once; wrong ones are out, however fast."""
    row = {"format": "nf4", "rank": 8, "T": 3, "us": {"with product": 10.0}}
    results = [
        row | {"N": 4096, "K": 4096, "tiles": {"first": 9.0, "second": 8.0, "third": "WRONG"}},
        row | {"N": 4096, "K": 11008, "tiles": {"first": 5.0, "second": 8.0, "third": 1.0}},
    ]
    last = tiles.comparison_table(results).splitlines()[-1]
    assert last.startswith("BLOCKS = second: 40.0 us a block, all formats; default LowRankBlocks(")
    assert last.endswith(": 50.0")
    assert "WRONG" in tiles.comparison_table(results)


def test_a_choice_that_changes_bits_is_wrong(tiles, monkeypatch):
    """And one that cannot be launched is an error of its own."""
    module = importlib.import_module("bench_dequantize")
    format = module.FORMATS["nf4"]
    payload = module.random_payload(8, 64, format, torch.device("cpu"))
    monkeypatch.setattr(tiles, "CHOICES", tiles.CHOICES[:3])

    def clock(case):
        return 2.0

    assert set(tiles.time_choices(payload, format, 8, 64, 4, clock).values()) == {2.0}
    calls = []

    def formed(*parts):
        calls.append(parts)
        if len(calls) == 1:
            raise ValueError("no such tiles")
        return tiles.dequantize_low_rank_reference(*parts) + (len(calls) == 3)

    monkeypatch.setattr(tiles, "dequantize_low_rank", formed)
    assert list(tiles.time_choices(payload, format, 8, 64, 4, clock).values()) == [
        "ValueError: no such tiles",
        2.0,
        "WRONG",
    ]
