"""Train the cases of a plan with several seeds each, some at a time on every GPU, and compare their curves.

    tools/bench_curves.py PLAN.toml [section.key=value ...] [--jobs N] [--seeds N,N] [--output PLAN.json]

PLAN.toml names a configuration, seeds and `[[case]]` tables with the overrides that make each case; its keys
are the fields of `Plan` and `Case` below. Overrides of the command line come after those of the plan and hold
for all cases. Every run is a process of its own, so a failed one costs only itself; the JSON is written anew
after each, and --resume keeps the finished runs in it. The table, in the JSON too, has each case's metric at
the end, its spread over the seeds (standard deviation), and the difference from the baseline's run of the
same seed. Runs share their GPU, so no time in the JSON is a speed.

A case may have `choices`, such as learning rates: overrides of which the one is taken that does best in a
run of its own, as the plan's `[search]` makes them, with a seed and held-out data of their own. Claims beyond
the differences from the baseline are the cases' `recovers` and `versus`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from bench_run import shown, train_command
from claims import claim_lines, claims
from curves import best, read_curve, summarize, table, values
from pydantic import ConfigDict, TypeAdapter, ValidationError

from qrecipes.cli.report import run_main
from qrecipes.config.lines import read_toml
from qrecipes.config.problems import explain
from qrecipes.config.run import STRICT, NonNegativeFloat, NonNegativeInt
from qrecipes.config.schema import meanings
from qrecipes.errors import ConfigError

J = TypeVar("J")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    title: str
    """What the table calls it."""
    config: str | None = None
    """Shipped name or path of its configuration, where it is not the plan's."""
    overrides: tuple[str, ...] = ()
    """Its section.key=value."""
    goal_percent: NonNegativeFloat | None = None
    """By how much of the baseline's metric it may be worse."""
    seeds: tuple[NonNegativeInt, ...] | None = None
    """Its seeds, where they are not the plan's; one is enough for what does not train."""
    choices: tuple[tuple[str, ...], ...] = ()
    """Lists of section.key=value, of which the best in the plan's `[search]` is added to its overrides."""
    choices_of: tuple[str, ...] = ()
    """Titles of earlier cases whose choices it takes over, before it makes its own."""
    recovers: str | None = None
    """Title of the case from which it is to make good what is lost against the baseline."""
    goal_recovered_percent: NonNegativeFloat | None = None
    """The least share of that loss to make good."""
    versus: str | None = None
    """Title of another case, besides the baseline, that it is compared with seed by seed."""
    goal_versus_percent: NonNegativeFloat | None = None
    """By how much of that case's metric it may be worse."""

    def __post_init__(self) -> None:
        where = f"case {self.title!r}"
        if self.seeds is not None and len(set(self.seeds)) < max(len(self.seeds), 1):
            raise ConfigError(f"{where}: seeds: {list(self.seeds)} should be one or more, each once")
        twice = next((list(one) for one in self.choices if self.choices.count(one) > 1), None)
        if twice is not None:
            raise ConfigError(f"{where}: choices: {twice} is there twice; name each once")
        for goal, other in (("goal_recovered_percent", "recovers"), ("goal_versus_percent", "versus")):
            if getattr(self, goal) is not None and getattr(self, other) is None:
                raise ConfigError(f"{where}: {goal}: a goal without a case to hold it against; set {other}")


