"""Kinds of devices: which of several GPUs is of the kind that a run trained on."""

from __future__ import annotations

import pytest
import torch

from qrecipes.training.device_kind import device_of, kind_of

CAPABILITIES = [(9, 0), (8, 0), (8, 0)]


@pytest.fixture
def _three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITIES[device.index])


@pytest.mark.usefixtures("_three_gpus")
@pytest.mark.parametrize(("kind", "index"), [("cuda 9.0", 0), ("cuda 8.0", 2), ("cuda 8.9", None)])
def test_a_gpu_of_the_kind_is_found_the_current_one_first(kind, index):
    device = device_of(kind)
    assert device == (None if index is None else torch.device("cuda", index))
    assert device is None or kind_of(device) == kind


def test_without_gpus_only_the_cpu_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kind_of(torch.device("cpu")) == "cpu"
    assert device_of("cpu") == torch.device("cpu")
    assert device_of("cuda 9.0") is device_of("xpu") is None
