"""Whole-tensor reads and writes on plain tensors, tensor subclasses, and both under FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from qrecipes.quant.int8_gathered import GatheredAsInt8


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself where it is not sharded.

    It is what the optimizer updates: how FSDP2 will gather it is left out.
    """
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.plain if isinstance(tensor, GatheredAsInt8) else tensor


def flat_locals(*tensors: Tensor) -> list[Tensor]:
    """This rank's parts of tensors of one shape, as vectors where all are contiguous.

    A compiled elementwise function then sees one number of dimensions, and is not compiled for each.
    """
    found = [local(tensor) for tensor in tensors]
    return [t.view(-1) for t in found] if all(t.is_contiguous() for t in found) else found


def is_composite(tensor: Tensor) -> bool:
    """Whether this rank's part is a tensor subclass made of inner tensors, such as a quantized optimizer
    state."""
    return hasattr(local(tensor), "__tensor_flatten__")


def parts(tensor: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """The plain tensors that this rank's part of a composite tensor is made of, by dotted name."""
    tensor = local(tensor)
    if not hasattr(tensor, "__tensor_flatten__"):
        return {prefix: tensor}
    names, _ = tensor.__tensor_flatten__()
    found: dict[str, Tensor] = {}
    for name in names:
        found |= parts(getattr(tensor, name), f"{prefix}.{name}" if prefix else name)
    return found


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank, detached. A collective where the tensor is sharded."""
    tensor = tensor.detach()
    return local(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


@torch.no_grad()
def write_whole_(tensor: Tensor, value: Tensor) -> None:
    """Overwrite `tensor` with the whole `value`, which every rank holds; each keeps its own part.

    Raises:
        ValueError: if the shapes differ.
    """
    if tensor.shape != value.shape:
        raise ValueError(f"value has shape {tuple(value.shape)}; the tensor has {tuple(tensor.shape)}")
    if isinstance(tensor, DTensor):
        value = value.to(device=tensor.device, dtype=tensor.dtype)
        # src_data_rank=None: every rank cuts its own part, nothing is sent
        sharded = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        local(tensor).copy_(sharded.to_local())
    else:
        tensor.copy_(value)