@dataclass(frozen=True, kw_only=True)
class Search:
    """How choices are made, before the runs that are compared."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    seed: NonNegativeInt
    """Of all its runs; none of the compared runs has it."""
    overrides: tuple[str, ...]
    """What makes its runs short, and judged by data that the compared runs are not judged by. They come
    after the plan's and before the case's."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cases to compare, each run once a seed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    config: str
    """Shipped name or path of the configuration that the cases change."""
    case: tuple[Case, ...]
    """The cases."""
    baseline: str
    """Title of the case that the others are compared with."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Seeds: each decides the initial weights, the order of the data and stochastic rounding."""
    overrides: tuple[str, ...] = ()
    """The section.key=value of all cases."""
    metric: str = "val_loss"
    """What is compared: a key of the evaluation in metrics.jsonl, or `loss`, that of training."""
    better: Literal["lower", "higher"] = "lower"
    """Which way the metric is better."""
    search: Search | None = None
    """Needed by cases with `choices`."""

    def __post_init__(self) -> None:
        titles = [case.title for case in self.case]
        if len(set(titles)) < len(titles):
            twice = next(title for title in titles if titles.count(title) > 1)
            raise ConfigError(f"case: {twice!r} is the title of several; give each its own")
        if self.baseline not in titles:
            raise ConfigError(f"baseline: {self.baseline!r} is no case; write one of {', '.join(titles)}")
        if len(set(self.seeds)) < max(len(self.seeds), 1):
            raise ConfigError(f"seeds: {list(self.seeds)} should be one or more, each once")
        for case in self.case:
            self._check(case, titles)

    def _check(self, case: Case, titles: Sequence[str]) -> None:
        where = f"case {case.title!r}"
        before = titles[: titles.index(case.title)]
        for key in ("recovers", "versus"):
            other = getattr(case, key)
            if other is not None and (other not in titles or other == case.title):
                raise ConfigError(
                    f"{where}: {key}: {other!r} is no other case; write one of {', '.join(titles)}"
                )
        for title in case.choices_of:
            if title not in before or not self.named(title).choices:
                raise ConfigError(
                    f"{where}: choices_of: {title!r} is no case before it that has choices; correct it"
                )
        if case.choices and self.search is None:
            raise ConfigError(f"{where}: choices: nothing says how to choose; add a [search] table")
        if case.choices and self.search is not None and self.search.seed in self.seeds_of(case):
            raise ConfigError(
                f"search.seed: {self.search.seed} is a seed of {where}, too, so a choice would have seen the "
                "order of data that it is judged with; take another"
            )

    def named(self, title: str) -> Case:
        """The case of a title."""
        return next(case for case in self.case if case.title == title)

    def seeds_of(self, case: Case) -> tuple[int, ...]:
        """The seeds of a case's runs."""
        return self.seeds if case.seeds is None else case.seeds


@dataclass(frozen=True)
class Job:
    """One run."""

    case: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    choice: tuple[str, ...] | None = None
    """What a run of the search tries; None for a run that is compared."""

    @property
    def command(self) -> str:
        """As one would type it."""
        return shown(train_command(self.config, self.overrides))


def main(argv: list[str]) -> int:
    """Run what is missing and print the table; the exit status is 1 where a run failed."""
    args = _parser().parse_intermixed_args(argv)
    plan = load(args.plan)
    if args.seeds is not None:
        plan = replace(plan, seeds=args.seeds)
    output = args.output or args.plan.with_suffix(".json")
    devices = visible_devices()
    seeds = [] if args.seeds is None else ["--seeds", ",".join(map(str, args.seeds))]
    many = [] if args.jobs == 1 else ["--jobs", str(args.jobs)]
    command = shlex.join(["tools/bench_curves.py", str(args.plan), *args.overrides, *seeds, *many])
    progress = Progress(plan, args.overrides, earlier(output) if args.resume else {})
    first, began = progress.ready(), time.monotonic()
    at_a_time = min(args.jobs * len(devices), max(len(first), progress.expected - len(progress.done)))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Processes() as processes:

        def train(job: Job, device: str | None) -> dict[str, Any]:
            left = args.budget - (time.monotonic() - began)
            if left <= 0:
                return {
                    "case": job.case,
                    "seed": job.seed,
                    "command": job.command,
                    "failed": f"not started within {args.budget:.0f} s",
                }
            environment = environment_of_run(device, at_a_time)
            return run_job(job, Path(folder), processes, environment, min(args.timeout, left), plan.metric)

        for job, result in run_all(first, devices, args.jobs, train, progress.ready):
            progress.add(job, result)
            write(output, assemble(plan, command, progress))
            name = "" if job.choice is None else f" of the search, {' '.join(job.choice)}"
            print(
                f"{time.monotonic() - began:4.0f} s  {len(progress.done)}/{progress.expected} "
                f"{line(result, plan.metric, name)}",
                file=sys.stderr,
                flush=True,
            )
    found = assemble(plan, command, progress)
    write(output, found)
    print(report(plan, found))
    return int(any("failed" in run for run in (*found["runs"], *found.get("search", ()))))


