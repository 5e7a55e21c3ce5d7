"""Two processes under FSDP2 train as one process does; gloo on CPU here, NCCL where there are two GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Trial, losses, methods, tiny_run

from qrecipes.transforms import REGISTRY

WORKER = Path(__file__).with_name("worker.py")
FAMILIES = ("llm", "vit") if importlib.util.find_spec("timm") else ("llm",)
PLAIN = [f"{family}:{method}:plain" for family in FAMILIES for method in ["", *methods()]]
EXTRA = [
    f"llm:{methods()[0]}:checkpointing",
    f"llm:{methods()[0]}:compile",
    "llm::noreshard",
    "llm::adamw8bit",
]


def run_worker(folder: Path, device: str, cases: list[str]) -> dict:
    output = folder / "found.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(WORKER),
    ]
    finished = subprocess.run(
        [*command, str(output), device, str(folder), *cases],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("fsdp2"), "cpu", PLAIN + EXTRA)


def one_process(case: str, device: torch.device | None = None) -> list[float]:
    family, method, name = case.split(":")
    run = tiny_run(family, method or None, steps=6)
    dtype = torch.float32
    if name == "adamw8bit":
        run, dtype = replace(run, optim=replace(run.optim, name="adamw8bit")), torch.bfloat16
    return losses(Trial.of(run, dtype=dtype).advance(6))


def rtol(case: str) -> float:
    _, method, name = case.split(":")
    if name == "adamw8bit":
        return 2e-2  # bfloat16, and each rank's blocks of 8-bit moments are cut at its own rows
    return REGISTRY[method].parity_rtol if method else 1e-5  # float32 sums in another order


@pytest.mark.parametrize("case", PLAIN + EXTRA)
def test_two_processes_equal_one(two_processes, case):
    torch.testing.assert_close(
        losses(two_processes[case]["unbroken"]), one_process(case), rtol=rtol(case), atol=0
    )


@pytest.mark.parametrize("case", PLAIN + EXTRA)
def test_resume_is_bit_exact_on_two_processes(two_processes, case):
    assert two_processes[case]["resumed"] == two_processes[case]["unbroken"]


@pytest.mark.multigpu
def test_two_gpus_equal_one_process(tmp_path):
    """NCCL; the tiny runs of every method against the CPU in one process."""
    found = run_worker(tmp_path, "cuda", PLAIN)
    for case in PLAIN:
        assert found[case]["resumed"] == found[case]["unbroken"], case
        # float32 on a GPU sums in another order (and TF32 stays off)
        expected = one_process(case)
        torch.testing.assert_close(
            losses(found[case]["unbroken"]), expected, rtol=max(rtol(case), 1e-3), atol=0
        )
