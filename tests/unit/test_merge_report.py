"""The merge report: what it measures, where it is written, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from harness import Trial, command_line, tiny_run

from qrecipes import load_export
from qrecipes.data import Batch, build_validation_data
from qrecipes.errors import ExportError
from qrecipes.export import merge_report as module
from qrecipes.export import store
from qrecipes.export.merge_report import merge_report
from qrecipes.quant.linear import QuantLinear
from qrecipes.training import checkpoint
from qrecipes.training.output import write_identity
from qrecipes.transforms import LoRAConfig, LRQATConfig, QALoRAConfig
from qrecipes.transforms.base import MergeBounds
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.qa_lora import QALoRALinear


def trained(method: str = "qa_lora", dtype: torch.dtype = torch.float32, steps: int = 4, **changes):
    """A trial of a tiny decoder and two held-out batches."""
    trial = Trial.of(tiny_run("llm", method, **changes), dtype=dtype)
    trial.advance(steps)
    run = trial.run
    held_out = build_validation_data(run.data, None, task=run.task, seed=run.seed, rank=0, world=1)
    return trial, list(held_out)[:2]


def saved(trial: Trial, folder) -> str:
    """The folder of a run with the trial's checkpoint."""
    run = replace(trial.run, output=str(folder))
    checkpoint.save(run, trial.done, trial.model, trial.optimizer, trial.data.state_dict(), trial.process)
    write_identity(run, trial.chain.receipt, {})
    return run.output


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_group_pooled_adapters_merge_within_the_goals(bits):
    """1e-12 of the largest logit in float64 and 1e-5 in float32, in a trained model; bounds, too."""
    config = QALoRAConfig(bits=bits, rank=8)
    trial, batches = trained(transform=(config,), steps=8, optim__lr=2e-3)
    report = merge_report(trial.model, trial.chain, batches)
    assert report.logits["float64"].relative_error <= 1e-12
    assert report.logits["float32"].relative_error <= 1e-5
    assert report.logits["float64"].bound == 1e-12
    assert not report.faults()


def test_perplexity_of_bfloat16_weights_with_float32_offsets_is_equal_to_four_digits():
    trial, batches = trained(dtype=torch.bfloat16, steps=12)
    report = merge_report(trial.model, trial.chain, batches)
    assert report.dtype == "bfloat16"
    assert f"{report.before.perplexity:.4g}" == f"{report.after.perplexity:.4g}"
    assert report.after.perplexity != report.before.perplexity  # they were measured


def test_integer_zero_points_are_said_to_lose_what_was_learnt():
    """Training lowered the perplexity; integer zero points raise it again by more than a merge may."""
    trial, batches = trained(steps=12)
    report = merge_report(trial.model, trial.chain, batches)
    assert report.integer_zeros.perplexity > 1.02 * report.before.perplexity
    assert report.integer_zeros.kl > 1e6 * report.after.kl
    assert "with integer zero points it would be" in report.summary()


def test_perplexity_and_divergence_are_those_of_the_two_models():
    """Against the finalized model run by hand on the same tokens."""
    trial, batches = trained(
        transform=(LoRAConfig(rank=4, base="int2", merge="requantize", merge_tolerance=9.0),)
    )
    report = merge_report(trial.model, trial.chain, batches)
    with torch.no_grad():
        before = torch.cat([trial.model.eval()(b.inputs) for b in batches]).double().log_softmax(-1)
        merged = trial.chain.finalize(trial.model).eval()
        after = torch.cat([merged(b.inputs) for b in batches]).double().log_softmax(-1)
    targets = torch.cat([b.targets for b in batches])
    for found, logprobs in ((report.before, before), (report.after, after)):
        loss = -logprobs.gather(-1, targets.unsqueeze(-1)).mean()
        assert found.loss == pytest.approx(float(loss), rel=1e-6)  # float32 logits of other batch shapes
        assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-6)
        divergence = (before.exp() * (before - logprobs)).sum(-1).mean()
        assert found.kl == pytest.approx(float(divergence), rel=1e-4, abs=1e-9)
    assert report.targets == targets.numel()
    assert report.after.kl > 1e-4
    assert report.perplexity_change == pytest.approx(report.after.perplexity / report.before.perplexity - 1)


