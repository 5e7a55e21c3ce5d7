"""Launches of kernels by what was compiled before: when they may skip Triton's own binding of arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="launches Triton's kernels")

from qrecipes.quant import triton_launch  # noqa: E402
from qrecipes.quant.triton_launch import Launcher, Launchers  # noqa: E402


class Recorder:
    """Stands in for a Triton function, for what it compiles and for the driver."""

    def __init__(self) -> None:
        self.bound: list[tuple[Any, ...]] = []
        self.run_with: list[tuple[Any, ...]] = []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid):
        def bind(*arguments, **named):
            self.bound.append((grid, arguments, named))
            return self

        return bind

    def run(self, *arguments):
        self.run_with.append(arguments)


@pytest.fixture
def recorder(monkeypatch):
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: "stream")
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton_launch, "JITFunction", Recorder)
    monkeypatch.setattr(triton_launch, "_FAST", True)
    return Recorder()


def test_equal_arguments_are_bound_once_and_then_run_with_the_constants_last(recorder):
    launch = Launcher(recorder, {"BLOCK": 16, "WHOLE": True}, num_warps=2)
    tensors = [torch.zeros(64), torch.ones(64)]
    for t in tensors:
        launch(3, t, None, 7, float(t[0]))  # floats may differ
    assert len(recorder.bound) == 1
    assert recorder.bound[0][0] == (3, 1, 1)
    assert recorder.bound[0][2] == {"BLOCK": 16, "WHOLE": True, "num_warps": 2}
    ((*grid, stream, function, metadata, _, enter, leave, t, none, seven, one, block, whole),) = (
        recorder.run_with
    )
    assert (grid, stream, function, metadata) == ([3, 1, 1], "stream", "function", "metadata")
    assert t is tensors[1]
    assert (enter, leave, none, seven, one, block, whole) == (None, None, None, 7, 1.0, 16, True)


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(64, dtype=torch.bfloat16), 7),
        (torch.zeros(65)[1:], 7),
        (torch.zeros(64), 8),
        (None, 7),
        (torch.zeros(64), None),
    ],
    ids=["type", "alignment", "integer", "no tensor", "no integer"],
)
def test_whatever_triton_may_specialize_for_is_bound_anew(recorder, other):
    launch = Launcher(recorder, {})
    launch(1, torch.zeros(64), 7)
    launch(1, *other)
    assert len(recorder.bound) == 2
    assert recorder.run_with == []


def test_constants_come_in_the_order_of_the_signature_and_grids_may_have_two_dimensions(recorder):
    recorder.arg_names = ["x", "FIRST", "SECOND"]
    launch = Launcher(recorder, {"SECOND": 2, "FIRST": 1})
    launch((4, 5), 7)
    launch((4, 5), 7)
    assert recorder.bound[0][0] == (4, 5, 1)
    assert recorder.run_with[0][:3] == (4, 5, 1)
    assert recorder.run_with[0][-3:] == (7, 1, 2)


def test_launchers_are_made_once_for_each_set_of_constants_and_options(recorder):
    launchers = Launchers(recorder)
    first = launchers({"BLOCK": 1, "KIND": "a"}, num_warps=1)
    assert launchers({"BLOCK": 1, "KIND": "a"}, num_warps=1) is first
    for other in (
        launchers({"BLOCK": 2, "KIND": "a"}, num_warps=1),
        launchers({"BLOCK": 1, "KIND": "a"}, num_warps=2),
    ):
        assert other is not first
    assert first.named == {"BLOCK": 1, "KIND": "a", "num_warps": 1}


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_that_wait_for_launches_are_not_passed_over(recorder, name):
    launch = Launcher(recorder, {})
    launch(1, 7)
    hook = lambda metadata: None  # noqa: E731
    chain = getattr(triton.knobs.runtime, name)
    chain.add(hook)
    try:
        launch(1, 7)
    finally:
        chain.remove(hook)
    assert len(recorder.bound) == 2
    launch(1, 7)
    assert len(recorder.run_with) == 1


def test_every_device_has_a_kernel_of_its_own_and_launches_on_its_current_stream(recorder, monkeypatch):
    launch = Launcher(recorder, {})
    driver = triton.runtime.driver.active
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(driver, "get_current_device", lambda device=device: device)
        monkeypatch.setattr(driver, "get_current_stream", lambda device: f"stream of {device}")
        launch(1, 7)
    assert len(recorder.bound) == 2
    assert [arguments[3] for arguments in recorder.run_with] == ["stream of 0", "stream of 1"]


def test_versions_of_triton_that_were_not_tried_bind_every_time(recorder, monkeypatch):
    monkeypatch.setattr(triton_launch, "_FAST", False)
    launch = Launcher(recorder, {})
    launch(1, 7)
    launch(1, 7)
    assert len(recorder.bound) == 2


def test_many_shapes_do_not_pile_up(recorder, monkeypatch):
    monkeypatch.setattr(triton_launch, "KEPT", 3)
    launch = Launcher(recorder, {})
    for size in range(20):
        launch(1, size)
    assert len(launch._compiled) <= 3
