"""Adapters over low-bit weights are trained, merged, quantized again and compared, seed by seed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path

import pytest
import torch
from harness import command_line

from qrecipes.config import parse
from qrecipes.data import build_validation_data
from qrecipes.data.tokenizers import tokenizer_of
from qrecipes.errors import ConfigError
from qrecipes.export.opened import open_model
from qrecipes.training.task import forward_batch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("bench_merge")


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory) -> tuple[dict, str]:
    """The JSON of a whole comparison and what was printed, with commands called here, one after the other,
    instead of as processes."""
    judge = importlib.import_module("judge_merge")

    def run(self, command, environment, log, timeout):
        if command[1] == str(bench.JUDGE):
            return None if judge.main(list(command[2:])) == 0 else "failed"
        return None if command_line(*command[len(bench.PROGRAM) :]) == 0 else "failed"

    def one_by_one(jobs, devices, per_device, run):
        return ((job, run(job, None)) for job in jobs)

    output, printed = tmp_path_factory.mktemp("merge") / "merge.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(bench.Processes, "run", run)
        patch.setattr(bench, "run_all", one_by_one)
        assert bench.main(arguments(output)) == 0
    return json.loads(output.read_text()), printed.getvalue()


def test_resumed_it_keeps_the_runs_that_finished_and_makes_the_bases_anew(bench, whole, tmp_path):
    """One run had failed; it alone is trained again, and the tables become those of the whole."""
    document, _ = whole
    output = tmp_path / "merge.json"
    finals = [run for run in document["processes"] if run["kind"] == "final"]
    cut = [run | {"failed": "lost"} if run is finals[0] else run for run in document["processes"]]
    output.write_text(json.dumps(document | {"processes": cut}))
    by_name = {run["title"]: run for run in document["processes"]}
    asked: list[str] = []

    class Lab(bench.Lab):
        """Trains and quantizes nothing."""

        def _train(self, task, job, environment):
            asked.append(task.name)
            return dict(by_name[task.name])

        def _quantize(self, bits, environment):
            asked.append(f"GPTQ W{bits}")

        def _judge(self, model, again, environment, bits=None):
            return by_name["GPTQ W3" if "base_w3" in model else "16-bit"]["rows"]

    given = arguments(output)
    folder = Path(finals[0]["command"].split("data.files=")[1].split('"')[1]).parent
    output.write_text(output.read_text().replace(str(folder), str(tmp_path)))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(bench, "Lab", Lab)
        assert bench.main([*given, "--resume"]) == 0
    assert sorted(asked) == ["GPTQ W3", finals[0]["title"]]
    again = json.loads(output.read_text())
    assert again["tables"][0]["summary"] == document["tables"][0]["summary"]


def arguments(output: Path) -> list[str]:
    """The attention of one layer of the story model, two steps, some conversations."""
    talk = (ROOT / "qrecipes/assets/smalltalk/conversations.jsonl").read_text().splitlines(keepends=True)
    train, held_out = output.with_name("train.jsonl"), output.with_name("held_out.jsonl")
    train.write_text("".join(talk[:12]))
    held_out.write_text("".join(talk[12:14]))
    data = (f'data.files=["{train}"]', f'data.validation_files=["{held_out}"]', "data.validation_fraction=0")
    short = ("schedule.warmup_steps=0", "data.sequence_length=128", "data.batch_size=2")
    sizes = ("--steps", "2", "--search-steps", "1", "--seeds", "0", "--lrs", "3e-3", "--bits", "3")
    adapters = ("--rank", "2", "--samples", "2")
    skip = ("--skip", "layers.[1-9]*", "--skip", "*mlp*", "--skip", "output")
    return [
        *("--config", "tiny/chat", "device=cpu", *data, *short),
        *(*sizes, *adapters, *skip, "--output", str(output)),
    ]


def test_every_row_is_there_and_merging_changes_nothing_but_roundings(whole):
    document, printed = whole
    (table,) = document["tables"]
    rows = {entry["case"]: entry for entry in table["summary"]}
    assert len(rows) == 13
    assert all((entry["runs"], entry["failed"]) == (1, 0) for entry in rows.values())
    pooled = rows["QA-LoRA over GPTQ W3"]["mean"]
    assert rows["QA-LoRA over GPTQ W3, merged"]["mean"] == pytest.approx(pooled, abs=1e-5)  # float32
    assert rows["QLoRA, merged, 16-bit"]["mean"] == pytest.approx(rows["QLoRA"]["mean"], abs=1e-5)
    assert len({round(entry["mean"], 5) for entry in rows.values()}) == 10  # all but three merges differ
    (verdict,) = document["verdicts"]
    theirs = rows["QLoRA, merged, GPTQ W3"]["mean"]
    assert verdict["difference"] == pytest.approx(pooled - theirs, abs=1e-5)
    assert list(verdict["by_seed"]) == ["0"]
    assert printed.splitlines()[-1].startswith("W3: QA-LoRA over GPTQ W3, merged - QLoRA, merged, GPTQ W3: ")


def test_the_search_never_sees_the_held_out_data(whole):
    """Its runs hold out a share of the training data, and no final run's seed is theirs."""
    search = [one for one in whole[0]["processes"] if one["kind"] == "search"]
    assert len(search) == 3
    for one in search:
        assert "data.validation_files=[]" in one["command"]
        assert "data.validation_fraction=0.05" in one["command"]
        assert one["seed"] == 1


