"""Train, quantize, adapt, export, reload: what each command leaves is what the next one takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import command_line
from torch import nn

from qrecipes import load_export
from qrecipes.errors import CheckpointError
from qrecipes.export.store import load_run, load_swapped
from qrecipes.quant.linear import QuantLinear

TOKENS = torch.arange(48).reshape(2, 24)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS)


def train(config: str, output: Path, *overrides: str) -> Path:
    shared = (f"output={output}", "steps=4", "device=cpu", "log.progress=false", "checkpoint.every=2")
    assert command_line("run", "train", "--config", config, *shared, *overrides) == 0
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A trained run of a torchtune builder, with its export."""
    run = train("tiny/llm", tmp_path_factory.mktemp("walk") / "run")
    assert command_line("export", str(run)) == 0
    return run


def quantize(model: Path, output: Path, *arguments: str) -> Path:
    shared = ("--bits", "4", "--group-size", "32", "--asymmetric", "--output", str(output), "--device", "cpu")
    assert command_line("quantize", str(model), *shared, *arguments) == 0
    return output


GPTQ = ("--method", "gptq", "--calibration", "tiny/llm", "--samples", "8", "--length", "64")


@pytest.mark.parametrize("of", ["checkpoint", "export"])
@pytest.mark.parametrize("frozen", ["once", "rebuild"])
def test_a_trained_model_is_quantized_adapted_and_exported(trained, tmp_path, of, frozen):
    source = trained if of == "checkpoint" else trained / "export"
    base = quantize(source, tmp_path / "w4", *GPTQ)
    before = load_export(base)
    adapt = (f"model.quantized={base}", "transform.0.quantizer=gptq", f"checkpoint.frozen={frozen}")
    run = train("tiny/llm_qa_lora", tmp_path / "adapted", *adapt, "export.at_end=true")
    swapped, _, _ = load_swapped(run)
    merged, _ = load_run(run)
    exported = load_export(run / "export")
    assert torch.equal(logits(exported), logits(merged))
    # float32 sums in another order: 1e-5 of the largest logit, the bound of exports
    found, expected = logits(merged), logits(swapped)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(before)).abs().max() > 1e-3 * expected.abs().max()  # something was learnt
    report = json.loads((run / "export" / "merge_report.json").read_text())
    assert report["logits"]["float64"]["relative_error"] <= 1e-12
    layers = {name: m for name, m in before.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        ours = exported.get_submodule(name)
        assert torch.equal(ours.packed, layer.packed), name
        assert torch.equal(ours.scale, layer.scale), name


def test_checkpoint_and_export_quantize_to_the_same_bytes(trained, tmp_path):
    a = quantize(trained, tmp_path / "a", "--method", "rtn")
    b = quantize(trained / "export", tmp_path / "b", "--method", "rtn")
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_a_merged_export_is_a_base_again(trained, tmp_path):
    """Its float offsets are, so training goes on where the first adapter ended."""
    base = quantize(trained, tmp_path / "w4", "--method", "rtn")
    first = train("tiny/llm_qa_lora", tmp_path / "first", f"model.quantized={base}", "export.at_end=true")
    second = train(
        "tiny/llm_qa_lora", tmp_path / "second", f"model.quantized={first / 'export'}", "optim.lr=1e-30"
    )
    losses = [
        [row["val_loss"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "val_loss" in row]
        for run in (first, second)
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-6)  # float32 offsets


def test_a_run_without_its_base_is_refused_where_it_is_not_kept(trained, tmp_path):
    """Quantized anew by another method, the folder of the same name holds other integers."""
    base = quantize(trained, tmp_path / "w4", "--method", "rtn")
    adapt = (f"model.quantized={base}", "checkpoint.frozen=rebuild")
    run = train("tiny/llm_qa_lora", tmp_path / "adapted", *adapt)
    expected = logits(load_run(run)[0])
    assert torch.equal(logits(load_run(run)[0]), expected)
    quantize(trained, base, "--method", "mse")
    with pytest.raises(CheckpointError, match=r"of this run's model is not what it was .*tensors differ"):
        load_run(run)
