"""Fine-tune adapters over low-bit weights, merge them, bring all to the same bits, compare held-out loss.

    tools/bench_merge.py [section.key=value ...] [--config NAME] [--jobs N] [--output FILE.json]

The claim of QA-LoRA (arXiv 2309.14717) against QLoRA: its merged model has the bits that it trained over,
while a merged QLoRA must be quantized again. For each number of bits, on the configuration's data:

    QA-LoRA over a GPTQ base, as trained, and merged into the base's offsets
    QLoRA (NF4 base), as trained, merged into a 16-bit model, and that by GPTQ and by rounding to nearest
    LoRA over the same GPTQ base, likewise; and the model without training, in 16 bits, by GPTQ, rounded

All low-bit rows have one format: groups of --group-size with a float32 scale and a float32 offset. All GPTQ
rows are calibrated on the same samples of the training data. Methods train for the same steps on the same
tokens with adapters of the same rank; a seed decides their order and the adapters' initial weights. Each
method's learning rate is the best of --lrs in a run of --search-steps with a seed of its own, as trained, on
the last --search-share of the training rows, which only the runs for the table train on, too; the held-out
data is not looked at.

tools/judge_merge.py measures every row in the same way. Every run is a process of its own, --jobs at a time
on a GPU, so a failed one costs only itself, and no time in the JSON is a speed; --resume keeps the finished
runs that are in it, and makes the GPTQ bases anew. The JSON has, for each number
of bits, what tools/bench_curves.py writes, with differences from QLoRA merged and quantized by GPTQ with the
same seed; tools/plot_curves.py draws it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench_curves import (
    Job,
    Processes,
    earlier,
    environment_of_run,
    run_all,
    run_job,
    visible_devices,
    write,
)
from bench_run import PROGRAM
from curves import best, finals, mean_and_spread, of_case, summarize, table, values

from qrecipes.cli.report import run_main
from qrecipes.config import parse
from qrecipes.errors import ConfigError

METRIC = "val_loss"
JUDGE = Path(__file__).with_name("judge_merge.py")
DEFAULT_OUTPUT = Path("merge.json")


@dataclass(frozen=True)
class Method:
    """One way to train."""

    title: str
    transform: str
    """Its `[[transform]]` table, as an override."""
    bits: int | None = None
    """Of the GPTQ base; None where the method quantizes the 16-bit model itself."""

    def rows(self, bits: int) -> dict[tuple[str, int | None], str]:
        """(what tools/judge_merge.py calls a row, its bits) -> the row's title in the table of `bits`."""
        if self.title.startswith("QA-LoRA"):
            return {("as it is", None): self.title, ("merged", None): f"{self.title}, merged"}
        return {
            ("as it is", None): self.title,
            ("merged", None): f"{self.title}, merged, 16-bit",
            ("gptq", bits): f"{self.title}, merged, GPTQ W{bits}",
            ("rtn", bits): f"{self.title}, merged, RTN W{bits}",
        }


@dataclass(frozen=True)
class Task:
    """One process, or two after each other."""

    kind: Literal["plain", "base", "search", "final"]
    """`plain` judges the model without training, `base` quantizes it by GPTQ; `search` is a run for the
    learning rate, `final` one for the table."""
    bits: int | None = None
    method: Method | None = None
    seed: int | None = None
    lr: float | None = None

    @property
    def name(self) -> str:
        """For who watches."""
        if self.method is None:
            return "16-bit" if self.bits is None else f"GPTQ W{self.bits}"
        return f"{self.method.title}, lr {self.lr:g}, seed {self.seed}"


def methods(args: argparse.Namespace) -> list[Method]:
    """What is compared; the order in which the runs start, the two of the claim first."""
    adapter = {"rank": args.rank, "alpha": args.alpha} | ({} if args.skip is None else {"skip": args.skip})
    own = adapter | {"group_size": args.group_size}
    found = [Method("QLoRA", _transform(name="lora", base="nf4", **adapter))]
    for bits in args.bits:
        pooled = _transform(name="qa_lora", bits=bits, quantizer="gptq", **own)
        found.append(Method(f"QA-LoRA over GPTQ W{bits}", pooled, bits))
    for bits in args.bits:
        found.append(
            Method(f"LoRA over GPTQ W{bits}", _transform(name="lora", base=f"int{bits}", **own), bits)
        )
    return found


