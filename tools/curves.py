"""Curves of training runs, and how the runs of one case compare with those of another, seed by seed.

A curve is a list of rows, one an evaluation: its step, what was measured on held-out data (`val_loss`, ...),
and `loss`, the training loss averaged over the steps since the evaluation before. A run is a table with its
`case`, its `seed` and its `curve`, or with why it `failed`. Differences are relative and in percent of the
baseline.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, float]
Run = Mapping[str, Any]


def read_curve(path: Path) -> list[Row]:
    """The curve that a run's metrics.jsonl tells.

    Raises:
        ValueError: if a loss is not finite, or nothing was evaluated.
    """
    rows: list[Row] = []
    losses: list[float] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        wrong = next((key for key, value in found.items() if not math.isfinite(float(value))), None)
        if wrong is not None:
            raise ValueError(f"step {found['step']}: {wrong} is {found[wrong]}")
        if "val_loss" not in found:
            losses.append(found["loss"])
            continue
        rows.append(found | ({"loss": statistics.fmean(losses)} if losses else {}))
        losses = []
    if not rows:
        raise ValueError("no evaluation; name held-out data in the run")
    return rows


def values(run: Run, metric: str) -> dict[int, float]:
    """The metric by step, at the steps that have it."""
    return {int(row["step"]): row[metric] for row in run["curve"] if metric in row}


def finals(runs: Iterable[Run], metric: str) -> dict[int, float]:
    """The metric at the end, by seed, of the runs that did not fail."""
    return {run["seed"]: list(values(run, metric).values())[-1] for run in runs if "failed" not in run}


def best(runs: Iterable[Run], metric: str, better: str = "lower") -> Run | None:
    """The run that ended best, the first of equals; None if all failed."""
    ended = [(list(values(run, metric).values())[-1], run) for run in runs if "failed" not in run]
    pick = min if better == "lower" else max
    return pick(ended, key=lambda pair: pair[0])[1] if ended else None


def differences(found: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    """Relative difference in percent by seed, or by step, where both have a value; none from a base of 0."""
    return {key: 100 * (found[key] - base[key]) / abs(base[key]) for key in found if base.get(key)}


def mean_and_spread(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1), each None where there are too few numbers."""
    mean = statistics.fmean(numbers) if numbers else None
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else None


def summarize(plan: Mapping[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each case of the plan: the metric at the end, its spread over the seeds, and the difference from
    the baseline's run of the same seed, which cancels what the seed does to both.

    A goal is reached where the case is worse than the baseline by at most `goal_percent`, on average over the
    seeds; whether worse is above or below, the plan's `better` says. Without a difference it is None.
    """
    metric, worse = plan["metric"], 1 if plan["better"] == "lower" else -1
    base = finals(of_case(runs, plan["baseline"]), metric)
    summary = []
    for case in plan["case"]:
        own = of_case(runs, case["title"])
        found = finals(own, metric)
        mean, spread = mean_and_spread(list(found.values()))
        entry = {
            "case": case["title"],
            "runs": len(found),
            "failed": len(own) - len(found),
            "mean": mean,
            "spread": spread,
        }
        if case["title"] != plan["baseline"]:
            apart = differences(found, base)
            mean, spread = mean_and_spread(list(apart.values()))
            entry |= {"difference_percent": mean, "difference_spread": spread, "differences_percent": apart}
            if case.get("goal_percent") is not None:
                goal = case["goal_percent"]
                entry |= {"goal_percent": goal, "reached": None if mean is None else worse * mean <= goal}
        summary.append(entry)
    return summary


def of_case(runs: Iterable[Run], title: str) -> list[Run]:
    """The runs of one case."""
    return [run for run in runs if run["case"] == title]


def table(metric: str, baseline: str, summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary for a reader."""
    width = max(len(entry["case"]) for entry in summary) + 2
    wide = max(12, len(metric) + 2)
    lines = [
        f"{'case':{width}}{'runs':>5}{metric:>{wide}}{'spread':>9}{'%':>9}{'spread':>9}"
        f"{'by seed':>26}{'goal':>7}   (% of {baseline}, same seed)"
    ]
    for entry in summary:
        cells = [f"{entry['case']:{width}}{entry['runs']:5}"]
        cells += [_cell(entry["mean"], wide, ".4f"), _cell(entry["spread"], 9, ".4f")]
        if "difference_percent" in entry:
            cells.append(_cell(entry["difference_percent"], 9, "+.3f"))
            cells.append(_cell(entry["difference_spread"], 9, ".3f"))
            cells.append(f"{' '.join(f'{v:+.3f}' for v in entry['differences_percent'].values()):>26}")
        if "goal_percent" in entry:
            verdict = {True: "reached", False: "MISSED", None: "not measured"}[entry["reached"]]
            cells.append(f"{entry['goal_percent']:7.2f} {verdict}")
        if entry["failed"]:
            cells.append(f"   {entry['failed']} failed")
        lines.append("".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{format(value, form):>{width}}"
