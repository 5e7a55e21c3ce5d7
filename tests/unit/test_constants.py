"""Parameters that training cannot change: saved once or rebuilt, recognized by every bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from harness import Inert, Trial, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qrecipes.errors import CheckpointError
from qrecipes.export import store
from qrecipes.training import checkpoint, constants
from qrecipes.training.output import write_identity
from qrecipes.transforms.base import ParamGroup, StepContext, TransformConfig, register

MODES = ["once", "rebuild"]
TYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.float64, torch.bool]


def of_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    whole = bytearray(data[: len(data) - len(data) % size])
    return torch.frombuffer(whole, dtype=dtype) if whole else torch.empty(0, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), dtype=st.sampled_from(TYPES[:-1]), bit=st.integers(0, 1 << 20))
def test_a_fingerprint_notices_every_bit(data, dtype, bit):
    tensor = of_bytes(data, dtype)
    print_ = constants.fingerprint(tensor)
    assert constants.fingerprint(tensor.clone()) == print_
    if tensor.numel():
        flipped = tensor.clone()
        view = flipped.view(torch.uint8)
        bit %= 8 * view.numel()
        view[bit // 8] ^= 1 << (bit % 8)
        assert constants.fingerprint(flipped) != print_
        assert constants.fingerprint(torch.cat([tensor, torch.zeros(1, dtype=dtype)])) != print_


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), dtype=st.sampled_from(TYPES))
def test_a_fingerprint_is_of_the_content_not_of_the_memory(rows, columns, dtype):
    """Against the same words hashed one by one with Python's own integers."""
    torch.manual_seed(rows)
    tensor = torch.randint(0, 2, (rows, columns)).to(dtype)
    apart = torch.zeros(2 * rows + 1, columns, dtype=dtype)
    apart[1::2] = tensor
    prints = {constants.fingerprint(t) for t in (tensor, apart[1::2], tensor.t().contiguous().t())}
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    data += b"\0" * (-len(data) % 8)
    most, total = (1 << 64) - 1, 0
    for place in range(len(data) // 8):
        z = int.from_bytes(data[8 * place : 8 * place + 8], "little")
        z ^= (place + 1) * 0x9E3779B97F4A7C15 & most
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            negative = z >> 63  # torch shifts a signed integer
            z ^= z >> shift | (negative * (most << (64 - shift)) & most)
            z = z * factor & most
        total = (total + z) & most
    import hashlib

    signed = total - (1 << 64) if total >> 63 else total
    described = f"{dtype} {(rows, columns)} {signed}"
    assert prints == {hashlib.sha256(described.encode()).hexdigest()[:16]}


def test_a_fingerprint_knows_type_shape_and_order():
    tensors = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int32),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.tensor([3.0, 4.0, 1.0, 2.0]),
        torch.tensor(1.0),
        torch.tensor([1.0]),
    ]
    assert len({constants.fingerprint(tensor) for tensor in tensors}) == len(tensors)


def test_chunks_do_not_show(monkeypatch):
    tensor = torch.randn(1000, 3)
    whole = constants.fingerprint(tensor)
    monkeypatch.setattr(constants, "_CHUNK", 7)
    assert constants.fingerprint(tensor) == whole


@pytest.fixture(params=MODES)
def mode(request) -> str:
    return request.param


@pytest.fixture
def run(tmp_path, mode):
    return tiny_run("llm", "qlora", output=str(tmp_path / "run"), steps=8, checkpoint__frozen=mode)


def save(trial: Trial, step: int) -> Path:
    return checkpoint.save(
        trial.run, step, trial.model, trial.optimizer, trial.data.state_dict(), trial.process
    )


def restore(folder: Path, trial: Trial) -> None:
    trial.done, position = checkpoint.restore(folder, trial.run, trial.model, trial.optimizer, trial.process)
    trial.data.load_state_dict(position)


def stored_files(run) -> list[str]:
    return sorted(p.name for p in Path(run.output, "checkpoints").glob("frozen_*"))


