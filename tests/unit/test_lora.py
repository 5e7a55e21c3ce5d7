"""LoRA, rsLoRA, DoRA and LoftQ over plain and low-bit bases, against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from harness import saved_for_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import quantize_

from qrecipes.errors import ConfigError
from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.linear import QuantLinear
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.lora import LoRA, LoRAConfig, LoRALinear

BASES = ["bf16", "nf4", "int8", "int4", "int3", "int2"]


def adapted(linear: nn.Module, **config) -> LoRALinear:
    """A layer with B other than zero, and with DoRA magnitudes off the norms."""
    layer = LoRALinear.from_linear(linear, LoRAConfig(**({"rank": 4, "group_size": 16} | config)))
    with torch.no_grad():
        layer.lora_b.normal_(0, 0.3)
        if layer.magnitude is not None:
            layer.magnitude.mul_(1 + 0.3 * torch.rand_like(layer.magnitude))
    return layer.eval()


def model(layer: LoRALinear, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output in float64 from the papers' formulas, and the leaves that it depends on."""
    base = layer.base
    weight = base.weight.detach() if isinstance(base, nn.Linear) else base.dequantize(torch.float32)
    leaves = {
        name: p.detach().double().requires_grad_() for name, p in layer.named_parameters() if p.requires_grad
    }
    leaves["x"] = x.detach().double().requires_grad_()
    config = layer.config
    kappa = config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
    changed = weight.double() + kappa * leaves["lora_b"] @ leaves["lora_a"]
    if config.use_dora:
        changed = leaves["magnitude"].unsqueeze(1) * changed / changed.detach().norm(dim=1, keepdim=True)
    y = leaves["x"] @ changed.t()
    return (y if base.bias is None else y + base.bias.detach().double()), leaves


@settings(max_examples=40, deadline=None)
@given(
    base=st.sampled_from(BASES),
    dora=st.booleans(),
    rslora=st.booleans(),
    bias=st.booleans(),
    groups=st.integers(1, 3),
    rows=st.integers(1, 20),
    tokens=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    rank=st.integers(1, 5),
)
def test_output_and_gradients_are_the_papers(base, dora, rslora, bias, groups, rows, tokens, rank):
    torch.manual_seed(0)
    linear = nn.Linear(16 * groups, rows, bias=bias)
    layer = adapted(linear, base=base, use_dora=dora, use_rslora=rslora, rank=rank)
    x = torch.randn(*tokens, 16 * groups, requires_grad=True)
    expected, leaves = model(layer, x)
    found = layer(x)
    grad = torch.randn(found.shape)
    found.backward(grad)
    expected.backward(grad.double())
    tolerance = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of at most 48 terms near 1
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), leaves["x"].grad, **tolerance)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), leaves[name].grad, **tolerance, msg=name)
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dora", [False, True])
def test_merging_is_exact_in_float64(base, dora):
    layer = adapted(nn.Linear(64, 24), base=base, use_dora=dora).to(torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-12, atol=1e-12)  # sums of 64 terms near 1


def test_requantizing_rounds_to_the_base_format_and_loses():
    """The adapter is larger than a step of 8 bits and smaller than one of 2."""
    errors = {}
    for base in ("int8", "int2", "nf4"):
        layer = adapted(nn.Linear(64, 24), base=base, merge="requantize")
        merged = layer.merged()
        assert isinstance(merged, QuantLinear)
        assert merged.format == layer.base.format
        wanted = layer.merged_weight()
        errors[base] = float((merged.dequantize() - wanted).norm() / wanted.norm())
    assert errors["int8"] < 0.01 < errors["nf4"] < 0.2 < errors["int2"]


