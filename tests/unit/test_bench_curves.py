"""Runs of several cases and seeds become curves and paired differences; a failed run costs only itself."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_training import train_by

from qrecipes.config import parse
from qrecipes.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_curves")


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("curves")


@pytest.fixture
def plot(monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra dev")
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("plot_curves")


def run_of(case: str, seed: int, *points: float, metric: str = "val_loss") -> dict:
    """A run that was evaluated at steps 0, 10, 20, ..."""
    rows = [{"step": 10 * i, metric: value} for i, value in enumerate(points)]
    return {"case": case, "seed": seed, "curve": rows}


def plan_of(*titles: str, **keys) -> dict:
    cases = [{"title": title, "goal_percent": None} for title in titles]
    return {"baseline": titles[0], "metric": "val_loss", "better": "lower", "case": cases, **keys}


def write_metrics(folder: Path, *rows: dict) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_curve_has_what_was_held_out_and_the_mean_training_loss_since(tmp_path, curves):
    path = write_metrics(
        tmp_path,
        {"step": 0, "val_loss": 5.0, "val_accuracy": 0.25},
        {"step": 1, "loss": 4.0, "lr": 0.1, "tokens_per_s": 7.0},
        {"step": 2, "loss": 3.0, "lr": 0.1, "skipped": True},
        {"step": 2, "val_loss": 3.5, "val_accuracy": 0.5},
        {"step": 3, "loss": 1.0, "lr": 0.1},
        {"step": 3, "val_loss": 2.0, "val_accuracy": 0.75},
    )
    assert curves.read_curve(path) == [
        {"step": 0, "val_loss": 5.0, "val_accuracy": 0.25},
        {"step": 2, "val_loss": 3.5, "val_accuracy": 0.5, "loss": 3.5},
        {"step": 3, "val_loss": 2.0, "val_accuracy": 0.75, "loss": 1.0},
    ]


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_value_that_is_not_finite_is_no_curve(tmp_path, curves, value):
    path = write_metrics(tmp_path, {"step": 0, "val_loss": 5.0}, {"step": 4, "val_loss": value})
    with pytest.raises(ValueError, match=f"step 4: val_loss is {value}"):
        curves.read_curve(path)


def test_a_run_without_evaluation_is_no_curve(tmp_path, curves):
    with pytest.raises(ValueError, match="no evaluation; name held-out data"):
        curves.read_curve(write_metrics(tmp_path, {"step": 1, "loss": 4.0}))


def test_differences_are_those_of_pairs_of_one_seed(curves):
    """By hand: 4.02/4 and 5.1/5 are 0.5% and 2% more; their mean is 1.25, their deviation 1.5/sqrt(2)."""
    runs = [
        run_of("base", 0, 9.0, 4.0),
        run_of("base", 1, 9.0, 5.0),
        run_of("case", 1, 9.0, 5.1),
        run_of("case", 0, 9.0, 4.02),
    ]
    base, case = curves.summarize(plan_of("base", "case"), runs)
    assert base == {
        "case": "base", "runs": 2, "failed": 0, "mean": 4.5, "spread": pytest.approx(0.5**0.5),
    }  # fmt: skip
    assert case["mean"] == pytest.approx(4.56)
    assert case["spread"] == pytest.approx(1.08 / 2**0.5)
    assert case["differences_percent"] == {0: pytest.approx(0.5), 1: pytest.approx(2.0)}
    assert case["difference_percent"] == pytest.approx(1.25)
    assert case["difference_spread"] == pytest.approx(1.5 / 2**0.5)


def test_a_seed_without_its_pair_counts_in_the_mean_only(curves):
    runs = [
        run_of("base", 0, 4.0),
        {"case": "base", "seed": 1, "failed": "lost"},
        run_of("case", 0, 4.4),
        run_of("case", 1, 8.0),
    ]
    base, case = curves.summarize(plan_of("base", "case"), runs)
    assert (base["runs"], base["failed"], base["spread"]) == (1, 1, None)
    assert case["mean"] == pytest.approx(6.2)
    assert case["differences_percent"] == {0: pytest.approx(10.0)}
    assert case["difference_spread"] is None


def test_a_case_that_only_failed_has_no_numbers_and_no_verdict(curves):
    plan = plan_of("base", "case")
    plan["case"][1]["goal_percent"] = 100.0
    runs = [run_of("base", 0, 4.0), {"case": "case", "seed": 0, "failed": "lost"}]
    summary = curves.summarize(plan, runs)
    assert (summary[1]["mean"], summary[1]["difference_percent"], summary[1]["reached"]) == (
        None,
        None,
        None,
    )
    assert "not measured   1 failed" in curves.table("val_loss", "base", summary)


@pytest.mark.parametrize(
    ("better", "value", "reached"),
    [
        ("lower", 4.02, True),
        ("lower", 4.03, False),
        ("lower", 3.0, True),
        ("higher", 3.98, True),
        ("higher", 3.97, False),
        ("higher", 5.0, True),
    ],
)
def test_a_goal_bounds_how_much_worse_the_mean_may_be(curves, better, value, reached):
    plan = plan_of("base", "case", better=better)
    plan["case"][1]["goal_percent"] = 0.6  # of 4: 0.024
    summary = curves.summarize(plan, [run_of("base", 0, 4.0), run_of("case", 0, value)])
    assert summary[1]["reached"] is reached
    assert ("MISSED" in curves.table("val_loss", "base", summary)) is not reached


def test_another_metric_can_be_compared(curves):
    runs = [run_of("base", 0, 0.1, 0.5, metric="accuracy"), run_of("case", 0, 0.1, 0.4, metric="accuracy")]
    summary = curves.summarize(plan_of("base", "case", metric="accuracy"), runs)
    assert summary[1]["difference_percent"] == pytest.approx(-20)


def test_a_baseline_of_zero_has_no_relative_difference(curves):
    assert curves.differences({0: 1.0, 10: 2.0}, {0: 0.0, 10: 4.0}) == {10: -50.0}


def write_plan(folder: Path, *cases: str, head: str = "") -> Path:
    path = folder / "plan.toml"
    text = f'config = "tiny/llm"\nbaseline = "a"\n{head}\n'
    path.write_text(text + "".join(f"[[case]]\n{case}\n" for case in cases))
    return path


TWO_CASES = ('title = "a"', 'title = "b"\noverrides = ["optim.lr=1e-3"]')


def test_each_case_runs_once_a_seed_and_later_overrides_win(tmp_path, bench):
    plan = bench.load(write_plan(tmp_path, *TWO_CASES, head='seeds = [3, 5]\noverrides = ["steps=9"]'))
    jobs = bench.list_jobs(plan, ["steps=4"])
    assert [(job.case, job.seed) for job in jobs] == [("a", 3), ("b", 3), ("a", 5), ("b", 5)]
    run = parse.load(jobs[3].config, jobs[3].overrides)
    assert (run.steps, run.seed, run.optim.lr) == (4, 5, 1e-3)
    assert jobs[3].command == "qrecipes run train --config tiny/llm steps=9 optim.lr=1e-3 steps=4 seed=5"


@pytest.mark.parametrize(
    ("head", "cases", "message"),
    [
        ("seed = [1]", TWO_CASES, r"plan\.toml: seed: unknown key.*seeds"),
        ("seeds = [1, 1]", TWO_CASES, r"seeds: \[1, 1\] should be one or more, each once"),
        ("seeds = []", TWO_CASES, r"seeds: \[\] should be one or more"),
        ("", (TWO_CASES[0], TWO_CASES[0]), "case: 'a' is the title of several"),
        ("", ('title = "b"',), "baseline: 'a' is no case; write one of b"),
        ("", ('title = "a"\nstep = 3',), r"case\[0\]\.step: unknown key"),
        ('better = "more"', TWO_CASES, "better: "),
    ],
)
def test_a_wrong_plan_is_refused_with_its_place(tmp_path, bench, head, cases, message):
    with pytest.raises(ConfigError, match=message):
        bench.load(write_plan(tmp_path, *cases, head=head))


@pytest.mark.parametrize(
    "path",
    [path for path in (ROOT / "benchmarks").glob("*.toml") if "baseline =" in path.read_text()],
    ids=lambda path: path.stem,
)
def test_shipped_plans_are_right_and_say_what_runs_them(path, bench):
    plan = bench.load(path)
    assert path.read_text().startswith(f"# tools/bench_curves.py benchmarks/{path.name}")
    for job in bench.list_jobs(plan):
        parse.load(job.config, job.overrides)


def test_no_device_holds_more_runs_than_asked_and_every_one_is_used(bench):
    jobs = [bench.Job(str(i), 0, "", ()) for i in range(24)]
    lock, now, most = threading.Lock(), {"0": 0, "1": 0, "2": 0}, {"0": 0, "1": 0, "2": 0}

    def run(job, device):
        with lock:
            now[device] += 1
            most[device] = max(most[device], now[device])
        time.sleep(0.02)
        with lock:
            now[device] -= 1
        return {"name": job.case}

    found = dict(bench.run_all(jobs, list(now), 2, run))
    assert {job: result["name"] for job, result in found.items()} == {job: job.case for job in jobs}
    assert most == {"0": 2, "1": 2, "2": 2}


def test_a_run_gets_one_gpu_and_its_share_of_the_cores(bench, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    found = bench.environment_of_run("3", 21)
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["TORCHINDUCTOR_COMPILE_THREADS"] == "7"
    assert found["PATH"] == os.environ["PATH"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in bench.environment_of_run(None, 1)


def test_gpus_are_those_that_are_visible(bench, monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a")
    assert bench.visible_devices() == ["5", "GPU-8a"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert bench.visible_devices() == ["0", "1"]
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 0)
    assert bench.visible_devices() == [None]


FAKE_TRAINING = """
import json, os, sys, pathlib
arguments = dict(text.split("=", 1) for text in sys.argv[1:] if "=" in text)
open(arguments["count"], "a").write("x")
if arguments.get("die") == arguments["seed"]:
    sys.exit("error: it died")
