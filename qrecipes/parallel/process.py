"""One process of a run: its rank, its device, and what it must agree on with the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qrecipes.errors import ConfigError

TIMEOUT = timedelta(minutes=30)
"""Longest that a collective waits; rank 0 writes checkpoints while the others wait."""


@dataclass(frozen=True)
class Process:
    """This process among `world` equal ones; `mesh` is None in a run of one."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over ranks, on the device, in float64."""
        total = value.detach().to(self.device, torch.float64, copy=True)
        if self.mesh is not None:
            dist.all_reduce(total)
        return total

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over ranks, on the device, in float64."""
        return self.sum(value) / self.world

    def largest(self, number: int) -> int:
        """The largest of one integer of every rank. Over the CPU's backend, so that the device's queue runs
        on."""
        if self.mesh is None:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """Each flag, true where it is on any rank. Over the CPU's backend."""
        if self.mesh is None or not flags:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [bool(value) for value in values]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh is not None:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def pick_device(wanted: str) -> torch.device:
    """The device called "auto", "cpu" or "cuda" in a run; this rank's own GPU under torchrun.

    Raises:
        ConfigError: if "cuda" is wanted and there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch finds no GPU; use 'auto' or 'cpu'")
    index = int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device: local rank {index} has no GPU of its own; torch finds {torch.cuda.device_count()}; "
            "lower --nproc-per-node, or use device=cpu"
        )
    return torch.device("cuda", index)


def start(device: str = "auto") -> Process:
    """Join the process group that torchrun describes in the environment, or run alone."""
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ or world == 1:
        return Process(0, 1, chosen, None)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        bound = chosen if chosen.type == "cuda" else None
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound)
    mesh = init_device_mesh(chosen.type, (world,), mesh_dim_names=("data",))
    return Process(dist.get_rank(), world, chosen, mesh)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
