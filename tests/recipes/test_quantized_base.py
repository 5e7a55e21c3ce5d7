"""Quantize, adapt, export: a run that starts from `qrecipes quantize`, and ends with its integers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import command_line, write_run

from qrecipes import load_export
from qrecipes.quant.linear import QuantLinear

STORIES = ("--calibration", "asset:tinyshakespeare/train.txt.xz", "--samples", "8", "--length", "64")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """The story model by GPTQ at 3 bits in groups of 32, but for the layers that no group divides."""
    output = tmp_path_factory.mktemp("quantized") / "w3"
    options = ("--method", "gptq", "--bits", "3", "--group-size", "32", "--asymmetric", "--skip", "*.w2")
    arguments = (*options, *STORIES, "--output", str(output), "--device", "cpu")
    assert command_line("quantize", "hf:asset:stories260k", *arguments) == 0
    return output


def train(
    folder: Path, quantized: object, *overrides: str, skip: Sequence[str] = ("*.w2",), **args: int
) -> int:
    """A run of three steps over the quantized model; its status."""
    model = {"source": "hf:asset:stories260k", "quantized": str(quantized), "args": args}
    adapters = {"name": "qa_lora", "bits": 3, "rank": 4, "quantizer": "gptq", "skip": skip}
    config = write_run(folder, model, adapters, steps=3, optim__lr=3e-3, export__at_end=True)
    return command_line("run", "train", "--config", str(config), *overrides)


def test_adapters_over_gptq_merge_into_its_integers(quantized, tmp_path):
    """The export keeps GPTQ's packed integers and scales bit for bit, learnt something, and needs neither the
    run nor the quantized model."""
    base = Path(shutil.copytree(quantized, tmp_path / "base"))
    assert train(tmp_path, base) == 0
    export = Path(shutil.move(tmp_path / "run" / "export", tmp_path / "export"))
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "run")
    merged, before = load_export(export), load_export(quantized)
    layers = {fqn: m for fqn, m in before.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 30
    for fqn, layer in layers.items():
        ours = merged.get_submodule(fqn)
        assert torch.equal(ours.packed, layer.packed), fqn
        assert torch.equal(ours.scale, layer.scale), fqn
        assert ours.format.has_offset
        assert not torch.equal(ours.dequantize(), layer.dequantize()), fqn
    report = json.loads((export / "merge_report.json").read_text())
    assert report["logits"]["float64"]["relative_error"] <= 1e-12
    assert report["logits"]["float32"]["relative_error"] <= 1e-5


def test_training_starts_at_the_quantized_model(quantized, tmp_path):
    assert train(tmp_path, quantized) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    assert held_out[-1] < held_out[0]
    (tmp_path / "plain").mkdir()
    assert train(tmp_path / "plain", quantized, "steps=1", "optim.lr=1e-30") == 0
    again = [json.loads(line) for line in (tmp_path / "plain" / "run" / "metrics.jsonl").open()]
    assert next(row["val_loss"] for row in again if "val_loss" in row) == held_out[0]


def test_a_run_from_a_quantized_model_resumes(quantized, tmp_path):
    assert train(tmp_path, quantized, "steps=2", "checkpoint.every=1") == 0
    assert train(tmp_path, quantized, "steps=3", "checkpoint.every=1") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": ("*.w2", "*.w1")}, "no transform takes layers.0.mlp.w1, layers.1.mlp.w1"),
        (
            {"num_layers": 3},
            "is another model than model.source .*num_layers is 5 there, 3",
        ),
        ({"quantized": "hf:asset:stories260k"}, "has no low-bit layer; use model.weights"),
        (
            {"skip": ()},
            "'gptq' needs calibration text and the whole model, and layers.0.mlp.w2|does not divide",
        ),
    ],
)
def test_what_cannot_be_a_base_is_refused(quantized, tmp_path, capfd, changes, message):
    assert train(tmp_path, **({"quantized": quantized} | changes)) == 2
    assert re.search(message, capfd.readouterr().err)
