"""What a user can get wrong, and what the command line then says; the exit status tells a wrong request (2)
apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from harness import command_line
from safetensors.torch import load_file, save_file

from qrecipes.assets import resolve
from qrecipes.locate import shipped


def complain(capfd, *arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a command line."""
    status = command_line(*arguments)
    return status, capfd.readouterr().err


@pytest.fixture
def train(tmp_path, capfd):
    def run(*overrides: str, config: str = "tiny/llm") -> tuple[int, str]:
        output = [] if any(o.startswith("output=") for o in overrides) else [f"output={tmp_path}/run"]
        return complain(
            capfd, "run", "train", "--config", config, "steps=4", "log.progress=false", *output, *overrides
        )

    return run


def text_overrides(file: Path) -> list[str]:
    return [
        'data.source="text"',
        f'data.files=["{file}"]',
        'tokenizer.kind="bytes"',
        "model.args.vocab_size=512",
    ]


def test_unknown_key(train):
    status, said = train("optim.weigth_decay=0.1")
    assert status == 2
    assert "optim.weigth_decay: unknown key" in said
    assert "did you mean 'weight_decay'?" in said


def test_wrong_type(train):
    status, said = train('optim.lr="fast"')
    assert status == 2
    assert "optim.lr: expected a number" in said


def test_missing_data_file(train, tmp_path):
    status, said = train(*text_overrides(tmp_path / "nowhere.txt"))
    assert status == 1
    assert "nowhere.txt" in said


def test_empty_corpus(train, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    status, said = train(*text_overrides(tmp_path / "empty.txt"))
    assert status == 1
    assert "empty" in said


def test_corpus_shorter_than_one_sequence(train, tmp_path):
    (tmp_path / "short.txt").write_text("To be")
    status, said = train(*text_overrides(tmp_path / "short.txt"))
    assert status == 1
    assert "data.sequence_length" in said


def test_tokenizer_larger_than_the_model(train, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 50)
    status, said = train(*text_overrides(tmp_path / "text.txt"), "model.args.vocab_size=100")
    assert status == 2
    assert "257" in said
    assert "100" in said


def weights_with(change, tmp_path: Path) -> Path:
    source = resolve("asset:stories260k")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_whose_names_do_not_fit(train, tmp_path):
    folder = weights_with(lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), tmp_path)
    status, said = train(
        f"model.weights={json.dumps(str(folder))}", "schedule.warmup_steps=0", config="quickstart"
    )
    assert status == 1
    assert "layers.3.mlp" in said


def test_weights_whose_shapes_do_not_fit(train, tmp_path):
    def widen(tensors):
        tensors["model.norm.weight"] = torch.ones(65)

    status, said = train(
        f"model.weights={json.dumps(str(weights_with(widen, tmp_path)))}",
        "schedule.warmup_steps=0",
        config="quickstart",
    )
    assert status == 1
    assert "65" in said
    assert "64" in said


def test_transform_that_selects_no_layer(train):
    name = next(path.stem for path in sorted((shipped("configs") / "tiny").glob("llm_*.toml")))
    status, said = train('transform.0.targets=["decoder.*"]', config=f"tiny/{name}")
    assert status == 2
    assert "select no plain linear layer" in said


def test_resume_from_another_run_shape(train):
    assert train()[0] == 0
    status, said = train("model.args.num_layers=3", "steps=6")
    assert status == 1
    assert "belongs to another run" in said
    assert "num_layers" in said


def test_a_refused_resume_leaves_the_earlier_run_as_it_was(train, tmp_path):
    assert train()[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert train("model.args.num_layers=3", "steps=6")[0] == 1
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_truncated_checkpoint(train, tmp_path):
    assert train("checkpoint.every=2")[0] == 0
    newest = tmp_path / "run" / "checkpoints" / "step_00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    status, said = train("steps=6")
    assert status == 1
    assert "damaged: model.safetensors has 1,000 bytes" in said
    assert "step_00000002" in said


def test_no_write_permission(train):
    status, said = train("output=/proc/qrecipes/run")  # where not even root can write
    assert status == 2
    assert "output: /proc/qrecipes/run cannot be written" in said


def test_loss_that_becomes_nan_stops_with_the_last_good_checkpoint(train, tmp_path):
    """The update that ruins the model follows a finite loss: the checkpoint right after it is not good."""
    good = ["checkpoint.every=1", "checkpoint.keep=9"]
    assert train(*good)[0] == 0
    status, said = train(*good, "steps=30", "optim.lr=1e30", "optim.clip_norm=0", 'schedule.kind="constant"')
    assert status == 1
    assert re.search(r"step 6: loss is .*(nan|inf)", said)
    assert f"the last good checkpoint is {tmp_path}/run/checkpoints/step_00000004" in said
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["aside_step_00000005", *(f"step_{n:08d}" for n in (1, 2, 3, 4))]
    assert train(*good, "steps=8")[0] == 0  # and from there the run goes on
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(train, tmp_path):
    assert train("checkpoint.every=1", "checkpoint.keep=9")[0] == 0
    older = tmp_path / "run" / "checkpoints" / "step_00000002"
    status, said = train(f"checkpoint.resume={older}", "steps=3", "checkpoint.keep=9", "export.at_end=true")
    assert status == 0
    assert "set aside" in said
    names = sorted(p.name for p in older.parent.iterdir())
    assert names == ["aside_step_00000003", "aside_step_00000004", *(f"step_{n:08d}" for n in (1, 2, 3))]


def test_a_finished_run_keeps_its_identity(train, tmp_path):
    assert train()[0] == 0
    before = (tmp_path / "run" / "run.toml").read_text()
    assert train("optim.lr=0.5")[0] == 0
    assert (tmp_path / "run" / "run.toml").read_text() == before


def test_builder_and_arguments_are_checked_before_anything_is_built(train):
    status, said = train("model.source=torchtune:llama3_22_1b", "model.args={}")
    assert status == 2
    assert "model.source" in said
    assert "did you mean 'llama3_2_1b'" in said
    status, said = train("model.args.num_layer=2")
    assert status == 2
    assert "num_layers" in said


def test_quickstart_refuses_what_its_two_runs_differ_in(capfd):
    status, said = complain(capfd, "run", "quickstart", "output=elsewhere")
    assert status == 2
    assert "use `qrecipes run train`" in said


def test_cuda_that_is_not_there(train):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, said = train('device="cuda"')
    assert status == 2
    assert "torch finds no GPU" in said