def test_ignored_targets_do_not_count():
    trial, (batch, _) = trained(steps=1)
    some = batch.targets.clone()
    some[:, ::2] = -100
    halved = Batch(batch.inputs, some)
    report = merge_report(trial.model, trial.chain, [halved])
    assert report.targets == some.numel() // 2
    with pytest.raises(ExportError, match="no held-out batch with a target"):
        merge_report(trial.model, trial.chain, [Batch(batch.inputs, torch.full_like(some, -100))])


def test_measuring_leaves_the_model_as_it_was():
    trial, batches = trained(steps=2)
    trial.model.train()
    before = {name: tensor.clone() for name, tensor in trial.model.state_dict().items()}
    types = [type(m) for m in trial.model.modules()]
    merge_report(trial.model, trial.chain, batches)
    assert trial.model.training
    assert [type(m) for m in trial.model.modules()] == types
    for name, tensor in trial.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype is before[name].dtype


def test_float64_is_float64_to_the_end():
    """Norms and rotary embeddings of the model would round to float32: a change of 1e-10 would be lost."""
    trial, (batch, _) = trained(steps=1)
    model = trial.model.double().eval()
    embedding = model.tok_embeddings.weight
    with torch.no_grad():
        first = module._in_type(model, batch, torch.float64)
        embedding.mul_(1 + 1e-10 * torch.randn_like(embedding))
        second = module._in_type(model, batch, torch.float64)
    error = (second - first).abs().max() / first.abs().max()
    assert 1e-12 < error < 1e-8


