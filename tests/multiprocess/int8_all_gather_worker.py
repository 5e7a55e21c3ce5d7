"""Run under torchrun: what FSDP2 does with weights that are gathered as INT8, against one process.

    torchrun --nproc-per-node 2 int8_all_gather_worker.py OUTPUT.json DEVICE FOLDER

Every check compares on every rank; only rank 0 writes, which checks failed where.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recomputed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Trial, tiny_run

from qrecipes.config import parse
from qrecipes.config.run import OptimSection
from qrecipes.locate import find
from qrecipes.parallel import process as processes
from qrecipes.quant.int8_gathered import GatheredAsInt8, Int8Rows
from qrecipes.quant.sharded import parts, whole, write_whole_
from qrecipes.training import checkpoint
from qrecipes.training.optim import build_optimizer
from qrecipes.transforms import Int8MixedPrecisionConfig
from qrecipes.transforms.chain import Chain

SHAPES = {"even": (40, 24), "ragged": (40, 7), "one row": (40, 1), "narrow": (5, 6)}
"""Input and output features; of one row the second rank has none."""


class Gathers(TorchDispatchMode):
    """Records type and bytes of what this rank gives to each all-gather."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather" in str(func):
            self.sent.append((args[1].dtype, args[1].nbytes))
        return func(*args, **(kwargs or {}))


def network(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, **config: bool) -> nn.Module:
    """One swapped layer with a bias, the same on every rank."""
    torch.manual_seed(1)
    linear = nn.Linear(*shape, dtype=dtype, device=device)
    chain = Chain.from_configs(
        [
            Int8MixedPrecisionConfig(
                int8_all_gather=True, min_size=0, min_size_grad_weight=0, emulate=True, **config
            )
        ]
    )
    return chain.swap(nn.Sequential(linear))


def sharded(model: nn.Module, process, reshard: bool = True) -> nn.Module:
    Chain.from_configs([model[0].config]).before_shard(model)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    return fully_shard(model, mesh=process.mesh, mp_policy=policy, reshard_after_forward=reshard)


def batches(shape: tuple[int, int], dtype: torch.dtype, process, count: int = 2) -> list:
    """Inputs and gradients of the output, different on each rank."""
    generator = torch.Generator().manual_seed(10 + process.rank)
    sizes = (9, shape[0]), (9, shape[1])
    return [
        tuple(torch.randn(size, generator=generator).to(process.device, dtype) for size in sizes)
        for _ in range(count)
    ]


def run_batches(model: nn.Module, given: list, recompute: bool = False) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the inputs, and the parameters' gradients accumulated over the batches."""
    found = {}
    for i, (x, grad_y) in enumerate(given):
        x = x.clone().requires_grad_()
        y = recomputed(model, x, use_reentrant=False) if recompute else model(x)
        y.backward(grad_y)
        found |= {f"output {i}": y.detach(), f"grad_input {i}": x.grad}
    return found


def mean_over_ranks(grads: list[torch.Tensor], process) -> torch.Tensor:
    """The mean of each micro-batch's gradient over ranks in float32, summed in the gradient's own type."""
    total = None
    for grad in grads:
        summed = grad.float().cpu()
        dist.all_reduce(summed)
        mean = (summed / process.world).to(grad.dtype)
        total = mean if total is None else total + mean
    return total


def differing(found: dict, expected: dict, where: str) -> list[str]:
    return [
        f"{where}: {name}"
        for name, value in expected.items()
        if not torch.equal(found[name].cpu(), value.cpu())
    ]


def check_layers(process) -> list[str]:
    """Outputs and all gradients, bit for bit."""
    faults = []
    settings = [({}, False), ({"save_int8_input": True}, False), ({}, True), ({"grad_input": False}, False)]
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for reshard in (True, False):
                for config, recompute in settings:
                    given = batches(shape, dtype, process)
                    alone = network(shape, dtype, process.device, **config)
                    expected, grads = {}, {"weight": [], "bias": []}
                    for i, batch in enumerate(given):
                        alone.zero_grad()
                        one = run_batches(alone, [batch])
                        expected |= {key.replace("0", str(i)): value for key, value in one.items()}
                        for key in grads:
                            grads[key].append(getattr(alone[0], key).grad)
                    expected |= {f"grad_{key}": mean_over_ranks(g, process) for key, g in grads.items()}
                    model = sharded(network(shape, dtype, process.device, **config), process, reshard)
                    found = run_batches(model, given, recompute)
                    found |= {f"grad_{key}": whole(getattr(model[0], key).grad) for key in grads}
                    faults += differing(
                        found, expected, f"{name} {dtype} reshard={reshard} {config} recompute={recompute}"
                    )
    return faults


