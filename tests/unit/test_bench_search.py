"""Choices of a plan are made by runs of their own, and loss made good and other comparisons are judged."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from fake_training import train_by

from qrecipes.config import parse
from qrecipes.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench_curves")


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("claims")


SEARCH = '[search]\nseed = 9\noverrides = ["steps=3", "optim.lr=7"]\n'
CASES = (
    'title = "a"\noverrides = ["a=1"]\nchoices = [["lr=0.3"], ["lr=0.1"], ["lr=0.2"]]',
    'title = "b"\nchoices_of = ["a"]',
    'title = "c"\nseeds = [4]\noverrides = ["steps=0"]',
)


def write_plan(folder: Path, *cases: str, head: str = "seeds = [0, 1]", search: str = SEARCH) -> Path:
    path = folder / "plan.toml"
    text = f'config = "tiny/llm"\nbaseline = "a"\n{head}\noverrides = ["steps=6"]\n{search}'
    path.write_text(text + "".join(f"[[case]]\n{case}\n" for case in cases))
    return path


FAKE_TRAINING = """
import json, sys, pathlib
arguments = dict(text.split("=", 1) for text in sys.argv[1:] if "=" in text)
open(arguments["count"], "a").write(" ".join(sys.argv[1:]) + "\\n")
rate = float(arguments.get("lr", 1))
if rate == float(arguments.get("worst", -1)):
    sys.exit("error: it diverged")
folder = pathlib.Path(arguments["output"])
folder.mkdir()
rows = [{"step": 0, "val_loss": 9.0}, {"step": 1, "loss": 8.0}, {"step": 1, "val_loss": 4 + rate}]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "receipt.json").write_text(json.dumps({"summary": "as built"}))
(folder / "environment.json").write_text(json.dumps({"command": ["x"], "device": "cpu"}))
"""


@pytest.fixture
def fake(bench, monkeypatch, tmp_path):
    """Training replaced by a script whose loss is 4 plus the rate; the file with its commands."""
    return train_by(FAKE_TRAINING, bench, monkeypatch, tmp_path)


def test_the_best_choice_is_trained_with_and_taken_over(tmp_path, bench, fake, capsys):
    assert bench.main([str(write_plan(tmp_path, *CASES)), "--jobs", "2"]) == 0
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["choices"] == {"a": ["lr=0.1"]}
    assert [(run["choice"], run["seed"]) for run in document["search"]] == [
        (["lr=0.3"], 9), (["lr=0.1"], 9), (["lr=0.2"], 9),
    ]  # fmt: skip
    assert [(run["case"], run["seed"]) for run in document["runs"]] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("c", 4),
    ]  # fmt: skip
    for run in document["runs"]:
        assert ("lr=0.1" in run["command"]) == (run["case"] in "ab")
    assert document["summary"][0]["mean"] == pytest.approx(4.1)
    assert capsys.readouterr().out.startswith("a: lr=0.1\n")


def test_a_search_is_short_and_a_case_has_the_last_word(tmp_path, bench):
    """Overrides in order: the plan's, the search's, the case's, the choice, the command line's, the seed."""
    plan = bench.load(
        write_plan(tmp_path, *CASES, 'title = "d"\noverrides = ["steps=0"]\nchoices = [["x=1"]]')
    )
    jobs = bench.list_searches(plan, ["last=1"])
    assert jobs[0].overrides == (
        "steps=6", "steps=3", "optim.lr=7", "a=1", "lr=0.3", "last=1", "seed=9",
    )  # fmt: skip
    assert jobs[3].overrides[:4] == ("steps=6", "steps=3", "optim.lr=7", "steps=0")


def test_a_search_waits_for_the_choices_that_it_takes_over(tmp_path, bench, fake):
    """b is searched with a's best range, and c is trained with both choices."""
    cases = (
        'title = "a"\nchoices = [["lr=0.3", "p=3"], ["lr=0.1", "p=4"]]',
        'title = "b"\nchoices_of = ["a"]\nchoices = [["lr=0.5"], ["lr=0.4"]]',
        'title = "c"\nchoices_of = ["a", "b"]',
    )
    plan = bench.load(write_plan(tmp_path, *cases))
    assert [job.case for job in bench.list_searches(plan)] == ["a", "a"]
    assert bench.main([str(tmp_path / "plan.toml"), "--jobs", "3"]) == 0
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["choices"] == {"a": ["lr=0.1", "p=4"], "b": ["lr=0.4"]}
    searched = [run["command"].split() for run in document["search"] if run["case"] == "b"]
    assert [command[-5:-1] for command in searched] == [
        ["optim.lr=7", "lr=0.1", "p=4", rate] for rate in ("lr=0.5", "lr=0.4")
    ]
    last = [run["command"].split() for run in document["runs"] if run["case"] == "c"]
    assert last[0][-4:] == ["lr=0.1", "p=4", "lr=0.4", "seed=0"]


