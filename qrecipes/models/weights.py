"""Pretrained weights on disk into a built model, and a trained model back into a Hugging Face folder.

A Hugging Face checkpoint names its tensors differently from torchtune, orders the rows of some of them
differently, and stacks some; `families` has the tables.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from qrecipes.errors import ConfigError, ExportError, WeightsError
from qrecipes.models.activation_quantizers import quantized_computation
from qrecipes.models.build import build_skeleton, initialize_adapter_magnitudes_
from qrecipes.models.checkpoint_files import Checkpoint, read_config, some, write_sharded
from qrecipes.models.families import (
    EMBEDDING,
    HF_EMBEDDING,
    HF_OUTPUT,
    OUTPUT,
    QUANTIZATION,
    Config,
    Family,
    complete,
    family_of,
    overridden,
    rotary_frequencies,
)
from qrecipes.models.hub import locate
from qrecipes.models.sources import low_bit_source, pretrained, source_folder
from qrecipes.models.traits import rotary_theta, traits
from qrecipes.quant.linear import dequantized_state_dict

if TYPE_CHECKING:
    from qrecipes.config.run import ModelSection

__all__ = [
    "Checkpoint",
    "Place",
    "huggingface_places",
    "load_pretrained",
    "locate",
    "pretrained",
    "save_huggingface",
    "source_folder",
    "state_dict_to_huggingface",
]

MAX_SHARD_BYTES = 5_000_000_000
_ROTATED = re.compile(r"\.(q|k)_proj\.(weight|bias|packed|scale|zero)$")
_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Tensors in old checkpoints that follow from config.json."""
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


Reorder = Callable[[str, Tensor], Tensor]
"""(our name of a tensor, the tensor) -> the tensor with its rows in another order."""


@dataclass(frozen=True)
class _Source:
    """Where one tensor of a model lies in a checkpoint."""

    name: str
    stacked: tuple[str, ...] = ()
    """Our names of the tensors that are stacked by rows in that one, if several are."""


def load_pretrained(model: nn.Module, section: ModelSection) -> Path:
    """Fill `model` in place from the weights that `section` names, and return the folder that they came from.

    Takes a Hugging Face folder of a family that `families` lists for torchtune's decoders, and for any model
    safetensors whose names are the model's own. Tensors are read one at a time and cast to the type of the
    parameters, on their device. Adapters keep their values where the file has none.

    Raises:
        WeightsError: if the weights are missing, damaged, of another architecture, or do not fit the model;
        the model is then unchanged.
        ConfigError: if the section names no weights, or the model is longer than a window that it lacks.
    """
    name = pretrained(section)
    if name is None:
        raise ConfigError(
            "model.weights: not given; name a folder, a safetensors file, asset:NAME or OWNER/NAME"
        )
    path = locate(name, "model.weights" if section.weights else "model.source")
    folder = path if path.is_dir() else path.parent
    checkpoint = Checkpoint.open(path)
    if any(name.endswith(".qweight") for name in checkpoint.files):
        raise low_bit_source(folder)
    targets = _targets(model)
    config = read_config(folder)
    if config is None or set(checkpoint.files) == set(targets):
        sources = {name: _Source(name) for name in checkpoint.files}
        _check_fit(model, targets, checkpoint, sources)
        _copy(targets, checkpoint, sources, _as_it_is)
    else:
        fill(model, checkpoint, family_of(config, path), config, folder)
    initialize_adapter_magnitudes_(model)
    return folder


def fill(model: nn.Module, checkpoint: Checkpoint, family: Family, config: Config, folder: Path) -> None:
    """Copy the tensors of a Hugging Face checkpoint, whose config.json is `config`, into a torchtune decoder.

    Raises:
        WeightsError: if they do not fit the model; the model is then unchanged.
        ConfigError: if the model is longer than a window that it lacks.
    """
    targets = _targets(model)
    known = complete(family, config, checkpoint.path)
    sources = _family_sources(model, targets, checkpoint, family, known)
    _check_fit(model, targets, checkpoint, sources)
    _check_architecture(model, checkpoint.path, config, folder)
    _copy(targets, checkpoint, sources, _reordering(family, known, _pairs_together))


