"""What choosing and launching a Triton kernel needs to know of a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
LEAST_CAPABILITY = (8, 0)
"""CUDA devices that the kernels run on: from Ampere on there are bfloat16 and INT8 tensor cores. Older ones
get plain PyTorch."""
_NO_CONTEXT = nullcontext()

if HAS_TRITON:
    import triton


class DeviceLimits(NamedTuple):
    """What kernels are chosen by."""

    capability: tuple[int, int]
    num_processors: int
    shared_bytes: int
    """Shared memory that a block can have."""

    @property
    def has_tma(self) -> bool:
        """Whether blocks can be read by the tensor memory accelerator: from Hopper on."""
        return self.capability >= (9, 0)


INTERPRETER = DeviceLimits((0, 0), 1, 2**15)
"""What stands for a device where Triton's interpreter runs kernels: any tiles do."""


@cache
def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device; those of the interpreter for others.

    Raises:
        RuntimeError: if Triton is not installed.
    """
    if device.type != "cuda":
        return INTERPRETER
    require_triton("device_limits")
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    capability = torch.cuda.get_device_capability(device)
    return DeviceLimits(capability, properties["multiprocessor_count"], properties["max_shared_mem"])


@cache
def has_int8_tensor_cores(device: torch.device) -> bool:
    """Whether the INT8 kernels serve a device: NVIDIA GPUs of compute capability 8.0, Ampere, or later.

    Elsewhere every operator gives the same numbers in plain PyTorch, slowly.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def require_triton(where: str) -> None:
    """Raise RuntimeError, naming `where`, if Triton is not installed."""
    if not HAS_TRITON:
        raise RuntimeError(
            f"{where}: Triton is not installed, and the CUDA kernel is written in it; install the triton "
            "package that this torch names, or train on the CPU"
        )


def on_device_of(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; entering torch's context costs more than asking whether to."""
    if t.device.type != "cuda" or t.get_device() == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device_of(t)
