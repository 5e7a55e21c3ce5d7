"""Low-bit layers among trained ones under FSDP2, two gloo processes against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("quant_linear_worker.py")
sys.path.insert(0, str(WORKER.parent))
from quant_linear_worker import build, train  # noqa: E402 - a script beside this file, run under torchrun


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    output = tmp_path_factory.mktemp("quant_linear") / "found.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, str(WORKER), str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def one_process():
    return train(build())


def test_losses_and_gradients_equal_one_process(two_processes, one_process):
    # float32 sums over two halves of a batch
    assert two_processes["losses"] == pytest.approx(one_process["losses"], rel=1e-5)
    assert two_processes["gradients"].keys() == one_process["gradients"].keys()
    for name, gradient in one_process["gradients"].items():
        torch.testing.assert_close(two_processes["gradients"][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_payloads_have_not_moved_by_one_bit(two_processes, one_process):
    before = {name: p for name, p in build().named_parameters() if not p.requires_grad}
    assert before.keys() == two_processes["frozen"].keys() == one_process["frozen"].keys()
    for name, tensor in before.items():
        assert two_processes["frozen"][name].dtype is tensor.dtype
        assert torch.equal(two_processes["frozen"][name], tensor), name


def test_every_payload_is_cut_along_its_rows(two_processes):
    """Each rank holds at most the larger half of every tensor's first dimension, and both together all."""
    for name, tensor in build().named_parameters():
        if tensor.requires_grad:
            continue
        rows = [shapes[name][0] for shapes in two_processes["held"]]
        assert sum(rows) == tensor.shape[0], name
        assert max(rows) == -(-tensor.shape[0] // 2), name


def test_converting_a_sharded_model_leaves_payloads(two_processes):
    for name, tensor in build().named_parameters():
        is_payload = not tensor.requires_grad
        assert two_processes["types"][name] is (tensor.dtype if is_payload else torch.bfloat16), name