def test_a_choice_that_fails_is_not_taken(tmp_path, bench, fake):
    assert bench.main([str(write_plan(tmp_path, *CASES)), "worst=0.1"]) == 1
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["choices"] == {"a": ["lr=0.2"]}
    assert [run.get("failed") for run in document["search"]] == [None, "error: it diverged", None]


def test_without_any_choice_a_case_does_not_run_and_the_others_do(tmp_path, bench, fake, capsys):
    cases = ('title = "a"', 'title = "b"\noverrides = ["worst=5"]\nchoices = [["lr=5"]]')
    assert bench.main([str(write_plan(tmp_path, *cases))]) == 1
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [run["case"] for run in document["runs"]] == ["a", "a"]
    assert document["choices"] == {}
    assert [entry["runs"] for entry in document["summary"]] == [2, 0]


def test_resuming_repeats_neither_a_search_nor_what_it_led_to(tmp_path, bench, fake):
    plan = write_plan(tmp_path, *CASES)
    assert bench.main([str(plan)]) == 0
    first = json.loads((tmp_path / "plan.json").read_text())
    assert len(fake.read_text().splitlines()) == 3 + 2 + 2 + 1
    plan = write_plan(tmp_path, *CASES, head="seeds = [0, 1, 2]")
    assert bench.main([str(plan), "--resume"]) == 0
    assert len(fake.read_text().splitlines()) == 8 + 2
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["search"] == first["search"]
    assert found["choices"] == first["choices"]


def test_when_the_time_is_up_nothing_starts_and_what_was_found_is_kept(tmp_path, bench, fake):
    plan = write_plan(tmp_path, *CASES)
    assert bench.main([str(plan)]) == 0
    plan = write_plan(tmp_path, *CASES, head="seeds = [0, 1, 2]")
    assert bench.main([str(plan), "--resume", "--budget", "0"]) == 1
    runs = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert {run["seed"]: run.get("failed") for run in runs if run["case"] == "a"} == {
        0: None,
        1: None,
        2: "not started within 0 s",
    }


@pytest.mark.parametrize(
    ("case", "search", "message"),
    [
        ("choices = [['x=1']]", "", r"case 'b': choices: nothing says how to choose; add a \[search\] table"),
        ("choices = [['x=1']]", SEARCH.replace("9", "1"), "search.seed: 1 is a seed of case 'b', too"),
        ('choices_of = ["a"]', SEARCH, "case 'b': choices_of: 'a' is no case before it that has choices"),
        ('choices_of = ["b"]\nchoices = [["x=1"]]', SEARCH, "case 'b': choices_of: 'b' is no case before"),
        ('recovers = "b"', SEARCH, "case 'b': recovers: 'b' is no other case"),
        ("goal_versus_percent = 1.0", SEARCH, "case 'b': goal_versus_percent: a goal without a case"),
        ("seeds = []", SEARCH, r"case 'b': seeds: \[\] should be one or more"),
        ('choices = [["x=1"], ["x=1"]]', SEARCH, r"case 'b': choices: \['x=1'\] is there twice"),
    ],
)
def test_a_wrong_plan_is_refused_with_its_place(tmp_path, bench, case, search, message):
    with pytest.raises(ConfigError, match=message):
        bench.load(write_plan(tmp_path, 'title = "a"', f'title = "b"\n{case}', search=search))


