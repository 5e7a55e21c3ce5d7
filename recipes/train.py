"""Train a model: TOML -> model -> transforms -> parallelize -> loop -> checkpoint.

qrecipes run [torchrun flags] train --config NAME_OR_PATH section.key=value ...
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from qrecipes.cli.report import run_main
from qrecipes.config import parse
from qrecipes.config.run import Run
from qrecipes.data import ValidationData, build_data
from qrecipes.data.tokenizers import tokenizer_of
from qrecipes.errors import TrainingError
from qrecipes.export.opened import require_bases, starting_model
from qrecipes.export.peft import load_peft
from qrecipes.models.build import resolve_dtype
from qrecipes.parallel import process as processes
from qrecipes.parallel.apply import parallelize
from qrecipes.parallel.process import Process
from qrecipes.quant.linear import QuantLinear
from qrecipes.training import checkpoint
from qrecipes.training.evaluate import evaluate
from qrecipes.training.interrupt import Interruption
from qrecipes.training.metrics import Log, environment, training_flops
from qrecipes.training.optim import build_optimizer, lr_ratio, set_lr
from qrecipes.training.optimizer_verbs import evaluation_weights
from qrecipes.training.output import prepare_output, write_identity
from qrecipes.training.passes import passes_for
from qrecipes.training.seed import seed_building, seed_running
from qrecipes.training.step import train_step
from qrecipes.training.task import Task
from qrecipes.transforms.base import named_linears
from qrecipes.transforms.chain import Chain

PROBE_TOKENS = 512
"""Most tokens of the sequence that the probe runs: enough rows, and quick for a large model on the CPU."""


def main(argv: list[str]) -> int:
    """Train as the configuration says; the exit status is 130 or 143 after Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="qrecipes run train", description=__doc__)
    parser.add_argument("--config", required=True, help="shipped name or path of a TOML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value, values as in TOML")
    args = parser.parse_args(argv)
    run = parse.load(args.config, args.overrides, check_model=True)
    process = processes.start(run.device)
    try:
        return train(run, process)
    finally:
        processes.stop()


