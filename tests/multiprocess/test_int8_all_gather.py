"""Two processes that gather their weights as INT8; gloo on CPU here, NCCL where there are two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Trial, tiny_run
from safetensors.torch import load_file

from qrecipes import load_export
from qrecipes.training import checkpoint
from qrecipes.transforms.int8_mixed_precision import Int8MixedPrecision

WORKER = Path(__file__).with_name("int8_all_gather_worker.py")
CHECKS = {
    "layers": "outputs and gradients of two processes are one process's, bit for bit",
    "compiled": "under torch.compile with fullgraph, compiled once",
    "traffic": "INT8 and a float32 scale a row are what is sent",
    "what remains": "the gathered weight is freed, and is INT8 while it is there",
    "stochastic rounding": "one draw a gather, the same weight on every rank",
    "optimizers": "update as they update a weight that is gathered as it is",
    "variants": "activation checkpointing and reshard_after_forward change no bit",
    "moved and loaded": "Module.to and load_state_dict keep the gather",
}


def run_worker(folder: Path, device: str) -> dict[str, list[str]]:
    output = folder / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*launcher, str(WORKER), str(output), device, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes wrote."""
    return tmp_path_factory.mktemp("int8_all_gather")


@pytest.fixture(scope="module")
def found(folder):
    """What differed, by check."""
    return run_worker(folder, "cpu")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: CHECKS[check])
def test_two_processes(found, check):
    assert found[check] == []


def losses(output: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


def test_a_run_trains_as_one_process_does(found, folder):
    two = losses(folder / "whole")
    run = tiny_run("llm", "int8_mixed_precision", steps=6)
    one = Trial.of(replace(run, transform=(replace(run.transform[0], int8_all_gather=True),))).advance(6)
    assert two[-1] < two[0]
    one = torch.tensor([loss for loss, _ in one], dtype=torch.float64)
    # scales of grad_weight are over each rank's tokens
    torch.testing.assert_close(two, one, rtol=Int8MixedPrecision.parity_rtol, atol=0)


def assert_resumes_bit_for_bit(folder: Path, name: str) -> None:
    unbroken, resumed = (checkpoint.folder_of(folder / run, 6) for run in (name, f"{name}_resumed"))
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert (unbroken / file).read_bytes() == (resumed / file).read_bytes(), file
    assert torch.equal(losses(folder / name)[3:], losses(folder / f"{name}_resumed"))


@pytest.mark.parametrize("name", ["whole", "rounded"])
def test_a_run_resumes_bit_for_bit(found, folder, name):
    """Rounded to nearest, and stochastically with recomputed blocks."""
    assert_resumes_bit_for_bit(folder, name)


def test_checkpoints_are_those_of_a_run_without_the_option(found, folder):
    """Names, shapes and types; and each goes on with the other's setting, on two processes and on one."""
    gathered, plain = (checkpoint.folder_of(folder / name, 3) for name in ("whole", "plain"))
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        shapes = [
            {name: (t.shape, t.dtype) for name, t in load_file(saved / file).items()}
            for saved in (gathered, plain)
        ]
        assert shapes[0] == shapes[1], file
    for name in ("with", "without"):
        # the option changes grad_input's rounding: the runs stay close for three steps
        torch.testing.assert_close(losses(folder / name), losses(folder / "whole")[3:], rtol=1e-2, atol=0)
        assert not torch.equal(losses(folder / name), losses(folder / "whole")[3:])
    run = tiny_run("llm", "int8_mixed_precision", steps=6, model__dtype="float32")
    trial = Trial.of(run)
    trial.done, position = checkpoint.restore(gathered, run, trial.model, trial.optimizer, trial.process)
    trial.data.load_state_dict(position)
    one = torch.tensor([loss for loss, _ in trial.advance(3)], dtype=torch.float64)
    torch.testing.assert_close(one, losses(folder / "without"), rtol=1e-2, atol=0)


def test_a_run_exports_its_weights(found, folder):
    """In high precision: those of the last checkpoint."""
    saved = load_file(checkpoint.folder_of(folder / "whole", 6) / checkpoint.MODEL)
    exported = load_export(folder / "whole" / "export").state_dict()
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(exported[name], tensor), name


@pytest.mark.multigpu
def test_two_gpus(tmp_path):
    """NCCL; every check above but the comparison with the CPU."""
    found = run_worker(tmp_path, "cuda")
    assert {check: faults for check, faults in found.items() if faults} == {}
    for name in ("whole", "rounded"):
        assert_resumes_bit_for_bit(tmp_path, name)
    test_a_run_exports_its_weights(found, tmp_path)
    two = losses(tmp_path / "whole")
    assert two[-1] < two[0]