folder = pathlib.Path(arguments["output"])
folder.mkdir()
seed = int(arguments["seed"])
loss = 4 + seed + float(arguments.get("more", 0))
rows = [{"step": 0, "val_loss": 9.0}, {"step": 1, "loss": 8.0, "peak_memory_bytes": 3e9}]
rows.append({"step": 1, "val_loss": loss})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "receipt.json").write_text(json.dumps({"summary": "as built"}))
device = arguments.get("device", "cpu")
(folder / "environment.json").write_text(json.dumps({"command": ["x"], "device": device}))
"""


@pytest.fixture
def fake(bench, monkeypatch, tmp_path):
    """Training replaced by a script that takes no time; the file in which it leaves a mark for each run."""
    return train_by(FAKE_TRAINING, bench, monkeypatch, tmp_path)


def test_a_failed_run_is_reported_and_the_others_go_on(tmp_path, bench, fake, capsys):
    plan = write_plan(
        tmp_path, 'title = "a"', 'title = "b"\noverrides = ["more=0.4", "die=1"]', head="seeds = [0, 1, 2]"
    )
    assert bench.main([str(plan), "--jobs", "3"]) == 1
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [(run["case"], run["seed"]) for run in document["runs"]] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    assert [run.get("failed") for run in document["runs"]] == [None, None, None, "error: it died", None, None]
    assert document["environment"] == {"device": "cpu"}
    assert document["runs"][4]["curve"][-1] == {"step": 1, "val_loss": 6.0, "loss": 8.0}
    assert document["runs"][0]["peak_memory_gb"] == 3.0
    assert document["summary"][1]["differences_percent"] == {
        "0": pytest.approx(10.0),
        "2": pytest.approx(0.4 / 6 * 100),
    }
    assert str(tmp_path) not in json.dumps(document).replace(str(plan), "")
    captured = capsys.readouterr()
    assert "1 failed" in captured.out
    assert "b, seed 1: failed: error: it died" in captured.err


def test_resuming_runs_only_what_is_missing_failed_or_changed(tmp_path, bench, fake):
    plan = write_plan(tmp_path, 'title = "a"', 'title = "b"\noverrides = ["die=1"]', head="seeds = [0, 1]")
    assert bench.main([str(plan)]) == 1
    assert len(fake.read_text()) == 4
    plan = write_plan(tmp_path, 'title = "a"', 'title = "b"\noverrides = ["die=1"]', head="seeds = [0, 1, 2]")
    bench.main([str(plan), "--resume"])
    assert len(fake.read_text()) == 7  # a and b with seed 2; b died again with seed 1
    plan = write_plan(
        tmp_path, 'title = "a"', 'title = "b"\noverrides = ["more=1"]', head="seeds = [0, 1, 2]"
    )
    assert bench.main([str(plan), "--resume"]) == 0
    assert len(fake.read_text()) == 10  # b alone
    before = (tmp_path / "plan.json").read_bytes()
    assert bench.main([str(plan), "--resume"]) == 0
    assert len(fake.read_text()) == 10
    assert (tmp_path / "plan.json").read_bytes() == before
    assert bench.main([str(plan)]) == 0
    assert len(fake.read_text()) == 16


def test_seeds_of_the_command_line_replace_those_of_the_plan(tmp_path, bench, fake):
    plan = write_plan(tmp_path, 'title = "a"', head="seeds = [0, 1, 2]")
    assert bench.main([str(plan), "--seeds", "4,7", "--jobs", "2", "more=1"]) == 0
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [(run["seed"], run["curve"][-1]["val_loss"]) for run in document["runs"]] == [(4, 9.0), (7, 12.0)]
    assert document["plan"]["seeds"] == [4, 7]
    assert document["command"] == f"tools/bench_curves.py {plan} more=1 --seeds 4,7 --jobs 2"
    with pytest.raises(ConfigError, match="seeds"):
        bench.main([str(plan), "--seeds", "4,4"])


def test_a_run_on_another_device_says_so(tmp_path, bench, fake):
    plan = write_plan(tmp_path, 'title = "a"', 'title = "b"\noverrides = ["device=gpu"]', head="seeds = [0]")
    assert bench.main([str(plan)]) == 0
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["environment"] == {"device": "cpu"}
    assert [run.get("environment") for run in document["runs"]] == [None, {"device": "gpu"}]


def test_a_metric_that_no_run_has_is_refused_with_those_it_has(tmp_path, bench, fake):
    plan = write_plan(tmp_path, 'title = "a"', head='seeds = [0]\nmetric = "accuracy"')
    assert bench.main([str(plan)]) == 1
    (run,) = json.loads((tmp_path / "plan.json").read_text())["runs"]
    assert run["failed"] == "it measured no 'accuracy'; set the plan's metric to one of step, val_loss, loss"


NAP = f"60.{os.getpid()}"
"""Seconds to sleep, by which no other process is mistaken for ours."""
SLEEPER = [sys.executable, "-c", f"import subprocess as s; s.run(['sleep', '{NAP}'])"]
"""A process with a child of its own."""


def test_a_run_that_takes_too_long_ends_with_its_children(tmp_path, bench):
    with bench.Processes() as processes:
        failure = processes.run(SLEEPER, dict(os.environ), tmp_path / "log", 0.7)
        assert failure == "took longer than 1 s"
        assert not sleeping_children()


def sleeping_children() -> list[str]:
    """The children that SLEEPERs of these tests left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{NAP}\0".encode():
                found.append(str(path))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


