"""Train the cases of a plan with several seeds each, some at a time on every GPU, and compare their curves.

    tools/bench_curves.py PLAN.toml [section.key=value ...] [--jobs N] [--seeds N,N] [--output PLAN.json]

PLAN.toml names a configuration, seeds and `[[case]]` tables with the overrides that make each case; its keys
are the fields of `Plan` and `Case` below. Overrides of the command line come after those of the plan and hold
for all cases. Every run is a process of its own, so a failed one costs only itself; the JSON is written anew
after each, and --resume keeps the finished runs in it. The table, in the JSON too, has each case's metric at
the end, its spread over the seeds (standard deviation), and the difference from the baseline's run of the
same seed. Runs share their GPU, so no time in the JSON is a speed.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from bench_run import shown, train_command
from curves import read_curve, summarize, table, values
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

    def __post_init__(self) -> None:
        titles = [case.title for case in self.case]
        if len(set(titles)) < len(titles):
            twice = next(title for title in titles if titles.count(title) > 1)
            raise ConfigError(f"case: {twice!r} is the title of several; give each its own")
        if self.baseline not in titles:
            raise ConfigError(f"baseline: {self.baseline!r} is no case; write one of {', '.join(titles)}")
        if len(set(self.seeds)) < max(len(self.seeds), 1):
            raise ConfigError(f"seeds: {list(self.seeds)} should be one or more, each once")


@dataclass(frozen=True)
class Job:
    """One run."""

    case: str
    seed: int
    config: str
    overrides: tuple[str, ...]

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
    jobs = list_jobs(plan, args.overrides)
    output = args.output or args.plan.with_suffix(".json")
    done = finished(output, jobs) if args.resume else {}
    devices = visible_devices()
    seeds = [] if args.seeds is None else ["--seeds", ",".join(map(str, args.seeds))]
    many = [] if args.jobs == 1 else ["--jobs", str(args.jobs)]
    command = shlex.join(["tools/bench_curves.py", str(args.plan), *args.overrides, *seeds, *many])
    missing = [job for job in jobs if job not in done]
    at_a_time = min(args.jobs * len(devices), len(missing))

    def document() -> dict[str, Any]:
        return assemble(plan, command, [done[job] for job in jobs if job in done])

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Processes() as processes:

        def train(job: Job, device: str | None) -> dict[str, Any]:
            environment = environment_of_run(device, at_a_time)
            return run_job(job, Path(folder), processes, environment, args.timeout, plan.metric)

        for job, result in run_all(missing, devices, args.jobs, train):
            done[job] = result
            write(output, document())
            print(f"{len(done)}/{len(jobs)} {line(result, plan.metric)}", file=sys.stderr, flush=True)
    found = document()
    write(output, found)
    print(table(plan.metric, plan.baseline, found["summary"]))
    return int(any("failed" in run for run in found["runs"]))


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


def list_jobs(plan: Plan, overrides: Sequence[str] = ()) -> list[Job]:
    """Every case once with the first seed, then with the second: an early end leaves whole comparisons."""
    return [
        Job(
            case.title,
            seed,
            case.config or plan.config,
            (*plan.overrides, *case.overrides, *overrides, f"seed={seed}"),
        )
        for seed in plan.seeds
        for case in plan.case
    ]


def run_all(
    jobs: Sequence[J],
    devices: Sequence[str | None],
    per_device: int,
    run: Callable[[J, str | None], dict[str, Any]],
) -> Iterator[tuple[J, dict[str, Any]]]:
    """Each job and what `run` made of it, as they end; at most `per_device` at a time on each device."""
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
        futures = {pool.submit(on_a_free_device, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
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


def finished(output: Path, jobs: Sequence[Job]) -> dict[Job, dict[str, Any]]:
    """The results in an earlier JSON of jobs whose command is still the same, without those that failed."""
    if not output.exists():
        return {}
    document = json.loads(output.read_text())
    known = {
        (run["case"], run["command"]): {"environment": document["environment"]} | run
        for run in document["runs"]
        if "failed" not in run
    }
    return {job: known[job.case, job.command] for job in jobs if (job.case, job.command) in known}


def assemble(plan: Plan, command: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON: an environment that differs from the first run's stays with its run."""
    environments = [run["environment"] for run in runs if "environment" in run]
    common = environments[0] if environments else None
    kept = [
        {key: value for key, value in run.items() if key != "environment" or value != common} for run in runs
    ]
    described = json.loads(json.dumps(asdict(plan)))
    return {
        "command": command,
        "environment": common,
        "plan": described,
        "summary": summarize(described, runs),
        "runs": kept,
    }


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write the JSON in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def line(result: Mapping[str, Any], metric: str) -> str:
    """A finished run for who watches."""
    name = f"{result['case']}, seed {result['seed']}"
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
