"""QA-LoRA: its formulas in float64, and merges that keep the integers and the function."""

from __future__ import annotations

import pytest
import torch
from harness import Trial, predict, saved_for_backward, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qrecipes.errors import ConfigError
from qrecipes.export.integer_zeros import round_zeros_, with_integer_zeros
from qrecipes.quant.affine import float_zeros
from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.linear import QuantLinear
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.qa_lora import (
    QALoRAConfig,
    QALoRALinear,
    convert_pool,
    pooled_input,
)


def adapted(linear: nn.Module, size: float = 0.05, **config) -> QALoRALinear:
    """A layer with B other than zero."""
    layer = QALoRALinear.from_linear(linear, QALoRAConfig(**({"rank": 4, "group_size": 16} | config)))
    with torch.no_grad():
        layer.lora_b.normal_(0, size)
    return layer.eval()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    pool=st.sampled_from(["sum", "mean"]),
    size=st.sampled_from([16, 24, 32]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 20),
    tokens=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    bias=st.booleans(),
)
def test_output_and_gradients_are_the_papers(bits, pool, size, groups, rows, tokens, bias):
    """Groups are pooled one by one here, and the merged weight is written down entry by entry."""
    torch.manual_seed(0)
    layer = adapted(nn.Linear(size * groups, rows, bias=bias), bits=bits, pool=pool, group_size=size)
    x = torch.randn(*tokens, size * groups, requires_grad=True)
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    wide = x.detach().double().requires_grad_()
    pooled = torch.stack([wide[..., g * size : (g + 1) * size].sum(-1) for g in range(groups)], -1)
    if pool == "mean":
        pooled = pooled / size
    expected = wide @ layer.base.dequantize(torch.float64).t() + 16.0 / 4 * pooled @ a.t() @ b.t()
    if bias:
        expected = expected + layer.base.bias.detach().double()
    found = layer(x)
    grad = torch.randn(found.shape)
    found.backward(grad)
    expected.backward(grad.double())
    tolerance = {"rtol": 2e-5, "atol": 5e-5}  # float32 sums of up to 96 terms near 1
    for ours, theirs in (
        (found, expected),
        (x.grad, wide.grad),
        (layer.lora_a.grad, a.grad),
        (layer.lora_b.grad, b.grad),
    ):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)
    assert all(p.grad is None for p in layer.base.parameters())


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    pool=st.sampled_from(["sum", "mean"]),
    quantizer=st.sampled_from(["rtn", "mse", "lp", "hqq"]),
    scale=st.sampled_from(["float32", "bfloat16"]),
    groups=st.integers(1, 3),
)
def test_merging_keeps_integers_and_scales_and_is_exact_in_float64(bits, pool, quantizer, scale, groups):
    torch.manual_seed(0)
    linear = nn.Linear(32 * groups, 24)
    layer = adapted(
        linear, bits=bits, pool=pool, quantizer=quantizer, group_size=32, scale_dtype=scale, size=0.5
    ).to(torch.float64)
    merged = layer.merged()
    assert torch.equal(merged.packed, layer.base.packed)
    assert torch.equal(merged.scale, layer.base.scale)
    assert merged.scale.dtype is getattr(torch, scale)
    assert not torch.equal(merged.offset, layer.base.offset.double())
    x = torch.randn(9, 32 * groups, dtype=torch.float64)
    expected = layer(x)
    error = float((merged(x) - expected).abs().max() / expected.abs().max())
    assert error < 1e-14


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_offsets_are_float32_in_a_bfloat16_model(pool):
    """bfloat16 offsets would lose a good part of an adapter that is small beside the weights."""
    layer = adapted(nn.Linear(64, 24), pool=pool, size=1e-3 if pool == "mean" else 1e-4).to(torch.bfloat16)
    merged = layer.merged()
    assert merged.offset.dtype is torch.float32
    change = layer.offset_change()
    kept = merged.offset - layer.base.offset
    lost = float((kept - change).norm() / change.norm())
    in_bfloat16 = merged.offset.bfloat16().float() - layer.base.offset.bfloat16().float()
    assert lost < 1e-4 < 0.03 < float((in_bfloat16 - change).norm() / change.norm())  # 2**-24 and 2**-8


