"""Export a run: checkpoint -> finalize -> a folder that reloads bit for bit, and a Hugging Face folder.

qrecipes export RUN_FOLDER [--step N] [--output FOLDER] [--no-huggingface] [--peft] [--no-merge-check]
"""

from __future__ import annotations

import argparse

from qrecipes.cli.report import run_main
from qrecipes.export.store import export_run


def main(argv: list[str]) -> int:
    """Write the export and say where it is."""
    parser = argparse.ArgumentParser(prog="qrecipes export", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run (its `output`)")
    parser.add_argument("--step", type=int, help="which checkpoint, by its step; default: the newest")
    parser.add_argument("--output", help="folder to write; default: RUN/export")
    parser.add_argument("--no-huggingface", action="store_true", help="write no Hugging Face folder")
    parser.add_argument(
        "--peft", action="store_true", help="also write the adapters as peft reads them, in OUTPUT/peft"
    )
    parser.add_argument(
        "--no-merge-check",
        action="store_true",
        help="export even where merging costs more than the method allows; merge_report.json has the cost",
    )
    args = parser.parse_args(argv)
    written = export_run(
        args.run,
        args.output,
        step=args.step,
        huggingface=not args.no_huggingface,
        peft=args.peft,
        check_merge=not args.no_merge_check,
    )
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    run_main(main)
