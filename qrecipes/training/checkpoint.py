"""The whole state of a run on disk: model, optimizer, data position, step and random state.

A checkpoint is a folder `step_00000100` that appears by a rename when everything in it is written, so a
killed save leaves the previous one untouched. `model.safetensors` and `optimizer.safetensors` hold whole
tensors, whatever the number of ranks; `rank_00000.safetensors` holds what is a rank's own: random state, and
tensors made of several parts (quantized optimizer states, whose blocks follow the sharding). Parameters that
training cannot change are apart, once for all checkpoints or not at all (`constants`). The model is as
it is judged and exported, where an optimizer tells such weights from those that are trained. `state.json`
comes last, with the step, the kind of device, the data position, the size and CRC-32 of every file, and what
of the run must be equal to resume. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from qrecipes.errors import CheckpointError
from qrecipes.parallel.process import Process
from qrecipes.quant.sharded import is_composite, parts, whole, write_whole_
from qrecipes.training import constants
from qrecipes.training.device_kind import kind_of
from qrecipes.training.optimizer_verbs import evaluation_weights, training_weights_

if TYPE_CHECKING:
    from qrecipes.config.run import Run

FORMAT = 2
"""Format 1 had frozen parameters in the model's file; it is still read."""
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
T = TypeVar("T")
_PART = "//"
"""Between the name of a composite tensor and the name of its part."""