def run_of(case: str, seed: int, value: float) -> dict:
    return {"case": case, "seed": seed, "curve": [{"step": 1, "ppl": value}]}


def plan_of(*cases: dict, better: str = "lower") -> dict:
    return {"metric": "ppl", "better": better, "baseline": cases[0]["title"], "case": list(cases)}


def test_the_share_made_good_is_that_of_the_way_from_below_to_above(claims):
    """By hand: from 30 towards 20 and 22, 21 and 24 are 90% and 75% of the way, 15/sqrt(2) apart."""
    plan = plan_of(
        {"title": "above"},
        {"title": "below", "seeds": [7]},
        {"title": "own", "recovers": "below", "goal_recovered_percent": 80.0},
    )
    runs = [run_of("above", 0, 20.0), run_of("above", 1, 22.0), run_of("below", 7, 30.0)]
    runs += [run_of("own", 0, 21.0), run_of("own", 1, 24.0)]
    (claim,) = claims.claims(plan, runs)
    assert claim["by_seed"] == {0: pytest.approx(90.0), 1: pytest.approx(75.0)}
    assert (claim["percent"], claim["spread"]) == (pytest.approx(82.5), pytest.approx(15 / 2**0.5))
    assert claim["reached"] is True
    (line,) = claims.claim_lines([claim])
    assert line == (
        "own  recovers 82.5 +- 10.6% (90.0 75.0) of what below loses against the baseline; "
        "goal at least 80%: reached"
    )
    plan["case"][2]["goal_recovered_percent"] = 83.0
    assert claims.claims(plan, runs)[0]["reached"] is False


@pytest.mark.parametrize(
    ("better", "value", "reached"), [("lower", 10.1, True), ("lower", 10.11, False), ("higher", 9.89, False)]
)
def test_another_case_is_compared_with_by_seed(claims, better, value, reached):
    plan = plan_of(
        {"title": "full"},
        {"title": "own", "versus": "full", "goal_versus_percent": 1.0 + 1e-9},
        better=better,
    )
    runs = [run_of("full", 0, 10.0), run_of("own", 0, value), run_of("own", 1, 99.0)]
    (claim,) = claims.claims(plan, runs)
    assert claim["by_seed"] == {0: pytest.approx(10 * (value - 10))}
    assert claim["reached"] is reached
    assert ("MISSED" in claims.claim_lines([claim])[0]) is not reached


def test_what_did_not_run_is_not_judged(claims):
    plan = plan_of({"title": "a"}, {"title": "b", "versus": "a", "goal_versus_percent": 1.0})
    (claim,) = claims.claims(plan, [run_of("b", 0, 1.0), {"case": "a", "seed": 0, "failed": "lost"}])
    assert (claim["percent"], claim["reached"]) == (None, None)
    assert claims.claim_lines([claim]) == ["b  - against a; goal at most 1%: not measured"]


def test_the_shipped_plan_chooses_by_other_data_than_it_judges_by(bench):
    """And every run that it could lead to has a right configuration, with no text seen twice."""
    plan = bench.load(ROOT / "benchmarks/smollm2_qat_h100.toml")
    choices = {case.title: case.choices[0] for case in plan.case if case.choices}
    searches = bench.list_searches(plan, (), choices)
    assert len(searches) == sum(len(case.choices) for case in plan.case)
    for job in searches:
        run = parse.load(job.config, job.overrides)
        assert run.data.validation_files == ("data/qat/wiki/validation",)
        assert run.steps <= 100
    jobs = bench.list_jobs(plan, (), choices)
    assert len(jobs) == sum(len(plan.seeds_of(case)) for case in plan.case)
    for job in jobs:
        run = parse.load(job.config, job.overrides)
        assert run.data.validation_files == ("data/qat/test/train",)
        assert run.steps * run.data.batch_size * run.data.sequence_length * run.optim.accumulate < 4_142_931
