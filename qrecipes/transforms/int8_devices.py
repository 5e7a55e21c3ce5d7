"""Where a method may compute INT8 products: on INT8 tensor cores, or emulated where its `emulate` says so."""

from __future__ import annotations

import torch

from qrecipes.errors import ConfigError
from qrecipes.quant.device import has_int8_tensor_cores


def check_int8_device(where: str, device: torch.device, *, emulate: bool, instead: str = "") -> None:
    """Refuse a device without INT8 tensor cores, unless they are to be emulated.

    `where` names the setting that asks for INT8, `instead` how to do without, such as "set x = false".

    Raises:
        ConfigError: if there are none on `device`.
    """
    if emulate or has_int8_tensor_cores(device):
        return
    remedies = ["use such a device", *([instead] if instead else [])]
    raise ConfigError(
        f"{where}: the device is {device}, but INT8 products need the tensor cores of an NVIDIA GPU of "
        f"compute capability 8.0 or later; {', '.join(remedies)}, or set emulate = true to compute the same "
        "numbers slowly"
    )
