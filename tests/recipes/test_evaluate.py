"""`qrecipes evaluate`: from the command line to the table and the JSON."""

from __future__ import annotations

import json
import math
import sys

import pytest

from qrecipes.cli.main import main
from qrecipes.evaluation import perplexity
from qrecipes.export.opened import open_model
from qrecipes.models.activation_quantizers import activation_quantizers, quantize_activations

STORIES = "hf:asset:stories260k"
TEXT = "Once upon a time there was a little girl named Lily. She had a red ball. " * 30


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a short run; its export is in it."""
    output = tmp_path_factory.mktemp("evaluate") / "run"
    small = ["steps=2", "data.sequence_length=32", "data.batch_size=2", "schedule.warmup_steps=0"]
    small += ["log.evaluate_batches=1"]
    assert command("run", "train", "--config", "quickstart_baseline", f"output={output}", *small) == 0
    return output


def command(*arguments: str) -> object:
    """The exit code of a verb that runs a script."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


def evaluate(*arguments: str) -> object:
    return command("evaluate", *arguments)


def test_one_models_results_stand_at_the_top_and_say_how_they_came(text, tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    assert evaluate(STORIES, "--text", text, "--block", "64", "--tokens", "300", "--json", str(out)) == 0
    found = json.loads(out.read_text())
    opened = open_model(STORIES)
    expected = perplexity(opened.model, opened.tokenizer, TEXT, block=64, tokens=300)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)  # the same in another batch
    assert (found["tokens"], found["tokens_read"], found["block"], found["stride"]) == (252, 300, 64, None)
    assert found["bits_per_byte"] == pytest.approx(
        found["loss"] * found["tokens"] / math.log(2) / found["bytes"]
    )
    assert found["model"] == STORIES
    assert found["versions"]["torch"]
    assert found["command"].startswith(f"qrecipes evaluate {STORIES} --text")
    printed = capsys.readouterr()
    assert f"{found['perplexity']:.4f}" in printed.out
    assert "44 tokens fill no block" in printed.err


def test_several_models_stand_side_by_side(text, tmp_path, capsys, trained):
    """A run and its export are the same model in two places."""
    out = tmp_path / "out.json"
    names = [str(trained), str(trained / "export")]
    assert evaluate(*names, "--text", text, "--block", "32", "--tokens", "320", "--json", str(out)) == 0
    first, second = json.loads(out.read_text())["models"]
    assert [first["model"], second["model"]] == names
    assert first["loss"] == second["loss"]
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == names
    assert line.split()[:2] == ["text", "perplexity"]
    assert line.split()[2] == line.split()[3]


def test_tasks_have_accuracy_and_standard_error(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    rows = [{"query": "Question: red?\n", "choices": ["yes", "no way"], "gold": n % 2} for n in range(6)]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("QRECIPES_EVAL_DATA", str(tmp_path))
    out = tmp_path / "out.json"
    assert evaluate(STORIES, "--tasks", "piqa", "--limit", "4", "--json", str(out)) == 0
    row = json.loads(out.read_text())["tasks"]["piqa"]
    # every row is the same question, so one answer is right every other time
    assert (row["acc"], row["acc_norm"], row["samples"]) == (0.5, 0.5, 4)
    assert row["stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert "0.5000 ± 0.2887" in capsys.readouterr().out


def test_a_text_alone_does_without_lm_eval(text, monkeypatch):
    """The extra is optional, and slow to import."""
    for name in [name for name in sys.modules if name.startswith("qrecipes.evaluation")]:
        monkeypatch.delitem(sys.modules, name)  # what is imported once is not imported again
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate(STORIES, "--text", text, "--block", "64", "--tokens", "64") == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([STORIES], 2, "nothing to measure"),
        ([STORIES, "--text", "TEXT", "--block", "64", "--stride", "64"], 2, "--stride: 64"),
        ([STORIES, "--text", "TEXT", "--limit", "5"], 2, "--limit says how --tasks NAMES is measured"),
        ([STORIES, "--text", "TEXT", "--num-fewshot", "0"], 2, "or leave --num-fewshot out"),
        ([STORIES, "--tasks", "piqa", "--tokens", "5"], 2, "--tokens says how --text FILE is measured"),
        ([STORIES, "--text", "TEXT", "--block", "1024"], 2, "use at most 512"),
        ([STORIES, "--text", "TEXT", "--block", "64", "--tokens", "30"], 1, "do not fill one block"),
        ([STORIES, "--text", "none.txt", "--block", "64"], 1, "none.txt: cannot be read"),
        (["nowhere", "--text", "TEXT", "--block", "64"], 2, "neither a run nor an export"),
        ([STORIES, "--text", "TEXT", "--block", "64", "--json", "/proc/none/out.json"], 2, "--json"),
        ([STORIES, "--tasks", "none.yaml"], 2, "none.yaml is no file"),
        ([STORIES, "--tasks", "piqa", "--data", "nowhere"], 2, "nowhere is no folder"),
    ],
)
def test_wrong_requests_end_with_one_message(text, capsys, arguments, code, message):
    if "--tasks" in arguments:
        pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    assert evaluate(*[text if argument == "TEXT" else argument for argument in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_activations_are_quantized_while_they_are_measured(text, tmp_path):
    """What the command finds is what the library computes with the quantizers put in by hand."""
    out = tmp_path / "out.json"
    found = {}
    for pattern in (None, "a8", "na=2,mm=2"):
        more = () if pattern is None else ("--activations", pattern)
        arguments = (STORIES, "--text", text, "--block", "32", "--tokens", "320", "--json", str(out), *more)
        assert evaluate(*arguments, "--device", "cpu") == 0
        found[pattern] = json.loads(out.read_text())["loss"]
        assert json.loads(out.read_text())["activations"] == pattern
    opened = open_model(STORIES)
    quantize_activations(opened.model, {"na": 2, "mm": 2})
    opened.model.train()
    measured = perplexity(opened.model, opened.require_tokenizer(), TEXT, block=32, tokens=320)
    assert measured.loss == found["na=2,mm=2"]
    assert opened.model.training  # measuring leaves the mode alone
    assert len(activation_quantizers(opened.model)) == 2 * len(opened.model.layers)
    assert abs(found["a8"] - found[None]) < 0.05 < found["na=2,mm=2"] - found[None]  # nats; 2 bits hurt


def test_a_run_as_it_trained_computes_with_its_quantizers(text, tmp_path, capsys):
    output, out = tmp_path / "run", tmp_path / "out.json"
    small = ["steps=1", "data.sequence_length=32", "data.batch_size=2", "schedule.warmup_steps=0"]
    small += ["log.evaluate_batches=1", "transform.0.name=activation_quantization", "transform.0.pattern=a4"]
    assert command("run", "train", "--config", "quickstart_baseline", f"output={output}", *small) == 0
    measure = ("--text", text, "--block", "32", "--tokens", "320", "--json", str(out))
    losses = []
    for more in ((str(output),), (str(output), "--as-trained"), (str(output), "--activations", "a4")):
        assert evaluate(*more, *measure) == 0
        losses.append(json.loads(out.read_text())["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]
    for other in (STORIES, str(output / "export")):
        assert evaluate(other, "--as-trained", *measure) == 2
        assert f"{other}: is no run" in capsys.readouterr().err
