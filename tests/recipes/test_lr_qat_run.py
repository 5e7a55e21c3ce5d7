"""LR-QAT from the command line: over GPTQ's integers, resumed, exported, and as rounding alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import command_line

from qrecipes import load_export
from qrecipes.export.store import load_swapped
from qrecipes.models.activation_quantizers import activation_quantizers
from qrecipes.quant.input_linear import QuantInputLinear
from qrecipes.quant.linear import QuantLinear

MODEL = "hf:asset:stories260k"
CALIBRATION = ("--calibration", "asset:tinyshakespeare/train.txt.xz", "--samples", "4", "--length", "64")


def train(folder: Path, transform: str, *overrides: str, model: str = "") -> int:
    (folder / "text.txt").write_text("Once upon a time there was a tiny run. " * 60)
    config = folder / "run.toml"
    config.write_text(f"""
steps = 3
output = "{folder}/run"
device = "cpu"
[model]
source = "{MODEL}"
{model}
[data]
source = "text"
files = ["{folder}/text.txt"]
validation_fraction = 0.2
sequence_length = 32
batch_size = 2
[optim]
lr = 3e-2
[log]
progress = false
[export]
at_end = true
[[transform]]
name = "lr_qat"
rank = 4
{transform}
""")
    return command_line("run", "train", "--config", str(config), *overrides)


def rows(folder: Path, key: str) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_gptqs_integers_are_where_training_starts(tmp_path):
    base = tmp_path / "w3"
    options = ("--method", "gptq", "--bits", "3", "--group-size", "row", "--asymmetric", "--device", "cpu")
    assert command_line("quantize", MODEL, *options, *CALIBRATION, "--output", str(base)) == 0
    transform = 'bits = 3\nsymmetric = false\nalpha = 400.0\nstorage = "int4"'
    assert train(tmp_path, transform, model=f'quantized = "{base}"') == 0
    found = rows(tmp_path, "val_loss")
    assert found[-1] < found[0]
    (tmp_path / "still").mkdir()
    assert train(tmp_path / "still", transform, "steps=0", model=f'quantized = "{base}"') == 0
    assert rows(tmp_path / "still", "val_loss") == found[:1]
    before, same = load_export(base), load_export(tmp_path / "still" / "run" / "export")
    layers = {fqn: m for fqn, m in before.named_modules() if isinstance(m, QuantLinear)}
    assert layers
    for fqn, layer in layers.items():
        for name, tensor in layer.state_dict().items():
            assert torch.equal(same.get_submodule(fqn).state_dict()[name], tensor), fqn
    moved = load_export(tmp_path / "run" / "export")
    assert any(
        not torch.equal(moved.get_submodule(fqn).packed, layer.packed) for fqn, layer in layers.items()
    )


def test_no_steps_round_the_model_as_quantize_does(tmp_path):
    """The post-training baseline, from the grids that training starts from."""
    assert train(tmp_path, 'storage = "fp32"', "steps=0") == 0
    options = ("--method", "lp", "--bits", "4", "--group-size", "row", "--device", "cpu")
    assert command_line("quantize", MODEL, *options, "--output", str(tmp_path / "lp")) == 0
    ours, theirs = load_export(tmp_path / "run" / "export"), load_export(tmp_path / "lp")
    tokens = torch.arange(64).reshape(2, 32)
    assert torch.equal(ours(tokens), theirs(tokens))


@pytest.mark.parametrize(
    "inputs", ["integer_forward = true", "activation_symmetric = false\nkv_bits = 4"], ids=["integer", "kv4"]
)
def test_an_export_computes_as_the_model_trained(tmp_path, inputs):
    """With quantized inputs, keys and values: bit for bit, on the same device."""
    assert train(tmp_path, f"activation_bits = 8\n{inputs}") == 0
    swapped, _, _ = load_swapped(tmp_path / "run")
    exported = load_export(tmp_path / "run" / "export")
    tokens = torch.arange(64).reshape(2, 32)
    assert torch.equal(swapped(tokens), exported(tokens))
    assert any(isinstance(m, QuantInputLinear) for m in exported.modules())
    assert bool(activation_quantizers(exported)) is ("kv_bits" in inputs)
    plain = load_export(tmp_path / "run" / "export")
    for module in plain.modules():
        if isinstance(module, QuantInputLinear):
            module.__class__ = QuantLinear
    assert not torch.equal(plain(tokens), exported(tokens))


def test_a_resumed_run_never_encodes_again(tmp_path):
    """phi encoded twice would be another weight: losses go on as in an unbroken run, bit for bit."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert train(tmp_path / "whole", "", "steps=4", "schedule.kind='constant'") == 0
    for steps in (2, 4):
        assert train(tmp_path / "parts", "", f"steps={steps}", "schedule.kind='constant'") == 0
    assert rows(tmp_path / "parts", "loss") == rows(tmp_path / "whole", "loss")