def load(path: Path) -> Plan:
    """The plan in a TOML file.

    Raises:
        ConfigError: with a line for each problem.
    """
    contents, _ = read_toml(path)
    try:
        return TypeAdapter(Plan).validate_json(json.dumps(contents), strict=True)
    except ValidationError as error:
        problems = explain(error, contents, (), meanings(Plan))
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems)) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def list_jobs(
    plan: Plan, overrides: Sequence[str] = (), choices: Mapping[str, Sequence[str]] | None = None
) -> list[Job]:
    """Every case once with the first seed, then with the second: an early end leaves whole comparisons.

    Without those that wait for a choice: `choices` has the overrides that were chosen, by case.
    """
    choices = {} if choices is None else choices
    jobs = []
    for seed in dict.fromkeys(seed for case in plan.case for seed in plan.seeds_of(case)):
        for case in plan.case:
            own = [case.title] if case.choices else []
            chosen = _chosen([*case.choices_of, *own], choices)
            if seed in plan.seeds_of(case) and chosen is not None:
                what = (*plan.overrides, *case.overrides, *chosen, *overrides, f"seed={seed}")
                jobs.append(Job(case.title, seed, case.config or plan.config, what))
    return jobs


def list_searches(
    plan: Plan, overrides: Sequence[str] = (), choices: Mapping[str, Sequence[str]] | None = None
) -> list[Job]:
    """A run for each choice of each case, without those that wait for the choice of another case."""
    search = plan.search
    if search is None:
        return []
    jobs = []
    for case in plan.case:
        before = _chosen(case.choices_of, {} if choices is None else choices)
        if before is None:
            continue
        common = (*plan.overrides, *search.overrides, *case.overrides, *before)
        for choice in case.choices:
            what = (*common, *choice, *overrides, f"seed={search.seed}")
            jobs.append(Job(case.title, search.seed, case.config or plan.config, what, choice))
    return jobs


def _chosen(titles: Sequence[str], choices: Mapping[str, Sequence[str]]) -> tuple[str, ...] | None:
    """The choices of some cases together, None if one is not made yet."""
    if any(title not in choices for title in titles):
        return None
    return tuple(override for title in titles for override in choices[title])


