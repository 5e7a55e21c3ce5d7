"""Where the tensors between a model's layers can be taken hold of, by LR-QAT's names (arXiv 2406.06385).

    na  output of the norm before attention     nm  output of the norm before the feed-forward layer
    q k v  outputs of these projections         qe ke  queries and keys as attention multiplies them
    ao  input of attention's output projection  o  its output
    g u  outputs of gate and up projection      mm  input of the down projection     d  its output

`g` is taken before the activation function. `qe` and `ke` come after rotation and norm, where there are any.
In a timm block without a gate, `u` is the output of fc1, and `mm` the input of fc2.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from qrecipes.errors import ConfigError
from qrecipes.models.view import block_sites

KEYS = ("na", "q", "k", "v", "qe", "ke", "ao", "o", "nm", "g", "u", "mm", "d")
"""Names of the points, in the order in which a block computes them."""

INSIDE_ATTENTION = ("aw", "ap")
"""LR-QAT's names for attention's scores and probabilities, which fused attention never shows."""

Place = Literal["input", "output", "query", "key"]


@dataclass(frozen=True)
class Point:
    """A tensor of one block."""

    key: str
    fqn: str
    """Fully qualified name of `module`."""
    module: nn.Module
    place: Place
    """What of the module: its input or output, or the queries or keys that it gives its `_attention_call`."""
    num_heads: int = 0
    """Heads that lie side by side in the last dimension; 0 where it is one head or has none."""
    part: int | None = None
    """Which third of the last dimension, of a projection to queries, keys and values at once."""
    feeds: tuple[str, ...] = ()
    """Fully qualified names of the linear layers that the tensor is the input of."""

    @property
    def name(self) -> str:
        """Name of the tensor: the module's, and the key."""
        return f"{self.fqn}:{self.key}"


def activation_points(
    model: nn.Module, keys: Collection[str], left_alone: Callable[[str], bool] = lambda fqn: False
) -> list[Point]:
    """The points called `keys` of every block of torchtune's decoders and timm's vision transformers.

    Modules of which `left_alone(fully qualified name)` is true have none.

    Raises:
        ConfigError: if a key is unknown, or a block has no such point: its attention is computed where
            nothing can take hold of it, or it is built in another way. The message names the module.
    """
    check_keys(keys)
    names = {module: fqn for fqn, module in model.named_modules()}
    found = []
    for site in block_sites(model):
        for key in KEYS:
            if key not in keys:
                continue
            try:
                point = _point(key, names[site.block], site.block)
            except _MissingError as error:
                if left_alone(error.fqn):
                    continue
                raise
            if not left_alone(point.fqn):
                found.append(point)
    return found


def check_keys(keys: Collection[str], where: str = "pattern") -> None:
    """Raise ConfigError where a key is of no point."""
    for key in keys:
        if key in INSIDE_ATTENTION:
            raise ConfigError(
                f"{where}.{key}: attention's scores and probabilities exist only inside its kernel, so they "
                "cannot be quantized; use qe, ke and v, which it multiplies"
            )
        if key not in KEYS:
            raise ConfigError(f"{where}.{key}: no activation has this name; use {', '.join(KEYS)}")


class _MissingError(ConfigError):
    """A module does not have a point."""

    def __init__(self, fqn: str, text: str) -> None:
        super().__init__(f"{fqn}: {text}, or add {fqn!r} to skip")
        self.fqn = fqn


def _point(key: str, fqn: str, block: Any) -> Point:
    """The point `key` of a block; raises _MissingError where there is none."""
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if key in ("na", "nm"):
        return _norm(key, fqn, block)
    if key in ("g", "u", "mm", "d"):
        return _of_mlp(key, f"{fqn}.mlp", block, mlp)
    if all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "output_proj")):
        return _of_attention(key, f"{fqn}.attn", attention)
    if all(hasattr(attention, name) for name in ("qkv", "proj", "num_heads")):
        return _of_fused_attention(key, f"{fqn}.attn", attention)
    raise _missing(key, fqn if attention is None else f"{fqn}.attn", attention or block)


