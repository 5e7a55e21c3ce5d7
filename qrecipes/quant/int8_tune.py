"""Measured choices of tiles, kept on disk: one JSON file for each device and version of Triton.

Nothing is measured unless QRECIPES_INT8_TUNE=1 or `int8_matmul.tune` asks; what was measured once is then
used by every run. Which tiles are taken changes the time of a product, never its result.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import astuple
from functools import cache
from pathlib import Path

import torch

from qrecipes.quant.int8_tiles import TMA_TILES, Tiles

MAX_SHAPES = 64
"""Shapes that one process tunes at most by itself; further ones get the tiles of the fixed rule."""
REPEATS = 10
"""Timings of each candidate, of which the median counts."""


def is_wanted() -> bool:
    """Whether products met for the first time are to be tuned."""
    return os.environ.get("QRECIPES_INT8_TUNE", "") == "1"


def cache_folder() -> Path:
    """$QRECIPES_CACHE, or `qrecipes` in the user's cache folder."""
    if folder := os.environ.get("QRECIPES_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrecipes"


def bucket(size: int) -> int:
    """`size` rounded up to four significant bits and a multiple of 64: ragged sizes share an entry."""
    step = max(64, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


class TunedTiles:
    """Fastest tiles by shape, read from `path` once and written whole after every addition."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tiles = self._read()
        self.added = 0

    def get(self, M: int, N: int, K: int) -> Tiles | None:
        """The tiles measured fastest for products of about this size, or None."""
        return self._tiles.get(_key(M, N, K))

    def add(
        self, M: int, N: int, K: int, candidates: Iterable[Tiles], measure_ms: Callable[[Tiles], float]
    ) -> Tiles:
        """Measure every candidate, keep the fastest and write it down.

        A file that cannot be written costs a warning: the choice then holds for this process alone.
        """
        fastest = min(candidates, key=measure_ms)
        self._tiles[_key(M, N, K)] = fastest
        self.added += 1
        try:
            self._write()
        except OSError as error:
            warnings.warn(
                f"{self.path}: cannot be written ({error}), so the next run measures INT8 matmuls again; "
                "set QRECIPES_CACHE to a folder that can be",
                stacklevel=2,
            )
        return fastest

    def _read(self) -> dict[str, Tiles]:
        try:
            entries = json.loads(self.path.read_text())
            return {key: _tiles(value) for key, value in entries.items()}
        except FileNotFoundError:
            return {}
        except NotADirectoryError:  # writing there will say so
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"{self.path}: ignored, since it cannot be read ({error}); delete it", stacklevel=2)
            return {}

    def _write(self) -> None:
        """Replace the file by one that also holds what other processes added meanwhile."""
        self._tiles = (self._read() if self.path.exists() else {}) | self._tiles
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({key: _list(tiles) for key, tiles in sorted(self._tiles.items())}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
            file.write(text + "\n")
        os.replace(file.name, self.path)


@cache
def table(device: torch.device) -> TunedTiles:
    """The table of a CUDA device's kind and the installed Triton."""
    import triton

    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).strip("-")
    return TunedTiles(cache_folder() / f"int8_tiles_{name}_triton-{triton.__version__}.json")


def median_ms(function: Callable[[], object]) -> float:
    """Median time of `function` on the current CUDA device, after three calls that do not count."""
    for _ in range(3):
        function()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 3)
    return statistics.median(times)


def _key(M: int, N: int, K: int) -> str:
    return f"{bucket(M)}x{bucket(N)}x{bucket(K)}"


def _list(tiles: Tiles) -> list[int]:
    return list(astuple(tiles))


def _tiles(entry: list[int]) -> Tiles:
    tiles = Tiles(*entry)
    if tiles not in TMA_TILES:
        raise ValueError(f"{entry} are not tiles of this version")
    return tiles