def test_the_two_forms_are_one_adapter():
    """A of means is A of sums times the group's size, which is exact for a power of two."""
    x = torch.randn(7, 64)
    sums = adapted(nn.Linear(64, 24), pool="sum")
    means = adapted(nn.Linear(64, 24), pool="mean")
    means.base = sums.base
    with torch.no_grad():
        means.lora_b.copy_(sums.lora_b)
        means.lora_a.copy_(convert_pool(sums.lora_a, 16, "sum", "mean"))
    torch.testing.assert_close(means(x), sums(x), rtol=1e-5, atol=1e-5)  # a division by 16 moves no bit
    assert torch.equal(means.offset_change(), sums.offset_change())
    assert torch.equal(convert_pool(means.lora_a, 16, "mean", "sum"), sums.lora_a)
    assert torch.equal(pooled_input(x, 16, "sum"), 16 * pooled_input(x, 16, "mean"))


def test_rounding_zero_points_to_integers_erases_the_adapter():
    """|kappa B A / s| < 1/2 everywhere, so every integer zero is what it was without the adapter: all of the
    adapter is lost, where float offsets lose nothing."""
    layer = adapted(nn.Linear(64, 24), size=5e-4)
    step = float((layer.offset_change() / layer.base.scale).abs().max())
    assert 0.05 < step < 0.5
    base = with_integer_zeros(layer.base)
    near = QuantLinear.from_integers(layer.base.integers(), base.grid, base.format, layer.base.bias)
    start = QALoRALinear(
        near.with_grid(layer.base.grid._replace(offset=-base.scale * base.zero), layer.base.format),
        layer.config,
    )
    with torch.no_grad():
        start.lora_a.copy_(layer.lora_a)
        start.lora_b.copy_(layer.lora_b)
    merged = start.eval().merged()
    rounded = with_integer_zeros(merged)
    assert torch.equal(rounded.zero, base.zero)
    x = torch.randn(50, 64)
    adapter = start(x) - start.base(x)
    lost = (rounded(x) - start(x)).norm() / adapter.norm()
    assert 0.99 < lost < 1.01
    assert (merged(x) - start(x)).norm() / adapter.norm() < 1e-4  # float32 against a small difference


def test_integer_zeros_are_nearest_and_fit_the_bits():
    layer = adapted(nn.Linear(64, 24), bits=3, size=1.0).merged()
    rounded = with_integer_zeros(layer)
    assert rounded.format == AffineFormat(bits=3, group_size=16, symmetric=False, zero_point="integer")
    assert torch.equal(rounded.packed, layer.packed)
    assert rounded.zero.min() >= -4
    assert rounded.zero.max() <= 3
    exact = float_zeros(layer.grid)
    assert ((rounded.zero - exact).abs() <= 0.5 + 1e-5)[(exact > -4) & (exact < 3)].all()
    model = nn.Sequential(layer, nn.ReLU())
    assert round_zeros_(model) == 1
    assert round_zeros_(model) == 0
    with pytest.raises(ValueError, match="has no float zero points to round"):
        with_integer_zeros(rounded)


@pytest.mark.parametrize("compile", [False, True])
def test_nothing_of_the_weights_size_is_kept_for_backward(compile):
    layer = adapted(nn.Linear(160, 96), group_size=32)
    x = torch.randn(8, 160, requires_grad=True)
    call = torch.compile(layer, fullgraph=True) if compile else layer
    kept = saved_for_backward(call, x)
    assert max(t.numel() for t in kept) < 96 * 160
    assert x.grad is not None


def test_compiled_whole_equals_eager():
    layer = adapted(nn.Linear(64, 24))
    x = torch.randn(9, 64)
    found = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)  # fused float32 sums


def test_parameters_are_those_of_the_paper():
    """r (in / g + out) a layer: 89 million of LLaMA-7B's, at rank 64 and groups of 32."""
    width, hidden = 4096, 11008
    with torch.device("meta"):
        layers = [nn.Linear(k, n, bias=False) for k, n in [(width, width)] * 4 + [(width, hidden)] * 2]
        layers.append(nn.Linear(hidden, width, bias=False))
    adapters = [QALoRALinear.from_linear(layer, QALoRAConfig()) for layer in layers]
    trained = 32 * sum(p.numel() for a in adapters for p in a.parameters() if p.requires_grad)
    assert round(trained / 1e6) == 89


