"""Train shipped configurations for a few steps, one process each, and record speed, memory and losses as
JSON.

    tools/bench_run.py CASES.toml [--output CASES.json]

CASES.toml is a TOML file of `[[case]]` tables with `title`, `config` and `overrides` (a list of
section.key=value), and optionally `flags` (a list of torchrun flags). The median is over the steps after
`warmup` (default 10).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tomli

PROGRAM = (sys.executable, "-m", "qrecipes.cli.main")
QUIET = "log.progress=false"


def main() -> int:
    """Run every case and print the table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--output", type=Path, help="default: CASES with the suffix .json")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one case")
    args = parser.parse_args()
    output = args.output or args.cases.with_suffix(".json")
    command = f"tools/bench_run.py {args.cases}"
    cases = tomli.loads(args.cases.read_text())["case"]
    results = []
    for case in cases:
        results.append(run_case(case, args.timeout))
        output.write_text(json.dumps({"command": command, "results": results}, indent=1) + "\n")
    print(table(results))
    return int(any("failed" in result for result in results))


def train_command(
    config: str, overrides: Sequence[str], folder: Path | None = None, flags: Sequence[str] = ()
) -> list[str]:
    """The command that trains into `folder`, silently, with torchrun `flags`."""
    command = [*PROGRAM, "run", *flags, "train", "--config", config, *overrides]
    return command if folder is None else [*command, f"output={folder}", QUIET]


def shown(command: Sequence[str]) -> str:
    """A `train_command` as one would type it, without the temporary folder."""
    arguments = command[len(PROGRAM) : -2 if command[-1] == QUIET else None]
    return "qrecipes " + shlex.join(arguments)


def run_case(case: dict, timeout: float) -> dict:
    """Train one case in its own process, so that no graph or memory of another is counted."""
    with tempfile.TemporaryDirectory() as folder:
        flags = case.get("flags", [])
        command = train_command(case["config"], case.get("overrides", []), Path(folder), flags)
        result = {"title": case["title"], "command": shown(command)}
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return result | {"failed": f"took longer than {timeout:.0f} s"}
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return result | {"failed": done.stderr[-1500:]}
        result["wall_s"] = round(time.monotonic() - start, 1)
        return result | read(Path(folder), case.get("warmup", 10))


def read(folder: Path, warmup: int) -> dict:
    """What a finished run's folder tells."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "val_loss" in row]
    measured = steps[warmup:] or steps
    environment = json.loads((folder / "environment.json").read_text())
    found = {
        "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in measured), 1),
        "step_ms": round(1e3 * statistics.median(row["step_s"] for row in measured), 2),
        "peak_memory_gb": round(steps[-1]["peak_memory_bytes"] / 1e9, 3),
        "steps": len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "receipt": json.loads((folder / "receipt.json").read_text())["summary"],
        "environment": {key: value for key, value in environment.items() if key != "command"},
    }
    if any("mfu" in row for row in measured):
        found["mfu"] = round(statistics.median(row["mfu"] for row in measured if "mfu" in row), 4)
    if held_out:
        found["val_loss"] = [[row["step"], row["val_loss"]] for row in held_out]
    return found


def table(results: list[dict]) -> str:
    """The results for a reader."""
    lines = [f"{'case':44}{'tokens/s':>12}{'step ms':>10}{'peak GB':>9}{'MFU':>8}{'last loss':>11}"]
    for r in results:
        if "failed" in r:
            lines.append(f"{r['title']:44}  failed: {r['failed'].strip().splitlines()[-1][:90]}")
            continue
        lines.append(
            f"{r['title']:44}{r['tokens_per_s']:12,.0f}{r['step_ms']:10.2f}{r['peak_memory_gb']:9.2f}"
            f"{r.get('mfu', float('nan')):8.3f}{r['last_loss']:11.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
