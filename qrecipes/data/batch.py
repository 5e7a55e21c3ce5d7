"""What one forward pass takes: inputs, and the targets that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that counts neither in the loss nor in a metric; `cross_entropy` ignores it by
default."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Language modeling: `inputs` int64 [B, S] and `targets` int64 [B, S], where `targets[b, s]` is the token
    after `inputs[b, s]`. Images: `inputs` float32 [B, 3, H, W], normalized, and `targets` int64 [B].

    Where several documents share a row and none may attend to another, `documents` int32 [B, S] numbers them
    along the row (padding has a number of its own) and `positions` int64 [B, S] counts tokens from the start
    of each; both are None where a row is one text.
    """

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None
    positions: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Inputs, targets, documents and positions."""
        return self.inputs, self.targets, self.documents, self.positions

    def empty_on(self, device: torch.device | str) -> Batch:
        """A batch of the same shapes and types on `device`, of memory of its own that nothing is in yet."""
        return self._map(lambda tensor: torch.empty_like(tensor, device=device))

    def head(self, rows: int, length: int) -> Batch:
        """The first rows, and the first `length` tokens of each where they are tokens; as views."""
        if self.inputs.ndim == 2:
            return self._map(lambda tensor: tensor[:rows, :length])
        return self._map(lambda tensor: tensor[:rows])

    def rows(self) -> Iterator[Batch]:
        """Every row as a batch of its own, as views."""
        for row in range(len(self.inputs)):
            yield self._map(lambda tensor, row=row: tensor[row : row + 1])  # type: ignore[misc]

    def all_targets(self) -> Batch:
        """The same tokens with each but the last predicting the next, whatever counted; images unchanged."""
        if self.inputs.ndim != 2:
            return self
        targets = torch.full_like(self.inputs, IGNORE)
        targets[:, :-1] = self.inputs[:, 1:]
        return Batch(self.inputs, targets, self.documents, self.positions)

    def count(self) -> int:
        """Number of targets that count; on a GPU this waits for the device, so ask before `to`."""
        return int((self.targets != IGNORE).sum())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs, targets, documents, positions = (None if t is None else change(t) for t in self.tensors())
        assert inputs is not None
        assert targets is not None
        return Batch(inputs, targets, documents, positions)
