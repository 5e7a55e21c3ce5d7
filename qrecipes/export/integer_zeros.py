"""Low-bit layers for runtimes that take only integer zero points: what those would compute."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from qrecipes.quant.affine import AffineGrid
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.packing import signed_range


def has_float_zeros(module: nn.Module) -> bool:
    """Whether a module is a low-bit layer with an offset for each group."""
    return (
        isinstance(module, QuantLinear)
        and isinstance(module.format, AffineFormat)
        and module.format.has_offset
    )


def with_integer_zeros(layer: QuantLinear) -> QuantLinear:
    """The layer with each offset b rounded to a multiple of its scale: zero points z = round(-b / s), kept in
    as many bits as the integers, which stay as they are.

    A change of an offset by less than half a scale is then lost, wherever it does not cross a border. A group
    of scale 0 loses its offset.

    Raises:
        ValueError: if the layer has no offsets.
    """
    if not has_float_zeros(layer):
        raise ValueError(f"with_integer_zeros.layer: {layer.format} has no float zero points to round")
    assert isinstance(layer.format, AffineFormat)
    grid = layer.grid
    assert grid.offset is not None, layer.format
    scale = grid.scale.double()
    zeros = torch.round(-grid.offset.double() / torch.where(scale == 0, torch.inf, scale))
    zero = zeros.clamp(*signed_range(layer.format.bits)).to(torch.int8)
    return layer.with_grid(AffineGrid(grid.scale, zero=zero), replace(layer.format, zero_point="integer"))


def round_zeros_(model: nn.Module) -> int:
    """Put `with_integer_zeros` in the place of every layer of `model` that has offsets; how many there
    were."""
    found = {fqn: module for fqn, module in model.named_modules() if has_float_zeros(module)}
    for fqn, layer in found.items():
        assert isinstance(layer, QuantLinear)
        model.set_submodule(fqn, with_integer_zeros(layer))
    return len(found)
