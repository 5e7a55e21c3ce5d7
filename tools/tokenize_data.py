"""Tokenize text into a folder of shards that training reads: in parallel, and resumable at any time.

    tools/tokenize_data.py --config tinystories                       # tools/data/tinystories.toml
    tools/tokenize_data.py corpus/*.jsonl.xz --tokenizer OWNER/NAME --output data/corpus
    tools/tokenize_data.py --verify data/corpus                       # checksums of all its shards

Flags override the file's keys, whose meaning is in `qrecipes/config/tokenization.py`. Killed or stopped, the
same command goes on. A run then has

    [data]
    source = "tokens"
    files = ["data/corpus/train"]

    [tokenizer]
    path = "data/corpus/tokenizer"
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qrecipes.cli.report import run_main
from qrecipes.config.tokenization import Tokenization, load
from qrecipes.data.tokenize import Report, tokenize
from qrecipes.data.tokens import check_sum, find_shards, open_shard
from qrecipes.errors import ConfigError, DataError

CONFIGS = Path(__file__).resolve().parent / "data"
LINE_S = 2.0
"""Seconds between progress lines on a terminal; ten times as many elsewhere."""
FLAGS = (
    "output",
    "source",
    "split",
    "validation_split",
    "validation_files",
    "validation_fraction",
    "text_column",
    "document_separator",
    "streaming",
    "shard_tokens",
    "dtype",
)
"""Flags that are keys of the file."""


def main(argv: list[str]) -> int:
    """Tokenize, or verify; the exit status is 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    if args.verify is not None:
        return verify(args.verify)
    config = load(_config_path(args.config), _flags(args))
    progress = _Progress()
    try:
        report = tokenize(config, workers=args.workers, overwrite=args.overwrite, notify=progress)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(summary(report))
    if args.report is not None:
        add_result(args.report, args.title, argv, config, report, args.workers)
    return 0


def verify(folder: Path) -> int:
    """Read every shard of every split below `folder` and compare its size and checksum."""
    splits = [folder] if not (folder / "index.json").exists() else _splits(folder)
    count = 0
    for split in splits:
        for shard in find_shards([str(split)], "--verify"):
            open_shard(shard, "uint16", verify=False)
            if shard.sha256 is None:
                raise DataError(f"{shard.path}: {shard.index} has no checksum of it")
            check_sum(shard)
            count += 1
    print(f"{folder}: {count} shards, every checksum right")
    return 0


def summary(report: Report) -> str:
    """The folder in a few lines."""
    lines = [
        f"{split}: {report.documents[split]:,} documents, {report.tokens[split]:,} tokens, "
        f"{report.text_bytes[split] / 1e6:,.1f} MB of text"
        for split in report.tokens
    ]
    lines.append(
        f"{report.folder}: {report.shards} shards, {report.tokens_per_byte:.4f} tokens/byte, "
        f"{report.blank_documents:,} blank documents left out"
    )
    if report.new_bytes:
        lines.append(
            f"{report.new_bytes / 1e6:,.1f} MB in {report.seconds:,.1f} s: {report.mb_per_s:.2f} MB/s"
        )
    else:
        lines.append("nothing to do: the folder was complete")
    return "\n".join(lines)


