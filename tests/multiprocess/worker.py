"""Run under torchrun: the losses of tiny runs on all ranks together, and what a checkpoint of them restores.

    torchrun --nproc-per-node 2 worker.py OUTPUT.json DEVICE FOLDER CASE [CASE ...]

A case is FAMILY:METHOD:VARIANT, METHOD empty for none. Only rank 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Trial, peek, tiny_run

from qrecipes.parallel import process as processes
from qrecipes.training import checkpoint
from qrecipes.training.optim import OPTIMIZERS

STEPS = 6


def variant(run, name: str):
    """A tiny run with the settings that a variant stands for."""
    parallel, task = {
        "plain": ({}, {}),
        "checkpointing": ({"checkpointing": "full"}, {}),
        "compile": ({"compile": True}, {}),
        "in_graph": ({"compile": True, "checkpointing": "full", "recompute_in_graph": True}, {}),
        "noreshard": ({"reshard_after_forward": False}, {}),
        "chunked": ({}, {"loss": "chunked", "chunk_tokens": 24}),
        "adamw8bit": ({}, {}),
        "stochastic_adamw": ({}, {}),
        "schedule_free_adamw": ({}, {}),
        "in_backward": ({}, {}),
        "rebuild": ({}, {}),
    }[name]
    run = replace(run, parallel=replace(run.parallel, **parallel), task=replace(run.task, **task))
    if name == "in_backward":
        run = replace(run, optim=replace(run.optim, clip_norm=0.0, in_backward=True))
    if name == "rebuild":
        run = replace(run, checkpoint=replace(run.checkpoint, frozen="rebuild"))
    if name in OPTIMIZERS:
        run = replace(run, optim=replace(run.optim, name=name))
        if "embed_dim" in run.model.args and run.task.kind == "classification":
            # then the position embedding, which one rank holds whole, is large enough for 8 bits on that rank
            run = replace(run, model=replace(run.model, args=run.model.args | {"embed_dim": 256}))
    return run


def eager_optimizer(case: str) -> contextlib.AbstractContextManager:
    """torchao's 8-bit optimizer, which compiles its update for every shape on every rank, without that;
    test_int8_all_gather has it compiled."""
    if case.endswith(":adamw8bit"):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def halved(run, world: int):
    """The same run with each rank's share of the batch."""
    return replace(run, data=replace(run.data, batch_size=run.data.batch_size // world))


def examine(case: str, process, folder: Path) -> dict:
    """Losses of an unbroken run, which is saved in its middle, and of the same run resumed there."""
    family, method, name = case.split(":")
    output = str(folder / case.replace(":", "-"))
    run = halved(variant(tiny_run(family, method or None, output=output, steps=STEPS), name), process.world)
    dtype = torch.bfloat16 if name == "adamw8bit" else torch.float32
    first = Trial.of(run, process, dtype=dtype)
    found = first.advance(3)
    saved = checkpoint.save(run, 3, first.model, first.optimizer, first.data.state_dict(), process)
    drawn = next_draws()
    found += first.advance(STEPS - 3)
    second = Trial.of(run, process, dtype=dtype)
    torch.rand(3)  # what restoring must undo
    second.done, position = checkpoint.restore(saved, run, second.model, second.optimizer, process)
    second.data.load_state_dict(position)
    draws = gather((drawn, next_draws()), process)
    rows = gather(peek(second.data).inputs.flatten(1).tolist(), process)
    resumed = found[:3] + second.advance(STEPS - 3)
    return {"unbroken": found, "resumed": resumed, "draws": draws, "rows": rows}


def next_draws() -> list[float]:
    """What the generator will give next, and still will afterwards: a method may draw from it."""
    with torch.random.fork_rng(devices=[]):
        return torch.rand(2).tolist()


def gather(value, process) -> list:
    """A value of every rank, in order."""
    values = [None] * process.world
    torch.distributed.all_gather_object(values, value)
    return values


def main() -> None:
    output, device, folder, *cases = sys.argv[1:]
    process = processes.start(device)
    found = {}
    for case in cases:
        with eager_optimizer(case):
            found[case] = examine(case, process, Path(folder))
        torch._dynamo.reset()
    if process.is_main:
        Path(output).write_text(json.dumps(found))
    processes.stop()


if __name__ == "__main__":
    main()
