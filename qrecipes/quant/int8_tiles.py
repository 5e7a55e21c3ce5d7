"""How an INT8 matmul is cut into blocks: the choices measured, and fixed rules that pick one for a shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts the product up; block sizes are powers of two."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    """Blocks of K in flight."""
    num_warps: int
    persistent: bool = False
    """One program a processor that works through many blocks, rather than a program a block (TMA only)."""

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

# Relative rates of the integer products, fitted to a search on H100 (torch 2.11, triton 3.6): 128 x 256
# reached 1331 TOPS at 8192 cubed, 256 x 128 1326; persistent programs gained 6% at K = 4096 and lost 1 to 5%
# at 8192. A persistent program of 256 x 128 is no candidate: storing a ragged block took 64 KiB more shared
# memory than an H100 has.
TMA_TILES = {
    Tiles(128, 256, 128, 4, 8): 1.00,
    Tiles(256, 128, 128, 4, 8): 0.99,
    Tiles(128, 256, 128, 4, 8, persistent=True): 0.96,
    Tiles(128, 128, 128, 4, 8, persistent=True): 0.89,
    Tiles(64, 128, 128, 4, 4): 0.70,
}
STORE_COST, HIDDEN_STORE_COST = 3.0, 1.0
"""Time to store a block and start the next, in blocks of K; a persistent program hides most of it."""
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
    fitting = [tiles for tiles in TMA_TILES if tma_shared_bytes(tiles, output_bytes) <= shared_bytes]
    return min(fitting, key=lambda t: tma_cost(t, M, N, K, num_processors), default=None)


def tma_shared_bytes(tiles: Tiles, output_bytes: int) -> int:
    """Shared memory that the TMA kernel needs at most, compiled for Hopper.

    Beside the blocks in flight a persistent program needs memory to reorder the block that it stores. Triton
    3.6 and 3.8 reorder elements of two bytes in parts of 32 KiB.
    """
    reordered = tiles.block_m * tiles.block_n * output_bytes if tiles.persistent else 0
    if output_bytes <= 2:
        reordered = min(reordered, 2**15)
    return tiles.shared_bytes + reordered + 128  # barriers


def tma_cost(tiles: Tiles, M: int, N: int, K: int, num_processors: int) -> float:
    """Time of the product, in units that only comparisons have: rounds of blocks times the time of one."""
    rounds = -(-tiles.blocks(M, N) // num_processors)
    store = HIDDEN_STORE_COST if tiles.persistent else STORE_COST
    block = -(-K // tiles.block_k) / TMA_TILES[tiles] + store
    return rounds * tiles.block_m * tiles.block_n * block
