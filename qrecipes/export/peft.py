"""Adapters as the peft library keeps them: `adapter_model.safetensors` and `adapter_config.json`.

Tensors carry the names of Hugging Face's layers and are in its order of rows: where torchtune rotates queries
and keys in another order, rows of B and magnitudes change places as those of the weight do.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
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
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}
"""Settings of peft that must be these, or absent, for what this library computes."""


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
    places = huggingface_places(adapters, config)
    tensors = _to_peft(adapters, places)
    try:
        shutil.rmtree(destination, ignore_errors=True)
        destination.mkdir(parents=True)
        name = str(pretrained(run.model))
        base = name if is_repository(name) and not Path(name).exists() else str(folder.resolve())
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            save_huggingface(model, folder, destination / BASE, args=run.model.args)
            base = str((destination / BASE).resolve())
        save_file(tensors, destination / TENSORS, metadata={"format": "pt"})
        described = _describe(adapters, places, base)
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
    ours = {place.name: fqn for fqn, place in places.items()}
    groups = _grouped(folder, tensors)
    unknown = [name for name in groups if name not in ours]
    if unknown:
        raise WeightsError(
            f"{folder}: adapts {len(unknown)} layers that this run's model has not, or does not adapt: "
            f"{some(unknown)}; it was made for another model, or the transform's targets leave them out"
        )
    scaling = _scaling(folder, described)
    adapters = {}
    for name, parts in groups.items():
        place = places[ours[name]]
        rows = model.get_submodule(ours[name]).out_features
        for part in ("b", "magnitude"):
            if part in parts and len(parts[part]) != rows:
                raise WeightsError(
                    f"{folder}: {name}.{part}: has {len(parts[part])} rows, and the model's layer gives "
                    f"{rows} outputs; the adapter was made for another model"
                )
        magnitude = place.to_ours(parts["magnitude"]) if "magnitude" in parts else None
        adapters[ours[name]] = Adapter(parts["a"], place.to_ours(parts["b"]), scaling, magnitude)
    chain.load_adapters(model, adapters)


def _to_peft(adapters: dict[str, Adapter], places: dict[str, Place]) -> dict[str, Tensor]:
    tensors = {}
    for fqn, adapter in adapters.items():
        place = places[fqn]
        prefix = f"{_PREFIX}{place.name}"
        tensors[f"{prefix}.lora_A.weight"] = adapter.a
        tensors[f"{prefix}.lora_B.weight"] = place.to_huggingface(adapter.b)
        if adapter.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = place.to_huggingface(adapter.magnitude)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _describe(adapters: dict[str, Adapter], places: dict[str, Place], base: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Raises:
        ExportError: if adapters differ in rank, scaling or kind, of which the file has one.
    """
    kinds = {(a.a.shape[0], a.scaling, a.magnitude is not None) for a in adapters.values()}
    if len(kinds) > 1:
        raise ExportError(
            f"peft: the adapters are of {len(kinds)} kinds (rank, scaling, DoRA): {sorted(kinds)}; give all "
            "transforms one rank, alpha and kind, or leave --peft out"
        )
    ((rank, scaling, use_dora),) = kinds
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scaling * rank,  # of rsLoRA, too: the product is what counts
        "use_rslora": False,
        "use_dora": use_dora,
        "target_modules": sorted(places[fqn].name for fqn in adapters),
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
    return described, tensors


def _check_base(folder: Path, described: dict[str, Any], section: ModelSection) -> None:
    """Compare the last part of the names: a repository has the owner's before it, a copy other folders."""
    made_for, mine = described.get("base_model_name_or_path"), pretrained(section)
    if not made_for or mine is None:
        return
    if made_for == str((folder / BASE).resolve()) or Path(made_for).name == BASE:
        return  # the dequantized copy that `save_peft` wrote
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


def _scaling(folder: Path, described: dict[str, Any]) -> float:
    try:
        rank, alpha = int(described["r"]), float(described["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder / CONFIG}: r or lora_alpha cannot be read ({error})") from error
    if rank < 1:
        raise WeightsError(f"{folder / CONFIG}: r is {rank}; a rank is positive")
    return alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
