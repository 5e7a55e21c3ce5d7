"""Draw the curves that tools/bench_curves.py measured, and how far each case is from the baseline, as an SVG.

    tools/plot_curves.py CURVES.json [--output CURVES.svg] [--from-step STEP] [--cases TITLE ...]

Above, the metric of every case: its mean over the seeds, and a band from the least to the largest. Below, the
difference from the baseline's run of the same seed in percent, likewise; dotted lines are the goals. A case
that was measured once is a point, and one that was measured before training only, a dashed line. Of a JSON
with several `tables`, such as tools/bench_merge.py's, each has a column. The same JSON gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib as mpl
from curves import Run, differences, of_case, values

from qrecipes.cli.report import run_main
from qrecipes.errors import ConfigError

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Of Okabe and Ito, which those who see colours differently tell apart, too; the first is the baseline's."""
STROKES = (("-", "o"), ("-.", "s"))
"""Lines and points of the cases that the colours are for, and of those for which they are used again."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "curves",  # else the names of clip paths are random
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
}
Band = dict[int, list[float]]
"""By step, a value for each seed."""


def main(argv: list[str]) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(
        prog="tools/plot_curves.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("curves", type=Path)
    parser.add_argument("--output", type=Path, help="default: CURVES with the suffix .svg")
    parser.add_argument(
        "--from-step", type=int, default=1, metavar="STEP", help="leave out what comes before"
    )
    parser.add_argument("--cases", nargs="+", metavar="TITLE", help="these, and the baseline")
    args = parser.parse_args(argv)
    output = args.output or args.curves.with_suffix(".svg")
    draw(json.loads(args.curves.read_text()), output, args.from_step, args.cases)
    print(output)
    return 0


class Look(NamedTuple):
    """How a case is drawn."""

    colour: str
    line: str
    marker: str


def draw(
    document: Mapping[str, Any], output: Path, from_step: int = 1, only: Sequence[str] | None = None
) -> None:
    """Write the picture of a JSON of tools/bench_curves.py, or of one with several such `tables`.

    Raises:
        ConfigError: if there is no such case, or none with a run to draw.
    """
    from matplotlib.figure import Figure

    tables = document.get("tables") or [document]
    _check_titles(tables, only)
    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE, "backend": "svg"}):
        figure = Figure(figsize=(7.5 * len(tables), 7.5), layout="constrained")
        axes = figure.subplots(2, len(tables), sharex="col", squeeze=False)
        for column, found in enumerate(tables):
            _draw_table(found, axes[0, column], axes[1, column], from_step, only)
        # without the date, and without the version of who drew it, the same data gives the same file
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})


def _draw_table(
    document: Mapping[str, Any], above: Any, below: Any, from_step: int, only: Sequence[str] | None
) -> None:
    plan = document["plan"]
    cases = _chosen(plan, only)
    bands = {
        case["title"]: absolute(of_case(document["runs"], case["title"]), plan["metric"]) for case in cases
    }
    if not any(bands.values()):
        raise ConfigError(f"{plan['baseline']}: no run to draw, every one failed; see their `failed`")
    base = of_case(document["runs"], plan["baseline"])
    looks = [Look(colour, *stroke) for stroke in STROKES for colour in COLOURS]
    for case, look in zip(cases, looks * len(cases), strict=False):
        title = case["title"]
        _band(above, bands[title], from_step, look, title)
        if title == plan["baseline"]:
            below.axhline(0, color=look.colour, linewidth=1)
            continue
        own = of_case(document["runs"], title)
        _band(below, relative(own, base, plan["metric"]), from_step, look, None)
        if case.get("goal_percent") is not None:
            worse = 1 if plan["better"] == "lower" else -1
            below.axhline(worse * case["goal_percent"], color=look.colour, linewidth=1, linestyle=":")
    above.set_ylabel(plan["metric"])
    below.set_ylabel(f"% of {plan['baseline']}, same seed")
    below.set_xlabel("step")
    seeds = len(plan["seeds"])
    device = (document["environment"] or {}).get("device", "")
    above.set_title(f"{plan['config']}, {seeds} seed{'s' * (seeds != 1)}, {device}", fontsize=9)
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(cases) > len(COLOURS) else {}
    above.legend(frameon=False, **beside)


def absolute(runs: Sequence[Run], metric: str) -> Band:
    """The metric of the runs that did not fail, by step."""
    return _gathered(values(run, metric) for run in runs if "failed" not in run)


def relative(runs: Sequence[Run], base: Sequence[Run], metric: str) -> Band:
    """The difference in percent, by step, of each run from the baseline's of the same seed."""
    of_seed = {run["seed"]: values(run, metric) for run in base if "failed" not in run}
    return _gathered(
        differences(values(run, metric), of_seed[run["seed"]])
        for run in runs
        if "failed" not in run and run["seed"] in of_seed
    )


def _gathered(curves: Any) -> Band:
    band: Band = {}
    for curve in curves:
        for step, value in curve.items():
            band.setdefault(step, []).append(value)
    return dict(sorted(band.items()))


def _band(axes: Any, band: Band, from_step: int, look: Look, label: str | None) -> None:
    """A line through the means, and a band from the least to the largest."""
    colour = look.colour
    if list(band) == [0]:  # not trained
        axes.axhline(fmean(band[0]), color=colour, linewidth=1.2, linestyle="--", label=label)
        return
    shown = {step: found for step, found in band.items() if step >= from_step}
    if not shown:
        return
    steps = list(shown)
    if len(steps) == 1:
        found = shown[steps[0]]
        mean = fmean(found)
        ends = [[mean - min(found)], [max(found) - mean]]
        axes.errorbar(
            steps, [mean], ends, color=colour, fmt=look.marker, markersize=4, capsize=4, label=label
        )
        return
    means = [fmean(found) for found in shown.values()]
    axes.plot(steps, means, look.line, color=colour, linewidth=1.4, label=label)
    least, largest = ([pick(found) for found in shown.values()] for pick in (min, max))
    axes.fill_between(steps, least, largest, color=colour, alpha=0.15, linewidth=0)


def _check_titles(tables: Sequence[Mapping[str, Any]], only: Sequence[str] | None) -> None:
    titles = list(dict.fromkeys(case["title"] for found in tables for case in found["plan"]["case"]))
    for title in only or ():
        if title not in titles:
            raise ConfigError(f"--cases: {title!r} is no case; write some of {', '.join(map(repr, titles))}")


def _chosen(plan: Mapping[str, Any], only: Sequence[str] | None) -> list[Mapping[str, Any]]:
    """The cases to draw, the baseline first."""
    wanted = {plan["baseline"], *(only or (case["title"] for case in plan["case"]))}
    chosen = [case for case in plan["case"] if case["title"] in wanted]
    return sorted(chosen, key=lambda case: case["title"] != plan["baseline"])


if __name__ == "__main__":
    run_main(main)
