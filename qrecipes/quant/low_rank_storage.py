"""What a weight with a low-rank correction inside its rounding is made of, and how its frozen part is kept.

N output features (rows), K input features, G groups of a row, R rank; formulas in `low_rank_rounding.py`.
"""

from __future__ import annotations

import ast
import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from qrecipes.quant.affine import AffineGrid, _arithmetic, _divisor
from qrecipes.quant.formats import nearest_group_size
from qrecipes.quant.packing import pack, packed_width, signed_range, unpack

Storage: TypeAlias = Literal["fixed_point8", "int4", "bf16", "fp16", "fp32"]
"""How phi is kept: Q b.(8-b), an int8 of `bits` integer and 8 - `bits` fractional bits; integers, two to a
byte; or cast to a floating type."""
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOST_BITS = {"fixed_point8": 7, "int4": 4} | dict.fromkeys(FLOATS, 8)
"""Greatest bits of each storage; the least are 2."""


@dataclass(frozen=True, kw_only=True)
class LowRankRounding:
    """What is fixed about a weight: all but its tensors."""

    bits: int
    """2 to 8."""
    in_features: int
    group_size: int | None = None
    """Inputs of a row that share a scale, a multiple of 8 that divides them; None: the whole row."""
    storage: Storage = "fixed_point8"
    scaling: float = 1.0
    """Factor of A B: alpha / rank."""
    key: str = field(init=False, repr=False, compare=False, default="")
    """This rounding as one string, as formats have it."""

    def __post_init__(self) -> None:
        where = "LowRankRounding"
        if self.storage not in get_args(Storage):
            raise ValueError(f"{where}.storage: {self.storage!r}; use one of {', '.join(get_args(Storage))}")
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"{where}.bits: {self.bits!r}; use 2 to 8")
        if self.bits > MOST_BITS[self.storage]:
            raise ValueError(
                f"{where}.bits: {self.bits}, but storage {self.storage!r} takes 2 to "
                f"{MOST_BITS[self.storage]}; "
                f"use {'fixed_point8, ' if self.bits < 8 else ''}bf16, fp16 or fp32, or fewer bits"
            )
        if self.in_features < 1:
            raise ValueError(f"{where}.in_features: {self.in_features}; a weight has at least one")
        size = self.group_size
        if size is not None and (
            not isinstance(size, int) or size < 8 or size % 8 or self.in_features % size
        ):
            nearest = nearest_group_size(self.in_features, size) if isinstance(size, int) else None
            raise ValueError(
                f"{where}.group_size: {size!r} is no multiple of 8 that divides {self.in_features} input "
                f"features; use {nearest or 'None (one scale a row)'}"
            )
        if not math.isfinite(self.scaling):
            raise ValueError(f"{where}.scaling: {self.scaling}; alpha / rank is a finite number")
        fixed = {name: value for name, value in asdict(self).items() if name != "key"}
        object.__setattr__(self, "key", repr(fixed))

    @property
    def levels(self) -> tuple[int, int]:
        """Least and greatest Q."""
        return signed_range(self.bits)

    @property
    def num_groups(self) -> int:
        """Groups of a row."""
        return 1 if self.group_size is None else self.in_features // self.group_size

    def phi_spec(self, out_features: int) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and type of phi: [N, K], but [N, ceil(K / 2)] bytes of int4."""
        if self.storage == "int4":
            return (out_features, packed_width(self.in_features, 4)), torch.uint8
        dtype = torch.int8 if self.storage == "fixed_point8" else FLOATS[self.storage]
        return (out_features, self.in_features), dtype


@lru_cache(maxsize=4096)
def rounding_of_key(key: str) -> LowRankRounding:
    """The rounding whose `key` this is."""
    return LowRankRounding(**ast.literal_eval(key))


def encode(levels_NK: Tensor, rounding: LowRankRounding) -> Tensor:
    """phi of W / s0, or of W / s0 + rnd(z0): exact levels [N, K], floating.

    In fixed point and as integers they are clipped to the grid and rounded half to even. Rounding what is
    decoded then rounds twice: in fixed point one weight of 2**(8-bits) becomes an exact half, and half of
    these go to the other side. Floating storage is only cast. What is not a number becomes 0, but stays in
    floats.

    Raises:
        ValueError: if `levels_NK` is not a floating matrix of `in_features` columns.
    """
    if levels_NK.ndim != 2 or levels_NK.shape[1] != rounding.in_features or not levels_NK.is_floating_point():
        raise ValueError(
            f"encode.levels_NK: {levels_NK.dtype} of shape {tuple(levels_NK.shape)}, where a floating matrix "
            f"of {rounding.in_features} columns is needed; divide the weight by its scales first"
        )
    if rounding.storage in FLOATS:
        return levels_NK.to(FLOATS[rounding.storage]).contiguous()
    clipped = torch.where(levels_NK.isnan(), 0.0, levels_NK).clamp(*rounding.levels)
    if rounding.storage == "int4":
        return pack(torch.round(clipped).to(torch.int8), 4)
    return torch.round(clipped * _fixed_point_one(rounding)).to(torch.int8).contiguous()


def encode_weight(w_NK: Tensor, grid: AffineGrid, rounding: LowRankRounding) -> Tensor:
    """phi of a weight on a symmetric grid, or one with integer zeros, as the functions of `ranges` give.

    Divided in float32, or float64 of a float64 weight. Groups of scale 0 are not divided.

    Raises:
        ValueError: if the grid has offsets, or other groups than the rounding.
    """
    if grid.offset is not None:
        raise ValueError(
            "encode_weight.grid: has float offsets, which move W and not its levels; use zero_point='integer'"
        )
    if tuple(grid.scale.shape) != (w_NK.shape[0], rounding.num_groups):
        raise ValueError(
            f"encode_weight.grid: scales of shape {tuple(grid.scale.shape)}; {w_NK.shape[0]} rows have "
            f"{rounding.num_groups} groups each of group_size {rounding.group_size}"
        )
    w_NGS = grouped(w_NK.to(_arithmetic(w_NK, grid.scale)), rounding)
    levels_NGS = w_NGS / _divisor(grid.scale.to(w_NGS.dtype)).unsqueeze(-1)
    if grid.zero is not None:
        levels_NGS = levels_NGS + grid.zero.to(w_NGS.dtype).unsqueeze(-1)
    return encode(levels_NGS.reshape(w_NK.shape), rounding)


def decode(phi: Tensor, rounding: LowRankRounding) -> Tensor:
    """The levels [N, K] that phi stands for, exact in float32."""
    if rounding.storage == "int4":
        return unpack(phi, 4, rounding.in_features).float()
    if rounding.storage == "fixed_point8":
        return phi.float() / _fixed_point_one(rounding)
    return phi.float()


def integer_zeros(zero_NG: Tensor, rounding: LowRankRounding) -> Tensor:
    """Zero points as they are used: rounded half to even and clipped to the levels, still floating.

    As int8 they are the `zero` of an `AffineGrid`.
    """
    return torch.round(zero_NG).clamp(*rounding.levels)


def check_parts(
    where: str,
    phi: Tensor,
    a_NR: Tensor | None,
    b_RK: Tensor | None,
    scale_NG: Tensor | None,
    zero_NG: Tensor | None,
    rounding: LowRankRounding,
) -> None:
    """Raise ValueError, naming `where`, if the tensors are not those of one weight. Reads none."""
    N, K = phi.shape[0], rounding.in_features
    shape, dtype = rounding.phi_spec(N)
    if phi.dtype is not dtype or tuple(phi.shape) != shape:
        raise ValueError(
            f"{where}.phi: {phi.dtype} of shape {tuple(phi.shape)}; {rounding} of {N} rows keeps {dtype} of "
            f"shape {shape}; use encode"
        )
    if (a_NR is None) != (b_RK is None):
        raise ValueError(f"{where}.a_NR: A and B come together; give both, or None for both at rank 0")
    if a_NR is not None and b_RK is not None:
        R = a_NR.shape[1]
        if a_NR.shape[0] != N or tuple(b_RK.shape) != (R, K) or a_NR.dtype is not b_RK.dtype or R == 0:
            raise ValueError(
                f"{where}.a_NR: A is {a_NR.dtype} of shape {tuple(a_NR.shape)} and B {b_RK.dtype} of shape "
                f"{tuple(b_RK.shape)}; give {N} x rank and rank x {K} of one type, or None for both at rank 0"
            )
    for name, t in (("scale_NG", scale_NG), ("zero_NG", zero_NG)):
        if t is not None and (tuple(t.shape) != (N, rounding.num_groups) or not t.is_floating_point()):
            raise ValueError(
                f"{where}.{name}: {t.dtype} of shape {tuple(t.shape)}; give one floating number for each "
                f"of the {rounding.num_groups} groups of {N} rows"
            )


def grouped(matrix_NK: Tensor, rounding: LowRankRounding) -> Tensor:
    """A matrix [N, K] as [N, G, K // G]."""
    return matrix_NK.unflatten(1, (rounding.num_groups, rounding.in_features // rounding.num_groups))


def _fixed_point_one(rounding: LowRankRounding) -> int:
    return 2 ** (8 - rounding.bits)
