"""Exports: self-describing, checked, equal after reloading."""

from __future__ import annotations

import json

import pytest
import torch
from harness import Trial, methods, tiny_run

from qrecipes import load_export
from qrecipes.errors import ConfigError, ExportError
from qrecipes.export import store
from qrecipes.training import checkpoint
from qrecipes.training.output import write_identity


@pytest.fixture
def run(tmp_path):
    run = tiny_run("llm", methods()[0], output=str(tmp_path / "run"))
    trial = Trial.of(run)
    for _ in range(2):
        trial.advance(1)
        checkpoint.save(run, trial.done, trial.model, trial.optimizer, trial.data.state_dict(), trial.process)
    write_identity(run, trial.chain.receipt, {})
    return run


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(48).reshape(2, 24))


def test_export_of_a_run_reloads_bit_for_bit(run):
    (folder,) = store.export_run(run.output)
    model, _ = store.load_run(run.output)
    assert torch.equal(logits(load_export(folder)), logits(model))


def test_a_step_can_be_chosen(run, tmp_path):
    (older,) = store.export_run(run.output, tmp_path / "older", step=1)
    (newer,) = store.export_run(run.output, tmp_path / "newer")
    assert not torch.equal(logits(load_export(older)), logits(load_export(newer)))
    with pytest.raises(ExportError, match="no checkpoint of step 7; it has: step_00000001, step_00000002"):
        store.export_run(run.output, step=7)


def test_manifest_describes_the_model(run):
    (folder,) = store.export_run(run.output)
    manifest = json.loads((folder / store.MANIFEST).read_text())
    assert manifest["model"]["source"] == run.model.source
    assert manifest["linear_layers"] == {"Linear": 14}  # seven a layer; the head is tied to the embedding
    assert manifest["parameter_dtype"] == "float32"


def test_an_export_is_replaced_but_nothing_else_is(run, tmp_path):
    (folder,) = store.export_run(run.output)
    store.export_run(run.output, folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="exists and is no export"):
        store.export_run(run.output, other)
    assert (other / "thesis.txt").read_text() == "precious"


def test_damaged_exports_are_refused(run):
    (folder,) = store.export_run(run.output)
    path = folder / store.TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ExportError, match="SHA-256 differs"):
        load_export(folder)
    path.write_bytes(content[:100])
    with pytest.raises(ExportError, match="cannot be read"):
        load_export(folder)
    (folder / store.MANIFEST).unlink()
    with pytest.raises(ExportError, match="is no export"):
        load_export(folder)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run: it holds no run\.toml"):
        store.export_run(tmp_path)


def test_a_loaded_export_is_in_evaluation_mode(run):
    (folder,) = store.export_run(run.output)
    assert not load_export(folder).training


def test_a_reloaded_model_that_differs_is_refused(run, monkeypatch):
    """The exporter reads back what it wrote."""
    honest = store.load_export

    def perturbed(path):
        model = honest(path)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return model

    monkeypatch.setattr(store, "load_export", perturbed)
    with pytest.raises(ExportError, match="differs after reloading"):
        store.export_run(run.output)


def test_export_to_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ExportError, match="is a file"):
        store.export_run(run.output, tmp_path / "file")


def test_bfloat16_survives_the_export(tmp_path):
    run = tiny_run("llm", None, output=str(tmp_path / "run"))
    trial = Trial.of(run, dtype=torch.bfloat16)
    trial.advance(1)
    folder = store.save(trial.chain.finalize(trial.model.eval()), run, tmp_path / "export")
    loaded = load_export(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(trial.model))


def test_loading_an_export_draws_no_random_numbers(run):
    (folder,) = store.export_run(run.output)
    state = torch.get_rng_state()
    load_export(folder)
    assert torch.equal(torch.get_rng_state(), state)
