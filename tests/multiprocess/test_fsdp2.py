"""Two processes under FSDP2 train as one process does; gloo on CPU here, NCCL where there are two GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import Trial, methods, tiny_run, variants
from safetensors.torch import load_file

from qrecipes.errors import CheckpointError
from qrecipes.training import checkpoint, constants
from qrecipes.transforms import REGISTRY
from qrecipes.transforms.base import transform_for

WORKER = Path(__file__).with_name("worker.py")
sys.path.insert(0, str(WORKER.parent))
from worker import eager_optimizer, variant  # noqa: E402 - a script beside this file, run under torchrun

FAMILIES = ("llm", "vit") if importlib.util.find_spec("timm") else ("llm",)
PLAIN = [f"{family}:{method}:plain" for family in FAMILIES for method in ["", *methods()]]
REPLACES_LAYERS = next(method for method in methods() if REGISTRY[method].compares_layers)
EXTRA = [
    f"llm:{REPLACES_LAYERS}:checkpointing",
    *(f"{family}:{name}:plain" for name, families in variants().items() for family in families),
    f"llm:{REPLACES_LAYERS}:compile",
    f"llm:{REPLACES_LAYERS}:in_graph",
    "llm::noreshard",
    "llm::chunked",
    f"llm:{REPLACES_LAYERS}:chunked",
    "llm::adamw8bit",
    "llm::stochastic_adamw",  # in float32, where it rounds nothing and equals AdamW
    "llm::schedule_free_adamw",
    "llm::in_backward",
    "llm:qlora:rebuild",
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
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(output.read_text()) | {"folder": str(folder)}


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("fsdp2"), "cpu", PLAIN + EXTRA)


@pytest.fixture(scope="session")
def folder(two_processes):
    """Where the two processes wrote."""
    return Path(two_processes["folder"])


def one_process(case: str) -> torch.Tensor:
    """Loss and gradient norm of each step, [6, 2]."""
    family, method, name = case.split(":")
    run = tiny_run(family, method or None, steps=6)
    if name in ("adamw8bit", "schedule_free_adamw", "in_backward"):
        run = variant(run, name)  # and not what it should equal
    dtype = torch.bfloat16 if name == "adamw8bit" else torch.float32
    with eager_optimizer(case):
        return torch.tensor(Trial.of(run, dtype=dtype).advance(6))


def rtol(case: str) -> float:
    _, method, name = case.split(":")
    if name == "adamw8bit":
        return 2e-2  # bfloat16, and each rank's blocks of 8-bit moments are cut at its own rows
    if not method:
        return 1e-5  # float32 sums in another order
    return transform_for(tiny_run("llm", method).transform[0]).parity_rtol


@pytest.mark.parametrize("case", PLAIN + EXTRA)
def test_two_processes_equal_one(two_processes, case):
    """Losses, and norms of the whole gradient: Adam's losses do not see its scale."""
    found = torch.tensor(two_processes[case]["unbroken"])
    torch.testing.assert_close(found, one_process(case), rtol=rtol(case), atol=0)


@pytest.mark.parametrize("case", PLAIN + EXTRA)
def test_ranks_read_different_rows_and_draw_different_numbers(two_processes, case):
    (expected_0, got_0), (expected_1, got_1) = two_processes[case]["draws"]
    assert (got_0, got_1) == (expected_0, expected_1)
    assert got_0 != got_1
    first, second = two_processes[case]["rows"]
    assert not any(row in second for row in first)


@pytest.mark.parametrize(
    "case", [*PLAIN, "llm::schedule_free_adamw", "llm::in_backward", "llm:qlora:rebuild"]
)
def test_checkpoint_of_two_ranks_goes_on_with_one(two_processes, folder, case):
    family, method, name = case.split(":")
    run = tiny_run(family, method or None, output=str(folder / case.replace(":", "-")), steps=6)
    run = variant(run, name)
    trial = Trial.of(run)
    saved = checkpoint.folder_of(run.output, 3)
    trial.done, position = checkpoint.restore(saved, run, trial.model, trial.optimizer, trial.process)
    trial.data.load_state_dict(position)
    expected = torch.tensor(two_processes[case]["unbroken"][3:])
    torch.testing.assert_close(torch.tensor(trial.advance(3)), expected, rtol=rtol(case), atol=0)


@pytest.mark.parametrize("mode", ["once", "rebuild"])
def test_a_checkpoint_of_two_ranks_holds_what_trains(two_processes, folder, mode):
    """The frozen base is apart, whole, and has the fingerprints that one process finds."""
    case = "llm:qlora:plain" if mode == "once" else "llm:qlora:rebuild"
    run = tiny_run("llm", "qlora", output=str(folder / case.replace(":", "-")))
    saved = checkpoint.folder_of(run.output, 3)
    frozen = {n: p for n, p in Trial.of(run).model.named_parameters() if not p.requires_grad}
    state = checkpoint.read_state(saved)["frozen"]
    assert state["fingerprints"] == {name: constants.fingerprint(p) for name, p in frozen.items()}
    assert not load_file(saved / checkpoint.MODEL).keys() & frozen.keys()
    stored = list(saved.parent.glob("frozen_*"))
    assert [path.name for path in stored] == ([state["file"]] if mode == "once" else [])
    for path in stored:
        assert all(torch.equal(tensor, frozen[name]) for name, tensor in load_file(path).items())


def test_composite_states_are_not_resharded(two_processes, folder):
    case = "llm::adamw8bit"
    run = variant(tiny_run("llm", None, output=str(folder / case.replace(":", "-")), steps=6), "adamw8bit")
    trial = Trial.of(run, dtype=torch.bfloat16)
    with eager_optimizer(case), pytest.raises(CheckpointError, match="resume on as many ranks as saved it"):
        checkpoint.restore(
            checkpoint.folder_of(run.output, 3), run, trial.model, trial.optimizer, trial.process
        )


@pytest.mark.parametrize("case", PLAIN + EXTRA)
def test_resume_is_bit_exact_on_two_processes(two_processes, case):
    assert two_processes[case]["resumed"] == two_processes[case]["unbroken"]


@pytest.mark.multigpu
def test_two_gpus_equal_one_process(tmp_path):
    """NCCL; the tiny runs of every method against the CPU in one process."""
    cases = [*PLAIN, "llm::chunked"]
    found = run_worker(tmp_path, "cuda", cases)
    for case in cases:
        assert found[case]["resumed"] == found[case]["unbroken"], case
        # float32 on a GPU sums in another order (and TF32 stays off)
        got = torch.tensor(found[case]["unbroken"])
        torch.testing.assert_close(got, one_process(case), rtol=max(rtol(case), 1e-3), atol=0)
