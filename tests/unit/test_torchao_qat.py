"""torchao's fake quantizers under this library's verbs: the same products, and integers that keep them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import FakeQuantizedLinear

from qrecipes.errors import ConfigError, TrainingError
from qrecipes.quant.input_linear import QuantInputLinear
from qrecipes.quant.primitives import sqnr_db
from qrecipes.transforms import torchao_qat
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.torchao_qat import TorchaoQATConfig, TorchaoQATLinear

SCHEMES = ["int4_weight", "8da4w"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_those_of_torchao_itself(scheme):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 24))
    config = TorchaoQATConfig(scheme=scheme, group_size=32)
    theirs = copy.deepcopy(plain)
    quantize_(theirs, config.torchao_config())
    assert isinstance(theirs[0], FakeQuantizedLinear)
    weight = plain[0].weight
    ours = Chain.from_configs([config]).swap(plain)
    assert isinstance(ours[0], TorchaoQATLinear)
    assert ours[0].weight is weight
    x, dy = torch.randn(5, 64), torch.randn(5, 24)
    found = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(dy)
        found.append((y, leaf.grad, model[0].weight.grad, model[0].bias.grad))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_weights_are_the_trained_ones(scheme, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(64, 24).to(dtype)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-2, 2, 24).unsqueeze(1))
        linear.weight[3] = 0
    layer = TorchaoQATLinear.from_linear(linear, TorchaoQATConfig(scheme=scheme, group_size=16))
    merged = layer.merged()
    assert isinstance(merged, QuantInputLinear) is (scheme == "8da4w")
    trained = layer.weight_fake_quantizer(layer.weight).detach()
    torch.testing.assert_close(merged.dequantize(), trained, rtol=torch.finfo(dtype).eps, atol=1e-7)
    x = torch.randn(50, 64, dtype=dtype)
    # bfloat16 sums; and an 8-bit input may round to its other neighbour
    assert sqnr_db(layer(x).detach(), merged(x).detach()) > (40 if dtype is torch.bfloat16 else 50)


def test_a_rule_of_torchao_that_is_another_one_is_noticed(monkeypatch):
    layer = TorchaoQATLinear.from_linear(nn.Linear(64, 24), TorchaoQATConfig(group_size=32))
    monkeypatch.setattr(torchao_qat, "LEVELS", 14)
    with pytest.raises(TrainingError, match="this version of torchao quantizes otherwise"):
        layer.merged()


def test_wrong_requests_are_refused():
    with pytest.raises(ConfigError, match=r"torchao_qat.group_size: .*20 is no multiple of 8"):
        TorchaoQATConfig(group_size=20)
    with pytest.raises(ConfigError, match="torchao_qat: 0: group_size 128 does not divide 64"):
        Chain.from_configs([TorchaoQATConfig()]).swap(nn.Sequential(nn.Linear(64, 24)))