def _transform(**keys: Any) -> str:
    inner = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    return f"transform=[{{{inner}}}]"


def main(argv: list[str]) -> int:
    """Run everything, print the tables last; the exit status is 1 where something failed."""
    args = _parser().parse_intermixed_args(argv)
    common = (*args.overrides, "checkpoint.every=0")
    run = parse.load(args.config, [*common, f"steps={args.steps}"])
    if not run.data.validation_files:
        raise ConfigError(
            "data.validation_files: missing; the held-out data must not be of the training files"
        )
    devices = visible_devices()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Processes() as processes:
        lab = Lab(args, common, Path(folder), processes, min(args.jobs * len(devices), 64))
        (lab.folder / "run.toml").write_text(parse.dump(run))
        for stage in stages(args, lab.results):
            for task, result in run_all(stage, devices, args.jobs, lab.run):
                lab.results[task] = result
                said = f"failed: {result['failed']}" if "failed" in result else f"{_last(result):.4f}"
                print(
                    f"{time.monotonic() - lab.began:4.0f} s  {task.kind} {task.name}: {said}", file=sys.stderr
                )
                document = assemble(args, _command(argv), lab.results)
                write(args.output, json.loads(lab.shown(json.dumps(document))))
    print(report(document))
    return int(any("failed" in result for result in lab.results.values()))


def stages(args: argparse.Namespace, results: Mapping[Task, Mapping[str, Any]]) -> Iterator[list[Task]]:
    """What can run at the same time; each stage needs `results` of those before."""
    ways = methods(args)

    def final(way: Method, lr: float) -> list[Task]:
        return [Task("final", way.bits, way, seed, lr) for seed in args.seeds]

    if not args.search_steps:
        yield [*(Task("base", bits) for bits in args.bits), Task("plain")]
        failed = {bits for bits in args.bits if "failed" in results[Task("base", bits)]}
        yield [task for way in ways if way.bits not in failed for task in final(way, args.lrs[0])]
        return
    search = {
        way: [Task("search", way.bits, way, max(args.seeds) + 1, lr) for lr in args.lrs] for way in ways
    }
    unquantized = [task for way in ways if way.bits is None for task in search[way]]
    yield [*(Task("base", bits) for bits in args.bits), *unquantized, Task("plain")]
    ready = [way for way in ways if way.bits is None or "failed" not in results[Task("base", way.bits)]]
    yield [task for way in ready if way.bits is not None for task in search[way]]
    best = {way: best_rate([results[task] for task in search[way]]) for way in ready}
    yield [task for way, lr in best.items() if lr is not None for task in final(way, lr)]


