"""Integers of 2, 3, 4 and 8 bits packed into bytes along the last dimension, and back, bit for bit.

A row of K values is a little-endian stream of bits: value i takes bits i * bits to (i + 1) * bits, and bit j
of the stream is bit j % 8 of byte j // 8. So the first of two 4-bit values is in the low half of its byte,
eight 3-bit values fill three bytes, and no bit is wasted but in a row's last byte, whose rest is zero. Every
row starts at a byte of its own, so packed tensors are cut and joined along every other dimension.

Signed values below 8 bits are stored as code = value + 2**(bits - 1), so that a byte of zeros holds the
lowest level; at 8 bits as the int8 itself, so that `packed.view(torch.int8)` is the matrix. Unsigned values
are their own codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BITS = (2, 3, 4, 8)
"""Widths that can be packed."""


class _Word(NamedTuple):
    """The fewest values that fill whole bytes."""

    values: int
    num_bytes: int
    dtype: torch.dtype


_WORDS = {
    2: _Word(4, 1, torch.uint8),
    3: _Word(8, 3, torch.int32),
    4: _Word(2, 1, torch.uint8),
}


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of a packed row of `in_features` values."""
    return -(-in_features * bits // 8)


def signed_range(bits: int) -> tuple[int, int]:
    """Least and greatest signed value of `bits` bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def pack(q: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """uint8 [..., ceil(K * bits / 8)] of integers [..., K] of any integer type.

    The values must lie in `signed_range(bits)`, or in 0 to 2**bits - 1 where `signed` is false; this is not
    checked, since that would synchronize.

    Raises:
        ValueError: if `bits` cannot be packed, or `q` is of a floating type.
    """
    _check_bits("pack", bits)
    if q.is_floating_point():
        raise ValueError(f"pack.q: {q.dtype} is not an integer type; round it and convert it to torch.int8")
    if bits == 8:
        return q.to(torch.int8).view(torch.uint8).contiguous() if signed else q.to(torch.uint8).contiguous()
    codes = (q.to(torch.int8) + 2 ** (bits - 1) if signed else q).to(torch.uint8)
    word = _WORDS[bits]
    K = q.shape[-1]
    grouped = _padded(codes, word.values).unflatten(-1, (-1, word.values)).to(word.dtype)
    words = grouped[..., 0]
    for i in range(1, word.values):
        words = words | (grouped[..., i] << (i * bits))
    if word.num_bytes == 1:
        return words.contiguous()
    split = torch.stack([(words >> (8 * j)) & 0xFF for j in range(word.num_bytes)], dim=-1)
    return split.to(torch.uint8).flatten(-2)[..., : packed_width(K, bits)].contiguous()


def unpack(packed: Tensor, bits: int, in_features: int, *, signed: bool = True) -> Tensor:
    """The `in_features` integers of each row of `packed`: int8 [..., K], or uint8 where `signed` is false.

    Raises:
        ValueError: if `bits` cannot be packed, or `packed` is not bytes of rows of `in_features` values.
    """
    _check_bits("unpack", bits)
    width = packed_width(in_features, bits)
    if packed.dtype is not torch.uint8 or packed.shape[-1] != width:
        raise ValueError(
            f"unpack.packed: {packed.dtype} of shape {tuple(packed.shape)}; {in_features} values of {bits} "
            f"bits are torch.uint8 rows of {width} bytes"
        )
    if bits == 8:
        return packed.view(torch.int8) if signed else packed
    word = _WORDS[bits]
    if word.num_bytes == 1:
        words = packed
    else:
        split = _padded(packed, word.num_bytes).unflatten(-1, (-1, word.num_bytes)).to(word.dtype)
        words = split[..., 0]
        for j in range(1, word.num_bytes):
            words = words | (split[..., j] << (8 * j))
    codes = torch.stack([(words >> (i * bits)) & (2**bits - 1) for i in range(word.values)], dim=-1)
    codes = codes.to(torch.uint8).flatten(-2)[..., :in_features]
    return codes.to(torch.int8) - 2 ** (bits - 1) if signed else codes.contiguous()


def _padded(values: Tensor, multiple: int) -> Tensor:
    """`values` with zeros after each row, up to a multiple of `multiple`."""
    missing = -values.shape[-1] % multiple
    return pad(values, (0, missing)) if missing else values


def _check_bits(where: str, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{where}.bits: {bits}; use one of {', '.join(map(str, BITS))}")
