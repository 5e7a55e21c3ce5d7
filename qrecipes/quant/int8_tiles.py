"""How an INT8 matmul is cut into blocks: the choices measured, and fixed rules that pick one for a shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts the product up; block sizes are powers of two."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    """Blocks of K in flight."""
    num_warps: int
    per_processor: int = 0
    """Programs on each processor that work through many blocks each; 0 for a program a block (TMA only)."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the operands' blocks in flight."""
        return (self.block_m + self.block_n) * self.block_k * self.num_stages

    def blocks(self, M: int, N: int) -> int:
        """Number of blocks that cover [M, N]."""
        return -(-M // self.block_m) * -(-N // self.block_n)


# The first pair was the best of a search on H100; the rest serve smaller products and shared memories.
TILES = (
    (Tiles(128, 256, 128, 3, 8), Tiles(256, 128, 128, 3, 8)),
    (Tiles(128, 256, 64, 4, 8), Tiles(256, 128, 64, 4, 8)),
    (Tiles(128, 128, 128, 4, 8),),
    (Tiles(128, 128, 64, 4, 8),),
    (Tiles(64, 128, 128, 4, 4), Tiles(128, 64, 128, 4, 4)),
    (Tiles(64, 128, 64, 4, 4), Tiles(128, 64, 64, 4, 4)),
    (Tiles(64, 64, 64, 4, 4),),
)


class Speed(NamedTuple):
    """What the rule knows of tiles."""

    rate: float
    """Speed of the integer products, relative."""
    store_cost: float
    """Time to store a block and start the next, in blocks of K."""
    at_once: int = 1
    """Programs that a processor runs at once: one works while another stores."""


# Fitted to 28 products on H100 (tools/bench_matmul.py --tiles; torch 2.11, triton 3.6), those of layers of
# Llama 8B, Llama 1B and ViT-g and of a cube: of them the rule is 0.3% slower than the best on average, and at
# most 6%. Two small persistent programs a processor win but for the longest K: one stores while the other
# multiplies. A persistent program of 256 x 128 is no candidate: storing a ragged block took 64 KiB more
# shared memory than an H100 has.
TMA_TILES = {
    Tiles(128, 128, 128, 3, 4, per_processor=2): Speed(1.00, 1.75, 2),
    Tiles(128, 256, 128, 4, 8): Speed(1.04, 5.25),
    Tiles(256, 128, 128, 4, 8): Speed(1.05, 5.25),
    Tiles(128, 256, 128, 4, 8, per_processor=1): Speed(1.00, 3.75),
    Tiles(64, 256, 128, 4, 4): Speed(0.81, 5.00),
    Tiles(64, 128, 128, 4, 4, per_processor=2): Speed(0.75, 2.25, 2),
    Tiles(64, 128, 128, 4, 4): Speed(0.74, 3.25, 2),
}
ALONE = 0.7
"""Time of a program of two that has its processor to itself, of the time of both."""
GROUP_M = 8
"""Rows of blocks that are worked through together, so that their blocks of B stay in the L2 cache."""


def choose_tiles(M: int, N: int, shared_bytes: int, num_processors: int) -> Tiles:
    """The largest tiles that fit `shared_bytes` and give three quarters of the processors a block.

    For the kernel that reads through pointers. A fixed rule rather than a search: nothing is tuned at run
    time, whatever the number of shapes. Of a wide and a tall tile of one size, the one that needs fewer
    blocks is taken.
    """
    for alternatives in TILES:
        tiles = min(alternatives, key=lambda t: t.blocks(M, N))
        if tiles.shared_bytes <= shared_bytes and 4 * tiles.blocks(M, N) >= 3 * num_processors:
            return tiles
    return TILES[-1][0]


def choose_tma_tiles(
    M: int, N: int, K: int, shared_bytes: int, num_processors: int, output_bytes: int = 2
) -> Tiles | None:
    """The tiles of TMA_TILES with the least `tma_cost` that fit `shared_bytes`; None where none fits.

    `output_bytes` is the size of an output element.
    """
    fitting = [tiles for tiles in TMA_TILES if fits_tma(tiles, shared_bytes, output_bytes)]
    return min(fitting, key=lambda t: tma_cost(t, M, N, K, num_processors), default=None)


def fits_tma(tiles: Tiles, shared_bytes: int, output_bytes: int) -> bool:
    """Whether so many programs as are to run on a processor fit it; `shared_bytes` is what one can have."""
    needed, reserved = tma_shared_bytes(tiles, output_bytes), 1024  # CUDA keeps 1 KiB of each program's
    return max(1, tiles.per_processor) * (needed + reserved) <= shared_bytes + reserved


def tma_shared_bytes(tiles: Tiles, output_bytes: int) -> int:
    """Shared memory that a program of the TMA kernel needs at most, compiled for Hopper.

    Beside the blocks in flight a persistent program needs memory to reorder the block that it stores. Triton
    3.6 and 3.8 reorder elements of two bytes in parts of 8 KiB with 4 warps and of 32 KiB with 8, and wider
    ones in parts of 32 KiB with 4 warps and whole with 8.
    """
    reordered = tiles.block_m * tiles.block_n * output_bytes if tiles.per_processor else 0
    if tiles.num_warps == 4:
        reordered = min(reordered, 2**13 if output_bytes <= 2 else 2**15)
    elif output_bytes <= 2:
        reordered = min(reordered, 2**15)
    return tiles.shared_bytes + reordered + 128  # barriers


def tma_cost(tiles: Tiles, M: int, N: int, K: int, num_processors: int) -> float:
    """Time of the product, in units that only comparisons have: rounds of blocks times the time of one."""
    rate, store_cost, at_once = TMA_TILES[tiles]
    rounds, rest = divmod(tiles.blocks(M, N), at_once * num_processors)
    last = 0.0 if rest == 0 else ALONE if at_once > 1 and rest <= num_processors else 1.0
    block = -(-K // tiles.block_k) / rate + store_cost
    return (rounds + last) * at_once * tiles.block_m * tiles.block_n * block
