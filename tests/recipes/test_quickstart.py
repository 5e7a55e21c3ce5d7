"""The quickstart, shortened: both runs, the report, and an export that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import command_line

from qrecipes import load_export

SHORT = [
    "steps=4",
    "schedule.warmup_steps=1",
    "data.batch_size=2",
    "data.sequence_length=64",
    "log.evaluate_batches=4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a shortened quickstart ran."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert not command_line("run", "quickstart", *SHORT)
    return folder / "runs"


def test_it_writes_what_it_promises(folder):
    for name in ("quickstart", "quickstart-baseline"):
        for file in (
            "run.toml",
            "metrics.jsonl",
            "receipt.json",
            "environment.json",
            "checkpoints",
            "export",
        ):
            assert (folder / name / file).exists(), f"{name}/{file}"
    swapped = [
        row["method"] for row in json.loads((folder / "quickstart" / "receipt.json").read_text())["layers"]
    ]
    baseline = [
        row["method"]
        for row in json.loads((folder / "quickstart-baseline" / "receipt.json").read_text())["layers"]
    ]
    assert all(swapped)
    assert not any(baseline)
    assert len(swapped) == len(baseline) == 35


def test_both_runs_start_from_the_same_loss(folder):
    """The pretrained weights are loaded, and INT8 costs little before any training."""

    def first(name: str) -> float:
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return rows[0]["val_loss"]

    int8, plain = first("quickstart"), first("quickstart-baseline")
    assert plain < 5.2  # nats; log(512) = 6.24 is what random weights give
    assert int8 != plain
    assert abs(int8 - plain) < 0.05


def test_transformers_loads_the_export_with_equal_logits(folder):
    transformers = pytest.importorskip("transformers")
    export = folder / "quickstart" / "export"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        export / "huggingface", dtype=torch.float32
    ).eval()
    ours = load_export(export)
    tokens = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # float32, the same formulas in another order
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-4)


def test_generate_continues_a_prompt(folder, capsys):
    command = ["generate", str(folder / "quickstart" / "export"), "--prompt", "Once upon a time"]
    assert not command_line(*command, "--max-tokens", "12", "--temperature", "0", "--device", "cpu")
    first = capsys.readouterr().out
    assert first.startswith("Once upon a time")
    assert len(first) > len("Once upon a time") + 8
    command_line(*command, "--max-tokens", "12", "--temperature", "0", "--device", "cpu")
    assert capsys.readouterr().out == first


def test_a_second_quickstart_sets_the_first_aside(folder):
    import runpy

    from qrecipes.locate import shipped

    set_aside = runpy.run_path(str(shipped("recipes") / "quickstart.py"))["set_aside"]
    old = folder / "older"
    old.mkdir()
    (old / "metrics.jsonl").write_text("{}")
    set_aside(old)
    (kept,) = Path(folder).glob("older-*")
    assert (kept / "metrics.jsonl").read_text() == "{}"
    assert not old.exists()
