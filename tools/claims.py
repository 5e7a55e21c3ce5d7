"""What a table of runs claims beyond differences from its baseline: loss made good, and other comparisons.

A case that `recovers` from another, the reference below, is judged by the share of the way from there to the
baseline, the reference above: (below - own) / (below - baseline) of the metric. One that is compared `versus`
another is judged by its difference from that, in percent of it. Both go seed by seed; a reference that ran
with one seed only, since nothing about it is random, is that of every seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from curves import Run, differences, finals, mean_and_spread, of_case


def claims(plan: Mapping[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the cases of a plan with `recovers` and `versus` show: percent by seed, mean and spread of them,
    and whether the mean reaches its goal, None where there is no goal or nothing to judge by."""
    found = []
    for case in plan["case"]:
        if case.get("recovers") is not None:
            found.append(_recovery(plan, case, runs))
        if case.get("versus") is not None:
            found.append(_comparison(plan, case, runs))
    return found


def _recovery(plan: Mapping[str, Any], case: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    own = finals(of_case(runs, case["title"]), plan["metric"])
    above, below = (_reference(plan, runs, title, own) for title in (plan["baseline"], case["recovers"]))
    by_seed = {
        seed: 100 * (below[seed] - own[seed]) / (below[seed] - above[seed])
        for seed in own
        if seed in above and seed in below and below[seed] != above[seed]
    }
    goal = case.get("goal_recovered_percent")
    return _claim("recovered", case, case["recovers"], by_seed, goal, lambda mean: mean >= goal)


def _comparison(plan: Mapping[str, Any], case: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    own = finals(of_case(runs, case["title"]), plan["metric"])
    by_seed = differences(own, _reference(plan, runs, case["versus"], own))
    worse, goal = 1 if plan["better"] == "lower" else -1, case.get("goal_versus_percent")
    return _claim("versus", case, case["versus"], by_seed, goal, lambda mean: worse * mean <= goal)


def _reference(
    plan: Mapping[str, Any], runs: Sequence[Run], title: str, own: Mapping[int, float]
) -> Mapping[int, float]:
    """The metric of another case for each seed of `own`."""
    found = finals(of_case(runs, title), plan["metric"])
    case = next(case for case in plan["case"] if case["title"] == title)
    if len(case.get("seeds") or ()) == 1 and len(found) == 1:
        (value,) = found.values()
        return dict.fromkeys(own, value)
    return found


def _claim(
    kind: str,
    case: Mapping[str, Any],
    other: str,
    by_seed: Mapping[int, float],
    goal: float | None,
    holds: Any,
) -> dict[str, Any]:
    mean, spread = mean_and_spread(list(by_seed.values()))
    claim = {"kind": kind, "case": case["title"], "other": other}
    claim |= {"percent": mean, "spread": spread, "by_seed": dict(by_seed)}
    if goal is not None:
        claim |= {"goal_percent": goal, "reached": None if mean is None else holds(mean)}
    return claim


def claim_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The claims for a reader, a line each."""
    width = max((len(claim["case"]) for claim in found), default=0)
    return [f"{claim['case']:{width}}  {_said(claim)}" for claim in found]


def _said(claim: Mapping[str, Any]) -> str:
    if claim["percent"] is None:
        said = "-"
    else:
        form = ".1f" if claim["kind"] == "recovered" else "+.2f"
        spread = "" if claim["spread"] is None else f" +- {claim['spread']:{form.lstrip('+')}}"
        seeds = " ".join(format(value, form) for value in claim["by_seed"].values())
        said = f"{claim['percent']:{form}}{spread}% ({seeds})"
    if claim["kind"] == "recovered":
        text, bound = f"recovers {said} of what {claim['other']} loses against the baseline", "at least"
    else:
        text, bound = f"{said} against {claim['other']}", "at most"
    if "goal_percent" not in claim:
        return text
    verdict = {True: "reached", False: "MISSED", None: "not measured"}[claim["reached"]]
    return f"{text}; goal {bound} {claim['goal_percent']:g}%: {verdict}"
