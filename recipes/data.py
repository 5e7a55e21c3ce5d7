"""Look at what a configuration trains on, as the model sees it, without building the model.

qrecipes data preview CONFIG [KEY=VALUE ...] [--rows N] [--no-color]

Learnt tokens are green on a terminal, and between [[ and ]] elsewhere.
"""

from __future__ import annotations

import argparse
import os
import sys

from qrecipes.cli.report import run_main
from qrecipes.config import parse
from qrecipes.config.run import Run
from qrecipes.data import TrainingData, build_data
from qrecipes.data.preview import BRACKETS, COLOR, Marks, count, documents_of, render
from qrecipes.data.tokenizers import Tokenizer, tokenizer_of
from qrecipes.errors import ConfigError


def main(argv: list[str]) -> int:
    """Print the first rows that training would draw, then counts."""
    parser = argparse.ArgumentParser(
        prog="qrecipes data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="qrecipes data preview CONFIG [KEY=VALUE ...] [--rows N] [--no-color]",
    )
    parser.add_argument("verb", choices=("preview",), help="show the first rows")
    parser.add_argument("config", metavar="CONFIG", help="shipped name or path of a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values as in TOML")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="rows to show (default %(default)s)")
    parser.add_argument("--no-color", action="store_true", help="brackets even on a terminal")
    args = parser.parse_intermixed_args(argv)
    if args.rows < 1:
        raise ConfigError(f"--rows: {args.rows}; show at least 1")
    run = parse.load(args.config, args.overrides)
    if run.task.kind != "language_modeling":
        raise ConfigError(f"{args.config}: trains on images, which have no text to show; name one of text")
    tokenizer = tokenizer_of(run)
    data, held_out = build_data(run.data, tokenizer, task=run.task, seed=run.seed, rank=0, world=1)
    colored = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
    show(run, data, tokenizer, args.rows, COLOR if colored else BRACKETS)
    print(f"training data: {data.describe()}")
    if held_out is not None:
        print(f"held-out data: {held_out.describe()}")
    return 0


def show(run: Run, data: TrainingData, tokenizer: Tokenizer | None, rows: int, marks: Marks) -> None:
    """Print the first `rows` rows of the training data, and how much of them is learnt."""
    shown = total = learnt = 0
    while shown < rows:
        batch = data.next_batch()
        for row in range(min(len(batch.inputs), rows - shown)):
            shown += 1
            documents, padding = documents_of(batch, row)
            tokens, targets = count(documents)
            total, learnt = total + tokens, learnt + targets
            held = f"{_plural(tokens, 'token')} of {_plural(len(documents), 'document')}, {padding:,} padding"
            print(f"=== row {shown}: {held}, {_share(targets, tokens)} learnt ===")
            for number, document in enumerate(documents, start=1):
                if batch.documents is not None:
                    size = _plural(len(document.ids), "token")
                    print(f"--- document {number} of {len(documents)}: {size} ---")
                print(render(document, tokenizer, marks))
    legend = f"learnt tokens look {marks.before}like this{marks.after}"
    print(f"=== {_plural(shown, 'row')}, {_share(learnt, total)} of the tokens learnt; {legend} ===")


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})"


if __name__ == "__main__":
    run_main(main)
