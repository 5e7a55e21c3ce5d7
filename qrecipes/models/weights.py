"""Pretrained weights on disk into a built model, and a trained model back into a Hugging Face folder.

A Llama checkpoint of Hugging Face names its tensors differently from torchtune, and orders the rows of the
query and key projections for another form of rotary embedding: within a head it keeps the first components of
all rotated pairs, then the second ones, where torchtune keeps each pair together.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qrecipes import assets
from qrecipes.errors import ConfigError, ExportError, WeightsError
from qrecipes.models.build import initialize_adapter_magnitudes_

if TYPE_CHECKING:
    from qrecipes.config.run import ModelSection

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
SHOWN = 5
"""How many tensors that do not fit an error lists."""

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_TO_HUGGINGFACE = {
    _EMBEDDING: "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    _OUTPUT: "lm_head.weight",
    "layers.{}.attn.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attn.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attn.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attn.output_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.mlp.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.sa_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
}
_FROM_HUGGINGFACE = {theirs: ours for ours, theirs in _TO_HUGGINGFACE.items()}
_ROTATED = re.compile(r"\.(q|k)_proj\.weight$")
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
            WeightsError: naming the file that is missing, truncated or damaged.
        """
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(path):
            for name, shape in _header(file).items():
                files[name], shapes[name] = file, shape
        return cls(path, files, shapes)

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, one in memory at a time, file after file."""
        for file in dict.fromkeys(self.files[name] for name in names):
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    if self.files[name] == file:
                        yield name, opened.get_tensor(name)


def load_pretrained(model: nn.Module, section: ModelSection) -> Path:
    """Fill `model` in place from `section.weights`, and return the folder that they came from.

    Takes a Hugging Face folder of a Llama for torchtune's decoders, and for any model safetensors whose names
    are the model's own. Tensors are cast to the type of the parameters. Adapters keep their values where the
    file has none.

    Raises:
        WeightsError: if the weights are missing, damaged, of another architecture, or do not fit the model;
        the model is then unchanged.
    """
    if section.weights is None:
        raise ConfigError(
            "model.weights: not given; name a folder, a safetensors file, asset:NAME or OWNER/NAME"
        )
    path = locate(section.weights)
    folder = path if path.is_dir() else path.parent
    checkpoint = Checkpoint.open(path)
    targets = _targets(model)
    config = _read_config(folder)
    if config is None or set(checkpoint.files) == set(targets):
        sources = {name: name for name in checkpoint.files}
        _check_fit(model, targets, checkpoint, sources)
        head_dim = 0
    else:
        sources = _llama_sources(model, targets, checkpoint, config)
        _check_fit(model, targets, checkpoint, sources)
        _check_architecture(model, path, config)
        head_dim = _head_dim(config)
    _copy(targets, checkpoint, sources, head_dim)
    initialize_adapter_magnitudes_(model)
    return folder


def locate(weights: str) -> Path:
    """The local folder or file of `weights`; a hub repository `OWNER/NAME` is downloaded, or found cached.

    Raises:
        WeightsError: if there is nothing of that name.
    """
    path = assets.resolve(weights)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", weights) or weights.startswith("."):
        raise WeightsError(f"model.weights: {weights}: no such file or folder")
    import huggingface_hub

    try:
        wanted = ["*.json", "*.safetensors", *_COPIED]
        return Path(huggingface_hub.snapshot_download(weights, allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise WeightsError(
            f"model.weights: {weights}: no such folder here, and no repository of that name from the hub "
            f"({type(error).__name__}: {reason}); without a network, give a folder"
        ) from error


def state_dict_to_huggingface(state_dict: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A torchtune Llama's state dict under Hugging Face's names and in its order of rows; inverse of loading.

    `config` is the content of config.json. An output layer is left out where `config` ties it to the
    embedding.

    Raises:
        ExportError: if a tensor has no counterpart in a Hugging Face Llama.
    """
    unknown = [name for name in state_dict if _pattern(name) not in _TO_HUGGINGFACE]
    if unknown:
        raise ExportError(
            f"{len(unknown)} tensors have no place in a Hugging Face Llama: {_some(unknown)}; "
            "only plain layers do, so finalize the model first"
        )
    tied = config.get("tie_word_embeddings", False)
    return {
        _renamed(name, _TO_HUGGINGFACE): _pairs_apart(tensor, _head_dim(config))
        if _ROTATED.search(name)
        else tensor
        for name, tensor in state_dict.items()
        if not (tied and name == _OUTPUT)
    }


