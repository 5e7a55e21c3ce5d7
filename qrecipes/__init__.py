"""Composable low-precision training recipes for PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qrecipes import compat

__version__ = "0.1.0"

_PUBLIC = {
    "Chain": "qrecipes.transforms.chain",
    "load_export": "qrecipes.export.store",
    "register": "qrecipes.transforms.base",
}

__all__ = ["Chain", "__version__", "load_export", "register"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `qrecipes --help` does not wait for torch."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'qrecipes' has no attribute {name!r}; it has {', '.join(__all__)}")


compat.install()
