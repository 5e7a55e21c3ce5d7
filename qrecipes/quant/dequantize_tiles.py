"""How products with low-bit weights are computed: a fixed rule by tokens, sizes and device.

T tokens, N output features, K input features. For one token, a kernel for vectors; for few, a kernel that
feeds tensor cores; both read the packed weight once and write none. For more tokens the weight is dequantized
to a temporary, which costs as much as a product of some hundred tokens, and torch multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from qrecipes.quant.device import DeviceLimits

UNIT = 8
"""Weights of a row that a thread reads at once."""
FUSED_TYPES = (torch.bfloat16, torch.float16)
"""Types of tokens that tensor cores multiply as the reference does. float32 is fused for one token only."""


@dataclass(frozen=True)
class VectorTiles:
    """How the product of one token is cut up; numbers are powers of two."""

    block_n: int = 2
    """Rows of a program, which share the token in a thread's registers."""
    num_warps: int = 1
    repeats: int = 4
    """Units that a thread reads of each row before it multiplies the first."""
    splits: int = 1
    """Parts of K, by programs of their own; a second kernel adds them up in their order."""

    @property
    def block_k(self) -> int:
        """Columns of a step."""
        return UNIT * 32 * self.num_warps * self.repeats


@dataclass(frozen=True)
class MatrixTiles:
    """How the product of few tokens is cut up; numbers are powers of two."""

    block_t: int
    """As many as the tokens, or more; 16 at least."""
    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    """Blocks of K in flight."""
    splits: int = 1
    """As of `VectorTiles`."""


Tiles: TypeAlias = VectorTiles | MatrixTiles

# Reckoned for an H100 of 3 TB/s and 132 processors, and chosen so that triton 3.6 and 3.8 compile the kernels
# without spills: one warp a program looks the levels of NF4 up by shuffles, and 64 rows are what Hopper's
# tensor cores take at once. A 4-bit weight of 4096 x 4096 takes 3 us to read and 14 us to dequantize to
# bfloat16; in bfloat16 it takes 11 us to read. Of 40 tiles timed there for 16 tokens and the wide layers of
# Llama 7B these are the best or within 2%, but for int4 along 11,008: 64 columns a block take a fifth less.
MAX_FUSED_TOKENS = 64
"""For more tokens the weight is dequantized first."""
WIDE_TOKENS = 64
"""From so many tokens in a block on, the matrix kernel has twice the warps: sums fill the registers."""
VECTOR_PROGRAMS, MATRIX_PROGRAMS = 12, 3
"""Programs a processor, to hide the latency of memory; K is split if there are fewer than half."""
LEAST_SPLIT = 1024
"""Columns of a split, at least: shorter ones cost more to add up than they win."""
MAX_SPLITS = 16
THREE_STAGES_BYTES = 2**17
"""Shared memory a block from which on three blocks of K are in flight: 8-bit weights and 64 tokens then take
112 KiB as compiled, and with two blocks less than the 99 KiB of small devices."""


def choose_tiles(T: int, N: int, K: int, dtype: torch.dtype, device: DeviceLimits) -> Tiles | None:
    """How T tokens of type `dtype` are multiplied by a weight of N x K; None: by torch, by a temporary.

    It depends on nothing else, so a product has the same bits on every call.
    """
    num_processors = device.num_processors
    if T == 1:
        vector = VectorTiles()
        programs = -(-N // vector.block_n)
        splits = _splits(programs, K, max(LEAST_SPLIT, vector.block_k), VECTOR_PROGRAMS * num_processors)
        return VectorTiles(splits=splits)
    if T > MAX_FUSED_TOKENS or dtype not in FUSED_TYPES:
        return None
    block_t = max(16, 1 << (T - 1).bit_length())
    num_warps = 8 if block_t >= WIDE_TOKENS else 4
    programs = -(-N // MatrixTiles.block_n)
    splits = _splits(programs, K, LEAST_SPLIT, MATRIX_PROGRAMS * num_processors)
    num_stages = 3 if device.shared_bytes >= THREE_STAGES_BYTES else 2
    return MatrixTiles(block_t, num_warps=num_warps, num_stages=num_stages, splits=splits)


def _splits(programs: int, K: int, least: int, wanted: int) -> int:
    """Splits of K, a power of two, of at least `least` columns each, that give up to `wanted` programs."""
    splits = 1
    while 2 * splits * programs <= wanted and 2 * splits * least <= K and splits < MAX_SPLITS:
        splits *= 2
    return splits
