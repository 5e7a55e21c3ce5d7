"""Perplexity of a text and scores on tasks, of one or several models.

qrecipes evaluate MODEL [MODEL ...] --text FILE --block N [--stride M] [--tokens K] --json OUT
qrecipes evaluate MODEL [MODEL ...] --tasks piqa,arc_easy --data FOLDER [--limit N] --json OUT
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qrecipes import __version__
from qrecipes.cli.report import run_main
from qrecipes.errors import ConfigError
from qrecipes.evaluation import Perplexity, TaskScores, evaluate_tasks, perplexity, read_text
from qrecipes.evaluation.harness import SEED, require_tasks, shipped_tasks
from qrecipes.evaluation.table import table
from qrecipes.export.opened import OpenedModel, open_model
from qrecipes.models.activation_quantizers import pattern_of
from qrecipes.parallel.process import pick_device

DATA_VARIABLE = "QRECIPES_EVAL_DATA"


def main(argv: list[str]) -> int:
    """Measure each model, print the table, write the JSON."""
    args = _parser().parse_args(argv)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.text is None and not names:
        raise ConfigError("evaluate: nothing to measure; give --text FILE, --tasks NAME,NAME or both")
    _check_used(args, ("stride", "tokens"), args.text is not None, "--text FILE")
    _check_used(args, ("limit", "num_fewshot", "chat_template"), bool(names), "--tasks NAMES")
    if names:
        require_tasks(names, args.data)
    if args.json is not None:
        _check_writable(args.json)
    text = None if args.text is None else read_text(args.text, column=args.column)
    results = [_measure(name, args, text, names) for name in args.model]
    print(table([r.model for r in results], [r.text for r in results], [r.tasks for r in results]))
    if args.json is not None:
        document = _document(results, args, argv)
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _check_used(args: argparse.Namespace, options: tuple[str, ...], is_measured: bool, what: str) -> None:
    """Raise ConfigError where one of `options` is given and what it is about is not measured."""
    for option in options:
        value = getattr(args, option)
        if not is_measured and value is not None and value is not False:
            name = f"--{option.replace('_', '-')}"
            raise ConfigError(
                f"evaluate: {name} says how {what} is measured, which is not given; add it, or "
                f"leave {name} out"
            )


@dataclass(frozen=True)
class Result:
    """What one model measured."""

    model: str
    device: str
    dtype: str
    text: Perplexity | None
    tasks: dict[str, TaskScores]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the keys of `Perplexity`, where there was a text, and `tasks`, where there were."""
        found: dict[str, Any] = {"model": self.model, "device": self.device, "dtype": self.dtype}
        if self.text is not None:
            found |= asdict(self.text)
        if self.tasks:
            found["tasks"] = {name: scores.as_dict() for name, scores in self.tasks.items()}
        return found


def _measure(name: str, args: argparse.Namespace, text: str | None, tasks: list[str]) -> Result:
    """One model, which is let go of before the next is opened."""
    opened = open_model(
        name,
        device=pick_device(args.device),
        dtype=args.dtype,
        as_trained=args.as_trained,
        activations=None if args.activations is None else pattern_of(args.activations),
    )
    progress = sys.stderr.isatty()
    measured = None if text is None else _measure_text(opened, args, text, progress)
    scores: dict[str, TaskScores] = {}
    if tasks:
        scores = evaluate_tasks(
            opened.model,
            opened.require_tokenizer(),
            tasks,
            data=args.data,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            seed=args.seed,
            bos=args.bos,
            chat=opened.chat_template if args.chat_template is True else args.chat_template,
            progress=progress,
        )
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    return Result(name, _device_name(opened.device), dtype, measured, scores)


def _measure_text(opened: OpenedModel, args: argparse.Namespace, text: str, progress: bool) -> Perplexity:
    found = perplexity(
        opened.model,
        opened.require_tokenizer(),
        text,
        block=args.block,
        stride=args.stride,
        tokens=args.tokens,
        bos=bool(args.bos),
        batch_size=args.batch_size,
        progress=progress,
    )
    notes = []
    if args.tokens is not None and found.tokens_read < args.tokens:
        notes.append(f"the text has {found.tokens_read} tokens, fewer than --tokens {args.tokens}")
    if found.tokens_left_out:
        notes.append(f"the last {found.tokens_left_out} tokens fill no block and were left out")
    if not found.decodes_exactly:
        notes.append(
            "its tokens do not decode to the text exactly: bits_per_byte is per byte of what they decode to"
        )
    for note in notes:
        print(f"note: {opened.name}: {note}", file=sys.stderr)
    return found


