"""What a swap did, layer by layer: written to receipt.json, shown as one line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class LayerReceipt:
    """What became of one linear layer, or of one tensor between layers."""

    fqn: str
    """Fully qualified name in the model before the swap."""
    shape: tuple[int, ...]
    """[out_features, in_features]; nothing for a tensor between layers."""
    method: str | None
    """Name of the transform that replaced it, or None."""
    reason: str | None
    """Why it was left alone, or None."""
    bytes_before: int
    """Bytes of parameters and buffers before the swap."""
    bytes_after: int
    """The same after it."""
    partly: str | None = None
    """What the transform left as it was in this layer alone, and why, or None."""
    sqnr_db: dict[str, float] = field(default_factory=dict)
    """The probe's finding for each product the method changes, on real activations; infinite values are left
    out."""


@dataclass
class Receipt:
    """Every linear layer of a model, in the model's order, then every tensor that a transform changes."""

    layers: list[LayerReceipt]

    @property
    def methods(self) -> list[str]:
        """Names of the transforms that replaced a layer, in order of first use."""
        return list(dict.fromkeys(layer.method for layer in self.layers if layer.method))

    def summary(self) -> str:
        """One line: how many layers, weights and bytes each method took over, and the probe's worst
        findings."""
        if not self.methods:
            return f"no transform: {self._num_linears} linear layers as built"
        parts = [self._method_summary(method) for method in self.methods]
        left = [layer for layer in self.layers if layer.method is None]
        if left:
            parts.append("left alone: " + _counted([f"{layer.fqn} ({layer.reason})" for layer in left]))
        return "; ".join(parts)

    @property
    def _num_linears(self) -> int:
        return sum(bool(layer.shape) for layer in self.layers)

    def _method_summary(self, method: str) -> str:
        mine = [layer for layer in self.layers if layer.method == method]
        weights = sum(_product(layer.shape) for layer in mine)
        before, after = (
            sum(getattr(layer, key) for layer in mine) for key in ("bytes_before", "bytes_after")
        )
        if mine[0].shape:
            text = (
                f"{method}: {len(mine)} of {self._num_linears} linear layers, {weights:,} weights, "
                f"{_megabytes(before)} -> {_megabytes(after)}"
            )
        else:
            text = f"{method}: {len(mine)} tensors between layers"
        if partly := [f"{layer.fqn} ({layer.partly})" for layer in mine if layer.partly]:
            text += ", in part " + _counted(partly, most=1)
        worst = {
            product: min(layer.sqnr_db[product] for layer in mine if product in layer.sqnr_db)
            for product in dict.fromkeys(key for layer in mine for key in layer.sqnr_db)
        }
        if worst:
            found = ", ".join(f"{product} {db:.1f} dB" for product, db in worst.items())
            text += f", probe at least {found}"
        return text

    def to_json(self) -> dict[str, Any]:
        """The receipt as JSON values."""
        return {"summary": self.summary(), "layers": [asdict(layer) for layer in self.layers]}

    def save(self, path: Path) -> None:
        """Write the receipt as JSON."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def _counted(items: list[str], most: int = 3) -> str:
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