def best_rate(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The learning rate of the run that ended lowest; None if all failed."""
    found = best(runs, METRIC)
    return None if found is None else found["lr"]


def _last(result: Mapping[str, Any]) -> float:
    return list(values(result, METRIC).values())[-1]


class Lab:
    """Where tasks run, and what came out."""

    def __init__(
        self,
        args: argparse.Namespace,
        common: tuple[str, ...],
        folder: Path,
        processes: Processes,
        at_a_time: int,
    ) -> None:
        self.args, self.common, self.folder = args, common, folder
        self.processes, self.at_a_time = processes, at_a_time
        self.results: dict[Task, dict[str, Any]] = {}
        self.finished = earlier(args.output, ["processes"]) if args.resume else {}
        self.began = time.monotonic()

    def run(self, task: Task, device: str | None) -> dict[str, Any]:
        """Do a task; a curve and what belongs to it, or why it `failed`."""
        job = None if task.method is None else self._job(task, task.method)
        if job is not None and (found := self.finished.get((job.case, self.shown(job.command)))) is not None:
            return found
        if time.monotonic() - self.began > self.args.budget:
            return {
                "failed": f"not started within {self.args.budget:.0f} s",
                "bits": task.bits,
                "lr": task.lr,
            }
        environment = environment_of_run(device, self.at_a_time)
        if job is not None:
            return self._train(task, job, environment)
        result: dict[str, Any] = {"bits": task.bits}
        try:
            if task.bits is None:
                rows = self._judge(
                    parse.load(str(self.folder / "run.toml")).model.source, ["rtn"], environment
                )
            else:
                self._quantize(task.bits, environment)
                rows = self._judge(str(self._base(task.bits)), [], environment)
        except (OSError, ValueError, KeyError) as error:
            return result | {"failed": f"{type(error).__name__}: {error}"}
        return result | {"rows": rows, "curve": [{"step": 0, METRIC: rows[0][METRIC]}]}

    def shown(self, text: str) -> str:
        """`text` with another name for the temporary folder."""
        return text.replace(str(self.folder), "WORK")

    def _job(self, task: Task, method: Method) -> Job:
        args, own = self.args, [method.transform, f"optim.lr={task.lr}"]
        if method.bits is not None:
            own.append(f"model.quantized={self._base(method.bits)}")
        if task.kind == "search":
            own += ["data.validation_files=[]", f"data.validation_fraction={args.search_share}"]
            own += [f"steps={args.search_steps}", "log.evaluate_every=0"]
        else:
            own += [f"steps={args.steps}", f"log.evaluate_every={max(1, args.steps // 6)}"]
        assert task.seed is not None, task
        return Job(method.title, task.seed, args.config, (*self.common, *own, f"seed={task.seed}"))

    def _train(self, task: Task, job: Job, environment: Mapping[str, str]) -> dict[str, Any]:
        def judge(run: Path) -> dict[str, Any]:
            again = [] if job.case.startswith("QA-LoRA") else ["gptq", "rtn"]
            return {"rows": self._judge(str(run), again, environment, task.bits)}

        after = {} if task.kind == "search" else {"after": judge}
        args = self.args
        found = run_job(job, self.folder, self.processes, environment, args.timeout, METRIC, **after)
        return found | {"lr": task.lr, "bits": task.bits}

    def _quantize(self, bits: int, environment: Mapping[str, str]) -> None:
        """The GPTQ base of these bits, by the command that a user has for it."""
        args, config = self.args, self.folder / "run.toml"
        run = parse.load(str(config))
        command = [*PROGRAM, "quantize", run.model.source, "--method", "gptq", "--bits", str(bits)]
        command += ["--group-size", str(args.group_size), "--asymmetric", "--zero-point", "float"]
        command += ["--calibration", str(config), "--samples", str(args.samples)]
        command += ["--length", str(run.data.sequence_length), "--ranges", args.ranges, "--seed", "0"]
        command += ["--device", run.device, "--dtype", run.model.dtype, "--activations", "device"]
        command += ["--static-groups"] if args.static_groups else []
        command += [part for pattern in args.skip or () for part in ("--skip", pattern)]
        self._do([*command, "--output", str(self._base(bits))], environment)

    def _judge(
        self, model: str, again: list[str], environment: Mapping[str, str], bits: int | None = None
    ) -> list[dict[str, Any]]:
        """The rows of tools/judge_merge.py, with the model quantized `again` by each method."""
        args = self.args
        wanted = args.bits if bits is None else [bits]
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".json") as file:
            command = [sys.executable, str(JUDGE), model, "--config", str(self.folder / "run.toml")]
            command += ["--output", file.name, "--group-size", str(args.group_size)]
            command += ["--ranges", args.ranges, "--samples", str(args.samples)]
            command += ["--methods", ",".join(again), "--bits", ",".join(map(str, wanted))] if again else []
            command += ["--static-groups"] if args.static_groups else []
            command += [part for pattern in args.skip or () for part in ("--skip", pattern)]
            self._do(command, environment)
            return json.loads(Path(file.name).read_text())

    def _do(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".log") as log:
            failure = self.processes.run(command, environment, Path(log.name), self.args.timeout)
        if failure:
            raise ValueError(failure)

    def _base(self, bits: int) -> Path:
        return self.folder / f"base_w{bits}"


def assemble(
    args: argparse.Namespace, command: str, results: Mapping[Task, Mapping[str, Any]]
) -> dict[str, Any]:
    """The JSON, of what is there so far."""
    trained = [(task, result) for task, result in results.items() if task.method is not None]
    environments = [result["environment"] for _, result in trained if "environment" in result]
    common = environments[0] if environments else None
    runs = [
        {"kind": task.kind, "title": task.name}
        | {key: value for key, value in result.items() if key != "environment" or value != common}
        for task, result in results.items()
    ]
    found = [table_of(args, bits, results) | {"environment": common} for bits in args.bits]
    return {
        "command": command,
        "environment": common,
        "config": args.config,
        "tables": found,
        "verdicts": [verdict(one) for one in found],
        "learning_rates": {
            way.title: best_rate([r for t, r in trained if t.method == way and t.kind == "search"])
            if args.search_steps
            else args.lrs[0]
            for way in methods(args)
        },
        "processes": sorted(runs, key=lambda run: run["title"]),
    }


def table_of(
    args: argparse.Namespace, bits: int, results: Mapping[Task, Mapping[str, Any]]
) -> dict[str, Any]:
    """The rows of one number of bits, as a document of tools/bench_curves.py."""
    runs: list[dict[str, Any]] = []
    titles = [title for title, _, _ in untrained(bits)]
    for title, task, row in untrained(bits):
        rows = results.get(task, {}).get("rows", [])
        runs += [_run(title, None, [_point(0, found)]) for found in rows if _key(found) == row]
        if "failed" in results.get(task, {}):
            runs.append({"case": title, "seed": None, "failed": results[task]["failed"]})
    for way in methods(args):
        if way.bits not in (None, bits):
            continue
        names = way.rows(bits)
        titles += names.values()
        for task, result in results.items():
            if task.method != way or task.kind != "final":
                continue
            if "failed" in result:
                lost = {"seed": task.seed, "failed": result["failed"]}
                runs += [{"case": name} | lost for name in names.values()]
                continue
            for found in result["rows"]:
                if (name := names.get(_key(found))) is not None:
                    point = _point(args.steps, found)
                    curve = result["curve"][:-1] if found["weights"] == "as it is" else []
                    runs.append(_run(name, task.seed, [*curve, point]))
    plan = {
        "config": f"{args.config}, W{bits}",
        "metric": METRIC,
        "better": "lower",
        "baseline": baseline(bits),
        "seeds": list(args.seeds),
        "case": [{"title": title, "goal_percent": None} for title in titles],
    }
    return {"bits": bits, "plan": plan, "summary": summarize(plan, runs), "runs": runs}


def untrained(bits: int) -> list[tuple[str, Task, tuple[str, int | None]]]:
    """Title, task and row of what needs no training."""
    return [
        ("not trained, 16-bit", Task("plain"), ("as it is", None)),
        (f"not trained, GPTQ W{bits}", Task("base", bits), ("as it is", None)),
        (f"not trained, RTN W{bits}", Task("plain"), ("rtn", bits)),
    ]


def baseline(bits: int) -> str:
    """The row that QA-LoRA is to beat."""
    return f"QLoRA, merged, GPTQ W{bits}"


def contender(bits: int) -> str:
    """The row that is to beat it."""
    return f"QA-LoRA over GPTQ W{bits}, merged"


def _key(row: Mapping[str, Any]) -> tuple[str, int | None]:
    return row["weights"], row.get("bits")


def _point(step: int, row: Mapping[str, Any]) -> dict[str, float]:
    return {"step": step, **{key: row[key] for key in row if key.startswith("val_")}}


def _run(title: str, seed: int | None, curve: list[dict[str, float]]) -> dict[str, Any]:
    return {"case": title, "seed": seed, "curve": curve}


def verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    """Differences in nats, each of two rows of the same seed."""
    bits, runs = found["bits"], found["runs"]
    ours, theirs = (finals(of_case(runs, name), METRIC) for name in (contender(bits), baseline(bits)))
    trained = finals(of_case(runs, f"QA-LoRA over GPTQ W{bits}"), METRIC)
    by_seed = {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}
    mean, spread = mean_and_spread(list(by_seed.values()))
    merge = [abs(ours[seed] - trained[seed]) for seed in ours if seed in trained]
    return {
        "bits": bits,
        "difference": mean,
        "spread": spread,
        "by_seed": by_seed,
        "won": statistics.fmean(value < 0 for value in by_seed.values()) if by_seed else None,
        "merge_changed_at_most": max(merge, default=None),
    }


def report(document: Mapping[str, Any]) -> str:
    """The tables, and what they say."""
    lines = []
    rates = {way: rate for way, rate in document["learning_rates"].items() if rate is not None}
    for task in document["processes"]:
        if "failed" in task:
            lines.append(f"failed: {task['kind']} {task['title']}: {task['failed']}")
    lines.append("learning rates: " + ", ".join(f"{way} {rate:g}" for way, rate in rates.items()))
    for found in document["tables"]:
        lines += ["", f"W{found['bits']}", table(METRIC, found["plan"]["baseline"], found["summary"])]
    lines.append("")
    for one in document["verdicts"]:
        if one["difference"] is None:
            lines.append(f"W{one['bits']}: no pair to compare")
            continue
        spread = "" if one["spread"] is None else f" +- {one['spread']:.4f}"
        seeds = ", ".join(f"{value:+.4f}" for value in one["by_seed"].values())
        lines.append(
            f"W{one['bits']}: {contender(one['bits'])} - {baseline(one['bits'])}: "
            f"{one['difference']:+.4f}{spread} nats ({seeds}); merging changed QA-LoRA's loss by at most "
            f"{one['merge_changed_at_most']:.1e}"
        )
    return "\n".join(lines)


def _command(argv: Sequence[str]) -> str:
    return shlex.join(["tools/bench_merge.py", *argv])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench_merge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="section.key=value for all runs, values as in TOML")
    add("--config", default="finetune/gsm8k_local", help="model, data, schedule (default: %(default)s)")
    add("--bits", type=_numbers, default=(3, 2), metavar="B,B", help="default: 3,2")
    add("--group-size", type=int, default=32, help="default: %(default)s")
    add("--rank", type=int, default=64, help="default: %(default)s")
    add("--alpha", type=float, default=16.0, help="default: %(default)s")
    add("--steps", type=int, default=240, help="default: %(default)s")
    add("--seeds", type=_numbers, default=(0, 1, 2), metavar="N,N", help="default: 0,1,2")
    add("--lrs", type=_rates, default=(2e-5, 2e-4, 1e-3, 4e-3), help="default: 2e-5,2e-4,1e-3,4e-3")
    add(
        "--search-steps", type=int, default=60, help="0: no search, the first of --lrs (default: %(default)s)"
    )
    add("--search-share", type=float, default=0.05, help="default: %(default)s")
    add("--samples", type=int, default=128, help="calibration samples of one sequence (default: %(default)s)")
    add("--ranges", default="rtn", help="of GPTQ's groups, as in qrecipes quantize (default: %(default)s)")
    add("--static-groups", action=argparse.BooleanOptionalAction, default=True, help="of GPTQ (default: on)")
    add("--skip", action="append", metavar="PATTERN", help="layers to leave alone, instead of the heads")
    add("--jobs", type=int, default=1, metavar="N", help="processes at a time on each GPU")
    add("--timeout", type=float, default=600, help="seconds for one process")
    add("--budget", type=float, default=3600, help="seconds after which no process starts (default: an hour)")
    add("--resume", action="store_true", help="keep the finished runs of --output")
    add("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    run_main(main)
