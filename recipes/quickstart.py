"""The main job in one command: teach a small pretrained model Shakespeare in INT8, and see what INT8 costs.

    qrecipes run quickstart [section.key=value ...]

Runs `train` twice, with the configs `quickstart` (INT8) and `quickstart_baseline` (without), on whatever
device is there, and compares held-out loss, speed and a sample of text before and after. Overrides go to both
runs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from qrecipes import load_export
from qrecipes.cli.report import run_main
from qrecipes.config import parse
from qrecipes.config.run import Run
from qrecipes.data.tokenizers import tokenizer_of
from qrecipes.errors import ConfigError
from qrecipes.export.store import load_run
from qrecipes.generation import generate
from qrecipes.locate import shipped
from qrecipes.models.build import build
from qrecipes.models.weights import load_pretrained

PROMPT = "KING RICHARD:\n"
SAMPLE_TOKENS = 120


def main(argv: list[str]) -> int:
    """Train with INT8 and without, and compare."""
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    for override in argv:
        if override.startswith(("output=", "transform")):
            raise ConfigError(
                f"{override}: the quickstart's two runs differ in just that; use `qrecipes run train`"
            )
    runs = {title: parse.load(config, argv) for title, config in CONFIGS.items()}
    train = shipped("recipes") / "train.py"
    for title, config in CONFIGS.items():
        set_aside(Path(runs[title].output))
        print(f"\n== {title}: qrecipes run train --config {config}", file=sys.stderr)
        # a process each, so that the memory of one is not counted for the other
        status = run_to_its_end([sys.executable, str(train), "--config", config, *argv])
        if status:
            return status
    print(report(runs))
    return 0


CONFIGS = {"INT8 mixed precision": "quickstart", "baseline": "quickstart_baseline"}


def run_to_its_end(command: list[str]) -> int:
    """Exit status of a command that is given the time to save when it is interrupted."""
    child = subprocess.Popen(command)
    # a terminal's Ctrl-C reaches the child by itself; SIGTERM is passed on
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number)),
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_aside(output: Path) -> None:
    """Rename the folder of an earlier quickstart after the time it was made, so that this one starts anew."""
    if output.exists():
        made = time.strftime("%Y%m%d-%H%M%S", time.localtime(output.stat().st_mtime))
        kept = output.with_name(f"{output.name}-{made}")
        output.rename(kept)
        print(f"the earlier {output} is now {kept}", file=sys.stderr)


def report(runs: dict[str, Run]) -> str:
    """What the two runs found, for a reader of the terminal."""
    first = next(iter(runs.values()))
    lines = ["", f"{'':22}{'held-out loss':>15}{'perplexity':>12}{'tokens/s':>12}{'peak memory':>14}"]
    metrics = {title: read_metrics(run) for title, run in runs.items()}
    before = next(iter(metrics.values()))["first"]
    lines.append(f"{'before training':22}{before['val_loss']:15.4f}{before['val_perplexity']:12.2f}")
    for title, found in metrics.items():
        last = found["last"]
        lines.append(
            f"{title:22}{last['val_loss']:15.4f}{last['val_perplexity']:12.2f}{found['tokens_per_s']:12,.0f}"
            f"{found['peak_memory_bytes'] / 1e9:11.2f} GB"
        )
    lines += ["", json.loads(Path(first.output, "receipt.json").read_text())["summary"], ""]

    export = Path(first.output) / "export"
    tokenizer = tokenizer_of(first)
    if tokenizer is None:
        raise ConfigError("tokenizer: the quickstart writes text, and so needs one")
    original = build(first.model, dtype=torch.float32).eval()
    load_pretrained(original, first.model)
    trained = load_export(export)
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    finished, _ = load_run(first.output)
    with torch.no_grad():
        equal = torch.equal(finished(tokens), trained(tokens))
    lines.append(f"the export reloads with {'equal' if equal else 'DIFFERENT'} logits, bit for bit")
    for title, model in (("before", original), ("after", trained)):
        text = generate(model, tokenizer, PROMPT, max_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=40, seed=1)
        lines += ["", f"-- {title} training, continuing {PROMPT!r}:", (PROMPT + text).rstrip()]
    lines += ["", "written:"]
    for run in runs.values():
        lines += [f"  {path}" for path in sorted(Path(run.output).glob("*"))]
    return "\n".join(lines)


def read_metrics(run: Run) -> dict:
    """First and last evaluation, and the median speed, of a run."""
    rows = [json.loads(line) for line in Path(run.output, "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "val_loss" in row]
    steps = [row for row in rows if "loss" in row]
    speeds = sorted(row["tokens_per_s"] for row in steps)
    return {
        "first": evaluations[0],
        "last": evaluations[-1],
        "tokens_per_s": speeds[len(speeds) // 2],
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"],
    }


if __name__ == "__main__":
    run_main(main)
