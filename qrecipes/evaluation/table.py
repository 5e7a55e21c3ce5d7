"""Results of one or several models as an aligned table, a column each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qrecipes.evaluation.harness import TaskScores
from qrecipes.evaluation.perplexity import Perplexity

Cells = dict[tuple[str, str], str]
"""(what, metric) -> value, in the order of the table."""


def table(
    names: Sequence[str],
    perplexities: Sequence[Perplexity | None],
    tasks: Sequence[Mapping[str, TaskScores]],
) -> str:
    """A line for each metric, a column for each model; `value ± standard error`.

    Of a group only the groups in it get lines of their own: MMLU's 57 tasks are for the JSON.
    """
    columns = [
        _of_text(perplexity) | _of_tasks(scores)
        for perplexity, scores in zip(perplexities, tasks, strict=True)
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    lines = [["", "", *names]]
    before = None
    for what, metric in keys:
        values = [column.get((what, metric), "-") for column in columns]
        lines.append([what if what != before else "", metric, *values])
        before = what
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _of_text(result: Perplexity | None) -> Cells:
    if result is None:
        return {}
    return {
        ("text", "perplexity"): f"{result.perplexity:.4f}",
        ("text", "loss"): f"{result.loss:.4f}",
        ("text", "bits_per_byte"): f"{result.bits_per_byte:.4f}",
        ("text", "tokens"): f"{result.tokens:,}",
    }


def _of_tasks(scores: Mapping[str, TaskScores]) -> Cells:
    groups = {score.group for score in scores.values()}
    cells = {}
    for name, score in scores.items():
        if score.group is not None and name not in groups:
            continue
        for metric, value in score.metrics.items():
            error = score.stderrs.get(metric)
            cells[name, metric] = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    return cells
