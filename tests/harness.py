"""A run taken apart, so that tests can hold each piece: the same calls as recipes/train.py, in the same
order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from qrecipes.cli.main import main
from qrecipes.config import parse
from qrecipes.config.run import Run
from qrecipes.data import Batch, TrainingData, build_training_data
from qrecipes.locate import shipped
from qrecipes.models.build import build
from qrecipes.parallel.apply import parallelize
from qrecipes.parallel.process import Process
from qrecipes.training.optim import build_optimizer, lr_ratio, set_lr
from qrecipes.training.passes import Passes, passes_for
from qrecipes.training.seed import seed_building, seed_running
from qrecipes.training.step import train_step
from qrecipes.training.task import Task
from qrecipes.transforms import REGISTRY, Bounds, Transform
from qrecipes.transforms.chain import Chain


class Inert(Transform):
    """A method that changes nothing, for tests of what surrounds methods; a subclass names its Config."""

    def sites(self, model: nn.Module) -> dict[str, nn.Module]:
        return {}

    def swap(self, model: nn.Module) -> nn.Module:
        return model

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return {}

    def bounds(self) -> Bounds:
        return Bounds(None, None, None)

    def finalize(self, model: nn.Module, device: torch.device | None = None) -> nn.Module:
        return model


ALONE = Process(0, 1, torch.device("cpu"), None)
FAMILIES = ("llm", "vit")


def methods() -> list[str]:
    """Every registered method."""
    return sorted(REGISTRY)


@cache
def variants() -> dict[str, tuple[str, ...]]:
    """Tiny configurations with transforms that carry no registered method's name, and their families."""
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted((shipped("configs") / "tiny").glob("*_*.toml")):
        family, _, name = path.stem.partition("_")
        if family in FAMILIES and name not in REGISTRY and parse.load(f"tiny/{path.stem}").transform:
            found[name] = (*found.get(name, ()), family)
    return found


def tiny_run(family: str, method: str | None, **changes: object) -> Run:
    """The shipped tiny configuration of a method on a family; `changes` replace fields, `section__field`
    nested ones."""
    run = parse.load(f"tiny/{family}" + (f"_{method}" if method else ""))
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            value = replace(getattr(run, section), **{field: value})
        run = replace(run, **{section: value})
    return run


def build_plain(run: Run, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The run's model before any transform, from its seed."""
    seed_building(run.seed)
    return build(run.model, dtype=dtype)


class Repeats:
    """Stands for CUDA graphs on a CPU: what was recorded runs again, on the tensors that it ran on."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.recorded = self.finished = 0

    def run(self, action):
        action()

    def record(self, action):
        self.recorded += 1
        return action

    def finish(self):
        self.finished += 1


@dataclass
class Trial:
    """A run ready to step."""

    run: Run
    process: Process
    chain: Chain
    model: nn.Module
    optimizer: Optimizer
    data: TrainingData
    task: Task
    passes: Passes
    done: int = 0

    @classmethod
    def of(
        cls, run: Run, process: Process = ALONE, dtype: torch.dtype = torch.float32, probe: bool = False
    ) -> Trial:
        data = build_training_data(
            run.data, None, task=run.task, seed=run.seed, rank=process.rank, world=process.world
        )
        model = build_plain(run, dtype)
        task = Task(run.task)
        chain = Chain.from_configs(run.transform)
        batch = peek(data) if probe else None
        model = chain.swap(model, loss=(lambda m: task.loss(m, batch)) if probe else None)
        model = parallelize(model, run.parallel, process, chain).to(process.device)
        optimizer = build_optimizer(chain.param_groups(model), run.optim)
        seed_running(run.seed, process.rank)
        passes = passes_for(run.parallel, process, optimizer)
        return cls(run, process, chain, model.train(), optimizer, data, task, passes)

    def advance(self, steps: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of the next `steps` optimizer steps."""
        found = []
        for step in range(self.done, self.done + steps):
            set_lr(self.optimizer, self.run.optim.lr * lr_ratio(self.run.schedule, step, self.run.steps))
            batches = [self.data.next_batch() for _ in range(self.run.optim.accumulate)]
            report = train_step(
                self.model,
                self.optimizer,
                self.chain,
                batches,
                self.task,
                step,
                self.run.optim.clip_norm,
                self.process,
                self.passes,
            )
            found.append((float(report.loss), float(report.grad_norm)))
        self.done += steps
        return found


def write_run(
    folder: Path, model: dict[str, object], *transforms: dict[str, object], **settings: object
) -> Path:
    """The TOML of a short run on a text beside it, that starts from the `model` section given; its path.

    `settings` are the run's own, and `section__field` those of its sections, in place of what is here.
    """
    text = folder / "text.txt"
    text.write_text("Once upon a time there was a tiny run. " * 60, encoding="utf-8")
    run: dict[str, Any] = {
        "steps": 2,
        "output": str(folder / "run"),
        "device": "cpu",
        "model": model,
        "data": {
            "source": "text",
            "files": [str(text)],
            "validation_fraction": 0.2,
            "sequence_length": 32,
            "batch_size": 2,
        },
        "log": {"progress": False},
        "transform": list(transforms),
    }
    for key, value in settings.items():
        section, _, field = key.partition("__")
        if field:
            run.setdefault(section, {})[field] = value
        else:
            run[section] = value
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(run), encoding="utf-8")
    return path


def peek(data: TrainingData) -> Batch:
    """The next batch, which stays the next."""
    state = data.state_dict()
    batch = data.next_batch()
    data.load_state_dict(state)
    return batch


def losses(found: list[tuple[float, float]]) -> list[float]:
    """The losses of `Trial.advance`."""
    return [loss for loss, _ in found]


def predict(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's output in evaluation mode, with the random state put back."""
    was_training = model.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model.eval()(batch.inputs)
    model.train(was_training)
    return output


def command_line(*arguments: str) -> int:
    """Exit status of `qrecipes ARGUMENTS` in this process; a recipe ends by SystemExit."""
    try:
        return main(list(arguments))
    except SystemExit as request:
        return request.code or 0


def saved_for_backward(call: Callable[..., torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor that `call(x)` keeps for its backward pass, which is then run."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x)
    y.sum().backward()
    assert kept
    return kept


def products(layer: nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of a layer and every gradient of it, by name."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(grad_y)
    found = {"output": y.detach(), "grad_input": x.grad}
    return found | {f"grad_{name}": p.grad for name, p in layer.named_parameters()}