def save_huggingface(
    model: nn.Module, source_folder: Path, destination: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write `model` as a Hugging Face folder that `transformers` loads, with the source folder's tokenizer.

    Writes model.safetensors, in `dtype` or else in the parameters' own; config.json, the source's with its
    type and tying corrected; and copies of generation_config.json and the tokenizer's files.

    Raises:
        ExportError: if the model is no torchtune Llama decoder of plain layers, or does not fit the source's
        config.
    """
    config = _read_config(source_folder)
    if config is None:
        raise ExportError(
            f"{source_folder}: no config.json of a Hugging Face model, so there is none to write"
        )
    problem = _architecture_problem(config)
    if problem:
        raise ExportError(f"{source_folder}: {problem}")
    state_dict = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    config["tie_word_embeddings"] = _OUTPUT not in state_dict
    tensors = {
        name: tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in state_dict_to_huggingface(state_dict, config).items()
    }
    written_type = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
        config[key] = written_type
    destination.mkdir(parents=True, exist_ok=True)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED:
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, destination / name)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        files = [path / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(f"{path}: {len(missing)} of {len(files)} shards are missing: {_some(missing)}")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    others = sorted(
        file.name for file in path.glob("*") if file.suffix in (".safetensors", ".bin", ".pth", ".pt")
    )
    there = f"; it has {_some(others)}" if others else ""
    raise WeightsError(f"{path}: no model.safetensors and no model.safetensors.index.json{there}")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file}: truncated, damaged or no safetensors file ({error}); fetch it again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: holds {type(content).__name__}, not an object")
    return content


def _read_config(path: Path) -> dict[str, Any] | None:
    """config.json of a Hugging Face model; None where there is none, or only another library's."""
    file = path / "config.json"
    if not file.is_file():
        return None
    config = _read_json(file)
    return config if "model_type" in config or "architectures" in config else None


def _architecture_problem(config: dict[str, Any]) -> str | None:
    names = config.get("architectures") or [config.get("model_type")]
    if any(name in SUPPORTED_ARCHITECTURES for name in names) or config.get("model_type") == "llama":
        return None
    return f"architecture {names[0]} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"


def _missing_keys(config: dict[str, Any]) -> str | None:
    missing = [key for key in ("hidden_size", "num_attention_heads") if not isinstance(config.get(key), int)]
    return f"config.json lacks {', '.join(missing)}" if missing else None


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


def _llama_sources(
    model: nn.Module, targets: dict[str, Tensor], checkpoint: Checkpoint, config: dict[str, Any]
) -> dict[str, str]:
    """The checkpoint's name for each name of the model."""
    from torchtune.modules import TransformerDecoder

    problem = _architecture_problem(config) or _missing_keys(config)
    if problem is None and not isinstance(model, TransformerDecoder):
        problem = f"a Llama checkpoint fits torchtune's decoders, and the model is a {type(model).__name__}"
    if problem:
        raise WeightsError(f"{checkpoint.path}: {problem}")
    tied = config.get("tie_word_embeddings", False)
    sources = {}
    for name in checkpoint.files:
        if not (_RECOMPUTED.search(name) or (tied and name == _TO_HUGGINGFACE[_OUTPUT])):
            sources[_renamed(name, _FROM_HUGGINGFACE)] = name
    if tied and _OUTPUT in targets:
        sources[_OUTPUT] = sources.get(_EMBEDDING, _TO_HUGGINGFACE[_EMBEDDING])
    if not tied and _OUTPUT in sources and _OUTPUT not in targets:
        raise WeightsError(
            f"{checkpoint.path}: has its own output layer (lm_head.weight), and the model ties its output to "
            "the embedding; set model.args.tie_word_embeddings = false, or use a builder that does not tie"
        )
    return sources


def _check_architecture(model: Any, path: Path, config: dict[str, Any]) -> None:
    """Compare with config.json what shapes do not show: heads, norms and rotary frequencies."""
    from torchtune.models.llama3_1 import Llama3ScaledRoPE
    from torchtune.modules import MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings

    attention = next(module for module in model.modules() if isinstance(module, MultiHeadAttention))
    norm, rotary = model.norm, attention.pos_embeddings
    if type(rotary) not in (RotaryPositionalEmbeddings, Llama3ScaledRoPE) or type(norm) is not RMSNorm:
        raise WeightsError(
            f"{path}: a Llama checkpoint; the model has {type(norm).__name__} and {type(rotary).__name__}; "
            "use a Llama or Mistral builder"
        )
    heads = config["num_attention_heads"]
    pairs = {
        "num_attention_heads": (heads, attention.num_heads),
        "num_key_value_heads": (config.get("num_key_value_heads") or heads, attention.num_kv_heads),
        "head_dim": (_head_dim(config), attention.head_dim),
        "rms_norm_eps": (config.get("rms_norm_eps", 1e-6), norm.eps),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
    }
    wrong = [f"{key} {theirs}, model {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]
    if not wrong:
        theta, frequencies = rotary.theta.float().cpu(), _rotary_frequencies(path, config)
        if not torch.allclose(theta[: len(frequencies)], frequencies, rtol=1e-4):  # float32 powers
            wrong.append(
                f"rope_theta or rope scaling: lowest frequency {frequencies[-1]:.4g}, model {theta[-1]:.4g} "
                "(builder arguments rope_base and scale_factor)"
            )
    if wrong:
        raise WeightsError(f"{path}: config.json differs from the model: {'; '.join(wrong)}")


def _rotary_frequencies(path: Path, config: dict[str, Any]) -> Tensor:
    """Rotary frequencies of config.json, [head_dim // 2]: plain ones, or Llama 3.1's scaled ones."""
    # transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)} | (config.get("rope_scaling") or {})
    rope |= config.get("rope_parameters") or {}
    head_dim = _head_dim(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
    elif kind != "default":
        raise WeightsError(
            f"{path}: rotary embeddings of type {kind!r} are not supported; use default or llama3"
        )
    return frequencies.float()


def _check_fit(
    model: nn.Module, targets: dict[str, Tensor], checkpoint: Checkpoint, sources: dict[str, str]
) -> None:
    """Compare names and shapes before anything is copied."""
    optional = _adapter_names(model)
    missing = [name for name in targets if name not in sources and name not in optional]
    unexpected = [source for name, source in sources.items() if name not in targets]
    wrong = []
    for name in targets:
        source = sources.get(name)
        if source is None:
            continue
        if source not in checkpoint.shapes:
            missing.append(name)
        elif checkpoint.shapes[source] != tuple(targets[name].shape):
            found, expected = list(checkpoint.shapes[source]), list(targets[name].shape)
            wrong.append(f"{source}: found {found}, expected {expected} ({name})")
    parts = []
    if wrong:
        parts.append(f"{len(wrong)} of another shape: {_some(wrong)}")
    if missing:
        parts.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    if parts:
        raise WeightsError(
            f"{checkpoint.path}: of {len(checkpoint.files)} tensors for {len(targets)} places in the model: "
            f"{'; '.join(parts)}"
        )


def _adapter_names(model: nn.Module) -> set[str]:
    """Parameters that pretrained weights need not hold."""
    return {
        f"{fqn}.{name}".removeprefix(".")
        for fqn, module in model.named_modules()
        if hasattr(module, "adapter_params")
        for name in module.adapter_params()
    }


@torch.no_grad()
def _copy(targets: dict[str, Tensor], checkpoint: Checkpoint, sources: dict[str, str], head_dim: int) -> None:
    """Copy tensor by tensor; a name unlike its source's shows that the source is Hugging Face's."""
    places: dict[str, list[str]] = {}
    for name, source in sources.items():
        if name in targets:
            places.setdefault(source, []).append(name)
    for source, tensor in checkpoint.read(list(places)):
        for name in places[source]:
            reorder = source != name and _ROTATED.search(name)
            targets[name].copy_(_pairs_together(tensor, head_dim) if reorder else tensor)


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _pairs_together(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, [N, K], from Hugging Face's order to torchtune's.

    Row j of the first half of a head and row j of its second half are rotated together; here they become
    neighbors.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def _pairs_apart(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `_pairs_together`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{}.", name)


def _renamed(name: str, table: dict[str, str]) -> str:
    """The name in the other format; one that has none stays, and is reported as unexpected."""
    layer = re.search(r"\.(\d+)\.", name)
    return table.get(_pattern(name), name).format(layer[1] if layer else "")


def _some(names: list[str]) -> str:
    """The first few of a list, in words."""
    more = f", ... ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