def _norm(key: str, fqn: str, block: nn.Module) -> Point:
    first = key == "na"
    if hasattr(block, "sa_norm") and hasattr(block, "mlp_norm"):
        name, inner = ("sa_norm", "attn") if first else ("mlp_norm", "mlp")
    elif _is_timm_block(block):
        name, inner = ("norm1", "attn") if first else ("norm2", "mlp")
    else:
        raise _missing(key, fqn, block)
    layers = ("q_proj", "k_proj", "v_proj", "qkv", "w1", "w3", "fc1")
    feeds = (f"{fqn}.{inner}.{layer}" for layer in layers if getattr(getattr(block, inner), layer, None))
    return Point(key, f"{fqn}.{name}", getattr(block, name), "output", feeds=tuple(feeds))


def _is_timm_block(block: nn.Module) -> bool:
    """Whether it is timm's block that norms before its layers: others call `norm1` what comes after them."""
    timm = sys.modules.get("timm.models.vision_transformer")
    return timm is not None and isinstance(block, timm.Block)


def _of_mlp(key: str, fqn: str, block: nn.Module, mlp: Any) -> Point:
    place: Place = "input" if key == "mm" else "output"
    gated = {"g": "w1", "u": "w3", "mm": "w2", "d": "w2"}
    plain = {"u": "fc1", "mm": "fc2", "d": "fc2"}
    names = gated if hasattr(mlp, "w1") else plain if hasattr(mlp, "fc1") else {}
    layer = getattr(mlp, names.get(key, ""), None)
    if layer is None:
        raise _missing(key, fqn, block if mlp is None else mlp)
    name = f"{fqn}.{names[key]}"
    return Point(key, name, layer, place, feeds=(name,) if place == "input" else ())


def _of_attention(key: str, fqn: str, attention: Any) -> Point:
    """A point of torchtune's attention, which hands rotated queries and keys to its `_attention_call`."""
    if key in ("qe", "ke"):
        if not _calls(attention, "_attention_call"):
            raise _no_hook(key, fqn, attention, "_attention_call")
        return Point(key, fqn, attention, "query" if key == "qe" else "key")
    name = {"ao": "output_proj", "o": "output_proj"}.get(key, f"{key}_proj")
    heads = {"q": attention.num_heads, "ao": attention.num_heads, "o": 0}.get(key, attention.num_kv_heads)
    if key == "ao":
        fed = f"{fqn}.{name}"
        return Point(key, fed, attention.output_proj, "input", heads, feeds=(fed,))
    return Point(key, f"{fqn}.{name}", getattr(attention, name), "output", heads)


def _of_fused_attention(key: str, fqn: str, attention: Any) -> Point:
    """A point of timm's attention: one projection gives queries, keys and values, one after the other."""
    if key in ("qe", "ke"):
        name = "q_norm" if key == "qe" else "k_norm"
        if not isinstance(getattr(attention, name, None), nn.Module) or not _calls(attention, name):
            raise _no_hook(key, fqn, attention, name)
        return Point(key, f"{fqn}.{name}", getattr(attention, name), "output")
    if key == "o":
        return Point(key, f"{fqn}.proj", attention.proj, "output")
    if key == "ao":
        fed = f"{fqn}.proj"
        return Point(key, fed, attention.proj, "input", attention.num_heads, feeds=(fed,))
    if getattr(attention.qkv, "out_features", 1) % (3 * attention.num_heads):
        raise _missing(key, f"{fqn}.qkv", attention.qkv)
    return Point(key, f"{fqn}.qkv", attention.qkv, "output", attention.num_heads, "qkv".index(key))


def _calls(module: nn.Module, name: str) -> bool:
    """Whether the code of a module's class uses its attribute `name`."""
    return name in inspect.unwrap(type(module).forward).__code__.co_names


def _no_hook(key: str, fqn: str, attention: nn.Module, name: str) -> _MissingError:
    return _MissingError(
        fqn,
        f"{type(attention).__name__} has no hook for {key}: it multiplies queries and keys without a "
        f"{name} that could be taken hold of; leave {key} out of the pattern",
    )


def _missing(key: str, fqn: str, module: nn.Module) -> _MissingError:
    return _MissingError(
        fqn,
        f"{type(module).__name__} has no {key} to quantize: it is built neither like torchtune's decoder "
        f"layers nor like timm's blocks, or lacks that part; leave {key} out of the pattern",
    )