def test_the_picture_of_a_comparison_has_a_column_for_each_number_of_bits(whole, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra dev")
    plot = importlib.import_module("plot_curves")
    document = whole[0]
    other = json.loads(json.dumps(document["tables"][0]).replace("W3", "W2"))
    plot.draw(document | {"tables": [document["tables"][0], other]}, tmp_path / "two.svg")
    text = (tmp_path / "two.svg").read_text()
    for case in (
        entry["title"] for found in (document["tables"][0], other) for entry in found["plan"]["case"]
    ):
        assert f">{case}<" in text
    assert text.count(">tiny/chat, W") == 2
    with pytest.raises(ConfigError, match="'other' is no case"):
        plot.draw(document, tmp_path / "b.svg", only=["other"])


def test_a_judged_loss_is_the_mean_over_all_targets(bench, tmp_path):
    """Against log-softmax in float64, conversation sequence by sequence."""
    judge = importlib.import_module("judge_merge")
    run = parse.load("tiny/chat", ["device=cpu"])
    (tmp_path / "run.toml").write_text(parse.dump(run))
    rows = tmp_path / "rows.json"
    source = "hf:asset:stories260k"
    assert judge.main([source, "--config", str(tmp_path / "run.toml"), "--output", str(rows)]) == 0
    (row,) = json.loads(rows.read_text())
    model = open_model(source).model
    held_out = build_validation_data(run.data, tokenizer_of(run), task=run.task, seed=0, rank=0, world=1)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in held_out:
            logs = forward_batch(model, batch).double().log_softmax(-1)
            found = batch.targets >= 0
            total -= float(logs[found].gather(1, batch.targets[found].unsqueeze(1)).sum())
            count += int(found.sum())
    assert row == {
        "weights": "as it is",
        "val_loss": pytest.approx(total / count, rel=1e-5),  # float32
        "val_accuracy": row["val_accuracy"],
        "val_targets": count,
        "val_perplexity": pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-4),
    }


def test_without_its_base_a_method_is_left_out_and_the_others_are_compared(bench):
    """A failed base is reported; QLoRA needs none."""
    args = bench._parser().parse_args(["--bits", "3,2", "--lrs", "1e-3,1e-2", "--seeds", "0"])
    results: dict = {}
    stages = bench.stages(args, results)
    for task in next(stages):
        lost = {"failed": "lost"} if task == bench.Task("base", 2) else {}
        results[task] = {"lr": task.lr, "curve": [{"step": 1, "val_loss": task.lr or 1.0}]} | lost
    second = next(stages)
    assert {task.method.title for task in second} == {"LoRA over GPTQ W3", "QA-LoRA over GPTQ W3"}
    for task in second:
        pooled = task.method.title.startswith("QA-LoRA")
        lost = {"failed": "lost"} if task.lr == 1e-3 and pooled else {}
        results[task] = {"lr": task.lr, "curve": [{"step": 1, "val_loss": 1 + task.lr}]} | lost
    finals = {task.method.title: task.lr for task in next(stages)}
    assert finals == {"QLoRA": 1e-3, "LoRA over GPTQ W3": 1e-3, "QA-LoRA over GPTQ W3": 1e-2}
    document = bench.assemble(args, "command", results)
    assert [one["difference"] for one in document["verdicts"]] == [None, None]
    assert "failed: base GPTQ W2: lost" in bench.report(document)


def test_held_out_data_must_be_apart(bench, tmp_path):
    with pytest.raises(ConfigError, match="validation_files: missing"):
        bench.main(["--config", "tiny/chat", "--output", str(tmp_path / "x.json")])
