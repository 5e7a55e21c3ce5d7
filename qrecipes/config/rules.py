"""Rules across the sections of a run that need no model: impossible combinations stop before anything is
built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from qrecipes.config.problems import Problem, attribute, did_you_mean
from qrecipes.config.run import ConversationSection, OptimSection, Run
from qrecipes.errors import ConfigError
from qrecipes.transforms.base import transform_for


def check(run: Run) -> None:
    """Hold a run to the rules across sections, and to those of each of its transforms.

    Raises:
        ConfigError: with one line a problem, `KEY: value, rule; remedy`.
    """
    problems = [
        *_schedule(run),
        *_optimizer(run),
        *_task(run),
        *_conversation(run),
        *_sizes(run),
        *_paths(run),
        *_transforms(run),
    ]
    if problems:
        raise ConfigError("\n".join(map(str, problems)))


def _schedule(run: Run) -> Iterator[Problem]:
    warmup, decay = run.schedule.warmup_steps, run.schedule.decay_steps
    if run.steps and warmup + decay > run.steps:
        key, steps = ("warmup_steps", f"{warmup}") if warmup else ("decay_steps", f"{decay}")
        if warmup and decay:
            steps = f"{warmup} and {decay} of decay_steps"
        yield Problem(
            ("schedule", key),
            f"{steps} are more than the {run.steps} steps of the run; shorten the schedule, or raise steps",
        )


def _optimizer(run: Run) -> Iterator[Problem]:
    """The optimizer against the schedule, the device and what the run's transforms do between steps."""
    optim = run.optim
    if optim.name == "schedule_free_adamw" and run.schedule.kind != "constant":
        yield Problem(
            ("schedule", "kind"),
            f"{run.schedule.kind!r} lowers the learning rate, and optim.name 'schedule_free_adamw' averages "
            'weights instead: a falling rate spoils the average; set schedule.kind = "constant" (warm-up is '
            "fine)",
        )
    if optim.offload != "none" and run.device == "cpu":
        yield Problem(
            ("optim", "offload"),
            f"{optim.offload!r} moves the state from a GPU to the CPU, and device is 'cpu'; set offload = "
            '"none"',
        )
    if run.parallel.cuda_graphs and run.device == "cpu":
        yield Problem(("parallel", "cuda_graphs"), "true, and device is 'cpu'; set it to false")
    if run.parallel.cuda_graphs and optim.takes_gradients:
        taker = _taker(optim)
        yield Problem(
            ("optim", taker),
            f"{getattr(optim, taker)!r} updates in the backward pass, which parallel.cuda_graphs records; "
            "set parallel.cuda_graphs = false",
        )
    yield from _hooks(run)


def _taker(optim: OptimSection) -> str:
    """The key by which an optimizer that takes gradients does so."""
    return "in_backward" if optim.in_backward else "offload"


def _hooks(run: Run) -> Iterator[Problem]:
    """What transforms do around the backward pass, against optimizers that leave no room for it."""
    optim = run.optim
    taker = _taker(optim)
    keeper = "name" if optim.offload == "none" else "offload"
    remedy = {"in_backward": "in_backward = false", "offload": 'offload = "none"', "name": "another name"}
    for transform in map(transform_for, run.transform):
        if optim.takes_gradients and "after_backward" in transform.hooks:
            yield Problem(
                ("optim", taker),
                f"{getattr(optim, taker)!r} leaves no gradients after the backward pass, where "
                f"{transform.name} uses them; set {remedy[taker]}, or remove the transform",
            )
        elif optim.copies_weights and transform.hooks:
            yield Problem(
                ("optim", keeper),
                f"{getattr(optim, keeper)!r} keeps its own copy of the weights, and would undo what "
                f"{transform.name} may do to them in {' and '.join(sorted(transform.hooks))}; set "
                f"{remedy[keeper]}, or remove the transform",
            )


