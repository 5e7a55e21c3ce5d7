"""Checkpoints: whole, atomic, refused when damaged or foreign."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from harness import Trial, losses, methods, tiny_run

from qrecipes.config import parse
from qrecipes.errors import CheckpointError
from qrecipes.training import checkpoint


def save(trial: Trial, step: int):
    return checkpoint.save(
        trial.run, step, trial.model, trial.optimizer, trial.data.state_dict(), trial.process
    )


def restore(folder, trial: Trial):
    return checkpoint.restore(folder, trial.run, trial.model, trial.optimizer, trial.process)


@pytest.fixture
def run(tmp_path):
    return tiny_run("llm", None, output=str(tmp_path / "run"), checkpoint__keep=2)


@pytest.fixture
def trial(run):
    trial = Trial.of(run)
    trial.advance(2)
    return trial


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw", "adamw8bit", "sgd"])
def test_resume_is_bit_exact_for_every_optimizer(run, name):
    run = replace(run, optim=replace(run.optim, name=name))
    unbroken = Trial.of(run).advance(6)
    first = Trial.of(run)
    beginning = first.advance(3)
    second = Trial.of(run)
    second.done, position = restore(save(first, 3), second)
    second.data.load_state_dict(position)
    assert beginning + second.advance(3) == unbroken


def test_keeps_the_newest_only(run, trial):
    for step in (2, 4, 6, 8):
        save(trial, step)
    assert [p.name for p in checkpoint.list_checkpoints(run.output)] == ["step_00000006", "step_00000008"]


def test_resume_auto_takes_the_newest(run, trial):
    assert checkpoint.find(run.output, "auto") is None
    save(trial, 2)
    newest = save(trial, 4)
    assert checkpoint.find(run.output, "auto") == newest


def test_resume_never_refuses_an_existing_run(run, trial):
    save(trial, 2)
    with pytest.raises(CheckpointError, match=r"'never', but .*step_00000002 exists"):
        checkpoint.find(run.output, "never")


def test_resume_from_a_folder_that_is_not_there(run, trial):
    save(trial, 2)
    with pytest.raises(CheckpointError, match=r"nowhere is no folder; checkpoints in .*: step_00000002"):
        checkpoint.find(run.output, "nowhere")


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIMIZER, "rank_00000.safetensors"])
def test_truncated_file_is_named(run, trial, file):
    older, newer = save(trial, 2), save(trial, 4)
    path = newer / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        CheckpointError, match=rf"damaged: {file} has .* bytes instead of .*step_00000002"
    ) as caught:
        restore(newer, trial)
    assert str(older) in str(caught.value)


def test_changed_byte_is_noticed(run, trial):
    folder = save(trial, 2)
    path = folder / checkpoint.MODEL
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed since it was written"):
        restore(folder, trial)


def test_missing_file_is_named(run, trial):
    folder = save(trial, 2)
    (folder / checkpoint.OPTIMIZER).unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        restore(folder, trial)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_unreadable_state_is_damage(run, trial, content):
    folder = save(trial, 2)
    (folder / checkpoint.STATE).write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged: state\.json cannot be read"):
        restore(folder, trial)


def test_checkpoint_of_a_later_format_is_refused(run, trial):
    folder = save(trial, 2)
    state = json.loads((folder / checkpoint.STATE).read_text())
    (folder / checkpoint.STATE).write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads 1 to 2"):
        restore(folder, trial)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model__args": {"num_layers": 3}}, "model.args"),
        ({"data__sequence_length": 32}, "data.sequence_length is 64 there, 32 here"),
        ({"data__batch_size": 2}, "sequences a step .* is 8 there, 2 here"),
        ({"optim__name": "sgd"}, "optim.name is 'adamw' there, 'sgd' here"),
        ({"seed": 9}, "seed is 0 there, 9 here"),
        ({"data__shuffle": False}, "data.shuffle is True there, False here"),
        ({"model__dtype": "bfloat16"}, "model.dtype is"),
        ({"model__source": "torchtune:x.y"}, "model.source is"),
        ({"task__label_smoothing": 0.1}, "task.label_smoothing is"),
        (
            {"transform": tiny_run("llm", methods()[0]).transform},
            r"transform is \[\] there, \['\w+'\] here; resume",
        ),
    ],
)
def test_resuming_a_run_of_another_shape_is_refused(run, trial, change, said):
    folder = save(trial, 2)
    other = tiny_run("llm", None, output=run.output, **change)
    with pytest.raises(CheckpointError, match=f"belongs to another run: .*{said}"):
        checkpoint.restore(folder, other, trial.model, trial.optimizer, trial.process)


def test_a_transform_of_other_settings_is_refused_by_their_keys(tmp_path):
    """And no others: whole tables, one after the other, would have to be compared by eye."""
    run = tiny_run("llm", "full_qat", output=str(tmp_path / "run"))
    trial = Trial.of(run)
    folder = save(trial, 1)
    (config,) = run.transform
    other = replace(run, transform=(replace(config, bits=3, scale_lr=0.5),))
    keys = f"transform.0.bits is 4 there, 3 here; transform.0.scale_lr is {config.scale_lr} there, 0.5 here"
    with pytest.raises(CheckpointError, match=f"belongs to another run: {re.escape(keys)}; resume needs"):
        checkpoint.restore(folder, other, trial.model, trial.optimizer, trial.process)


def test_settings_that_may_change_between_sessions(run, trial):
    """More steps, another evaluation rhythm or learning rate, and accumulation in place of batch size."""
    folder = save(trial, 2)
    other = tiny_run(
        "llm", None, output=run.output, steps=99, optim__lr=1e-5, log__evaluate_every=3, data__batch_size=4
    )
    other = replace(other, optim=replace(other.optim, accumulate=2))
    assert checkpoint.restore(folder, other, trial.model, trial.optimizer, trial.process)[0] == 2


def test_a_killed_save_leaves_the_previous_one(run, tmp_path):
    """The process dies between writing the files and publishing them."""
    script = textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))!r})
        from harness import Trial, tiny_run
        from qrecipes.training import checkpoint
        trial = Trial.of(tiny_run("llm", None, output={run.output!r}))
        def save(step):
            state = trial.data.state_dict()
            checkpoint.save(trial.run, step, trial.model, trial.optimizer, state, trial.process)
        trial.advance(1)
        save(1)
        checkpoint._sync = lambda path: os._exit(9)
        trial.advance(1)
        save(2)
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 9
    assert [p.name for p in checkpoint.list_checkpoints(run.output)] == ["step_00000001"]
    trial = Trial.of(run)
    assert restore(checkpoint.find(run.output, "auto"), trial)[0] == 1
    trial.advance(1)
    save(trial, 2)  # and the leftovers of the killed save are not in the way
    assert checkpoint.find(run.output, "auto").name == "step_00000002"


@pytest.mark.skipif(
    os.geteuid() == 0 and not os.path.exists("/proc/self"), reason="needs a folder nobody can write"
)
def test_no_place_to_write_is_said(trial):
    trial.run = replace(trial.run, output="/proc/qrecipes")  # not even root can create a folder there
    with pytest.raises(CheckpointError, match=r"cannot be written: .*earlier checkpoints are untouched"):
        save(trial, 2)


def test_everything_loads_without_pickle(run, trial):
    """Only safetensors and JSON are in the folder."""
    folder = save(trial, 2)
    assert sorted(p.suffix for p in folder.iterdir()) == [
        ".json",
        ".safetensors",
        ".safetensors",
        ".safetensors",
    ]


def test_state_made_for_restoring_is_not_used_by_a_fresh_run(run):
    """initialize_state moves nothing: parameters keep their bits, learning rate and decay are put back."""
    trial = Trial.of(run)
    before = {n: p.detach().clone() for n, p in trial.model.named_parameters()}
    groups = [(g["lr"], g["weight_decay"]) for g in trial.optimizer.param_groups]
    checkpoint.initialize_state(trial.optimizer)
    assert all(torch.equal(p, before[n]) for n, p in trial.model.named_parameters())
    assert [(g["lr"], g["weight_decay"]) for g in trial.optimizer.param_groups] == groups


def test_losses_differ_without_the_optimizer_state(run):
    """The bit-exact test above would notice a forgotten optimizer."""
    unbroken = losses(Trial.of(run).advance(5))
    first = Trial.of(run)
    beginning = losses(first.advance(3))
    folder = save(first, 3)
    second = Trial.of(run)
    second.done, position = restore(folder, second)
    second.data.load_state_dict(position)
    second.optimizer.state.clear()
    assert beginning + losses(second.advance(2)) != unbroken


def test_restore_gives_the_random_state_back(run):
    first = Trial.of(run)
    torch.rand(3)  # as dropout or stochastic rounding would have drawn
    folder = save(first, 1)
    expected = torch.rand(4)
    restore(folder, Trial.of(run))
    assert torch.equal(torch.rand(4), expected)


def test_parameters_without_state_stay_without(run):
    """A transform may have reset a parameter's state in the step before the save."""
    first = Trial.of(run)
    first.advance(1)
    reset = next(iter(first.model.parameters()))
    del first.optimizer.state[reset]
    second = Trial.of(run)
    restore(save(first, 1), second)
    fresh = next(iter(second.model.parameters()))
    assert fresh not in second.optimizer.state
    assert len(second.optimizer.state) == len(first.optimizer.state)


def test_how_conversations_are_read_belongs_to_a_run():
    run = parse.load("tiny/chat")
    other = parse.load("tiny/chat", ["data.conversation.train_on=all"])
    assert checkpoint.fingerprint(run, 1) != checkpoint.fingerprint(other, 1)
    assert checkpoint.fingerprint(run, 1) == checkpoint.fingerprint(parse.load("tiny/chat", ["steps=7"]), 1)