def state_dict_to_huggingface(state_dict: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A torchtune decoder's state dict under Hugging Face's names and in its order of rows; inverse of
    loading.

    `config` is the content of config.json. An output layer is left out where `config` ties it to the
    embedding.

    Raises:
        ExportError: if a tensor has no counterpart in a Hugging Face model of that family.
    """
    family = family_of(config, "config.json")
    known = complete(family, config, "config.json")
    return {
        name: _assembled(family, known, state_dict, ours)
        for name, ours in _places(family, known, state_dict).items()
    }


@dataclass(frozen=True)
class Place:
    """Where one of our linear layers is in a Hugging Face model."""

    name: str
    """Its module there."""
    to_huggingface: Callable[[Tensor], Tensor]
    """The rows of a tensor that has one for each output, in Hugging Face's order."""
    to_ours: Callable[[Tensor], Tensor]
    """The inverse."""
    stack: tuple[str, ...]
    """Our names of all layers that are that module, one on top of the other; of this one alone where it is
    one of its own."""


def huggingface_places(layers: Iterable[str], config: Config) -> dict[str, Place]:
    """The places of a torchtune decoder's linear layers, by our names. `config` is that of config.json.

    Raises:
        ExportError: if a layer has no counterpart in a Hugging Face model of that family.
        WeightsError: if the family is not supported.
    """
    family = family_of(config, "config.json")
    known = complete(family, config, "config.json")
    apart, together = _reordering(family, known, _pairs_apart), _reordering(family, known, _pairs_together)
    weights = dict.fromkeys((f"{layer}.weight" for layer in layers), torch.empty(0))
    places = {}
    for theirs, ours in _places(family, known, weights).items():
        stack = tuple(name.removesuffix(".weight") for name in ours)
        for name, layer in zip(ours, stack, strict=True):
            if name in weights:
                places[layer] = Place(
                    theirs.removesuffix(".weight"), partial(apart, name), partial(together, name), stack
                )
    return places


def save_huggingface(
    model: nn.Module,
    source_folder: Path,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    args: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write `model` as a Hugging Face folder that `transformers` loads, with the source folder's tokenizer.

    Writes model.safetensors, or shards of at most `max_shard_bytes` and their index, in `dtype` or else in
    the parameters' own; config.json, the source's with its type and tying corrected; and copies of
    generation_config.json and the tokenizer's files. `destination` appears by a rename, complete. `args` are
    the builder's arguments that overrode config.json, if any did, and are written into it. Low-bit layers are
    written dequantized, all of them in memory at once. No such folder can say that activations are quantized:
    where the model's are, stderr tells what is lost.

    Raises:
        ExportError: if the model is no torchtune decoder of plain layers, does not fit the source's config,
        or cannot be written.
    """
    config = read_config(source_folder)
    if config is not None:
        config.pop(QUANTIZATION, None)  # of a run's base; what is written is dequantized
    if config is None:
        raise ExportError(
            f"{source_folder}: no config.json of a Hugging Face model, so there is none to write"
        )
    if destination.resolve() == source_folder.resolve():
        raise ExportError(f"{destination}: is the folder that the model came from; name another")
    if destination.is_dir() and any(destination.iterdir()) and read_config(destination) is None:
        raise ExportError(f"{destination}: exists and is no Hugging Face folder; name another, or remove it")
    state_dict = dequantized_state_dict(model)
    try:
        family = family_of(config, source_folder)
        config |= overridden(family, args)
        if HF_OUTPUT in family.names:
            config["tie_word_embeddings"] = OUTPUT not in state_dict
        known = complete(family, config, source_folder)
    except WeightsError as error:
        raise ExportError(str(error)) from error
    places = _places(family, known, state_dict)
    _check_describes(model, state_dict, config, source_folder)
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
        config[key] = str(dtype or state_dict[EMBEDDING].dtype).removeprefix("torch.")
    sizes = {
        name: sum(state_dict[n].numel() * (dtype or state_dict[n].dtype).itemsize for n in ours)
        for name, ours in places.items()
    }

    def tensor(name: str) -> Tensor:
        whole = _assembled(family, known, state_dict, places[name])
        return whole.to(device="cpu", dtype=dtype or whole.dtype).contiguous()

    partial = destination.with_name(destination.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_sharded(partial, sizes, tensor, max_shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in _COPIED:
            if (source_folder / file).is_file():
                shutil.copyfile(source_folder / file, partial / file)
        shutil.rmtree(destination, ignore_errors=True)
        partial.rename(destination)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{destination}: cannot be written: {error}; name another folder") from error
    lost = quantized_computation(model)
    if lost is not None:
        print(
            f"note: {destination}: the model quantizes {lost}, and what loads a Hugging Face folder does "
            "not, so that its outputs differ; `qrecipes evaluate` measures both",
            file=sys.stderr,
        )


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Tensors to fill, by their names in the state dict.

    Parameters stand for themselves: the state dict of a model with NF4 weights holds dequantized copies.
    """
    targets = dict(model.state_dict())
    targets |= {name: parameter for name, parameter in model.named_parameters() if name in targets}
    for name, tensor in targets.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device; build the model where its weights are to be")
    return targets


def _family_sources(
    model: nn.Module, targets: dict[str, Tensor], checkpoint: Checkpoint, family: Family, config: Config
) -> dict[str, _Source]:
    """The source of each tensor of the model, by our names."""
    from torchtune.modules import TransformerDecoder

    if not isinstance(model, TransformerDecoder):
        raise WeightsError(
            f"{checkpoint.path}: {family.architecture} fits torchtune's decoders, and the model is a "
            f"{type(model).__name__}"
        )
    tied = config["tie_word_embeddings"]
    sources: dict[str, _Source] = {}
    for name in checkpoint.files:
        if _RECOMPUTED.search(name) or (tied and name == HF_OUTPUT):
            continue
        pattern, layer = _pattern(name)
        ours = tuple(part.format(layer) for part in family.names.get(pattern, (name,)))
        sources |= {part: _Source(name, ours if len(ours) > 1 else ()) for part in ours}
    if tied and OUTPUT in targets:
        sources[OUTPUT] = _Source(HF_EMBEDDING)
    if not tied and OUTPUT in sources and OUTPUT not in targets:
        raise WeightsError(
            f"{checkpoint.path}: has its own output layer ({HF_OUTPUT}), and the model ties its output to "
            "the embedding; set model.args.tie_word_embeddings = false, or use a builder that does not tie"
        )
    return sources


def _check_fit(
    model: nn.Module, targets: dict[str, Tensor], checkpoint: Checkpoint, sources: dict[str, _Source]
) -> None:
    """Compare names and shapes before anything is copied."""
    optional = _adapter_names(model)
    missing = [name for name in targets if name not in sources and name not in optional]
    unexpected = [source.name for name, source in sources.items() if name not in targets]
    wrong = {}
    for name in targets:
        source = sources.get(name)
        if source is None:
            continue
        if source.name not in checkpoint.shapes:
            missing.append(name)
            continue
        parts = source.stacked or (name,)
        rows = sum(len(targets[part]) if targets[part].dim() else 0 for part in parts if part in targets)
        expected = [rows, *targets[name].shape[1:]] if targets[name].dim() else []
        if list(checkpoint.shapes[source.name]) != expected:
            found = list(checkpoint.shapes[source.name])
            wrong[source.name] = f"{source.name}: found {found}, expected {expected} ({', '.join(parts)})"
    problems = []
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {some(list(wrong.values()))}")
    if missing:
        problems.append(f"{len(missing)} missing: {some(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {some(list(dict.fromkeys(unexpected)))}")
    if problems:
        raise WeightsError(
            f"{checkpoint.path}: of {len(checkpoint.files)} tensors for {len(targets)} places in the model: "
            f"{'; '.join(problems)}"
        )


def _check_architecture(model: Any, path: Path, config: Config, folder: Path) -> None:
    """Compare with config.json what shapes do not show: heads, norms, caps, rotary frequencies."""
    skeleton = build_skeleton(config, folder, {"max_seq_len": model.max_seq_len})
    expected, found = traits(skeleton), traits(model)
    wrong = [f"{key} {expected[key]}, model {found[key]}" for key in expected if expected[key] != found[key]]
    if not wrong:
        family = family_of(config, folder)
        theta, frequencies = rotary_theta(model), rotary_frequencies(complete(family, config, folder))
        if not torch.allclose(theta, frequencies, rtol=1e-4):  # float32 powers
            wrong.append(
                f"rope_theta or rope scaling: lowest frequency {frequencies[-1]:.4g}, model {theta[-1]:.4g} "
                "(builder arguments rope_base and scale_factor)"
            )
    if wrong:
        raise WeightsError(f"{path}: config.json differs from the model: {'; '.join(wrong)}")


def _check_describes(model: nn.Module, state_dict: dict[str, Tensor], config: Config, folder: Path) -> None:
    """Raise ExportError where a model is not the one that the config.json of `folder` describes."""
    try:
        skeleton = build_skeleton(config, folder, {"max_seq_len": model.max_seq_len})
        expected = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        wrong = [
            f"{name}: model {list(state_dict[name].shape) if name in state_dict else 'lacks it'}, "
            f"config.json {expected.get(name, 'lacks it')}"
            for name in sorted(expected.keys() | state_dict.keys())
            if name not in state_dict or expected.get(name) != list(state_dict[name].shape)
        ]
        if wrong:
            raise WeightsError(f"{folder}: {len(wrong)} tensors differ: {some(wrong)}")
        _check_architecture(model, folder, config, folder)
    except (WeightsError, ConfigError) as error:
        raise ExportError(f"the model is not the one that its config.json describes: {error}") from error


def _adapter_names(model: nn.Module) -> set[str]:
    """Parameters that pretrained weights need not hold."""
    return {
        f"{fqn}.{name}".removeprefix(".")
        for fqn, module in model.named_modules()
        if hasattr(module, "adapter_params")
        for name in module.adapter_params()
    }


@torch.no_grad()
def _copy(
    targets: dict[str, Tensor], checkpoint: Checkpoint, sources: dict[str, _Source], reorder: Reorder
) -> None:
    """Copy tensor by tensor; stacked ones are read part by part."""
    places: dict[str, list[str]] = {}
    rows: dict[str, list[tuple[int, int] | None]] = {}
    for name, source in sources.items():
        if name not in targets:
            continue
        places.setdefault(source.name, []).append(name)
        rows.setdefault(source.name, []).append(_rows(name, source, targets))
    for source_name, index, tensor in checkpoint.read(rows):
        name = places[source_name][index]
        targets[name].copy_(reorder(name, tensor))


def _rows(name: str, source: _Source, targets: dict[str, Tensor]) -> tuple[int, int] | None:
    """The rows [start, end) of its source that are the tensor `name`; None where it has all of them."""
    if not source.stacked:
        return None
    above = source.stacked[: source.stacked.index(name)]
    start = sum(len(targets[part]) for part in above)
    return start, start + len(targets[name])


def _places(family: Family, config: Config, state_dict: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Our tensors in each of Hugging Face's, which come in the order of the model."""
    theirs = {ours: (name, parts) for name, parts in family.names.items() for ours in parts}
    unknown = [name for name in state_dict if _pattern(name)[0] not in theirs]
    if unknown:
        raise ExportError(
            f"{len(unknown)} tensors have no place in a {family.architecture}: {some(unknown)}; "
            "only plain layers do, so finalize the model first"
        )
    places = {}
    for ours in state_dict:
        if ours == OUTPUT and config["tie_word_embeddings"]:
            continue
        pattern, layer = _pattern(ours)
        name, parts = theirs[pattern]
        places[name.format(layer)] = tuple(part.format(layer) for part in parts)
    return places


def _assembled(
    family: Family, config: Config, state_dict: dict[str, Tensor], ours: tuple[str, ...]
) -> Tensor:
    """One tensor of Hugging Face from those of ours that it holds."""
    reorder = _reordering(family, config, _pairs_apart)
    parts = [reorder(name, state_dict[name]) for name in ours]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _reordering(family: Family, config: Config, pairs: Callable[[Tensor, int], Tensor]) -> Reorder:
    """`pairs` for queries and keys of a family whose rotation torchtune computes in another order."""

    def reorder(name: str, tensor: Tensor) -> Tensor:
        return pairs(tensor, config["head_dim"]) if family.pairs and _ROTATED.search(name) else tensor

    return reorder


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _pairs_together(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, [N, K], from Hugging Face's order to torchtune's.

    Row j of the first half of a head and row j of its second half are rotated together; here they become
    neighbors.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def _pairs_apart(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `_pairs_together`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def _pattern(name: str) -> tuple[str, str]:
    """The name with its layer's number taken out, and the number."""
    layer = re.search(r"\.(\d+)\.", name)
    return re.sub(r"\.\d+\.", ".{}.", name, count=1), layer[1] if layer else ""