def test_a_checkpoint_holds_what_trains_and_fingerprints_of_the_rest(run, mode):
    trial = Trial.of(run)
    trial.advance(1)
    folder = save(trial, 1)
    trained = {name for name, p in trial.model.named_parameters() if p.requires_grad}
    with safe_open(folder / checkpoint.MODEL, "pt") as file:
        assert set(file.keys()) == trained
    state = json.loads((folder / checkpoint.STATE).read_text())
    frozen = {name: p for name, p in trial.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert state["frozen"]["fingerprints"] == {n: constants.fingerprint(p) for n, p in frozen.items()}
    if mode == "rebuild":
        assert stored_files(run) == []
        return
    (file,) = stored_files(run)
    assert file == state["frozen"]["file"]
    stored = load_file(folder.parent / file)
    assert stored.keys() == frozen.keys()
    assert all(torch.equal(stored[name], p) for name, p in frozen.items())


def test_later_checkpoints_share_the_file(run, mode):
    trial = Trial.of(run)
    trial.advance(1)
    save(trial, 1)
    before = [(p, p.stat().st_mtime_ns) for p in Path(run.output, "checkpoints").glob("frozen_*")]
    trial.advance(1)
    save(trial, 2)
    after = [(p, p.stat().st_mtime_ns) for p in Path(run.output, "checkpoints").glob("frozen_*")]
    assert before == after
    assert len(after) == (mode == "once")


def test_nothing_is_apart_where_all_trains(tmp_path):
    run = tiny_run("llm", None, output=str(tmp_path / "run"))
    folder = save(Trial.of(run), 1)
    assert json.loads((folder / checkpoint.STATE).read_text())["frozen"] is None
    assert stored_files(run) == []


def test_resume_is_bit_exact(run):
    unbroken = Trial.of(run).advance(6)
    first = Trial.of(run)
    beginning = first.advance(3)
    second = Trial.of(run)
    restore(save(first, 3), second)
    assert beginning + second.advance(3) == unbroken


def of_another_base(run) -> Trial:
    """A run whose frozen weights have something in them that no seed gives again."""
    trial = Trial.of(run)
    with torch.no_grad():
        for parameter in trial.model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.mul_(1 + 0.01 * torch.rand(parameter.shape, generator=_UNSEEDED))
    return trial


_UNSEEDED = torch.Generator()
_UNSEEDED.seed()


def test_a_base_that_no_seed_gives_again_resumes_exactly_or_is_refused(run, mode):
    unbroken = of_another_base(run)
    second = of_another_base(run)
    folder = save(unbroken, 0)
    if mode == "rebuild":
        with pytest.raises(
            CheckpointError, match=r"tensors differ \(.*layers\.0.*checkpoint.frozen = \"once"
        ):
            restore(folder, second)
        return
    restore(folder, second)
    assert second.advance(3) == unbroken.advance(3)


def test_a_refused_base_leaves_the_model_alone(tmp_path):
    run = tiny_run("llm", "qlora", output=str(tmp_path / "run"), checkpoint__frozen="rebuild")
    first = Trial.of(run)
    first.advance(2)
    folder = save(first, 2)
    second = of_another_base(run)
    before = {name: p.detach().clone() for name, p in second.model.named_parameters()}
    with pytest.raises(CheckpointError, match="holds only what trained"):
        restore(folder, second)
    assert all(torch.equal(p, before[name]) for name, p in second.model.named_parameters())


def test_exports_of_both_modes_are_equal(tmp_path):
    found = []
    for mode in MODES:
        run = tiny_run("llm", "qlora", output=str(tmp_path / mode), checkpoint__frozen=mode)
        trial = Trial.of(run)
        trial.advance(2)
        save(trial, 2)
        write_identity(run, trial.chain.receipt, {})
        model, _, _ = store.load_swapped(run.output)
        with torch.no_grad():
            found.append(model(torch.arange(48).reshape(2, 24)))
            expected = trial.model.eval()(torch.arange(48).reshape(2, 24))
        assert torch.equal(found[-1], expected)
        assert store.export_run(run.output)
    assert torch.equal(*found)


def test_a_missing_file_is_made_good_by_the_same_base_only(tmp_path):
    run = tiny_run("llm", "qlora", output=str(tmp_path / "run"))
    first = Trial.of(run)
    first.advance(2)
    folder = save(first, 2)
    expected = first.advance(2)
    (file,) = folder.parent.glob("frozen_*")
    moved = file.rename(tmp_path / file.name)
    second = Trial.of(run)
    restore(folder, second)
    assert second.advance(2) == expected
    with pytest.raises(CheckpointError, match=f"or {file.name} beside it"):
        restore(folder, of_another_base(run))
    moved.rename(file)
    restore(folder, of_another_base(run))


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_file_is_named(tmp_path, damage):
    run = tiny_run("llm", "qlora", output=str(tmp_path / "run"))
    trial = Trial.of(run)
    folder = save(trial, 1)
    (file,) = folder.parent.glob("frozen_*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-7] if damage == "truncated" else content)
    with pytest.raises(CheckpointError, match=rf"{file.name}: damaged: .*delete it"):
        restore(folder, trial)
    file.unlink()
    restore(folder, trial)


def test_a_killed_save_leaves_the_previous_one(tmp_path):
    """Killed while the file of constants is written, before it has its name, and before the checkpoint is
    published: the leftovers are in nobody's way."""
    output = str(tmp_path / "run")
    run = tiny_run("llm", "qlora", output=output, checkpoint__frozen="rebuild")
    trial = Trial.of(run)
    trial.advance(1)
    save(trial, 1)
    script = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))!r})
        from harness import Trial, tiny_run
        from qrecipes.training import checkpoint, constants
        trial = Trial.of(tiny_run("llm", "qlora", output={output!r}))
        trial.advance(2)

        def while_written(): constants.save_file = lambda _, path, **__: (path.write_bytes(b"x"), os._exit(9))
        def before_named(): Path.rename = lambda *_: os._exit(9)
        def before_published(): checkpoint._sync = lambda _: os._exit(9)

        for kill in (while_written, before_named, before_published):
            if not (child := os.fork()):
                kill()
                state = trial.data.state_dict()
                checkpoint.save(trial.run, 2, trial.model, trial.optimizer, state, trial.process)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
    assert [p.name for p in checkpoint.list_checkpoints(output)] == ["step_00000001"]
    assert len(stored_files(run)) == 1
    once = replace(run, checkpoint=replace(run.checkpoint, frozen="once"))
    again = Trial.of(once)
    restore(checkpoint.find(output, "auto"), again)
    again.advance(1)
    newest = save(again, 2)
    assert len(stored_files(run)) == 1
    other = of_another_base(once)
    restore(newest, other)
    assert other.advance(1) == again.advance(1)


