"""The methods: every module in this folder is imported, and registers itself.

Exports one `<Method>Config` for each registered method, found through the registry.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from qrecipes.transforms.base import (
    REGISTRY,
    Bounds,
    ParamGroup,
    StepContext,
    Transform,
    TransformConfig,
    register,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

globals().update({cls.Config.__name__: cls.Config for cls in REGISTRY.values()})

__all__ = [
    "REGISTRY",
    "Bounds",
    "ParamGroup",
    "StepContext",
    "Transform",
    "TransformConfig",
    "register",
    *(cls.Config.__name__ for cls in REGISTRY.values()),
]
