"""Adapters as the peft library keeps them: `adapter_model.safetensors` and `adapter_config.json`.

Tensors carry the names of Hugging Face's layers and are in its order of rows: where torchtune rotates queries
and keys in another order, rows of B and magnitudes change places as those of the weight do.

Where Hugging Face stacks layers by rows in one, as Phi-3 does queries, keys and values, their adapters are
one there: with A_i [R, K] and B_i [N_i, R] of each, A = [A_1; A_2; ...] and B = diag(B_1, B_2, ...), of rank
R times their number, which `rank_pattern` tells. An adapter that peft trained on such a layer has one A for
all of them, and each of ours starts from it with its rows of B.

peft's group-pooled adapters (`use_qalora`), which it cannot merge, are read as what they compute: A repeated
over each group's inputs.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qrecipes.errors import ExportError, WeightsError
from qrecipes.models.checkpoint_files import read_config, some
from qrecipes.models.hub import is_repository
from qrecipes.models.sources import pretrained, source_folder
from qrecipes.models.weights import Place, huggingface_places, save_huggingface
from qrecipes.quant.linear import QuantLinear
from qrecipes.transforms.base import Adapter
from qrecipes.transforms.chain import Chain

if TYPE_CHECKING:
    from qrecipes.config.run import ModelSection, Run

CONFIG, TENSORS, BASE = "adapter_config.json", "adapter_model.safetensors", "base"
_MADE_FOR = "made_for"
"""In the metadata of the tensors: the model that `base/` was made of."""
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"^base_model\.model\.(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?$"
)
_PARTS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
}
"""Settings of peft that must be these, or absent, for what this library computes."""
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initializations of peft that leave the weight of the base as it is. PiSSA and its like take out of it what
they begin the adapter with, so that the adapter belongs to the rest of it."""


