"""Parameters that training cannot change, such as a frozen base: saved once for all checkpoints, or not at
all, and recognized either way.

Every checkpoint holds a fingerprint of each. The tensors are in `frozen_DIGEST.safetensors` beside the
checkpoints of a run, one file for all of them, which appears by a rename before the first checkpoint that
needs it; with `checkpoint.frozen = "rebuild"` they are nowhere, since the run's model, seed and transforms
give them again. A file that is missing is made good in the same way. Whatever comes in a model is compared
with the fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qrecipes.errors import CheckpointError
from qrecipes.parallel.process import Process
from qrecipes.quant.sharded import is_composite, whole
from qrecipes.transforms.chain import Chain

if TYPE_CHECKING:
    from qrecipes.config.run import Run

_PREFIX, _SUFFIX = "frozen_", ".safetensors"
_CHUNK = 1 << 22
"""Words of 8 bytes that are hashed at a time: 32 MB, and as much for each step of it."""
_STEP, _MIX_1, _MIX_2 = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""SplitMix64's constants, as signed integers."""


@torch.no_grad()
def fingerprint(tensor: Tensor) -> str:
    """64 bits of a tensor's type, shape and bits, in hexadecimal: the same on every device.

    The sum over words of 8 bytes, modulo 2^64, of SplitMix64's function of word and place, so that nothing
    leaves the device. It tells tensors apart that differ by accident, not by design.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    even = data.numel() - data.numel() % 8
    total = _hashed(data[:even].view(torch.int64), 0)
    if even < data.numel():
        last = data.new_zeros(8)
        last[: data.numel() - even] = data[even:]
        total = total + _hashed(last.view(torch.int64), even // 8)
    described = f"{tensor.dtype} {tuple(tensor.shape)} {int(total)}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _hashed(words: Tensor, first: int) -> Tensor:
    """The sum of a function of each word and its place, which counts from `first`."""
    total = words.new_zeros(())
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        places = torch.arange(first + start, first + start + part.numel(), device=words.device)
        mixed = part ^ ((places + 1) * _STEP)
        mixed = (mixed ^ (mixed >> 30)) * _MIX_1
        mixed = (mixed ^ (mixed >> 27)) * _MIX_2
        total = total + (mixed ^ (mixed >> 31)).sum()
    return total


def constant_names(run: Run, model: nn.Module, process: Process) -> set[str]:
    """Names in the state dict of the parameters that a run cannot change, the same on every rank.

    Parameters made of several tensors are left out: their parts are a rank's own.
    """
    names = Chain.from_configs(run.transform).constants(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    composite = process.any_rank([is_composite(tensor) for tensor in tensors.values()])
    return {name for name, apart in zip(tensors, composite, strict=True) if not apart}


def keep(
    run: Run, model: nn.Module, names: set[str], folder: Path, process: Process
) -> dict[str, Any] | None:
    """What a checkpoint's state says of the constants called `names`; None where there are none.

    Writes their file into `folder`, that of all checkpoints, where it is wanted and not there yet. A
    collective: every rank calls it.
    """
    if not names:
        return None
    tensors = {name: t for name, t in sorted(model.state_dict().items()) if name in names}
    prints = {name: fingerprint(whole(tensor)) for name, tensor in tensors.items()}
    digest = hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:16]
    path = folder / f"{_PREFIX}{digest}{_SUFFIX}"
    wanted = run.checkpoint.frozen == "once" and not path.is_file()
    if process.largest(wanted):
        _write(path, tensors, process)
    return {
        "file": path.name,
        "device": process.device.type,
        "torch": torch.__version__,
        "fingerprints": prints,
    }


def _write(path: Path, tensors: dict[str, Tensor], process: Process) -> None:
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if process.is_main:
            gathered[name] = value.to("cpu", copy=True).contiguous()
    if process.is_main:
        partial = path.with_name(path.name + ".partial")
        save_file(gathered, partial, metadata={"format": "pt"})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.rename(path)


def file_of(folder: Path, state: Mapping[str, Any]) -> Path | None:
    """The file with the constants of the checkpoint in `folder`; None where it has none, or the file is not
    beside it."""
    if not state.get("frozen"):
        return None
    path = folder.parent / state["frozen"]["file"]
    return path if path.is_file() else None


def needs_rebuilding(folder: Path, state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has constants that only the run's model can give."""
    return bool(state.get("frozen")) and file_of(folder, state) is None


def read(folder: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The constants of a checkpoint by name, from their file; nothing where there is none.

    Raises:
        CheckpointError: if the file is not what was saved.
    """
    path = file_of(folder, state)
    if path is None:
        return {}
    remedy = "delete it where the run's model still gives these tensors; otherwise use another checkpoint"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged: cannot be read ({error}); {remedy}") from error
    differing = _differing(state["frozen"]["fingerprints"], tensors)
    if differing:
        raise CheckpointError(
            f"{path}: damaged: {_some(differing)} of what {folder.name} was saved with; {remedy}"
        )
    return tensors


def require_rebuilt(folder: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise CheckpointError where a model's own tensors are not the constants of a checkpoint. A collective
    where the model is sharded."""
    frozen = state["frozen"]
    differing = _differing(frozen["fingerprints"], model.state_dict())
    if differing:
        raise CheckpointError(
            f"{folder}: holds only what trained, and the frozen rest of this run's model is not what it was "
            f"trained over: {_some(differing)}; it needs the weights, seed and kind of device "
            f"({frozen['device']}, torch {frozen['torch']}) that it began with, or {frozen['file']} beside "
            'it; set checkpoint.frozen = "once" to keep such a file'
        )


def _differing(prints: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that are missing, or have another fingerprint; each is one collective where it is
    sharded."""
    return [
        name
        for name, expected in prints.items()
        if name not in tensors or fingerprint(whole(tensors[name])) != expected
    ]


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensors differ ({', '.join(names[:3])}{more})"


def forget_unused(folder: Path, states: Iterable[Path]) -> None:
    """Delete the files of constants in `folder` that none of the checkpoints' `states` name."""
    used = set()
    for path in states:
        try:
            used.add((json.loads(path.read_text(encoding="utf-8")).get("frozen") or {}).get("file"))
        except (OSError, ValueError, AttributeError):
            return  # a checkpoint that cannot be read may need any of them
    for path in folder.glob(f"{_PREFIX}*"):
        if path.name not in used:
            path.unlink()
