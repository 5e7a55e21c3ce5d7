"""How a low-bit weight is stored: small frozen descriptions that go to JSON and back.

N output features (rows), K input features, G groups of a row. A format gives the name, shape and type of each
tensor that a weight of N x K becomes, its payload. Payloads are tuples in the order of `payload_spec`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from qrecipes.quant.packing import BITS, packed_width

Payload: TypeAlias = tuple[Tensor, ...]
"""The tensors of a low-bit weight, in the order of its format's `payload_spec`."""
PayloadSpec: TypeAlias = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor of a payload, by name."""
FloatName: TypeAlias = Literal["float32", "bfloat16", "float64"]

LEAST_GROUP, GREATEST_GROUP, GROUP_STEP = 16, 256, 8
"""Group sizes: a multiple of 8 fills whole bytes at every width, so that no two groups share a byte."""
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class AffineFormat:
    """Signed integers q of `bits` bits and a grid for each group of `group_size` inputs of a row.

    q lies in -2**(bits - 1) to 2**(bits - 1) - 1, the lowest level included, also where symmetric:

    | symmetric | zero_point | weight        | beside the packed q                        |
    |-----------|------------|---------------|--------------------------------------------|
    | true      | -          | s * q         | scale [N, G]                               |
    | false     | "integer"  | s * (q - z)   | scale [N, G], zero int8 [N, G], in units of q |
    | false     | "float"    | s * q + b     | scale [N, G], offset [N, G], in units of W |

    Because q is centred on 0, b is near the middle of the group's range, where it is best conditioned: it is
    convention (C) of W = s * (u - 2**(bits - 1)) + b over unsigned u.
    """

    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: int | None = None
    """Inputs of a row that share a scale, a multiple of 8 from 16 to 256 that divides K; None: the whole
    row, of any length."""
    symmetric: bool = True
    """No zero point."""
    zero_point: Literal["integer", "float"] = "integer"
    """What an asymmetric format has."""
    scale_dtype: FloatName = "float32"
    """Type of the scales. float64 is for checks of arithmetic."""
    offset_dtype: FloatName = "float32"
    """Type of the offsets of a float zero point. bfloat16 loses what a merged adapter adds."""
    key: str = field(init=False, repr=False, compare=False, default="")
    """This format as one string, which operators take; without double quotes, as Inductor's C++ wrapper puts
    it between such."""

    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        where = "AffineFormat"
        if self.bits not in BITS:
            raise ValueError(f"{where}.bits: {self.bits!r}; use one of {', '.join(map(str, BITS))}")
        size = self.group_size
        if size is not None and (
            not LEAST_GROUP <= size <= GREATEST_GROUP or size % GROUP_STEP or not isinstance(size, int)
        ):
            wrong = (
                "out of range"
                if isinstance(size, int) and size % GROUP_STEP == 0
                else f"no multiple of {GROUP_STEP}"
            )
            raise ValueError(
                f"{where}.group_size: {size!r} is {wrong}; use a multiple of {GROUP_STEP} from {LEAST_GROUP} "
                f"to {GREATEST_GROUP}, or one scale for the whole row"
            )
        if self.zero_point not in ("integer", "float"):
            raise ValueError(f"{where}.zero_point: {self.zero_point!r}; use 'integer' or 'float'")
        if self.symmetric and self.zero_point == "float":
            raise ValueError(
                f"{where}.zero_point: 'float', but a symmetric format has no zero point; "
                "set symmetric=False, or leave zero_point out"
            )
        for name in ("scale_dtype", "offset_dtype"):
            if getattr(self, name) not in _FLOATS:
                raise ValueError(f"{where}.{name}: {getattr(self, name)!r}; use one of {', '.join(_FLOATS)}")
        object.__setattr__(self, "key", repr(format_to_json(self)))

    @property
    def has_zero(self) -> bool:
        """Whether there is an integer zero point."""
        return not self.symmetric and self.zero_point == "integer"

    @property
    def has_offset(self) -> bool:
        """Whether there is a float zero point."""
        return not self.symmetric and self.zero_point == "float"

    def num_groups(self, in_features: int) -> int:
        """Groups of a row."""
        return 1 if self.group_size is None else in_features // self.group_size

    def check_width(
        self, in_features: int, where: str = "AffineFormat", row: str = "group_size None (one scale a row)"
    ) -> None:
        """Raise ValueError, naming `where`, if the groups do not divide a row. `row` is how the caller spells
        one scale a row, the remedy where no size divides it; empty if it has none."""
        _check_features(in_features, where)
        size = self.group_size
        if size is None or in_features % size == 0:
            return
        nearest = nearest_group_size(in_features, size)
        remedy = f"group_size {nearest}" if nearest else row
        raise ValueError(
            f"{where}: group_size {size} does not divide {in_features} input features; "
            f"{f'use {remedy}, or ' if remedy else ''}leave the layer out"
        )

    def payload_spec(self, out_features: int, in_features: int) -> PayloadSpec:
        """Shape and type of the payload's tensors, by name, in order."""
        grid = (out_features, self.num_groups(in_features))
        spec: PayloadSpec = {
            "packed": ((out_features, packed_width(in_features, self.bits)), torch.uint8),
            "scale": (grid, _FLOATS[self.scale_dtype]),
        }
        if self.has_zero:
            spec["zero"] = (grid, torch.int8)
        if self.has_offset:
            spec["offset"] = (grid, _FLOATS[self.offset_dtype])
        return spec


