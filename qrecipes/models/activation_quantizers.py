"""Quantizers of activations put into a model, and taken out of it again.

They are hooks: no module is replaced, so names in state dicts stay, layers may be of any kind, and
compilation, recomputation and sharding of blocks see ordinary modules. Replacing a layer afterwards loses
what was on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.models.activation_points import Point, activation_points, check_keys
from qrecipes.quant.activations import MAX_BITS, MIN_BITS, ZeroPoint, fake_quantize
from qrecipes.quant.input_linear import QuantInputLinear
from qrecipes.quant.primitives import sqnr_db

Preset = Literal["a8", "a8kv4", "a4"]
PRESETS: dict[str, dict[str, int]] = {
    "a8": dict.fromkeys(("na", "k", "v", "qe", "ke", "ao", "nm", "mm"), 8),
    "a8kv4": dict.fromkeys(("na", "qe", "ke", "ao", "nm", "mm"), 8) | {"k": 4, "v": 4},
    "a4": dict.fromkeys(("na", "k", "v", "qe", "ke", "ao", "nm", "mm"), 4),
}
"""LR-QAT's: bits of each activation."""

SPLITS_HEADS = ("q", "k", "v", "ao")
"""Activations that can have a grid a head, or one over all heads; qe and ke always have one a head."""


@dataclass(frozen=True, kw_only=True)
class ActivationScheme:
    """Which activations are quantized, and on what grids. Every token has its own."""

    pattern: Mapping[str, int]
    """Bits of each activation, by its name."""
    symmetric: bool = False
    zero_point: ZeroPoint = "integer"
    """Of asymmetric grids."""
    per_head: tuple[str, ...] = ("k", "v")
    """Activations of which each head of a token has a grid of its own."""

    def __post_init__(self) -> None:
        if not self.pattern:
            raise ConfigError("pattern: names no activation; give at least one, as {na = 8}")
        check_keys(self.pattern)
        for key, bits in self.pattern.items():
            if not MIN_BITS <= bits <= MAX_BITS:
                raise ConfigError(
                    f"pattern.{key}: {bits} bits are out of range; use {MIN_BITS} to {MAX_BITS}"
                )
        for key in self.per_head:
            if key not in SPLITS_HEADS:
                raise ConfigError(
                    f"per_head: {key!r} holds no heads side by side; use some of {', '.join(SPLITS_HEADS)}"
                )


def bits_of(pattern: str | Mapping[str, int], *, norm_outputs: bool = True) -> dict[str, int]:
    """Bits by activation of a preset's name or a pattern; `norm_outputs` false takes na and nm out of a
    preset.

    The inputs of query, key, value, gate and up projections are then not quantized, as in the W4A8 and W4A4
    runs of LR-QAT's README.

    Raises:
        ConfigError: if there is no such preset, or `norm_outputs` is false and a pattern names na or nm.
    """
    if isinstance(pattern, str):
        if pattern not in PRESETS:
            raise ConfigError(
                f"pattern: no preset is called {pattern!r}; use {', '.join(PRESETS)}, or a table"
            )
        return {k: bits for k, bits in PRESETS[pattern].items() if norm_outputs or k not in ("na", "nm")}
    contrary = [key for key in ("na", "nm") if key in pattern]
    if contrary and not norm_outputs:
        raise ConfigError(
            f"norm_outputs: false, but the pattern quantizes {' and '.join(contrary)}, the outputs of norms; "
            "leave one of them out"
        )
    return dict(pattern)


def pattern_of(text: str) -> str | dict[str, int]:
    """The preset or pattern that a command line names, as in `a8kv4` and `na=8,k=4`; `bits_of` and
    `ActivationScheme` check it.

    Raises:
        ConfigError: if it has an equals sign, and is no list of names with whole numbers.
    """
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(bits.strip().isdecimal() for _, _, bits in pairs):
        raise ConfigError(f"activations: {text!r} is no pattern; write one as na=8,k=4")
    return {key.strip(): int(bits) for key, _, bits in pairs}