@pytest.mark.parametrize("family", ["llm", "vit"])
def test_a_trained_model_merges_to_equal_outputs(family):
    """In float32: 1e-5 of the largest logit, the bound of exports."""
    if family == "vit":
        pytest.importorskip("timm")
    trial = Trial.of(tiny_run(family, "qa_lora"))
    trial.advance(3)
    batch = trial.data.next_batch()
    before = predict(trial.model, batch)
    after = predict(trial.chain.finalize(trial.model), batch)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def low_bit(format) -> nn.Module:
    return nn.Sequential(QuantLinear.from_linear(nn.Linear(64, 24), format))


@pytest.mark.parametrize(
    "format",
    [
        AffineFormat(bits=4, group_size=16),
        AffineFormat(bits=4, group_size=16, symmetric=False),
        AffineFormat(bits=4, group_size=16, symmetric=False, zero_point="float"),
    ],
)
@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_a_quantized_layer_is_a_base_with_its_integers(format, quantizer):
    model = low_bit(format)
    packed, scale, weight = (
        model[0].packed.clone(),
        model[0].scale.clone(),
        model[0].dequantize(torch.float64),
    )
    chain = Chain.from_configs([QALoRAConfig(group_size=16, rank=4, quantizer=quantizer)])
    merged = chain.finalize(chain.swap(model))[0]
    assert torch.equal(merged.packed, packed)
    assert torch.equal(merged.scale, scale)
    # b = -s z is rounded to float32 once
    torch.testing.assert_close(merged.dequantize(torch.float64), weight, rtol=0, atol=1e-7)


REFUSED = {
    r"group_size: 16, but 0 is quantized in groups of 32; an adapter merges only into groups": (
        {"group_size": 16},
        AffineFormat(bits=4, group_size=32),
    ),
    r"group_size: 16, but 0 is quantized with one scale a row; .*quantize the model in groups, or skip": (
        {"group_size": 16},
        AffineFormat(bits=4, group_size=None),
    ),
    r"0: is quantized already, as AffineFormat\(bits=3": (
        {"group_size": 16},
        AffineFormat(bits=3, group_size=16),
    ),
    r"0: is quantized already, as NF4Format": ({"group_size": 16}, NF4Format()),
    r"qa_lora: 0: group_size 24 does not divide 64 input features; use group_size 16": (
        {"group_size": 24},
        None,
    ),
    r"'gptq' needs calibration text and the whole model, and 0 is not quantized yet; quantize the model "
    r"first with `qrecipes quantize`": ({"group_size": 16, "quantizer": "gptq"}, None),
}


def test_a_width_that_no_group_divides_has_no_remedy_but_to_leave_the_layer_out():
    """172 = 4 * 43, which is no multiple of 8, and one scale a row is not what this method can have."""
    model = nn.Sequential(nn.Linear(172, 8))
    with pytest.raises(ConfigError, match=r"0: group_size 32 does not divide 172 input features; leave the"):
        Chain.from_configs([QALoRAConfig()]).swap(model)


@pytest.mark.parametrize("message", REFUSED)
def test_sites_that_cannot_be_adapted_are_named_before_any_is(message):
    config, format = REFUSED[message]
    model = nn.Sequential(nn.Linear(64, 24)) if format is None else low_bit(format)
    kind = type(model[0])
    with pytest.raises(ConfigError, match=message):
        Chain.from_configs([QALoRAConfig(**config)]).swap(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "qa_lora: .*bits: 5; use one of 2, 3, 4, 8"),
        ({"group_size": 20}, "qa_lora: .*20 is no multiple of 8"),
        ({"rank": 0}, "qa_lora.rank: 0 is not positive"),
        ({"alpha": -1.0}, "qa_lora.alpha: -1.0 is not positive"),
        ({"dropout": 1.0}, "qa_lora.dropout: 1.0"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        QALoRAConfig(**values)