@dataclass(frozen=True, kw_only=True)
class NF4Format:
    """4-bit NormalFloat of QLoRA (arXiv 2305.14314): 16 levels, times the greatest magnitude of a block.

    A row is cut in blocks of `block_size` inputs, the last one shorter where it does not divide K; every K is
    taken. With `double_quantized`, the [N, G] magnitudes less their mean are INT8, with one float32 scale for
    each `scale_block_size` of them, counted along the rows: 4.127 bits a weight with the paper's sizes, which
    are the defaults.
    """

    block_size: int = 64
    """Inputs of a row that share a magnitude."""
    double_quantized: bool = True
    """Keep the magnitudes in 8 bits."""
    scale_block_size: int = 256
    """Magnitudes that share a float32 scale."""
    key: str = field(init=False, repr=False, compare=False, default="")
    """This format as one string, which operators take; without double quotes, as Inductor's C++ wrapper puts
    it between such."""

    kind: ClassVar[str] = "nf4"
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        size = self.block_size
        if not isinstance(size, int) or not LEAST_GROUP <= size <= GREATEST_GROUP or size % GROUP_STEP:
            raise ValueError(
                f"NF4Format.block_size: {size!r} is no multiple of {GROUP_STEP} from {LEAST_GROUP} to "
                f"{GREATEST_GROUP}; QLoRA's is 64"
            )
        if not isinstance(self.scale_block_size, int) or self.scale_block_size < 1:
            raise ValueError(
                f"NF4Format.scale_block_size: {self.scale_block_size!r} is not positive; QLoRA's is 256"
            )
        object.__setattr__(self, "key", repr(format_to_json(self)))

    def num_groups(self, in_features: int) -> int:
        """Blocks of a row."""
        return -(-in_features // self.block_size)

    def check_width(self, in_features: int, where: str = "NF4Format") -> None:
        """Raise ValueError, naming `where`, if there are no inputs."""
        _check_features(in_features, where)

    def payload_spec(self, out_features: int, in_features: int) -> PayloadSpec:
        """Shape and type of the payload's tensors, by name, in order."""
        G = self.num_groups(in_features)
        packed: tuple[tuple[int, ...], torch.dtype] = (
            (out_features, packed_width(in_features, self.bits)),
            torch.uint8,
        )
        if not self.double_quantized:
            return {"packed": packed, "absmax": ((out_features, G), torch.float32)}
        return {
            "packed": packed,
            "absmax": ((out_features, G), torch.int8),
            "absmax_scale": ((-(-out_features * G // self.scale_block_size),), torch.float32),
            "absmax_mean": ((1,), torch.float32),
        }


WeightFormat: TypeAlias = AffineFormat | NF4Format
_KINDS: dict[str, type[WeightFormat]] = {cls.kind: cls for cls in (AffineFormat, NF4Format)}


def format_to_json(format: WeightFormat) -> dict[str, Any]:
    """The format as a JSON object, with its `kind`."""
    return {"kind": format.kind} | {f.name: getattr(format, f.name) for f in fields(format) if f.init}


def format_from_json(described: Mapping[str, Any]) -> WeightFormat:
    """The format that `format_to_json` described.

    Raises:
        ValueError: if the kind or a key is unknown, or a value is not allowed.
    """
    rest = dict(described)
    kind = rest.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"format.kind: {kind!r}; use one of {', '.join(_KINDS)}")
    known = {f.name for f in fields(_KINDS[kind]) if f.init}
    unknown = sorted(set(rest) - known)
    if unknown:
        raise ValueError(f"format.{unknown[0]}: unknown key of {kind}; known: {', '.join(sorted(known))}")
    return _KINDS[kind](**rest)


@lru_cache(maxsize=256)
def format_of_key(key: str) -> WeightFormat:
    """The format whose `key` this is."""
    return format_from_json(ast.literal_eval(key))


def bits_per_weight(format: WeightFormat, out_features: int, in_features: int) -> float:
    """Bits of the whole payload for each of the N x K weights."""
    spec = format.payload_spec(out_features, in_features)
    stored = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec.values())
    return 8 * stored / (out_features * in_features)


def nearest_group_size(in_features: int, wanted: int) -> int | None:
    """The allowed group size that divides `in_features` and is nearest to `wanted`, the smaller of two; None
    where there is none."""
    sizes = range(LEAST_GROUP, GREATEST_GROUP + 1, GROUP_STEP)
    return min(
        (size for size in sizes if in_features % size == 0), key=lambda s: (abs(s - wanted), s), default=None
    )


def _check_features(in_features: int, where: str) -> None:
    if in_features < 1:
        raise ValueError(f"{where}: {in_features} input features; a quantized layer has at least one")
