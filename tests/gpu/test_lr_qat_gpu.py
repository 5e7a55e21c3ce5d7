"""LR-QAT on a device: the merged layer's integers and weights are those that trained, and an export's too."""

from __future__ import annotations

import pytest
import torch
from harness import command_line
from torch import nn

from qrecipes import load_export
from qrecipes.export.store import load_run, load_swapped
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.low_rank_rounding import low_rank_weight
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.lr_qat import LRQATConfig, LRQATLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def trained(width: int = 1024, dtype: torch.dtype = torch.bfloat16, **config) -> nn.Sequential:
    """A layer on the GPU whose correction moves many levels by fractions of all sizes."""
    torch.manual_seed(0)
    model = Chain.from_configs([LRQATConfig(**config)]).swap(
        nn.Sequential(nn.Linear(width, width, device=CUDA, dtype=dtype))
    )
    with torch.no_grad():
        if model[0].low_rank_a is not None:
            model[0].low_rank_a.normal_(0, 40)
        if model[0].zero is not None:
            model[0].zero.add_(torch.rand_like(model[0].zero) * 2 - 1)
    return model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("storage", "bits"), [("fixed_point8", 4), ("int4", 2), ("int4", 3), ("fp32", 8)])
@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_layers_have_the_weights_of_the_training_forward(symmetric, storage, bits, group_size, dtype):
    options = {"symmetric": symmetric, "storage": storage, "bits": bits, "group_size": group_size}
    (layer,) = trained(dtype=dtype, scale_domain="log", **options)
    merged = layer.merged()
    parts = layer.phi, layer.low_rank_a, layer.low_rank_b, layer.effective_scale(), layer.zero
    assert torch.equal(merged.integers(), layer.integers())
    assert torch.equal(merged.dequantize(dtype), low_rank_weight(*parts, layer.rounding, dtype))
    x = torch.randn(256, 1024, device=CUDA, dtype=dtype)
    assert torch.equal(nn.functional.linear(x, merged.dequantize(), merged.bias), layer(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_integer_forward_is_the_merged_layers_bit_for_bit(bits):
    (layer,) = trained(activation_bits=bits, integer_forward=True)
    x = torch.randn(256, 1024, device=CUDA, dtype=torch.bfloat16)
    assert torch.equal(layer.merged()(x), layer(x))


def test_a_model_on_the_cpu_is_merged_as_its_device_merges():
    """Where the CPU's own arithmetic gives other integers somewhere: corrections of about 2 levels are summed
    to within some 4e-7, and of 50 million weights a few tens are so near to a half."""
    options = {"storage": "fp32", "rank": 64, "alpha": 64.0}
    model = trained(7168, **options)
    there = model[0].integers().cpu()
    model.cpu()
    here = model[0].integers()
    merged = Chain.from_configs([LRQATConfig(**options)]).finalize(model, CUDA)
    assert merged[0].packed.device.type == "cpu"
    assert torch.equal(merged[0].integers(), there)
    assert 0 < (there != here).sum() < 1e-5 * there.numel()


def test_an_export_has_the_integers_that_trained(tmp_path):
    run = tmp_path / "run"
    options = (f'output="{run}"', 'device="cuda"', "export.at_end=true", "log.progress=false", "steps=6")
    assert command_line("run", "train", "--config", "tiny/llm_lr_qat", *options) == 0
    swapped, _, _ = load_swapped(run, device=CUDA)
    layers = {fqn: m for fqn, m in swapped.named_modules() if isinstance(m, LRQATLinear)}
    assert layers
    for model in (load_export(run / "export"), load_run(run)[0], load_run(run, device=CUDA)[0]):
        for fqn, layer in layers.items():
            merged = model.get_submodule(fqn)
            assert isinstance(merged, QuantLinear)
            assert torch.equal(merged.integers().cpu(), layer.integers().cpu()), fqn
            assert torch.equal(merged.scale.cpu(), layer.effective_scale().cpu()), fqn
