"""Stored weights under FSDP2: bit-equal to one process, rows left over included, and gathered as INT8."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker_stored_weights.py")
sys.path.insert(0, str(WORKER.parent))
from worker_stored_weights import CASES, WIDTHS  # noqa: E402 - a script beside this file, run under torchrun

CASES = [str(case) for case in CASES]
SHAPES = list(zip(WIDTHS[1:], WIDTHS, strict=False))
"""[N, K] of each layer."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("stored_weights") / "found.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*launcher, str(WORKER), str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def one(found):
    return found["one"]


@pytest.fixture(scope="module")
def two(found):
    return found["two"]


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(found[name]) is torch.Tensor, name
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["start", "gradients", "end", "loaded", "moments", "values", "written"])
def test_two_processes_equal_one_to_the_bit(one, two, case, part):
    assert_equal(two[case][part], one[case][part])
    if part == "end":
        assert not torch.equal(two[case]["end"]["0.weight"], two[case]["start"]["0.weight"])


@pytest.mark.parametrize("case", CASES)
def test_losses_are_equal_and_loading_restores_them(one, two, case):
    assert two[case]["losses"] == one[case]["losses"]
    assert_equal(two[case]["loaded"], two[case]["end"])
    assert two[case]["loss of loaded"] == two[case]["loss of saved"] != two[case]["losses"][-1]


def test_state_dicts_hold_int8_and_float32(two):
    for case in CASES:
        types = {n.rpartition(".")[2]: t.dtype for n, t in two[case]["end"].items()}
        assert types == {"weight": torch.int8, "weight_scale": torch.float32}


def test_what_is_gathered_is_int8_and_its_scales(two):
    """Half the bytes of bfloat16, but for 4 bytes a row; parts are filled up to the first rank's rows."""
    start = two[CASES[1]]["start"]
    for rank, mine in enumerate(two["sent"]):
        assert len(mine["stored"]) == len(mine["plain"]) == len(SHAPES)
        for i, (N, K) in enumerate(SHAPES):
            rows = math.ceil(N / 2)
            plain, stored = mine["plain"][i], mine["stored"][i]
            assert (plain.dtype, plain.nbytes) == (torch.bfloat16, 2 * rows * K)
            assert (stored.dtype, stored.nbytes) == (torch.uint8, rows * K + 4 * rows)  # uint8: bytes of both
            part = slice(rank * rows, (rank + 1) * rows)
            q, scale = start[f"{i}.weight"][part], start[f"{i}.weight_scale"][part]
            sent_q = stored[: rows * K].view(torch.int8).view(rows, K)
            sent_scale = stored[rows * K :].clone().view(torch.float32).view(rows, 1)
            assert torch.equal(sent_q[: len(q)], q)
            assert torch.equal(sent_scale[: len(q)], scale)
            assert not sent_q[len(q) :].any()