class Progress:
    """What was found, and what can run next: a case with choices waits for the last of its search's runs."""

    def __init__(
        self, plan: Plan, overrides: Sequence[str], known: Mapping[tuple[str, str], dict[str, Any]]
    ) -> None:
        self.plan, self.overrides, self.known = plan, overrides, known
        self.done: dict[Job, dict[str, Any]] = {}
        self._listed: set[Job] = set()
        self.expected = sum(len(case.choices) + len(plan.seeds_of(case)) for case in plan.case)

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Take in what a run found."""
        self.done[job] = result if job.choice is None else result | {"choice": list(job.choice)}

    def choices(self) -> dict[str, tuple[str, ...]]:
        """By case, the choice that did best, of those whose runs did not fail; none where all did."""
        chosen = {}
        for case in self.plan.case:
            tried = [run for job, run in self.done.items() if job.case == case.title and "choice" in run]
            if case.choices and len(tried) == len(case.choices):
                tried.sort(key=lambda run: case.choices.index(tuple(run["choice"])))
                found = best(tried, self.plan.metric, self.plan.better)
                if found is not None:
                    chosen[case.title] = tuple(found["choice"])
        return chosen

    def ready(self) -> list[Job]:
        """What can run now and was not given out before; what is known from before is taken in at once."""
        ready: list[Job] = []
        while True:
            jobs = [*self.searches(), *self.jobs()]
            fresh = [job for job in jobs if job not in self._listed]
            self._listed.update(fresh)
            found = [job for job in fresh if (job.case, job.command) in self.known]
            for job in found:
                self.add(job, self.known[job.case, job.command])
            ready += [job for job in fresh if job not in found]
            if not found:
                return ready

    def searches(self) -> list[Job]:
        """The runs that choose, as far as they do not wait for other choices."""
        return list_searches(self.plan, self.overrides, self.choices())

    def jobs(self) -> list[Job]:
        """The runs that are compared, as far as choices are made."""
        return list_jobs(self.plan, self.overrides, self.choices())


def run_all(
    jobs: Sequence[J],
    devices: Sequence[str | None],
    per_device: int,
    run: Callable[[J, str | None], dict[str, Any]],
    more: Callable[[], Sequence[J]] = tuple,
) -> Iterator[tuple[J, dict[str, Any]]]:
    """Each job and what `run` made of it, as they end; at most `per_device` at a time on each device.

    Whenever what has ended was taken, `more` is asked for jobs that wait in line after the others.
    """
    free: SimpleQueue[str | None] = SimpleQueue()
    for device in [device for _ in range(per_device) for device in devices]:
        free.put(device)

    def on_a_free_device(job: J) -> dict[str, Any]:
        device = free.get()
        try:
            return run(job, device)
        finally:
            free.put(device)

    pool = ThreadPoolExecutor(per_device * len(devices))
    try:
        waiting = {pool.submit(on_a_free_device, job): job for job in jobs}
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                yield waiting.pop(future), future.result()
            waiting |= {pool.submit(on_a_free_device, job): job for job in more()}
    finally:  # without waiting: who leaves early is about to end what `run` waits for
        pool.shutdown(wait=False, cancel_futures=True)


def run_job(
    job: Job,
    folder: Path,
    processes: Processes,
    environment: Mapping[str, str],
    timeout: float,
    metric: str,
    after: Callable[[Path], dict[str, Any]] = lambda folder: {},
) -> dict[str, Any]:
    """Train, and read what the run's folder tells, which is then removed: a checkpoint is in it.

    What `after` finds in the folder before that, an OSError or a ValueError included, joins the result.
    """
    own = Path(tempfile.mkdtemp(dir=folder))
    result: dict[str, Any] = {"case": job.case, "seed": job.seed, "command": job.command}
    start = time.monotonic()
    try:
        command = train_command(job.config, job.overrides, own / "run")
        if failure := processes.run(command, environment, own / "log", timeout):
            return result | {"failed": failure}
        result["wall_s"] = round(time.monotonic() - start, 1)
        result |= read(own / "run")
        if not values(result, metric):
            known = ", ".join(result["curve"][-1])
            return result | {"failed": f"it measured no {metric!r}; set the plan's metric to one of {known}"}
        return result | after(own / "run")
    except (OSError, ValueError, KeyError) as error:
        return result | {"failed": f"{type(error).__name__}: {error}"}
    finally:
        shutil.rmtree(own, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """What a finished run's folder tells."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    environment = json.loads((folder / "environment.json").read_text())
    return {
        "receipt": json.loads((folder / "receipt.json").read_text())["summary"],
        "peak_memory_gb": round(max(json.loads(line).get("peak_memory_bytes", 0) for line in lines) / 1e9, 3),
        "environment": {key: value for key, value in environment.items() if key != "command"},
        "curve": [
            {key: round(value, 6) for key, value in row.items()}
            for row in read_curve(folder / "metrics.jsonl")
        ],
    }


