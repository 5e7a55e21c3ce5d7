"""Evaluation leaves every module in the mode that it was in."""

from __future__ import annotations

import pytest
from torch import nn

from qrecipes.models.modes import evaluation_mode


def test_each_module_is_put_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    model[1][1].eval()  # as of a backbone whose statistics stay
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_also_after_an_error():
    model = nn.Sequential(nn.Dropout())
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert model[0].training