def check_compiled(process) -> list[str]:
    """Within fullgraph, compiled once, against eager in float32."""
    shape = SHAPES["ragged"]
    given = batches(shape, torch.float32, process, count=3)
    expected = run_batches(sharded(network(shape, torch.float32, process.device), process), given)
    model = sharded(network(shape, torch.float32, process.device), process)
    model[0].compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    faults = differing(run_batches(model, given), expected, "compiled")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return faults + ([] if graphs == 1 else [f"{graphs} graphs"])


def check_traffic(process) -> list[str]:
    """What one gather sends: the weight's rows in INT8 with a float32 scale each, the bias as it is."""
    faults = []
    for name, (width, rows) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = sharded(network((width, rows), dtype, process.device), process)
            x = torch.randn(3, width, dtype=dtype, device=process.device)
            with Gathers() as gathers:
                model(x).sum().backward()
            most = -(-rows // process.world)
            expected = (torch.uint8, most * (width * 1 + 4 + dtype.itemsize))
            if gathers.sent != [expected] * 2:  # for the forward pass, and again for the backward pass
                faults.append(f"{name} {dtype}: sent {gathers.sent}, not twice {expected}")
    return faults


def check_what_remains(process) -> list[str]:
    """Between passes a rank holds its rows in high precision, and the gathered memory is empty."""
    model = sharded(network(SHAPES["even"], torch.bfloat16, process.device), process)
    seen = []
    model[0].register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    x = torch.randn(3, 40, dtype=torch.bfloat16, device=process.device)
    for _ in range(2):
        model(x).sum().backward()
        if not all(isinstance(weight, Int8Rows) for weight in seen):
            return [f"the layer multiplied by {seen}"]
        left = [part.untyped_storage().nbytes() for part in (seen[0].q, seen[0].scale)]
        if left != [0, 0] or seen[0] is not seen[-1]:
            return [f"{left} bytes of the gathered weight are left"]
    kept = model[0].weight.to_local()
    faults = [] if isinstance(kept, GatheredAsInt8) else [f"the rank's part is {type(kept)}"]
    return faults + (
        [] if kept.plain.shape == (12, 40) else [f"the rank's part has shape {kept.plain.shape}"]
    )


def check_stochastic_rounding(process) -> list[str]:
    """One draw a gather, of its own on each rank: right on average, and anew where the weight is freed."""
    torch.manual_seed(100 + process.rank)
    faults = []
    for reshard in (True, False):
        model = sharded(
            network(SHAPES["even"], torch.float32, process.device, stochastic_rounding=True), process, reshard
        )
        drawn = []
        model[0].register_forward_hook(lambda layer, *_, drawn=drawn: drawn.append(layer.weight.q.clone()))
        model[0].register_full_backward_pre_hook(
            lambda layer, *_, drawn=drawn: drawn.append(layer.weight.q.clone())
        )
        y = model(torch.randn(3, 40, device=process.device, requires_grad=True))
        y.sum().backward()
        forward, backward = drawn
        if torch.equal(forward, backward) is reshard:
            faults.append(f"reshard={reshard}: forward and backward rounded {'alike' if reshard else 'anew'}")
        if not same_on_every_rank(forward, process):
            faults.append("ranks have different weights")
    return faults


def same_on_every_rank(tensor: torch.Tensor, process) -> bool:
    values = [None] * process.world
    dist.all_gather_object(values, tensor.cpu())
    return all(torch.equal(value, values[0]) for value in values)


def check_optimizers(process) -> list[str]:
    """Two steps from the same gradients: the weights of a model that is gathered as it is, bit for bit."""
    faults = []
    for name in ("adamw", "fused", "foreach", "sgd", "stochastic_adamw", "adamw8bit"):
        results = []
        for gathered in (False, True):
            model = network((128, 127), torch.bfloat16, process.device)
            if gathered:
                Chain.from_configs([model[0].config]).before_shard(model)
            fully_shard(model, mesh=process.mesh)
            optimizer = an_optimizer(name, model)
            torch.manual_seed(3 + process.rank)
            for step in range(2):
                for i, p in enumerate(model[0].parameters()):
                    if name == "adamw8bit" and p.ndim == 1:
                        continue  # another graph to compile
                    p.grad = torch.zeros_like(p)
                    generator = torch.Generator().manual_seed(10 * step + i)
                    write_whole_(p.grad, torch.randn(p.shape, generator=generator))
                norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            states = {
                key: [part.clone() for part in parts(value).values()]
                for key, value in optimizer.state[model[0].weight].items()
            }
            results.append((whole(model[0].weight), norm.full_tensor(), states))
            torch._dynamo.reset()
        (weight, norm, states), (weight_gathered, norm_gathered, states_gathered) = results
        if not (torch.equal(weight, weight_gathered) and torch.equal(norm, norm_gathered)):
            faults.append(f"{name}: other weights")
        for key, values in states.items():
            if not all(torch.equal(a, b) for a, b in zip(values, states_gathered[key], strict=True)):
                faults.append(f"{name}: other {key}")
    return faults


def an_optimizer(name: str, model: nn.Module):
    if name in ("fused", "foreach"):
        return torch.optim.AdamW(model.parameters(), lr=1e-2, **{name: True})
    return build_optimizer(Chain().param_groups(model), OptimSection(name=name, lr=1e-2))


def with_option(run, on: bool = True):
    return replace(run, transform=(replace(run.transform[0], int8_all_gather=on),))


def check_variants(process) -> list[str]:
    """Recomputing blocks and keeping their weights change no bit of a model's losses and gradient norms."""
    run = with_option(tiny_run("llm", "int8_mixed_precision"))
    sections = {
        "plain": {},
        "recomputed": {"checkpointing": "full"},
        "kept": {"reshard_after_forward": False},
    }
    found = {
        name: Trial.of(replace(run, parallel=replace(run.parallel, **section)), process).advance(2)
        for name, section in sections.items()
    }
    return [name for name, value in found.items() if value != found["plain"]]


def check_moved_and_loaded(process) -> list[str]:
    """`Module.to` and load_state_dict keep the gather; ragged rows too."""
    faults = []
    model = sharded(network(SHAPES["ragged"], torch.float32, process.device), process)
    model.to(torch.bfloat16)
    value = torch.randn(7, 40).bfloat16().to(process.device)
    dist.broadcast(value, 0)
    with torch.no_grad():
        write_whole_(model[0].weight, value)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if list(state) != ["0.weight", "0.bias"]:
        faults.append(f"names {list(state)}")
    with torch.no_grad():
        write_whole_(model[0].weight, torch.zeros_like(value))
    model.load_state_dict(state)
    alone = network(SHAPES["ragged"], torch.float32, process.device).to(torch.bfloat16)
    alone[0].weight.data.copy_(value)
    seen = []
    model[0].register_forward_hook(lambda layer, *_: seen.append(type(layer.weight)))
    x = torch.randn(3, 40, device=process.device).bfloat16()
    if not torch.equal(model(x), alone(x)):
        faults.append("another output")
    return faults + ([] if seen == [Int8Rows] else [f"gathered as {seen}"])


@cache
def recipe():
    """recipes/train.py as a module."""
    spec = importlib.util.spec_from_file_location("train_recipe", find("recipes", "train"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(folder: Path, process, *overrides: str) -> None:
    """The recipe itself; six steps, saved after the third."""
    arguments = [
        f"output={folder}",
        f"device={process.device.type}",
        "steps=6",
        "checkpoint.every=3",
        "data.batch_size=4",
        "model.dtype=float32",
        *overrides,
    ]
    run = parse.load("tiny/llm_int8_mixed_precision", arguments)
    with contextlib.redirect_stderr(io.StringIO()):
        assert recipe().train(run, process) == 0


def check_runs(process, folder: Path) -> list[str]:
    """A run, its resumption at its middle, one that turns the option off there, and one that turns it on;
    then a run with random numbers in each gather, and its resumption."""
    on, off = "transform.0.int8_all_gather=true", "transform.0.int8_all_gather=false"
    train(folder / "whole", process, on, "export.at_end=true")
    middle = checkpoint.folder_of(folder / "whole", 3)
    train(folder / "whole_resumed", process, on, f"checkpoint.resume={middle}")
    train(folder / "without", process, off, f"checkpoint.resume={middle}")
    train(folder / "plain", process, off)
    train(folder / "with", process, on, f"checkpoint.resume={checkpoint.folder_of(folder / 'plain', 3)}")
    rounded = (on, "transform.0.stochastic_rounding=true", "parallel.checkpointing=full")
    train(folder / "rounded", process, *rounded)
    middle = checkpoint.folder_of(folder / "rounded", 3)
    train(folder / "rounded_resumed", process, *rounded, f"checkpoint.resume={middle}")
    return []


def main() -> None:
    output, device, folder = sys.argv[1:]
    process = processes.start(device)
    checks = {
        "layers": check_layers,
        "compiled": check_compiled,
        "traffic": check_traffic,
        "what remains": check_what_remains,
        "stochastic rounding": check_stochastic_rounding,
        "optimizers": check_optimizers,
        "variants": check_variants,
        "moved and loaded": check_moved_and_loaded,
        "runs": lambda process: check_runs(process, Path(folder)),
    }
    found = {}

    for name, check in checks.items():
        torch._dynamo.reset()
        faults = [None] * process.world
        dist.all_gather_object(faults, check(process))
        found[name] = [f"rank {rank}: {fault}" for rank, some in enumerate(faults) for fault in some]
    if process.is_main:
        Path(output).write_text(json.dumps(found))
    processes.stop()


if __name__ == "__main__":
    main()