def folder_of(output: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps is."""
    return Path(output) / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(output: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (Path(output) / "checkpoints").glob("step_????????") if p.is_dir())


def find(output: str | Path, resume: str) -> Path | None:
    """The checkpoint that `checkpoint.resume` means, or None for a fresh start.

    Raises:
        CheckpointError: if a named checkpoint does not exist, or `never` meets one.
    """
    existing = list_checkpoints(output)
    if resume == "auto":
        return existing[-1] if existing else None
    if resume == "never":
        if existing:
            raise CheckpointError(
                f"checkpoint.resume: 'never', but {existing[-1]} exists; "
                f"use 'auto' to go on from it, or another "
                "`output`"
            )
        return None
    path = Path(resume)
    if not path.is_dir():
        known = ", ".join(p.name for p in existing) or "none"
        raise CheckpointError(f"checkpoint.resume: {path} is no folder; checkpoints in {output}: {known}")
    return path


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written, from its name."""
    return int(folder.name.removeprefix("step_"))


def set_aside_after(output: str | Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, so that nothing takes them for the newest; their new names."""
    renamed = []
    for folder in list_checkpoints(output):
        if step_of(folder) > step:
            target = folder.with_name(f"aside_{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            renamed.append(folder.rename(target))
    return renamed


def fingerprint(run: Run, world: int) -> dict[str, Any]:
    """What of a run must be equal for a checkpoint to fit it, flat, by dotted key."""
    shape = {
        "seed": run.seed,
        "model.source": run.model.source,
        "model.args": run.model.args,
        "model.dtype": run.model.dtype,
        "task.kind": run.task.kind,
        "data.source": run.data.source,
        "data.files": list(run.data.files),
        "data.sequence_length": run.data.sequence_length,
        "data.shuffle": run.data.shuffle,
        "data.augment": run.data.augment,
        "data.split": run.data.split,
        "data.text_column": run.data.text_column,
        "data.document_separator": run.data.document_separator,
        "data.conversation": asdict(run.data.conversation) if run.data.source == "conversations" else None,
        "task.label_smoothing": run.task.label_smoothing,
        "tokenizer": None if run.tokenizer is None else asdict(run.tokenizer),
        "sequences a step (data.batch_size x optim.accumulate x ranks)": (
            run.data.batch_size * run.optim.accumulate * world
        ),
        "optim.name": run.optim.name,
        "optim.offload": None if run.optim.offload == "none" else "float32 weights in the state",
        "transform": [config.fingerprint() for config in run.transform],
    }
    return json.loads(json.dumps(shape))


def save(
    run: Run, step: int, model: nn.Module, optimizer: Optimizer, data_state: dict[str, Any], process: Process
) -> Path:
    """Write the checkpoint after `step` optimizer steps and delete the oldest beyond `checkpoint.keep`.

    A collective: every rank calls it. One whole tensor at a time is gathered; rank 0 holds them all in host
    memory.

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    final = folder_of(run.output, step)
    partial = final.with_name(final.name + ".partial")
    if process.is_main:
        _reporting_os_errors(partial, lambda: _empty(partial))
    process.barrier()
    apart = constants.constant_names(run, model, process)
    with evaluation_weights(optimizer):
        shared, own = _collect(model, optimizer, process, apart)
    frozen = _reporting_os_errors(partial, lambda: constants.keep(run, model, apart, final.parent, process))
    own |= _random_state(process)  # last: nothing above draws from it
    rank_file = partial / f"rank_{process.rank:05d}.safetensors"
    _reporting_os_errors(partial, lambda: save_file(own, rank_file))
    process.barrier()
    if process.is_main:
        _reporting_os_errors(
            partial, lambda: _publish(run, step, shared, data_state, frozen, process, partial, final)
        )
    process.barrier()
    return final


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _collect(
    model: nn.Module, optimizer: Optimizer, process: Process, left_out: set[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    trained = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    shared: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}}
    own: dict[str, Tensor] = {}
    for file, tensors in ((MODEL, trained), (OPTIMIZER, _optimizer_tensors(model, optimizer))):
        composite = process.any_rank([is_composite(tensor) for tensor in tensors.values()])
        for (name, tensor), apart in zip(tensors.items(), composite, strict=True):
            if apart:
                own |= {f"{file}{_PART}{name}{_PART}{part}": _on_cpu(t) for part, t in parts(tensor).items()}
                continue
            value = whole(tensor)
            if process.is_main:
                shared[file][name] = _on_cpu(value)
    return shared, own


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as `KEY/PARAMETER`, such as
    "exp_avg/layers.0.attn.q_proj.weight"."""
    return {
        f"{key}/{fqn}": value
        for fqn, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _random_state(process: Process) -> dict[str, Tensor]:
    state = {"random/cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        state["random/cuda"] = torch.cuda.get_rng_state(process.device)
    return state


def _publish(
    run: Run,
    step: int,
    shared: dict[str, dict[str, Tensor]],
    data_state: dict[str, Any],
    frozen: dict[str, Any] | None,
    process: Process,
    partial: Path,
    final: Path,
) -> None:
    for file, tensors in shared.items():
        save_file(tensors, partial / file, metadata={"format": "pt"})
    state = {
        "format": FORMAT,
        "step": step,
        "world": process.world,
        "device": kind_of(process.device),
        "data": data_state,
        "frozen": frozen,
        "fingerprint": fingerprint(run, process.world),
        "files": {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(partial.iterdir())},
    }
    (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for path in partial.iterdir():
        _sync(path)
    if final.exists():  # the same step once more, such as after resuming from an older one
        _remove(final)
    partial.rename(final)
    _sync(final.parent)
    for old in list_checkpoints(run.output)[: -run.checkpoint.keep]:
        if old != final:
            _remove(old)
    constants.forget_unused(final.parent, final.parent.glob(f"*/{STATE}"))


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves none that looks finished."""
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def _reporting_os_errors(folder: Path, action: Callable[[], T]) -> T:
    try:
        return action()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written: {error}; earlier checkpoints are untouched; "
            f"free space or permissions, "
            "or set another `output`"
        ) from error


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, after every file was found whole.

    Raises:
        CheckpointError: if a file is missing, truncated or changed.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{STATE} cannot be read ({error})") from error
    if state.get("format") not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{folder}: has checkpoint format {state.get('format')}; this version reads 1 to {FORMAT}; "
            f"use the version of "
            "qrecipes that wrote it"
        )
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            raise _damaged(folder, f"{name} is missing")
        if file.stat().st_size != facts["bytes"]:
            raise _damaged(folder, f"{name} has {file.stat().st_size:,} bytes instead of {facts['bytes']:,}")
        if _crc32(file) != facts["crc32"]:
            raise _damaged(folder, f"{name} was changed since it was written (its CRC-32 differs)")
    return state


def _damaged(folder: Path, what: str) -> CheckpointError:
    others = [p for p in list_checkpoints(folder.parent.parent) if p != folder]
    remedy = f"set checkpoint.resume to {str(others[-1])!r}" if others else "no other checkpoint is beside it"
    return CheckpointError(f"{folder}: damaged: {what}; {remedy}")


def check_fits(folder: Path, state: dict[str, Any], run: Run, process: Process) -> None:
    """Raise CheckpointError where a checkpoint belongs to a run of another shape, with every differing
    key."""
    both = fingerprint(run, process.world), state["fingerprint"]
    wanted, found = (_comparable(shape, fields=False) for shape in both)
    if wanted["transform"] == found["transform"]:
        wanted, found = (_comparable(shape, fields=True) for shape in both)
    differing = [
        f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here"
        for key in dict.fromkeys([*wanted, *found])
        if wanted.get(key) != found.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: belongs to another run: {'; '.join(differing)}; resume needs them equal; "
            "set another `output` to start anew"
        )


