"""Optimizer states in another type than their weights, kept by `load_state_dict`."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def load_exactly(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Overwrite what `Optimizer.load_state_dict` just loaded by the same tensors in their own type.

    torch casts every state but `step` to the type of its weight: a float32 second moment would come back as
    bfloat16.
    """
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for key, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                device = value.device if value.ndim == 0 else p.device
                optimizer.state[p][name] = value.detach().to(device, copy=True)