def train(run: Run, process: Process) -> int:
    """One training run on this process."""
    chain = Chain.from_configs(run.transform)
    chain.check_device(process.device)
    resume = checkpoint.find(run.output, run.checkpoint.resume)
    prepare_output(run, process)

    tokenizer = tokenizer_of(run)
    data, held_out = build_data(
        run.data, tokenizer, task=run.task, seed=run.seed, rank=process.rank, world=process.world
    )
    if process.is_main:
        print(f"training data: {data.describe()}", file=sys.stderr)
        if held_out is not None:
            print(f"held-out data: {held_out.describe()}", file=sys.stderr)

    seed_building(run.seed)
    home = process.device if process.mesh is None else torch.device("cpu")  # sharding moves each rank's part
    model = starting_model(run.model, dtype=resolve_dtype(run.model, process.device), device=home)
    low_bit = [fqn for fqn, module in named_linears(model) if isinstance(module, QuantLinear)]
    task = Task(run.task)
    largest = [source.max_token() for source in (data, held_out) if source is not None]
    vocabulary = tokenizer.vocab_size if tokenizer is not None else None
    longest = max((n for n in largest if n is not None), default=None)
    task.check_fits(model, vocabulary, longest, run.data.sequence_length)
    start = data.state_dict()
    probe_batch = data.next_batch().head(1, PROBE_TOKENS).all_targets().to(home)
    data.load_state_dict(start)
    plain = Task(
        replace(run.task, loss="plain")
    )  # its backward pass runs after the forward, as the probe expects
    model = chain.swap(model, loss=lambda m: plain.loss(m, probe_batch), device=process.device)
    require_bases(model, low_bit)
    if run.model.adapter is not None:
        load_peft(Path(run.model.adapter), model, chain, run.model)
    flops = training_flops(model, run.data.sequence_length)
    task = Task(run.task, compile=run.parallel.compile)  # only now: the probe's shape is not the run's
    model = parallelize(model, run.parallel, process, chain)
    model.to(process.device)
    optimizer = build_optimizer(chain.param_groups(model), run.optim)
    passes = passes_for(run.parallel, process, optimizer)
    seed_running(run.seed, process.rank)

    first_step = 0
    if resume is not None:
        first_step, data_state = checkpoint.restore(resume, run, model, optimizer, process)
        data.load_state_dict(data_state)
    if process.is_main:
        if resume is None or first_step < run.steps:
            write_identity(run, chain.receipt, {"command": sys.argv} | environment(process))
        print(chain.receipt.summary(), file=sys.stderr)
        if resume is not None:
            for folder in checkpoint.set_aside_after(run.output, first_step):
                print(f"later than {resume.name}, and so set aside: {folder}", file=sys.stderr)
            print(f"resumed from {resume}, {first_step} of {run.steps} steps done", file=sys.stderr)

    signal = 0
    if process.device.type == "cuda":
        if process.is_main:  # metrics count from here
            built = torch.cuda.max_memory_allocated(process.device) / 1e9
            print(f"building took {built:.1f} GB of GPU memory at most", file=sys.stderr)
        torch.cuda.reset_peak_memory_stats(process.device)
    with Log(run, process, first_step, flops) as log, Interruption(process) as interruption:

        def judge(step: int) -> None:
            log.flush()
            if held_out is not None:
                with evaluation_weights(optimizer):
                    found = evaluate(model, held_out, task, process, run.log.evaluate_batches)
                log.write({"step": step} | found)
            log.restart_clock()

        def save(step: int) -> None:
            log.flush()
            checkpoint.save(run, step, model, optimizer, data.state_dict(), process)
            log.restart_clock()

        model.train()
        if resume is None:
            judge(0)
            if not run.steps:
                save(0)
        try:
            for step in range(first_step, run.steps):
                lr = run.optim.lr * lr_ratio(run.schedule, step, run.steps)
                set_lr(optimizer, lr)
                batches = [data.next_batch() for _ in range(run.optim.accumulate)]
                report = train_step(
                    model, optimizer, chain, batches, task, step, run.optim.clip_norm, process, passes
                )
                done = step + 1
                log.step(done, lr, report)
                if run.log.evaluate_every and done % run.log.evaluate_every == 0 and done < run.steps:
                    judge(done)
                signal = interruption.received()
                every = run.checkpoint.every
                if signal or (every and done % every == 0) or done == run.steps:
                    save(done)
                if signal:
                    break
        except TrainingError as error:
            where = last_good_checkpoint(run, log.confirmed_step - 1, process)
            raise TrainingError(
                f"{error}; {where}; lower optim.lr, set optim.clip_norm, or look at the data of that step"
            ) from error
        judged = process.is_main and first_step >= run.steps and was_judged(run)
        if run.steps and not signal and not process.largest(judged):
            judge(run.steps)
    if signal:
        if process.is_main:
            print(
                f"stopped after step {done} of {run.steps}; run the same command again to go on",
                file=sys.stderr,
            )
        return 128 + signal
    if resume is not None and first_step >= run.steps and process.is_main:
        print(f"{run.output}: all {run.steps} steps were done before; nothing to train", file=sys.stderr)
    if run.export.at_end:
        export_in_this_process(run, process, held_out)
    return 0


def last_good_checkpoint(run: Run, step: int, process: Process) -> str:
    """Which checkpoint is the newest that a finite loss came after; later ones are set aside.

    A loss is measured before its step's update, so a checkpoint is known to be good only one step later.
    """
    if process.is_main:
        checkpoint.set_aside_after(run.output, step)
    process.barrier()
    good = checkpoint.list_checkpoints(run.output)
    return f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"


def was_judged(run: Run) -> bool:
    """Whether the finished run's last evaluation is on record; a kill may have come before it."""
    path = Path(run.output, "metrics.jsonl")
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any(row.get("step") == run.steps and "val_loss" in row for row in map(json.loads, rows))


def export_in_this_process(run: Run, process: Process, held_out: ValidationData | None) -> None:
    """Export the finished run as `qrecipes export` does; ranks but the first wait."""
    from qrecipes.export.store import export_run

    if process.is_main:
        written = export_run(
            Path(run.output),
            step=run.steps,
            huggingface=run.export.huggingface,
            peft=run.export.peft,
            check_merge=run.export.check_merge,
            held_out=held_out,
        )
        for path in written:
            print(f"exported to {path}", file=sys.stderr)
    process.barrier()


if __name__ == "__main__":
    run_main(main)