@pytest.mark.parametrize("base", ["bf16", "nf4", "int4"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_nothing_of_the_weights_size_is_kept_for_backward(base, dora, compile):
    """The low-bit payload is; a dequantized weight, or B A, would be [96, 160]."""
    layer = adapted(nn.Linear(160, 96), base=base, use_dora=dora, group_size=32)
    x = torch.randn(8, 160, requires_grad=True)
    call = torch.compile(layer, fullgraph=True) if compile else layer
    kept = saved_for_backward(call, x)
    frozen = {parameter.data_ptr() for parameter in layer.base.parameters()}
    large = [t for t in kept if t.numel() >= 96 * 160 and t.data_ptr() not in frozen]
    assert not large


@pytest.mark.parametrize("base", ["bf16", "nf4", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_compiled_whole_equals_eager(base, dora):
    layer = adapted(nn.Linear(64, 24), base=base, use_dora=dora)
    x = torch.randn(9, 64)
    found = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)  # fused float32 sums


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dora", [False, True])
def test_training_starts_at_the_base(base, dora):
    linear = nn.Linear(64, 24)
    config = LoRAConfig(rank=4, base=base, group_size=16, use_dora=dora)
    layer = LoRALinear.from_linear(linear, config)
    x = torch.randn(9, 64)
    assert torch.equal(layer(x), layer.base(x))
    assert not layer.lora_b.any()
    # peft's: Kaiming with a = sqrt(5) is uniform to 1 / sqrt(K)
    assert 0.8 / 8 < layer.lora_a.abs().max() <= 1 / 8


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    layer = adapted(nn.Linear(64, 24), dropout=0.5)
    x = torch.randn(400, 64)
    still = layer(x)
    assert torch.equal(layer(x), still)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(300)]).mean(0)
    spread = float((mean - still).std() / (still - layer.base(x)).std())
    assert spread < 0.15  # 1 / sqrt(300) = 0.06 of the adapter's part: right on average, not scaled
    layer.base.weight.data.zero_()
    layer.base.bias.data.zero_()
    with torch.no_grad():
        layer.lora_b.zero_()
    assert not layer(x).any()


def test_dora_drops_the_input_of_all_that_it_adds():
    """As peft: y = base(x) + (g - 1) base(drop(x)) + g kappa drop(x) A^T B^T."""
    layer = adapted(nn.Linear(16, 5), use_dora=True, dropout=0.5).train()
    x = torch.randn(7, 16)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    base = layer.base
    changed = base.weight + layer.scaling * layer.lora_b @ layer.lora_a
    g = layer.magnitude / changed.norm(dim=1)
    expected = base(x) + (g - 1) * (dropped @ base.weight.t())
    expected = expected + g * layer.scaling * (dropped @ layer.lora_a.t() @ layer.lora_b.t())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("kind", ["int2", "int4", "nf4"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (32, 32)])
def test_loftq_is_nearer_to_the_weight_than_quantization_and_svd_once(kind, shape):
    """Against the weights' own rounding, and against one round of the alternation."""
    torch.manual_seed(2)
    linear = nn.Linear(*shape, dtype=torch.float32)
    weight = linear.weight.detach()
    found = {}
    for init in ("default", "loftq"):
        layer = LoRALinear.from_linear(linear, LoRAConfig(rank=8, base=kind, group_size=16, init=init))
        found[init] = float((weight - layer.merged_weight()).norm())
    format = (
        NF4Format()
        if kind == "nf4"
        else AffineFormat(bits=int(kind[3:]), group_size=16, symmetric=False, zero_point="float")
    )
    base = QuantLinear.from_linear(linear, format)
    singular = torch.linalg.svdvals((weight - base.dequantize()).double())
    once = float(singular[8:].square().sum().sqrt())  # Eckart and Young: what rank 8 cannot hold
    assert found["loftq"] <= once * (1 + 1e-5)  # the best of all rounds, of which this is the first
    assert found["loftq"] < 0.9 * found["default"]


def test_adapters_keep_their_type_and_are_multiplied_in_the_inputs():
    layer = adapted(nn.Linear(64, 24), use_dora=True).to(torch.bfloat16)
    assert {p.dtype for p in layer.base.parameters()} == {torch.bfloat16}
    own = {name: p.dtype for name, p in layer.named_parameters(recurse=False)}
    assert set(own.values()) == {torch.float32}, own
    y = layer(torch.randn(3, 64, dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert layer.lora_a.grad.dtype is torch.float32
    assert adapted(nn.Linear(64, 24), adapter_dtype="bfloat16").lora_a.dtype is torch.bfloat16


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8))


def test_only_adapters_train():
    chain = Chain.from_configs([LoRAConfig(rank=4, use_dora=True, skip=("3",))])
    swapped = chain.swap(network())
    trained = {name for name, p in swapped.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.{part}" for i in (0, 2) for part in ("lora_a", "lora_b", "magnitude")}
    groups = {group.name: len(group.params) for group in chain.param_groups(swapped)}
    assert groups == {"adapters": 4, "magnitudes": 2}


def test_torchao_replaces_layers_too():
    model = network()
    quantize_(model, LoRAConfig(rank=4, base="nf4"), filter_fn=lambda m, fqn: fqn == "2")
    assert isinstance(model[2], LoRALinear)
    assert isinstance(model[2].base, QuantLinear)
    assert type(model[0]) is nn.Linear


def test_a_low_bit_layer_is_a_base_as_it_is():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0] = base = QuantLinear.from_linear(model[0], NF4Format())
    chain = Chain.from_configs([LoRAConfig(rank=4, base="nf4")])
    swapped = chain.swap(model)
    assert swapped[0].base is base
    assert chain.receipt.layers[0].method == "lora"


REFUSED = {
    "lora: 0: group_size 48 does not divide 64 input features; use group_size 32": (
        {"base": "int4", "group_size": 48},
        None,
    ),
    "rank: 65 is more than 0's 64 singular values": ({"base": "nf4", "init": "loftq", "rank": 65}, None),
    "'bf16', but a selected layer is low-bit already": ({}, NF4Format()),
    "0: is quantized already, as NF4Format.*asks for AffineFormat": ({"base": "int4"}, NF4Format()),
    "is quantized already, as AffineFormat.*bits=3": (
        {"base": "int4"},
        AffineFormat(bits=3, group_size=64),
    ),
    "'loftq' needs the weight that 0 had": ({"base": "nf4", "init": "loftq"}, NF4Format()),
}


def test_a_width_that_no_group_divides_is_for_one_scale_a_row():
    """172 = 4 * 43, which is no multiple of 8; what the message says is done."""
    model = nn.Sequential(nn.Linear(172, 8))
    with pytest.raises(ConfigError, match=r"172 input features; use group_size 0 \(one scale a row\), or"):
        Chain.from_configs([LoRAConfig(base="int4")]).swap(model)
    swapped = Chain.from_configs([LoRAConfig(base="int4", group_size=0, rank=2)]).swap(model)
    assert swapped[0].base.format.group_size is None


@pytest.mark.parametrize("message", REFUSED)
def test_sites_that_cannot_be_adapted_are_named_before_any_is(message):
    config, format = REFUSED[message]
    model = nn.Sequential(nn.Linear(64, 64))
    if format is not None:
        model[0] = QuantLinear.from_linear(model[0], format)
    kind = type(model[0])
    with pytest.raises(ConfigError, match=message):
        Chain.from_configs([LoRAConfig(**config)]).swap(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"base": "fp4"},
            "lora.base: 'fp4': Input should be 'bf16', 'nf4', 'int8', 'int4', 'int3' or 'int2'",
        ),
        ({"rank": 0}, "lora.rank: 0 is not positive"),
        ({"alpha": 0.0}, "lora.alpha: 0.0 is not positive"),
        ({"alpha": math.inf}, "lora.alpha: inf"),
        ({"dropout": 1.0}, "lora.dropout: 1.0"),
        ({"merge_tolerance": -1.0}, "lora.merge_tolerance: -1.0 is negative"),
        ({"merge_tolerance": math.nan}, "lora.merge_tolerance: nan is negative, or no number"),
        ({"init": "loftq"}, "lora.init: 'loftq' is for a low-bit base"),
        ({"merge": "requantize"}, "lora.merge: 'requantize' is for a low-bit base"),
        ({"quantizer": "mse"}, "lora.quantizer: 'mse' is for a low-bit base"),
        ({"symmetric": True}, "lora.symmetric: True is for a low-bit base"),
        ({"base": "nf4", "symmetric": True}, "lora.symmetric: True is for integers"),
        ({"base": "nf4", "quantizer": "mse"}, "lora.quantizer: 'mse' chooses ranges of integers"),
        ({"base": "int4", "group_size": 12}, "lora.group_size: .*12 is no multiple of 8"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**values)