def add_result(
    path: Path, title: str | None, argv: list[str], config: Tokenization, report: Report, workers: int
) -> None:
    """Add this run's speed to the results in a JSON file, in place of an earlier result of that title."""
    results = json.loads(path.read_text())["results"] if path.exists() else []
    title = (
        title
        or f"{config.tokenizer.kind} {config.tokenizer.path or ''}, {workers} worker{'s' * (workers != 1)}"
    )
    result = {
        "title": title,
        "command": "tools/tokenize_data.py " + shlex.join(_without_folders(argv)),
        "workers": workers,
        "mb_per_s": round(report.mb_per_s, 3),
        "seconds": round(report.seconds, 2),
        "mb_per_encoding_cpu_s": round(report.new_bytes / 1e6 / report.encoding_cpu_s, 3),
        "reading_cpu_s": round(report.reading_cpu_s, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "text_mb": round(report.new_bytes / 1e6, 3),
        "tokens": sum(report.tokens.values()),
        "documents": sum(report.documents.values()),
        "tokens_per_byte": round(report.tokens_per_byte, 5),
        "environment": environment(),
    }
    results = [other for other in results if other["title"] != title] + [result]
    path.write_text(json.dumps({"results": results}, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Machine and versions."""
    packages = ("numpy", "tokenizers", "tiktoken", "sentencepiece", "pyarrow", "datasets")
    return {
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {platform.system()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


class _Progress:
    """A line on stderr from time to time."""

    def __init__(self) -> None:
        self.every = LINE_S if sys.stderr.isatty() else 10 * LINE_S
        self.last = time.monotonic()

    def __call__(self, report: Report) -> None:
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        print(
            f"{sum(report.documents.values()):,} documents, {sum(report.tokens.values()):,} tokens, "
            f"{report.shards} shards, {report.mb_per_s:.2f} MB/s",
            file=sys.stderr,
        )


def _config_path(name: str | None) -> Path | None:
    if name is None:
        return None
    for path in (Path(name), CONFIGS / f"{name.removesuffix('.toml')}.toml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.toml")))
    raise ConfigError(f"--config: {name} is neither a file nor one of {shipped}")


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as keys of the file."""
    flags = {key: getattr(args, key) for key in FLAGS if getattr(args, key) is not None}
    if args.files:
        flags["files"] = args.files
    tokenizer = {"path": args.tokenizer, "kind": args.tokenizer_kind, "pattern": args.tokenizer_pattern}
    given = {key: value for key, value in tokenizer.items() if value is not None}
    return flags | ({"tokenizer": given} if given else {})


def _without_folders(argv: list[str]) -> list[str]:
    """The arguments without the folders that files happen to lie in."""
    return [Path(text).name if os.sep in text and not text.startswith("-") else text for text in argv]


def _splits(folder: Path) -> list[Path]:
    return [folder / name for name in json.loads((folder / "index.json").read_text())["splits"]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/tokenize_data.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="*", help="files or globs of text; a dataset's name, then its configuration"
    )
    parser.add_argument("--config", metavar="NAME", help="TOML file, or the name of one in tools/data")
    parser.add_argument("--output", metavar="DIR")
    parser.add_argument("--tokenizer", metavar="PATH", help="file, folder, asset:NAME or OWNER/NAME")
    parser.add_argument("--tokenizer-kind", metavar="KIND", help="auto, hf, tiktoken, sentencepiece or bytes")
    parser.add_argument("--tokenizer-pattern", metavar="NAME", help="of a tiktoken file, such as gpt2")
    parser.add_argument("--source", metavar="KIND", help="text or dataset")
    parser.add_argument("--split")
    parser.add_argument("--validation-split", metavar="SPLIT")
    parser.add_argument("--validation-files", nargs="+", metavar="FILE")
    parser.add_argument(
        "--validation-fraction", type=float, metavar="F", help="share of the documents held out"
    )
    parser.add_argument("--text-column", metavar="NAME")
    parser.add_argument("--document-separator", metavar="LINE", help="line between documents of .txt files")
    parser.add_argument("--streaming", action="store_true", default=None)
    parser.add_argument("--shard-tokens", type=int, metavar="N")
    parser.add_argument("--dtype", metavar="TYPE", help="auto, uint16 or uint32")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that tokenize (default: one a core; 0: this one alone)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove what an earlier run wrote, and start again"
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="add this run's speed to a file of results"
    )
    parser.add_argument("--title", help="of the result")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="only check the shards in DIR")
    return parser


if __name__ == "__main__":
    run_main(main)
