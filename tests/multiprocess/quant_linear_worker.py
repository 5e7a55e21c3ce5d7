"""Run under torchrun: three steps of a model of trained and low-bit layers under FSDP2.

    torchrun --nproc-per-node 2 quant_linear_worker.py OUTPUT.pt

Rank 0 writes losses, gradients, whole payloads and the bytes that each rank holds of them.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.sharded import local, whole

FORMATS = [
    AffineFormat(bits=4, group_size=32),
    AffineFormat(bits=3, group_size=32, symmetric=False, scale_dtype="bfloat16"),
    AffineFormat(bits=2, group_size=16, symmetric=False, zero_point="float"),
    AffineFormat(bits=8, symmetric=False),
    NF4Format(),
    NF4Format(double_quantized=False, block_size=32),
]
STEPS, ROWS, WIDTH = 3, 4, 96


class Block(nn.Module):
    """A trained layer, a low-bit one with as many rows as ranks divide, and one with one more."""

    def __init__(self, format) -> None:
        super().__init__()
        self.trained = nn.Linear(WIDTH, WIDTH)
        self.even = QuantLinear.from_linear(nn.Linear(WIDTH, 64), format)
        self.ragged = QuantLinear.from_linear(nn.Linear(64, WIDTH + 1, bias=False), format)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ragged(torch.relu(self.even(self.trained(x))))[..., :WIDTH]


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(format) for format in FORMATS))


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, rank: int = 0, world: int = 1) -> dict:
    """Losses of the whole batch, the last step's gradients and what the frozen parameters hold in the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(step).chunk(world)[rank]
        loss = model(x).square().mean()
        loss.backward()
        total = loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    frozen = {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}
    return {"losses": losses, "gradients": gradients, "frozen": frozen}


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    model = build()
    for block in model:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    fully_shard(model, mesh=mesh)
    found = train(model, rank, world)
    held = {name: local(p).shape for name, p in model.named_parameters() if not p.requires_grad}
    everyone: list = [None] * world
    dist.all_gather_object(everyone, held)
    model.bfloat16()  # sharded payloads stay as they are, too
    types = {name: p.dtype for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(found | {"held": everyone, "types": types}, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