def test_the_report_lies_beside_the_export(tmp_path, capsys):
    trial, _ = trained(steps=2)
    (folder,) = store.export_run(saved(trial, tmp_path / "run"))
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["methods"] == ["qa_lora"]
    assert report["logits"]["float64"]["relative_error"] <= 1e-12
    assert report["logits"]["bfloat16"]["bound"] is None  # infinite
    assert "merge of qa_lora: relative logit error float64" in capsys.readouterr().err
    layers = [m for m in load_export(folder).modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14


def test_a_run_without_transforms_has_no_report(tmp_path):
    trial = Trial.of(tiny_run("llm", None))
    trial.advance(1)
    (folder,) = store.export_run(saved(trial, tmp_path / "run"))
    assert not (folder / "merge_report.json").exists()


def worse(self) -> QuantLinear:
    """A merge by the rule of another convention of zero points: b' = b + P / s."""
    grid = self.base.grid
    offset = grid.offset.to(self.work_dtype) + self.offset_change() / grid.scale
    return self.base.with_grid(grid._replace(offset=offset), self.config.format())


def test_a_wrong_merge_is_refused_and_writes_nothing(tmp_path, monkeypatch, capsys):
    trial, _ = trained(steps=2)
    output = saved(trial, tmp_path / "run")
    monkeypatch.setattr(QALoRALinear, "merged", worse)
    assert command_line("export", output) == 1
    message = capsys.readouterr().err
    assert "export: the merge of qa_lora is worse than it may be: in float64, logits differ by" in message
    assert "at most 1e-12" in message
    assert "held-out perplexity went from" in message
    assert "--no-merge-check" in message
    assert not (tmp_path / "run" / "export").exists()
    assert command_line("export", output, "--no-merge-check") == 0
    report = json.loads((tmp_path / "run" / "export" / "merge_report.json").read_text())
    assert report["logits"]["float64"]["relative_error"] > 1e-3


def test_a_tolerance_is_the_users(tmp_path):
    config = LoRAConfig(rank=4, base="int2", merge="requantize", merge_tolerance=1e-6)
    trial, batches = trained(transform=(config,))
    (fault,) = merge_report(trial.model, trial.chain, batches).faults()
    assert "at most 1e-06" in fault
    loose = Chain.from_configs([replace(config, merge_tolerance=9.0)])
    assert not merge_report(trial.model, loose, batches).faults()


def test_without_data_the_merge_is_not_taken_on_trust(tmp_path, monkeypatch, capsys):
    trial, _ = trained(steps=1)
    output = saved(trial, tmp_path / "run")
    monkeypatch.setattr(store, "_held_out", lambda run: [])
    with pytest.raises(
        ExportError, match=r"cannot be measured: .*bring the data back, or export with --no-merge"
    ):
        store.export_run(output)
    store.export_run(output, check_merge=False)
    assert "the merge was not measured" in capsys.readouterr().err


def test_a_model_too_large_for_a_copy_is_told(monkeypatch):
    trial, batches = trained(steps=1)
    monkeypatch.setattr(module, "_free_memory", lambda device: 1_000_000)
    report = merge_report(trial.model, trial.chain, batches)
    assert report.logits["float64"].relative_error is None
    assert "in float64 need" in report.logits["float64"].not_measured
    assert report.logits["bfloat16"].relative_error is not None


def test_bounds_of_several_methods_add_up():
    total = MergeBounds(1e-12, 1e-5, math.inf, 0.01).plus(MergeBounds(None, 1e-5, 0.1, 0.02))
    assert total == MergeBounds(None, 2e-5, math.inf, pytest.approx(0.03))


def test_runs_are_merged_on_the_kind_of_device_that_trained_them(tmp_path, monkeypatch):
    """A GPU's sums have other last bits: export and load_run ask for one, and say so where there is none."""
    trial, _ = trained("lr_qat", steps=1)
    output = saved(trial, tmp_path / "run")
    (folder,) = store.export_run(output)
    assert json.loads((folder / store.MERGE_REPORT).read_text())["note"] is None

    asked: list[torch.device | None] = []
    honest = Chain.finalize

    def finalize(chain, model, device=None):
        asked.append(device)
        return honest(chain, model)

    monkeypatch.setattr(Chain, "finalize", finalize)
    store.load_run(output)
    assert asked == [torch.device("cpu")]
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    described = json.loads(state.read_text())
    assert described["device"] == "cpu"
    state.write_text(json.dumps(described | {"device": "cuda 9.0"}))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(store, "device_of", {"cuda 9.0": gpu}.get)
    asked.clear()
    store.load_run(output)
    (folder,) = store.export_run(output)
    # copies in three types, which tell arithmetic from rounding, are merged where they are
    assert [device for device in asked if device is not None] == [gpu, gpu, gpu]
    assert json.loads((folder / store.MERGE_REPORT).read_text())["note"] is None


@pytest.mark.parametrize(("device", "trainer"), [("cuda 9.0", "cuda 9.0"), (None, "not on record")])
def test_a_merge_on_another_kind_of_device_is_told(device, trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "device_of", lambda kind: None)
    trial, _ = trained("lr_qat", steps=1)
    output = saved(trial, tmp_path / "run")
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.json")
    described = json.loads(state.read_text())
    state.write_text(json.dumps({k: v for k, v in (described | {"device": device}).items() if v}))
    (folder,) = store.export_run(output)
    note = json.loads((folder / store.MERGE_REPORT).read_text())["note"]
    assert trainer in note
    assert "merged on cpu: integers next to a half may differ by a level" in note
    assert (
        f"note: {output}: {note}; for equal bits, use a machine with such a device" in capsys.readouterr().err
    )


def test_methods_that_merge_to_the_same_bits_everywhere_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "device_of", lambda kind: None)
    for method in ("int8_mixed_precision", "full_qat"):
        trial, _ = trained(method, steps=1)
        store.load_run(saved(trial, tmp_path / method))
    scales_only = LRQATConfig(rank=0, storage="int4")
    assert Chain.from_configs([scales_only]).merge_differs is None
    assert Chain.from_configs([LRQATConfig()]).merge_differs is not None
    assert "note:" not in capsys.readouterr().err
