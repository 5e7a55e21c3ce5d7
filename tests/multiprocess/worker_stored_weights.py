"""Run under torchrun: a few updates of layers with stored weights, sharded and whole, and what FSDP2 sends.

    torchrun --nproc-per-node 2 worker_stored_weights.py OUTPUT.pt

All ranks see one batch, so that averaged gradients are one process's to the bit, and weights are rounded to
nearest: what is left to differ is sharding. Only rank 0 writes: `one`, which it trains by itself, and `two`.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import qrecipes  # noqa: F401 - torchao's names, before it is imported
from qrecipes.config.run import OptimSection
from qrecipes.parallel import process as processes
from qrecipes.parallel.process import Process
from qrecipes.quant.sharded import whole, write_whole_
from qrecipes.quant.stored_int8 import StoredInt8
from qrecipes.training import stored_weights
from qrecipes.training.optim import build_optimizer
from qrecipes.training.seed import seed_building
from qrecipes.transforms.base import ParamGroup
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.int8_weights import Int8WeightConfig

WIDTHS = (48, 64, 25, 7, 1)
"""25 and 7 rows are not divisible by two ranks, and the last layer has none for the second."""
GROUPED_WIDTHS = (48, 80, 25)
"""The inputs are divisible by groups of 16."""
CASES = ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 16))
"""Type and group size."""
STEPS = 4


def network(dtype: torch.dtype, group_size: int | None, stored: bool, process: Process) -> nn.Module:
    seed_building(0)
    layers = [
        nn.Linear(k, n, bias=False, dtype=dtype)
        for k, n in pairwise(GROUPED_WIDTHS if group_size else WIDTHS)
    ]
    model = nn.Sequential(*layers)
    if stored:
        model = Chain.from_configs([Int8WeightConfig(group_size=group_size)]).swap(model)
    if process.mesh is not None:
        for layer in model:
            fully_shard(layer, mesh=process.mesh)
        fully_shard(model, mesh=process.mesh)
    return model.to("cpu")


def train(dtype: torch.dtype, group_size: int | None, process: Process) -> dict:
    """Losses, gradients of the first step, and the state dicts before and after, whole."""
    model = network(dtype, group_size, True, process)
    optimizer = build_optimizer([ParamGroup("rest", list(model.parameters()))], OptimSection(lr=1e-2))
    found: dict = {"start": wholes(model), "losses": []}
    x = torch.randn(16, WIDTHS[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    for step in range(STEPS):
        loss = model(x).float().square().mean()
        loss.backward()
        if step == 0:
            found["gradients"] = {n: whole(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    found["end"] = wholes(model)
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}
    found["moments"] = {n: whole(t).float().mean() for n, t in moments.items()}
    found["values"] = {n: torch.add(whole(p), 0) for n, p in model.named_parameters()}
    other = network(dtype, group_size, True, process)
    for p in other.parameters():
        write_whole_(p, torch.linspace(-1, 1, p.numel()).view(p.shape).to(dtype))
    found["written"] = wholes(other)
    other.load_state_dict(model.state_dict())
    found["loaded"] = wholes(other)
    with torch.no_grad():
        found["loss of loaded"] = other(x).float().square().mean().item()
        found["loss of saved"] = model(x).float().square().mean().item()
    return found


def wholes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def sent(stored: bool, process: Process) -> list[torch.Tensor]:
    """What this rank hands to each all-gather of one forward pass of a bfloat16 model, in order."""
    model = network(torch.bfloat16, None, stored, process)
    inputs = []

    def recording(gather):
        def record(output_tensor, input_tensor, *args, **kwargs):
            inputs.append(input_tensor.clone())
            return gather(output_tensor, input_tensor, *args, **kwargs)

        return record

    # FSDP2 calls the first in torch 2.14, the second before
    names = [name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name)]
    before = {name: getattr(dist, name) for name in names}
    try:
        for name, gather in before.items():
            setattr(dist, name, recording(gather))
        model(torch.randn(2, WIDTHS[0], dtype=torch.bfloat16))
    finally:
        for name, gather in before.items():
            setattr(dist, name, gather)
    return inputs


def to_nearest() -> None:
    """Round weights and bfloat16 states to nearest: ranks draw numbers of their own."""
    requantize_ = StoredInt8.requantize_
    StoredInt8.requantize_ = lambda self, value, *, stochastic: requantize_(self, value, stochastic=False)
    stored_weights._rounding = lambda device_type: torch.Tensor.bfloat16


def main() -> None:
    process = processes.start("cpu")
    to_nearest()
    two: dict = {str(case): train(*case, process) for case in CASES}
    mine = {"stored": sent(True, process), "plain": sent(False, process)}
    two["sent"] = [None] * process.world
    dist.all_gather_object(two["sent"], mine)
    if process.is_main:
        alone = Process(0, 1, torch.device("cpu"), None)
        one = {str(case): train(*case, alone) for case in CASES}
        torch.save({"one": one, "two": two}, Path(sys.argv[1]))
    processes.stop()


if __name__ == "__main__":
    main()