def test_requantizing_is_allowed_any_error_of_logits_and_its_tolerance_of_perplexity():
    exact, rounded = (
        LoRA(LoRAConfig(base="nf4", merge=merge, merge_tolerance=0.1)).merge_bounds()
        for merge in ("plain", "requantize")
    )
    assert exact.float64 < 1e-9
    assert math.isinf(rounded.float64)
    assert exact.perplexity == rounded.perplexity == 0.1


def test_a_symmetric_base_is_rounded_to_symmetric_integers_again():
    """The adapter's weight goes into the integers: QLoRA's base and LR-QAT's, per channel, with one key
    apart."""
    layer = adapted(
        nn.Linear(64, 24), base="int4", symmetric=True, group_size=0, quantizer="lp", merge="requantize"
    )
    assert layer.base.format == AffineFormat(bits=4)
    merged = layer.merged()
    assert merged.format == AffineFormat(bits=4)
    error = (merged.dequantize() - layer.merged_weight()).abs()
    assert (error <= 0.5001 * merged.scale).float().mean() > 0.9  # but for what the narrower range clips


@pytest.mark.parametrize("init", ["default", "loftq"])
def test_parameters_are_contiguous_as_fsdp2_wants_them(init):
    layer = LoRALinear.from_linear(nn.Linear(64, 48), LoRAConfig(base="int4", rank=8, init=init))
    assert all(p.is_contiguous() for p in layer.parameters())