def _comparable(fingerprint: Mapping[str, Any], *, fields: bool) -> dict[str, Any]:
    """With the methods of its transforms, or a key for each of their fields."""
    flat, transforms = dict(fingerprint), fingerprint.get("transform", [])
    flat["transform"] = [described["method"] for described in transforms]
    if fields:
        for index, described in enumerate(transforms):
            flat |= {f"transform.{index}.{key}": value for key, value in described.items()}
    return flat


def restore(
    folder: Path, run: Run, model: nn.Module, optimizer: Optimizer, process: Process
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint's state in place: the number of finished steps, and the data position.

    On the same number of ranks the run goes on bit for bit. On another number (with as many sequences a step)
    the random state starts from the run's seed instead; composite optimizer states cannot be resharded and
    are refused.

    Raises:
        CheckpointError: if the checkpoint is damaged or belongs to another run.
    """
    state = read_state(folder)
    check_fits(folder, state, run, process)
    initialize_state(optimizer)  # first: an optimizer with copies of the weights writes them back
    load_model(folder, state, model, process)
    same_world = state["world"] == process.world
    own = _load(folder / f"rank_{process.rank:05d}.safetensors") if same_world else {}
    path = folder / OPTIMIZER
    saved = _restore_tensors(path, _load(path), _optimizer_tensors(model, optimizer), own)
    _forget_absent_state(saved, model, optimizer)
    training_weights_(optimizer)
    if same_world:
        torch.set_rng_state(own["random/cpu"])
        if process.device.type == "cuda" and "random/cuda" in own:
            torch.cuda.set_rng_state(own["random/cuda"], process.device)
    return state["step"], state["data"]


def load_model(folder: Path, state: dict[str, Any], model: nn.Module, process: Process) -> None:
    """Put only a checkpoint's model in place; `state` is what `read_state` gave.

    Raises:
        CheckpointError: if names or shapes do not fit, or frozen parameters that were not saved are others in
        this model.
    """
    rank_file = folder / f"rank_{process.rank:05d}.safetensors"
    own = _load(rank_file) if rank_file.is_file() else {}
    targets = model.state_dict()
    if constants.needs_rebuilding(folder, state):
        constants.require_rebuilt(folder, state, model)
        targets = {n: t for n, t in targets.items() if n not in state["frozen"]["fingerprints"]}
    saved = _load(folder / MODEL) | constants.read(folder, state)
    _restore_tensors(folder / MODEL, saved, targets, own)


def initialize_state(optimizer: Optimizer) -> None:
    """Make the optimizer create its state, by a step of zero gradients at a learning rate of zero."""
    rates = [group["lr"] for group in optimizer.param_groups]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate, decay in zip(optimizer.param_groups, rates, decays, strict=True):
        group["lr"], group["weight_decay"] = rate, decay


def _restore_tensors(
    path: Path, saved: dict[str, Tensor], targets: dict[str, Tensor], own: dict[str, Tensor]
) -> set[str]:
    """Overwrite `targets` with the `saved` tensors of a file; the names of all that were saved."""
    file, problems = path.name, []
    for name, target in targets.items():
        if is_composite(target) or f"{file}{_PART}{name}{_PART}" in own:
            problems += _restore_parts(f"{file}{_PART}{name}", target, own)
        elif name not in saved:
            if file == MODEL:
                problems.append(f"{name} is missing")
        elif saved[name].shape != target.shape:
            problems.append(f"{name} has shape {tuple(saved[name].shape)} there, {tuple(target.shape)} here")
        else:
            write_whole_(target, saved[name])
    extra = [name for name in saved if name not in targets]
    problems += [f"{name} has no place in this run" for name in extra]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path}: does not fit: {'; '.join(problems[:5])}{more}")
    return set(saved) | {key.split(_PART)[1] for key in own if key.startswith(file)}


def _restore_parts(name: str, target: Tensor, own: dict[str, Tensor]) -> list[str]:
    problems = []
    for part, tensor in parts(target).items():
        saved = own.get(f"{name}{_PART}{part}")
        if saved is None:
            problems.append(
                f"{name} is saved by rank and cannot be resharded; resume on as many ranks as saved it"
            )
            break
        if saved.shape != tensor.shape:
            problems.append(f"{name}, {part}: shape {tuple(saved.shape)} there, {tuple(tensor.shape)} here")
        else:
            with torch.no_grad():
                tensor.copy_(saved)
    return problems


def _forget_absent_state(saved: set[str], model: nn.Module, optimizer: Optimizer) -> None:
    """Drop the state of parameters that had none when the checkpoint was written."""
    owners = {name.split("/", 1)[1] for name in saved}
    for fqn, parameter in model.named_parameters():
        if fqn not in owners:
            optimizer.state.pop(parameter, None)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