def save_peft(model: nn.Module, chain: Chain, run: Run, destination: Path) -> Path:
    """Write the adapters of a swapped model, which is left with the frozen layers in their place.

    Where the frozen weights are low-bit, `base/` beside the files is a Hugging Face folder that holds them
    dequantized, which is what the adapters were trained over, and which the files name.

    Raises:
        ExportError: if the model has no adapters, did not come from a Hugging Face folder, or an adapted
        layer has no counterpart in that; or if nothing can be written there.
    """
    folder = source_folder(run.model)
    config = None if folder is None else read_config(folder)
    if folder is None or config is None:
        raise ExportError(
            f"{destination}: adapters are written under the names of a Hugging Face model, and this run's "
            f"model ({run.model.source}) came from none; leave --peft out"
        )
    adapters = chain.detach_adapters(model)
    if not adapters:
        methods = ", ".join(transform.name for transform in chain.transforms) or "no transform"
        raise ExportError(
            f"{destination}: the run has no low-rank adapters ({methods}), and peft reads nothing else; "
            "leave --peft out"
        )
    _require_one_kind(adapters)
    places = huggingface_places(adapters, config)
    rows = {layer: _rows(model, layer) for place in places.values() for layer in place.stack}
    stacked = _stacked(adapters, places, rows)
    tensors = _to_peft(stacked)
    try:
        shutil.rmtree(destination, ignore_errors=True)
        destination.mkdir(parents=True)
        name = str(pretrained(run.model))
        made_for = base = name if is_repository(name) and not Path(name).exists() else str(folder.resolve())
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            save_huggingface(model, folder, destination / BASE, args=run.model.args)
            base = str((destination / BASE).resolve())
        save_file(tensors, destination / TENSORS, metadata={"format": "pt", _MADE_FOR: made_for})
        described = _describe(next(iter(adapters.values())), stacked, base)
        (destination / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(destination / CONFIG, destination / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{destination}: cannot be written: {error}; give another --output") from error
    return destination


def load_peft(folder: Path, model: nn.Module, chain: Chain, section: ModelSection) -> None:
    """Overwrite the adapters of a swapped model with those of a folder that peft, or `save_peft`, wrote.

    Raises:
        WeightsError: if the folder is damaged, of another kind of adapter, or made for another model, naming
        what does not fit.
        ConfigError: if the model's transforms adapt other layers, or at another rank or scaling.
    """
    described, tensors = _read(folder)
    source = source_folder(section)
    config = None if source is None else read_config(source)
    if config is None:
        raise WeightsError(
            f"{folder}: an adapter names a Hugging Face model's layers, and model.source "
            f"({section.source}) is none; use hf:FOLDER"
        )
    _check_base(folder, described, section)
    layers = [fqn for transform in chain.transforms for fqn in transform.layers(model)]
    places = huggingface_places(layers, config)
    members: dict[str, list[str]] = {}
    for fqn, place in places.items():
        members.setdefault(place.name, []).append(fqn)
    groups = _grouped(folder, tensors)
    unknown = [name for name in groups if name not in members]
    if unknown:
        raise WeightsError(
            f"{folder}: adapts {len(unknown)} layers that this run's model has not, or does not adapt: "
            f"{some(unknown)}; it was made for another model, or the transform's targets leave them out"
        )
    adapters = {}
    for name, parts in groups.items():
        rank, scaling = _rank_and_scaling(folder, described, name)
        if len(parts["a"]) != rank:
            raise WeightsError(
                f"{folder}: {name}.a: has {len(parts['a'])} rows, and {CONFIG} says rank {rank}; the two "
                "files belong to two adapters"
            )
        a = _widened(parts["a"], described) if described.get("use_qalora") else parts["a"]
        given = Adapter(a, parts["b"], scaling, parts.get("magnitude"))
        rows = {layer: _rows(model, layer) for layer in places[members[name][0]].stack}
        single = int(described["r"])
        for fqn, adapter in _unstacked(f"{folder}: {name}", given, rows, members[name], single).items():
            to_ours = places[fqn].to_ours
            magnitude = None if adapter.magnitude is None else to_ours(adapter.magnitude)
            adapters[fqn] = adapter._replace(b=to_ours(adapter.b), magnitude=magnitude)
    chain.load_adapters(model, adapters)


def _rows(model: nn.Module, layer: str) -> int:
    """Outputs of a linear layer."""
    return model.get_submodule(layer).out_features  # type: ignore[return-value]


def _stacked(
    adapters: dict[str, Adapter], places: dict[str, Place], rows: dict[str, int]
) -> dict[str, Adapter]:
    """Adapters by the names of Hugging Face's layers, in its order of rows; those of layers that it stacks as
    one.

    Raises:
        ExportError: if one of stacked layers has magnitudes, and another no adapter.
    """
    found = {}
    for name, stack in {place.name: place.stack for place in places.values()}.items():
        given = [adapters[layer] for layer in stack if layer in adapters]
        left = [layer for layer in stack if layer not in adapters]
        if given[0].magnitude is not None and left:
            raise ExportError(
                f"peft: {name} is {', '.join(stack)} in one, of which {', '.join(left)} has no adapter, and "
                "DoRA's magnitudes are of whole layers; adapt all of them, or leave --peft out"
            )
        parts, magnitudes = [], []
        for layer in stack:
            if layer in left:
                parts.append(given[0].b.new_zeros(rows[layer], 0))
                continue
            adapter, to_huggingface = adapters[layer], places[layer].to_huggingface
            parts.append(to_huggingface(adapter.b))
            if adapter.magnitude is not None:
                magnitudes.append(to_huggingface(adapter.magnitude))
        found[name] = Adapter(
            torch.cat([adapter.a for adapter in given]),
            torch.block_diag(*parts),
            given[0].scaling,
            torch.cat(magnitudes) if magnitudes else None,
        )
    return found


def _unstacked(
    where: str, given: Adapter, rows: dict[str, int], adapted: list[str], single: int
) -> dict[str, Adapter]:
    """The inverse, still in Hugging Face's order of rows, by our names of the `adapted` layers among those in
    `rows`. `single` is the rank of an adapter of one layer.

    Raises:
        WeightsError: if the rows are not the layers', or some that count are of a layer without an adapter.
    """
    if len(given.b) != sum(rows.values()):
        raise WeightsError(
            f"{where}.b: has {len(given.b)} rows, and the model's layer gives {sum(rows.values())} outputs; "
            "the adapter was made for another model"
        )
    sizes = list(rows.values())
    b = dict(zip(rows, given.b.split(sizes), strict=True))
    left = [
        layer for layer in rows if layer not in adapted and (given.magnitude is not None or b[layer].any())
    ]
    if left:
        raise WeightsError(
            f"{where}: also adapts {', '.join(left)}, which the transform's targets leave out; widen them"
        )
    blocks = {layer: slice(i * single, (i + 1) * single) for i, layer in enumerate(adapted)}
    apart = len(given.a) == single * len(adapted) and all(
        b[layer].count_nonzero() == b[layer][:, block].count_nonzero() for layer, block in blocks.items()
    )
    if not apart:
        blocks = dict.fromkeys(adapted, slice(None))
    magnitudes: dict[str, Tensor | None] = dict.fromkeys(rows)
    if given.magnitude is not None:
        magnitudes |= zip(rows, given.magnitude.split(sizes), strict=True)
    return {
        layer: Adapter(given.a[block], b[layer][:, block], given.scaling, magnitudes[layer])
        for layer, block in blocks.items()
    }


def _to_peft(stacked: dict[str, Adapter]) -> dict[str, Tensor]:
    tensors = {}
    for name, adapter in stacked.items():
        prefix = f"{_PREFIX}{name}"
        tensors[f"{prefix}.lora_A.weight"] = adapter.a
        tensors[f"{prefix}.lora_B.weight"] = adapter.b
        if adapter.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = adapter.magnitude
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _require_one_kind(adapters: dict[str, Adapter]) -> None:
    """Raise ExportError if adapters differ in rank, scaling or kind."""
    kinds = {(a.a.shape[0], a.scaling, a.magnitude is not None) for a in adapters.values()}
    if len(kinds) > 1:
        raise ExportError(
            f"peft: the adapters are of {len(kinds)} kinds (rank, scaling, DoRA): {sorted(kinds)}; give all "
            "transforms one rank, alpha and kind, or leave --peft out"
        )


def _describe(one: Adapter, stacked: dict[str, Adapter], base: str) -> dict[str, Any]:
    """The content of adapter_config.json, where `one` is any adapter of a single layer."""
    rank = len(one.a)
    ranks = {name: len(adapter.a) for name, adapter in stacked.items() if len(adapter.a) != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": one.scaling * rank,  # of rsLoRA, too: the product is what counts
        "rank_pattern": ranks,
        "alpha_pattern": {name: one.scaling * number for name, number in ranks.items()},
        "use_rslora": False,
        "use_dora": one.magnitude is not None,
        "target_modules": sorted(stacked),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(
            f"{folder}: is no adapter of peft: {error}; it has {CONFIG} and {TENSORS}"
        ) from error
    if described.get("peft_type") != "LORA":
        raise WeightsError(
            f"{folder}: peft_type is {described.get('peft_type')!r}; only 'LORA' can be loaded"
        )
    for key, value in _PLAIN.items():
        if (described.get(key) or None) != (value or None) and described.get(key) != value:
            raise WeightsError(
                f"{folder}: {key} is {described[key]!r}; only {value!r} can be loaded; merge the adapter "
                "with peft, and load the merged model"
            )
    begun = described.get("init_lora_weights")
    if begun not in _KEEPS_BASE:
        raise WeightsError(
            f"{folder}: init_lora_weights is {begun!r}, which changed the base's weights before training, so "
            "the adapter does not fit the model; save it with peft's "
            "path_initial_model_for_weight_conversion, which makes it one of the model itself, or merge it "
            "with peft, and load the merged model"
        )
    return described, tensors


def _check_base(folder: Path, described: dict[str, Any], section: ModelSection) -> None:
    """Compare the last part of the names: a repository has the owner's before it, a copy other folders."""
    made_for, mine = described.get("base_model_name_or_path"), pretrained(section)
    if made_for and Path(made_for).name == BASE:  # the dequantized copy that `save_peft` wrote
        with safe_open(folder / TENSORS, "pt") as file:
            made_for = (file.metadata() or {}).get(_MADE_FOR)
    if not made_for or mine is None:
        return
    names = [re.split(r"[/:]", str(name).rstrip("/"))[-1].lower() for name in (made_for, mine)]
    if names[0] != names[1]:
        raise WeightsError(
            f"{folder}: was made for {made_for}, and the model is {mine}; load it over its own model, or, if "
            f"they are the same, correct base_model_name_or_path in {CONFIG}"
        )


def _grouped(folder: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by layer and part.

    Raises:
        WeightsError: if one is neither A, B nor magnitudes of a layer, or a layer lacks A or B.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        match = _KEY.match(name)
        if match is None:
            strange.append(name)
        else:
            groups.setdefault(match["layer"], {})[_PARTS[match["part"]]] = tensor.to(torch.float32)
    strange += [layer for layer, parts in groups.items() if not {"a", "b"} <= parts.keys()]
    if strange or not groups:
        what = some(strange) if strange else "nothing"
        raise WeightsError(f"{folder / TENSORS}: holds {what}; it must hold lora_A and lora_B of each layer")
    return groups


def _widened(a_RG: Tensor, described: dict[str, Any]) -> Tensor:
    """A of each input, [R, K], from peft's `use_qalora`, which multiplies A by the mean of each of G groups
    of S inputs, times G."""
    size = int(described.get("qalora_group_size", 16))
    return (a_RG * (a_RG.shape[1] / size)).repeat_interleave(size, 1)


def _rank_and_scaling(folder: Path, described: dict[str, Any], layer: str) -> tuple[int, float]:
    """Those of the adapter of a layer: a pattern's, where one is the end of the layer's name, or else the
    file's."""
    found: dict[str, Any] = {}
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        given = described.get(patterns) or {}
        matching = [value for name, value in given.items() if re.match(rf"(.*\.)?({name})$", layer)]
        found[key] = matching[0] if matching else described.get(key)
    try:
        rank, alpha = int(found["r"]), float(found["lora_alpha"])
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG}: r or lora_alpha cannot be read ({error})") from error
    if rank < 1:
        raise WeightsError(f"{folder / CONFIG}: r is {rank}; a rank is positive")
    return rank, alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
