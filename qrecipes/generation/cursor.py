"""Where the tokens of a pass go in the caches of all layers."""

from __future__ import annotations

from torch import Tensor


class Cursor:
    """Where the tokens of this pass go in every layer's cache."""

    columns: Tensor
    """Their columns, int64 [S], consecutive."""
    end: int
    """How many columns attention reads."""
    capacity: int
    """How many columns there are, at most."""
    padding: Tensor
    """Columns at the beginning of each row that are not its own, int64 [B]."""