def _task(run: Run) -> Iterator[Problem]:
    task, source = run.task.kind, run.data.source
    if task == "classification" and source not in ("images", "synthetic"):
        yield Problem(
            ("data", "source"),
            f"{source!r} has no classes for task.kind 'classification' to learn; use 'images' or 'synthetic'",
        )
    if task == "language_modeling" and source == "images":
        yield Problem(
            ("data", "source"),
            "'images' has no text for task.kind 'language_modeling' to learn; "
            'set task.kind = "classification", or choose another source',
        )
    if task == "language_modeling" and run.model.source.startswith("timm:"):
        yield Problem(
            ("model", "source"),
            f"{run.model.source!r} classifies images, and task.kind is 'language_modeling'; "
            'set task.kind = "classification", or take a torchtune model',
        )
    own_tokenizer = run.model.source.startswith("hf:")  # in the model's folder
    needs_tokenizer = (
        source in ("text", "dataset", "conversations") and run.tokenizer is None and not own_tokenizer
    )
    if task == "language_modeling" and needs_tokenizer:
        yield Problem(
            ("data", "source"),
            f'{source!r} is text, and there is no tokenizer; add [tokenizer], such as kind = "bytes"',
        )


def _conversation(run: Run) -> Iterator[Problem]:
    data, section = run.data, run.data.conversation
    if data.source != "conversations":
        if section != ConversationSection():
            yield Problem(
                ("data", "conversation"),
                f"has no use with data.source {data.source!r}; remove it, or set data.source = "
                '"conversations"',
            )
        return
    longest = max(section.length_buckets, default=data.sequence_length)
    if longest != data.sequence_length:
        yield Problem(
            ("data", "conversation", "length_buckets"),
            f"the longest is {longest}, and data.sequence_length, the longest row, is "
            f"{data.sequence_length}; make them equal",
        )
    if section.format == "text" and section.system is not None:
        yield Problem(
            ("data", "conversation", "system"), "text has no turns for it to stand before; remove it"
        )


def _sizes(run: Run) -> Iterator[Problem]:
    """Sizes of the data against the builder's arguments, where the run gives both."""
    data, args = run.data, run.model.args
    sizes: list[tuple[str, int, str]] = []
    if run.task.kind == "language_modeling":
        sizes.append(("sequence_length", data.sequence_length, "max_seq_len"))
        if data.source == "synthetic":
            sizes.append(("vocab_size", data.vocab_size, "vocab_size"))
    elif data.source == "synthetic":
        sizes.append(("num_classes", data.num_classes, "num_classes"))
    for key, size, arg in sizes:
        most = args.get(arg)
        if isinstance(most, int) and size > most:
            yield Problem(
                ("data", key),
                f"{size} is more than the model's {arg}, {most}; lower it, or raise model.args.{arg}",
            )
    image_size = args.get("img_size")
    if run.task.kind == "classification" and isinstance(image_size, int) and data.image_size != image_size:
        yield Problem(
            ("data", "image_size"),
            f"{data.image_size} is not the model's img_size, {image_size}; make them equal",
        )


def _paths(run: Run) -> Iterator[Problem]:
    output = Path(run.output)
    if not run.output.strip():
        yield Problem(("output",), "'' is no folder; name one, such as runs/mine")
    elif run.output.startswith("~"):
        yield Problem(("output",), f"{run.output!r} would be a folder called '~'; write the path in full")
    else:
        for folder in (output, *output.parents):
            if os.path.exists(folder) and not folder.is_dir():  # false for a name too long, where Path raises
                yield Problem(
                    ("output",), f"{run.output!r} cannot be a folder: {folder} is a file; choose another"
                )
                break
    resume = run.checkpoint.resume
    if resume not in ("auto", "never") and not os.path.exists(resume):
        # A checkpoint may lie on another machine, but a misspelt word is no path.
        hint = did_you_mean(resume.lower(), ["auto", "never"])
        if hint or not resume:
            remedy = hint or "write one of them"
            yield Problem(
                ("checkpoint", "resume"),
                f"{resume!r} is neither auto, never nor a checkpoint that exists; {remedy}",
            )


def _transforms(run: Run) -> Iterator[Problem]:
    for index, config in enumerate(run.transform):
        transform = transform_for(config)
        keys = [field.name for field in fields(config)]
        try:
            transform.check(run)
        except (ConfigError, ValueError) as error:
            for line in str(error).splitlines():
                yield attribute(line, ("transform", index), keys, transform.name)
