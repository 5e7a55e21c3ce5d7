"""The kind of device that a run trains on, which its checkpoints say, and where here one of that kind is.

Elementwise float32 has the same bits everywhere; sums that tensor cores make have those of their generation.
"""

from __future__ import annotations

import torch


def kind_of(device: torch.device) -> str:
    """What decides the bits of a device's sums: its type and, as in "cuda 9.0", compute capability."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def device_of(kind: str) -> torch.device | None:
    """A device of that kind, the current CUDA device before others; None where there is none."""
    if kind == "cpu":
        return torch.device("cpu")
    if not kind.startswith("cuda") or not torch.cuda.is_available():
        return None
    current = torch.cuda.current_device()
    indices = [current, *(i for i in range(torch.cuda.device_count()) if i != current)]
    devices = (torch.device("cuda", index) for index in indices)
    return next((device for device in devices if kind_of(device) == kind), None)