class ActivationQuantizer:
    """What is done to the tensor at one point of a model."""

    enabled: bool = True
    """False while something else quantizes that tensor, as a low-bit cache does."""

    def __init__(self, point: Point, scheme: ActivationScheme) -> None:
        self.name, self.key, self.place, self.part = point.name, point.key, point.place, point.part
        self.num_heads = point.num_heads if point.key in scheme.per_head else 0
        self.bits = scheme.pattern[point.key]
        self.symmetric, self.zero_point = scheme.symmetric, scheme.zero_point
        self.seen: list[float] | None = None
        """Where it is a list, the SQNR of each tensor in dB is added to it."""

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor on its grid, [..., D] of any leading dimensions."""
        if not self.enabled:
            return x
        if self.part is None:
            found = self._quantized(x)
        else:
            thirds = list(x.chunk(3, dim=-1))
            thirds[self.part] = self._quantized(thirds[self.part])
            found = torch.cat(thirds, dim=-1)
        if self.seen is not None:
            self.seen.append(sqnr_db(x, found))
        return found

    def _quantized(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, -1)) if self.num_heads else x
        found = fake_quantize(heads, self.bits, symmetric=self.symmetric, zero_point=self.zero_point)
        return found.flatten(-2) if self.num_heads else found


class _OnInput(ActivationQuantizer):
    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(args[0]), *args[1:])


class _OnOutput(ActivationQuantizer):
    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self(output)


class _AttentionCall:
    """An attention module's `_attention_call`, with quantizers of its queries and keys before it."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call = call
        self.query: ActivationQuantizer | None = None
        self.key: ActivationQuantizer | None = None

    def __call__(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query = query if self.query is None else self.query(query)
        key = key if self.key is None else self.key(key)
        return self.call(query, key, *args, **kwargs)


def insert_activation_quantizers(
    model: nn.Module, scheme: ActivationScheme, left_alone: Callable[[str], bool] = lambda fqn: False
) -> nn.Module:
    """Quantize activations of `model` from now on, in place; `remove_activation_quantizers` undoes it.

    Modules and blocks of which `left_alone(fully qualified name)` is true stay as they are.

    Raises:
        ConfigError: if a block lacks a point of the pattern, or one is quantized already, by a quantizer or
            by the layer that it is the input of (one whose `input_format` is not None); nothing is changed.
    """
    points = activation_points(model, scheme.pattern, left_alone)
    present = {quantizer.name for _, quantizer in _quantizers(model)}
    for point in points:
        if point.name in present:
            raise ConfigError(
                f"{point.name}: is quantized already; leave {point.key} out of one of the patterns"
            )
        for fqn in point.feeds:
            if getattr(model.get_submodule(fqn), "input_format", None) is not None:
                raise ConfigError(
                    f"{point.name}: {fqn} quantizes its input itself, and twice is not as once; leave "
                    f"{point.key} out of the pattern"
                )
    for point in points:
        _insert(point, scheme)
    return model


def quantize_activations(
    model: nn.Module,
    pattern: str | Mapping[str, int],
    *,
    norm_outputs: bool = True,
    symmetric: bool = False,
    zero_point: ZeroPoint = "integer",
    per_head: tuple[str, ...] = ("k", "v"),
) -> nn.Module:
    """Quantize the activations of a whole model, in place, to a preset ("a8", "a8kv4", "a4") or a pattern
    ({"na": 8, "k": 4}).

    Raises:
        ConfigError: as `bits_of`, `ActivationScheme` and `insert_activation_quantizers`.
    """
    scheme = ActivationScheme(
        pattern=bits_of(pattern, norm_outputs=norm_outputs),
        symmetric=symmetric,
        zero_point=zero_point,
        per_head=per_head,
    )
    return insert_activation_quantizers(model, scheme)


def remove_activation_quantizers(model: nn.Module, keys: Collection[str] | None = None) -> nn.Module:
    """Leave no quantizer of the activations called `keys`, or of any, in `model`, in place."""

    def goes(quantizer: Any) -> bool:
        return isinstance(quantizer, ActivationQuantizer) and (keys is None or quantizer.key in keys)

    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle, hook in list(hooks.items()):
                if goes(getattr(hook, "__self__", None)):
                    del hooks[handle]
        call = vars(module).get("_attention_call")
        if isinstance(call, _AttentionCall):
            call.query = None if goes(call.query) else call.query
            call.key = None if goes(call.key) else call.key
            if call.query is None and call.key is None:
                module._attention_call = call.call  # type: ignore[assignment]
    return model


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every quantizer of a model's activations, by the name of its tensor."""
    return {quantizer.name: quantizer for _, quantizer in _quantizers(model)}


def quantized_computation(model: nn.Module) -> str | None:
    """What of a model computes on quantized activations, in words; None where nothing does."""
    inputs = sum(isinstance(module, QuantInputLinear) for module in model.modules())
    keys = sorted({quantizer.key for _, quantizer in _quantizers(model)})
    found = []
    if inputs:
        found.append(f"the inputs of {inputs} layers")
    if keys:
        found.append(", ".join(keys))
    return " and ".join(found) or None


def quantized_modules(model: nn.Module, keys: Collection[str]) -> dict[str, nn.Module]:
    """The modules that give or take a quantized activation called one of `keys`, by the activation's name."""
    return {quantizer.name: module for module, quantizer in _quantizers(model) if quantizer.key in keys}


def quantizers_of(module: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers on one module itself, by the activation's key."""
    return {quantizer.key: quantizer for quantizer in _on(module)}


@contextmanager
def suspended(*quantizers: ActivationQuantizer | None) -> Iterator[None]:
    """Within, the quantizers do nothing."""
    found = [quantizer for quantizer in quantizers if quantizer is not None]
    before = [quantizer.enabled for quantizer in found]
    for quantizer in found:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, enabled in zip(found, before, strict=True):
            quantizer.enabled = enabled


def measured(model: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """SQNR of each quantized activation in dB, the least over its calls, while `run()` uses the model; those
    that were not computed are absent."""
    found = activation_quantizers(model)
    for quantizer in found.values():
        quantizer.seen = []
    try:
        run()
        return {name: min(quantizer.seen) for name, quantizer in found.items() if quantizer.seen}
    finally:
        for quantizer in found.values():
            quantizer.seen = None


def _insert(point: Point, scheme: ActivationScheme) -> None:
    if point.place == "input":
        point.module.register_forward_pre_hook(_OnInput(point, scheme).hook)
    elif point.place == "output":
        point.module.register_forward_hook(_OnOutput(point, scheme).hook)
    else:
        module: Any = point.module
        if not isinstance(module._attention_call, _AttentionCall):
            module._attention_call = _AttentionCall(module._attention_call)
        setattr(module._attention_call, point.place, ActivationQuantizer(point, scheme))


def _quantizers(model: nn.Module) -> Iterator[tuple[nn.Module, ActivationQuantizer]]:
    return ((module, quantizer) for module in model.modules() for quantizer in _on(module))


def _on(module: nn.Module) -> Iterator[ActivationQuantizer]:
    for hook in [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]:
        quantizer = getattr(hook, "__self__", None)
        if isinstance(quantizer, ActivationQuantizer):
            yield quantizer
    call = vars(module).get("_attention_call")
    if isinstance(call, _AttentionCall):
        yield from (quantizer for quantizer in (call.query, call.key) if quantizer is not None)
