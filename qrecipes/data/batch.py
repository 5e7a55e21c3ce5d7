"""What one forward pass takes: inputs, and the targets that count."""

from __future__ import annotations

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
    """

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True))

    def head(self, rows: int, length: int) -> Batch:
        """The first rows, and the first `length` tokens of each where they are tokens; as views."""
        if self.inputs.ndim == 2:
            return Batch(self.inputs[:rows, :length], self.targets[:rows, :length])
        return Batch(self.inputs[:rows], self.targets[:rows])

    def count(self) -> int:
        """Number of targets that count; on a GPU this waits for the device, so ask before `to`."""
        return int((self.targets != IGNORE).sum())
