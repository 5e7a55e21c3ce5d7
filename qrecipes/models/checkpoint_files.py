"""Tensors in safetensors files: read one at a time, written in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qrecipes.errors import WeightsError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 5
"""How many of a list of names an error shows."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in one or several safetensors files, read one at a time."""

    path: Path
    files: dict[str, Path]
    """The file that holds each tensor, by the tensor's name."""
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read the headers of a safetensors file, or of those in a folder, sharded or not.

        Raises:
            WeightsError: naming the file that is missing, truncated or damaged, or that lacks a tensor of
            the index.
        """
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        weight_map = _weight_map(path)
        for file in _files(path, weight_map):
            for name, shape in _header(file).items():
                files[name], shapes[name] = file, shape
        lacking = [name for name, file in weight_map.items() if files.get(name) != path / file]
        if lacking:
            first = lacking[0]
            raise WeightsError(
                f"{path / INDEX}: names {len(lacking)} tensors that its shards lack, such as {first} in "
                f"{weight_map[first]}; fetch the folder again"
            )
        return cls(path, files, shapes)

    def read(self, parts: Mapping[str, list[tuple[int, int] | None]]) -> Iterator[tuple[str, int, Tensor]]:
        """(name, index into `parts[name]`, tensor): whole tensors, or rows [start, end) of them.

        One is in memory at a time, file after file.
        """
        for file in dict.fromkeys(self.files[name] for name in parts):
            with safe_open(file, framework="pt") as opened:
                for name, ranges in parts.items():
                    if self.files[name] != file:
                        continue
                    for index, rows in enumerate(ranges):
                        if rows is None:
                            yield name, index, opened.get_tensor(name)
                        else:
                            yield name, index, opened.get_slice(name)[rows[0] : rows[1]]


def write_sharded(
    folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor], max_shard_bytes: int
) -> None:
    """Write the tensors named in `sizes` (bytes) into `folder`, in one file, or in shards with an index.

    `tensor` gives one by name, on the CPU and contiguous; those of one shard are in memory at a time. A
    tensor larger than `max_shard_bytes` has a shard of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(sizes), get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )  # fmt: skip
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        WeightsError: if there is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: holds {type(content).__name__}, not an object")
    return content


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a Hugging Face model; None where there is none, or only another library's."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    return config if "model_type" in config or "architectures" in config else None


def some(names: list[str]) -> str:
    """The first few of a list, in words."""
    more = f", ... ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor, as the index of a sharded folder has it; empty where there is no index."""
    index = path / INDEX
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: has no weight_map, which names the shard of each tensor")
    return weight_map


def _files(path: Path, weight_map: dict[str, str]) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if path.is_file():
        return [path]
    if weight_map:
        files = [path / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(f"{path}: {len(missing)} of {len(files)} shards are missing: {some(missing)}")
        return files
    if (path / WHOLE).is_file():
        return [path / WHOLE]
    others = sorted(
        file.name for file in path.glob("*") if file.suffix in (".safetensors", ".bin", ".pth", ".pt")
    )
    there = f"; it has {some(others)}" if others else ""
    raise WeightsError(f"{path}: no {WHOLE} and no {INDEX}{there}")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file}: truncated, damaged or no safetensors file ({error}); fetch it again"
        ) from error