def test_sigterm_ends_the_runs_and_keeps_what_was_found(tmp_path):
    """In a process of its own: what is under way is killed, and the JSON holds the run before it."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(TOOLS)!r})\n"
        "import bench_curves as bench\n"
        "quick, sleeper = (bench.Job(name, 0, '', ()) for name in ('quick', 'sleeper'))\n"
        "with bench.Processes() as processes:\n"
        "    def run(job, device):\n"
        "        if job is sleeper:\n"
        f"            return {{'failed': processes.run({SLEEPER!r}, {{'PATH': '/usr/bin:/bin'}}, "
        f"bench.Path({str(tmp_path / 'log')!r}), 60)}}\n"
        "        return {'case': 'quick'}\n"
        "    for job, result in bench.run_all([quick, sleeper], [None], 2, run):\n"
        "        print(result['case'], flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    assert process.stdout.readline() == "quick\n"
    end = time.monotonic() + 30
    while not sleeping_children():
        assert time.monotonic() < end, "the sleeper did not start"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not sleeping_children()


def test_two_cases_train_and_are_compared(tmp_path, bench, capsys):
    """The whole way with real runs; after 4 steps INT8 is within 1% of float32 (0.02% was seen)."""
    plan = write_plan(
        tmp_path,
        'title = "a"',
        'title = "b"\ngoal_percent = 1.0\n'
        "overrides = ['transform=[{name = \"int8_mixed_precision\", min_size = 0, emulate = true}]']",
        head='seeds = [1]\noverrides = ["steps=4", "log.evaluate_every=2", "log.evaluate_batches=2"]',
    )
    assert bench.main([str(plan), "device=cpu", "--jobs", "2"]) == 0
    document = json.loads((tmp_path / "plan.json").read_text())
    for run in document["runs"]:
        assert [row["step"] for row in run["curve"]] == [0, 2, 4]
        assert run["curve"][-1]["val_loss"] < run["curve"][0]["val_loss"]
        assert ("int8_mixed_precision: 14 of 14" in run["receipt"]) == (run["case"] == "b")
    by_seed = document["summary"][1]["differences_percent"]
    assert list(by_seed) == ["1"]
    assert 0 < abs(by_seed["1"]) < 1.0
    assert document["summary"][1]["reached"]
    assert "reached" in capsys.readouterr().out


def document_of(plan: dict, *runs: dict) -> dict:
    plan = {"config": "tiny/llm", "seeds": [0, 1]} | plan
    return {"environment": {"device": "cpu"}, "plan": plan, "runs": list(runs)}


PAIRS = (
    run_of("base", 0, 9.0, 4.0, 2.0),
    run_of("base", 1, 9.0, 5.0, 3.0),
    run_of("case", 0, 9.0, 4.4, 2.0),
    run_of("case", 1, 9.0, 5.0, 3.3),
)


def test_the_bands_are_those_of_pairs_of_one_seed(plot):
    assert plot.absolute(PAIRS[2:], "val_loss") == {0: [9.0, 9.0], 10: [4.4, 5.0], 20: [2.0, 3.3]}
    assert plot.relative(PAIRS[2:], PAIRS[:2], "val_loss") == {
        0: [0.0, 0.0],
        10: [pytest.approx(10.0), 0.0],
        20: [0.0, pytest.approx(10.0)],
    }
    assert plot.relative(PAIRS[2:], PAIRS[:1], "val_loss") == {0: [0.0], 10: [pytest.approx(10.0)], 20: [0.0]}


def test_the_same_data_gives_the_same_picture(tmp_path, plot):
    plan = plan_of("base", "case", "lost")
    plan["case"][1]["goal_percent"] = 5.0
    file = tmp_path / "curves.json"
    file.write_text(json.dumps(document_of(plan, *PAIRS, {"case": "lost", "seed": 0, "failed": "lost"})))
    pictures = []
    for name in ("one.svg", "two.svg"):
        assert plot.main([str(file), "--output", str(tmp_path / name)]) == 0
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith("<?xml")
    assert all(f">{text}<" in pictures[0] for text in ("base", "case", "val_loss", "step"))
    assert ">lost<" not in pictures[0]
    assert "<dc:date>" not in pictures[0]


def test_some_cases_can_be_drawn_and_unknown_ones_are_refused(tmp_path, plot):
    document = document_of(plan_of("base", "case", "other"), *PAIRS, run_of("other", 0, 8.0, 3.0, 2.0))
    plot.draw(document, tmp_path / "a.svg", only=["other"])
    text = (tmp_path / "a.svg").read_text()
    assert ">other<" in text
    assert ">case<" not in text
    with pytest.raises(ConfigError, match="'otter' is no case; write some of 'base', 'case', 'other'"):
        plot.draw(document, tmp_path / "b.svg", only=["otter"])


def test_nothing_to_draw_is_an_error(tmp_path, plot):
    document = document_of(plan_of("base"), {"case": "base", "seed": 0, "failed": "lost"})
    with pytest.raises(ConfigError, match="base: no run to draw"):
        plot.draw(document, tmp_path / "a.svg")
