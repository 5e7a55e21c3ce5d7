"""Every shipped tiny configuration, through the command line: train, then export, then load."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from harness import command_line

from qrecipes import load_export
from qrecipes.locate import shipped

TINY = sorted(path.stem for path in (shipped("configs") / "tiny").glob("*.toml"))


@pytest.mark.parametrize("name", TINY)
def test_tiny_config_trains_exports_and_loads(name, tmp_path):
    if name.startswith("vit") and not importlib.util.find_spec("timm"):
        pytest.skip("needs timm")
    output = tmp_path / "run"
    assert not command_line(
        "run", "train", "--config", f"tiny/{name}", f"output={output}", "export.at_end=true"
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in training] == list(range(1, len(training) + 1))
    assert training[-1]["loss"] < training[0]["loss"]
    assert held_out[-1]["val_loss"] < held_out[0]["val_loss"]
    assert [row["step"] for row in held_out] == [0, len(training)]
    for file in ("run.toml", "receipt.json", "environment.json", "checkpoints"):
        assert (output / file).exists(), file
    assert isinstance(load_export(output / "export"), torch.nn.Module)


def test_a_second_start_has_nothing_to_do(tmp_path, capfd):
    command = ["run", "train", "--config", "tiny/llm", f"output={tmp_path}/run", "steps=2"]
    assert not command_line(*command)
    before = (Path(tmp_path) / "run" / "metrics.jsonl").read_text()
    assert not command_line(*command)
    assert "all 2 steps were done before" in capfd.readouterr().err
    assert (Path(tmp_path) / "run" / "metrics.jsonl").read_text() == before