def test_files_that_no_checkpoint_names_are_deleted(tmp_path):
    """A run anew in the same folder, over another base; what is set aside keeps its file."""
    run = tiny_run("llm", "qlora", output=str(tmp_path / "run"), checkpoint__keep=1)
    first = Trial.of(run)
    save(first, 1)
    (old,) = stored_files(run)
    second = of_another_base(run)
    checkpoint.set_aside_after(run.output, 0)
    save(second, 2)
    assert len(stored_files(run)) == 2
    shutil.rmtree(next(Path(run.output, "checkpoints").glob("aside_*")))
    save(second, 3)
    (left,) = stored_files(run)
    assert left != old


def test_a_checkpoint_of_format_1_still_resumes(tmp_path, monkeypatch):
    """It had all parameters in one file."""
    run = tiny_run("llm", "qlora", output=str(tmp_path / "run"))
    first = Trial.of(run)
    first.advance(2)
    monkeypatch.setattr(constants, "constant_names", lambda *_: set())
    folder = save(first, 2)
    monkeypatch.undo()
    state = json.loads((folder / checkpoint.STATE).read_text())
    del state["frozen"]
    (folder / checkpoint.STATE).write_text(json.dumps(state | {"format": 1}))
    second = of_another_base(run)
    restore(folder, second)
    assert second.advance(2) == first.advance(2)
    write_identity(run, first.chain.receipt, {})
    assert store.load_run(run.output)


@dataclass(frozen=True, kw_only=True)
class DriftConfig(TransformConfig):
    """A base that a hook moves."""


class Drifting(nn.Linear):
    """Trained by its bias; its frozen weight is another one after each step."""


def drift(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Drifting):
            module.weight.data.mul_(0.9)


def test_frozen_parameters_that_a_method_writes_are_in_every_checkpoint(tmp_path, monkeypatch):
    from qrecipes.transforms import base

    monkeypatch.setattr(base, "REGISTRY", dict(base.REGISTRY))

    class Drift(Inert):
        Config = DriftConfig
        Layer = Drifting

        def sites(self, model):
            return {n: m for n, m in model.named_modules() if n.endswith("w1") and type(m) is nn.Linear}

        def swap(self, model):
            for site in self.sites(model).values():
                site.__class__ = Drifting
                site.weight.requires_grad_(False)
                site.bias = nn.Parameter(torch.zeros(site.out_features))
            return model

        def layers(self, model):
            return {n: m for n, m in model.named_modules() if isinstance(m, Drifting)}

        def param_groups(self, model):
            return [ParamGroup("biases", [layer.bias for layer in self.layers(model).values()])]

        def after_backward(self, ctx: StepContext) -> None:
            drift(ctx.model)

    register("drift")(Drift)
    run = tiny_run("llm", None, output=str(tmp_path / "run"), transform=(DriftConfig(),))
    unbroken = Trial.of(run).advance(4)
    first = Trial.of(run)
    names = first.chain.constants(first.model)
    assert "layers.0.mlp.w2.weight" in names
    assert not any(".w1." in name for name in names)
    beginning = first.advance(2)
    folder = save(first, 2)
    with safe_open(folder / checkpoint.MODEL, "pt") as file:
        assert {name for name in file.keys() if name.endswith("w1.weight")}  # noqa: SIM118 - no dict
    second = Trial.of(run)
    restore(folder, second)
    assert beginning + second.advance(2) == unbroken
