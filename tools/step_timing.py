"""One training step after another, timed in a process of its own: what the benchmarks of steps share."""

from __future__ import annotations

import gc
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrecipes.data import Batch
from qrecipes.parallel.process import Process, pick_device
from qrecipes.training.metrics import environment

WARMUP = 4
"""Steps that compile or record, and that no median counts."""
COMPILING = 2
"""Steps that the peak of memory leaves out: those that compile. The next may record a CUDA graph, and only
then does the allocator see the memory that replaying it takes."""
Step = Callable[[], Tensor]
"""A forward and a backward pass and an update; its loss."""


def in_own_process(script: str, arguments: Sequence[str], timeout: float) -> dict[str, Any]:
    """What `script --worker` found, or how it `failed`; what else it printed is printed.

    A process of its own, since compiled graphs keep their memory.
    """
    command = [sys.executable, script, "--worker", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout:.0f} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    print("\n".join(line for line in done.stdout.splitlines() if line not in found), end="", flush=True)
    if done.returncode or not found:
        return {"failed": done.stderr[-1500:] or "no result"}
    return json.loads(found[0].removeprefix("RESULT "))


def each_in_own_process(
    script: str,
    cases: Sequence[tuple[dict[str, Any], Sequence[str]]],
    timeout: float,
    table: Callable[[list[dict[str, Any]]], str],
    output: Path | None,
) -> int:
    """Measure cases, given as what names each and its arguments; the table's lines as they come, and whole at
    the end. `output` is written after each. The exit status is 1 where one failed."""
    results: list[dict[str, Any]] = []
    for names, arguments in cases:
        results.append(names | in_own_process(script, arguments, timeout))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if output:
            document = {
                "command": shlex.join([f"tools/{Path(script).name}", *sys.argv[1:]]),
                "environment": environment(Process(0, 1, pick_device("auto"), None)),
                "results": results,
            }
            output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(results))
    return int(any("failed" in result for result in results))


def report(found: dict[str, Any]) -> None:
    """Hand a worker's findings to `in_own_process`."""
    print("RESULT", json.dumps(found))


def timed_steps(
    step: Step, steps: int, units: int, device: torch.device, *, profile: bool = False
) -> dict[str, Any]:
    """Medians of `steps` steps after the warm-up; `units` are the tokens or images of one.

    `host_ms` is the time until all of a step's work is queued.
    `memory_before_gb` is allocated before the first step, `peak_memory_gb` the allocator's peak after the
    COMPILING ones; both in 10**9 bytes. `graphs` counts what Dynamo compiled, and `graphs_after_step_3` what
    it compiled again.
    """
    gc.collect()
    before = gigabytes(torch.cuda.memory_allocated) if device.type == "cuda" else None
    times, host_times, losses, graphs = [], [], [], 0
    for i in range(WARMUP + steps):
        if i == COMPILING and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if i == 3:
            graphs = compiled_graphs()
        start = time.perf_counter()
        loss = step()
        host_times.append(time.perf_counter() - start)
        losses.append(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    all_graphs = compiled_graphs()
    seconds = statistics.median(times[WARMUP:] or times)
    peak = gigabytes(torch.cuda.max_memory_allocated) if device.type == "cuda" else None
    if profile:
        print_profile(step)
    return {
        "step_ms": round(1e3 * seconds, 2),
        "host_ms": round(1e3 * statistics.median(host_times[WARMUP:] or host_times), 2),
        "per_s": round(units / seconds, 1),
        "memory_before_gb": before,
        "peak_memory_gb": peak,
        "first_step_s": round(times[0], 1),
        "graphs": all_graphs,
        "graphs_after_step_3": all_graphs - graphs,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def gigabytes(count: Callable[[], int]) -> float:
    """What a counter of the CUDA allocator says, in 10**9 bytes."""
    return round(count() / 1e9, 3)


def random_tokens(rows: int, length: int, vocabulary: int, device: torch.device | str = "cpu") -> Batch:
    """Random tokens, and the next ones as targets."""
    tokens = torch.randint(vocabulary, (rows, length + 1), device=device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def print_profile(step: Step) -> None:
    """Kernels of one step by time, and the time in which none ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels)
    idle, end, gaps = 0.0, spans[0][0], []
    for start, stop, name in spans:
        if start > end:
            idle += start - end
            gaps.append((start - end, name))
        end = max(end, stop)
    total: dict[str, tuple[int, float]] = {}
    for start, stop, name in spans:
        count, microseconds = total.get(name, (0, 0.0))
        total[name] = count + 1, microseconds + stop - start
    print(f"\n{(end - spans[0][0]) / 1e3:9.3f} ms from first to last kernel, {idle / 1e3:.3f} of them idle")
    for gap, name in sorted(gaps, reverse=True)[:8]:
        print(f"{gap / 1e3:9.3f} ms idle before {name[:90]}")
    for name, (count, microseconds) in sorted(total.items(), key=lambda item: -item[1][1])[:40]:
        print(f"{microseconds / 1e3:9.3f} ms {count:5} x {name[:100]}")