def _document(results: list[Result], args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """One model's keys at the top, several as a list under `models`."""
    document: dict[str, Any] = {
        "command": shlex.join(["qrecipes", "evaluate", *argv]),
        "versions": _versions(),
        "text": args.text,
        "limit": args.limit,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "chat_template": args.chat_template,
        "as_trained": args.as_trained,
        "activations": args.activations,
    }
    if len(results) == 1:
        return results[0].as_dict() | document
    return document | {"models": [result.as_dict() for result in results]}


def _versions() -> dict[str, str]:
    found = {"qrecipes": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "torchao", "torchtune", "tokenizers", "lm-eval"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _check_writable(path: Path) -> None:
    """Make the folder of the results and try the file, before hours of work are lost for want of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a", encoding="utf-8"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror}; name another file") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qrecipes evaluate",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""perplexity:
  Without --stride the text's tokens are cut into blocks of N, each scored on its own. The first
  token of a block is not predicted, and a last block that is not full is left out.
  With --stride M a window of N tokens moves by M; every token but the first is predicted once, with
  at least N - M tokens before it, from the second window on.
  Every predicted token weighs the same: perplexity is exp of their mean loss in nats. bits_per_byte
  is their sum / ln 2 / the UTF-8 bytes of the text that they decode to.

tasks:
  with --data (or {DATA_VARIABLE}), from local files: {", ".join(shipped_tasks()[:7])},
    {", ".join(shipped_tasks()[7:])}
  any other name, and all without --data: lm-eval's own task, with data from the Hugging Face hub
  a path that ends in .yaml: your own task, as lm-eval defines tasks

JSON: with one model its results stand at the top, with several in a list `models`.""",
    )
    parser.add_argument(
        "model",
        nargs="+",
        metavar="MODEL",
        help="folder of a run or of an export, or hf:FOLDER_OR_REPOSITORY; several stand side by side",
    )
    text = parser.add_argument_group("perplexity")
    text.add_argument("--text", metavar="FILE", help="plain, .jsonl or .parquet, also as .xz or .gz")
    text.add_argument(
        "--block", type=int, default=1024, metavar="N", help="tokens the model is given at once (%(default)s)"
    )
    text.add_argument("--stride", type=int, metavar="M", help="slide a window by M tokens; default: blocks")
    text.add_argument("--tokens", type=int, metavar="K", help="only the first K tokens of the text")
    text.add_argument(
        "--column",
        default="text",
        help="column of a .jsonl or .parquet file, whose rows are joined with an empty line (%(default)s)",
    )
    tasks = parser.add_argument_group("tasks (need the extra `eval`)")
    tasks.add_argument("--tasks", default="", metavar="NAMES", help="names or .yaml files, by commas")
    tasks.add_argument(
        "--data",
        default=os.environ.get(DATA_VARIABLE) or None,
        metavar="FOLDER",
        help=f"folder of task files; default: {DATA_VARIABLE}",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    tasks.add_argument("--num-fewshot", type=int, metavar="K", help="examples; default: the task's own")
    tasks.add_argument(
        "--chat-template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="write prompts as conversations, with the tokenizer's template or the one of that name",
    )
    tasks.add_argument("--seed", type=int, default=SEED, help="of examples and samples (%(default)s)")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin every block and prompt with the beginning-of-text token; default: blocks without, "
        "prompts as transformers would",
    )
    parser.add_argument(
        "--as-trained",
        action="store_true",
        help="a run's model as its transforms compute, instead of finalized",
    )
    parser.add_argument(
        "--activations",
        metavar="PATTERN",
        help="quantize activations: a8, a8kv4, a4, or bits by name as in na=8,k=4,v=4",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="rows at once (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all results there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of an hf: model"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