class Processes:
    """Processes that end with this one: leaving the context kills what still runs, and SIGTERM leaves it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen] = set()
        self._closed = False

    def __enter__(self) -> Processes:
        self._handler = signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        with self._lock:
            self._closed = True
            for process in self._live:
                _kill(process)

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float
    ) -> str | None:
        """Run `command` to its end; None, or in a line why it failed. Its whole output goes to `log`."""
        with self._lock, log.open("w") as file:
            if self._closed:
                return "stopped"
            process = subprocess.Popen(  # a group of its own, so that its own children end with it
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
            )
            self._live.add(process)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"took longer than {timeout:.0f} s"
        finally:
            _kill(process)
            with self._lock:
                self._live.discard(process)
        if not status:
            return None
        output = log.read_text(errors="replace").strip()
        print(f"{shown(command)}\n{output[-3000:]}", file=sys.stderr, flush=True)
        return output.splitlines()[-1][:300] if output else f"exit status {status}"


def _leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _kill(process: subprocess.Popen) -> None:
    """End a process and its group at once: nothing that it could still save is kept."""
    if process.poll() is None:  # else its number may be another's by now
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def visible_devices() -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES may name, one a GPU; [None] on a CPU."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = named.split(",") if named else [str(index) for index in range(count)]
    return list(names[:count]) or [None]


def environment_of_run(device: str | None, at_a_time: int) -> dict[str, str]:
    """This process's environment, one GPU, and a fair share of the cores where nothing else is set."""
    share = str(max(1, (os.cpu_count() or 1) // at_a_time))
    shared = {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share}
    return shared | dict(os.environ) | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})


def earlier(output: Path, lists: Sequence[str] = ("search", "runs")) -> dict[tuple[str, str], dict[str, Any]]:
    """The results in `lists` of an earlier JSON, by case and command, without those that failed."""
    if not output.exists():
        return {}
    document = json.loads(output.read_text())
    return {
        (run["case"], run["command"]): {"environment": document["environment"]} | run
        for name in lists
        for run in document.get(name, ())
        if "command" in run and "failed" not in run
    }


def assemble(plan: Plan, command: str, progress: Progress) -> dict[str, Any]:
    """The JSON: an environment that differs from the first run's stays with its run."""
    runs, searched = (
        [progress.done[job] for job in jobs if job in progress.done]
        for jobs in (progress.jobs(), progress.searches())
    )
    environments = [run["environment"] for run in (*runs, *searched) if "environment" in run]
    common = environments[0] if environments else None

    def kept(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in run.items() if key != "environment" or value != common}
            for run in runs
        ]

    described = json.loads(json.dumps(asdict(plan)))
    search = {"choices": progress.choices(), "search": kept(searched)} if plan.search else {}
    return {
        "command": command,
        "environment": common,
        "plan": described,
        "summary": summarize(described, runs),
        "claims": claims(described, runs),
        **search,
        "runs": kept(runs),
    }


def report(plan: Plan, document: Mapping[str, Any]) -> str:
    """The tables of a JSON for a reader, what was chosen first."""
    chosen = [f"{case}: {' '.join(choice)}" for case, choice in document.get("choices", {}).items()]
    parts = [*chosen, table(plan.metric, plan.baseline, document["summary"])]
    return "\n".join([*parts, *claim_lines(document["claims"])])


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write the JSON in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def line(result: Mapping[str, Any], metric: str, name: str = "") -> str:
    """A finished run for who watches; `name` is what else there is to its name."""
    name = f"{result['case']}, seed {result['seed']}{name}"
    if "failed" in result:
        return f"{name}: failed: {result['failed']}"
    return f"{name}: {metric} {list(values(result, metric).values())[-1]:.4f} in {result['wall_s']:.0f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench_curves.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value for all cases, values as in TOML")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time on each GPU")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N", help="default: the plan's")
    parser.add_argument("--output", type=Path, help="default: PLAN with the suffix .json")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one run")
    parser.add_argument(
        "--budget",
        type=float,
        default=86400,
        help="seconds after which nothing runs any more (default: a day)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the output's finished runs of the same command"
    )
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


if __name__ == "__main__":
    run_main(main)
