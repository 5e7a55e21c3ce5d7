"""Adapted layers that multiply by their merged weight: its function and gradients in float64, what the merged
layer gives, and what is kept between the passes."""

from __future__ import annotations

import pytest
import torch
from harness import products, saved_for_backward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.quant.formats import AffineFormat, NF4Format, WeightFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.low_rank_offset import low_rank_offset_mm, low_rank_offset_mm_grad_input
from qrecipes.quant.merged_linear import merged_low_rank_linear, merged_offset_linear
from qrecipes.transforms.lora import LoRAConfig, LoRALinear
from qrecipes.transforms.qa_lora import QALoRAConfig, QALoRALinear

BASES = {
    "nf4": {"base": "nf4", "double_quantized": False},
    "nf4 double": {"base": "nf4"},
    "int4": {"base": "int4", "group_size": 16},
    "int4 symmetric": {"base": "int4", "group_size": 16, "symmetric": True},
    "int3": {"base": "int3", "group_size": 16},
    "int2": {"base": "int2", "group_size": 16},
    "int8 row": {"base": "int8", "group_size": 0},
}
FORMATS: dict[str, WeightFormat] = {
    "nf4": NF4Format(),
    "int4 offset": AffineFormat(bits=4, group_size=32, symmetric=False, zero_point="float"),
    "int4 symmetric": AffineFormat(bits=4, group_size=32),
    "int4 zero": AffineFormat(bits=4, group_size=32, symmetric=False),
    "int8 row": AffineFormat(bits=8),
}
TYPES = [torch.bfloat16, torch.float32, torch.float64]
tokens = st.lists(st.integers(0, 3), min_size=0, max_size=2)


def lora(linear: nn.Linear, size: float = 0.3, **config) -> LoRALinear:
    """A layer with B other than zero."""
    layer = LoRALinear.from_linear(linear, LoRAConfig(**({"rank": 4, "merged_forward": True} | config)))
    nn.init.normal_(layer.lora_b, 0, size)
    return layer


def qa_lora(linear: nn.Linear, size: float = 0.05, **config) -> QALoRALinear:
    """A layer with B other than zero."""
    settings = {"rank": 4, "group_size": 16, "merged_forward": True} | config
    layer = QALoRALinear.from_linear(linear, QALoRAConfig(**settings))
    nn.init.normal_(layer.lora_b, 0, size)
    return layer


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def assert_found(layer: nn.Module, x: Tensor, leaves: dict[str, Tensor], expected: Tensor) -> None:
    """Output and gradients in float32 against float64's; frozen parameters have none."""
    grad = torch.randn(expected.shape)
    expected.backward(grad.double())
    found = products(layer, x, grad)
    # float32 sums of at most 96 terms near 1
    tolerance = {"rtol": 2e-5, "atol": 5e-5}
    torch.testing.assert_close(found["output"].double(), expected, **tolerance)
    torch.testing.assert_close(found["grad_input"].double(), leaves["x"].grad, **tolerance)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            grads = found[f"grad_{name}"].double(), leaves[name].grad
            torch.testing.assert_close(*grads, **tolerance, msg=name)
        else:
            assert found[f"grad_{name}"] is None, name


@settings(max_examples=40, deadline=None)
@given(
    base=st.sampled_from(list(BASES)),
    rslora=st.booleans(),
    bias=st.booleans(),
    groups=st.integers(1, 3),
    rows=st.integers(1, 20),
    tokens=tokens,
    rank=st.integers(1, 5),
)
def test_low_rank_output_and_gradients_are_the_papers(base, rslora, bias, groups, rows, tokens, rank):
    torch.manual_seed(0)
    layer = lora(nn.Linear(16 * groups, rows, bias=bias), rank=rank, use_rslora=rslora, **BASES[base])
    x = torch.randn(*tokens, 16 * groups)
    leaves = {"x": wide(x), "lora_a": wide(layer.lora_a), "lora_b": wide(layer.lora_b)}
    kappa = 16.0 / rank ** (0.5 if rslora else 1)
    # beside the layer, not in its weight
    expected = leaves["x"] @ layer.base.dequantize(torch.float32).double().t()
    expected = expected + kappa * leaves["x"] @ leaves["lora_a"].t() @ leaves["lora_b"].t()
    if bias:
        expected = expected + layer.base.bias.detach().double()
    assert_found(layer, x, leaves, expected)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    pool=st.sampled_from(["sum", "mean"]),
    size=st.sampled_from([16, 24, 32]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 20),
    tokens=tokens,
    bias=st.booleans(),
)
def test_group_pooled_output_and_gradients_are_the_papers(bits, pool, size, groups, rows, tokens, bias):
    """Groups are pooled one by one here, and nothing is merged."""
    torch.manual_seed(0)
    layer = qa_lora(nn.Linear(size * groups, rows, bias=bias), bits=bits, pool=pool, group_size=size)
    x = torch.randn(*tokens, size * groups)
    leaves = {"x": wide(x), "lora_a": wide(layer.lora_a), "lora_b": wide(layer.lora_b)}
    pooled = torch.stack([leaves["x"][..., g * size : (g + 1) * size].sum(-1) for g in range(groups)], -1)
    if pool == "mean":
        pooled = pooled / size
    expected = leaves["x"] @ layer.base.dequantize(torch.float64).t()
    expected = expected + 16.0 / 4 * pooled @ leaves["lora_a"].t() @ leaves["lora_b"].t()
    if bias:
        expected = expected + layer.base.bias.detach().double()
    assert_found(layer, x, leaves, expected)


@pytest.mark.parametrize(
    ("name", "by_offsets"), [*((name, False) for name in FORMATS), ("int4 offset", True)]
)
def test_every_format_and_a_trained_bias(name, by_offsets):
    layer = QuantLinear.from_linear(nn.Linear(64, 24), FORMATS[name])
    a, b = (torch.randn(s, requires_grad=True) for s in ((3, 2 if by_offsets else 64), (24, 3)))
    x, grad = torch.randn(5, 64, requires_grad=True), torch.randn(5, 24)
    merged = merged_offset_linear if by_offsets else merged_low_rank_linear
    leaves = {"x": x, "a": a, "b": b, "bias": layer.bias}
    found = merged(x, layer, a, b, 0.5)
    gradients = torch.autograd.grad(found, leaves.values(), grad)
    exact = {name: wide(leaf) for name, leaf in leaves.items()}
    of_a = exact["a"].repeat_interleave(32, 1) if by_offsets else exact["a"]
    weight = layer.dequantize(torch.float32).double() + 0.5 * exact["b"] @ of_a
    expected = exact["x"] @ weight.t() + exact["bias"]
    wanted = torch.autograd.grad(expected, exact.values(), grad.double())
    # float32 sums of at most 64 terms of some units
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    for name, ours, theirs in zip(leaves, gradients, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pool", ["sum", "mean"])
@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_a_group_pooled_layer_gives_what_its_merged_layer_gives_bit_for_bit(dtype, pool, adapter):
    layer = qa_lora(nn.Linear(96, 40), pool=pool, group_size=24, adapter_dtype=adapter).to(dtype)
    for shape in ((1,), (3, 7), (200,)):
        x = torch.randn(*shape, 96, dtype=dtype)
        assert torch.equal(layer(x), layer.merged()(x))


@pytest.mark.parametrize("dtype", TYPES)
def test_so_does_a_compiled_one(dtype):
    layer = qa_lora(nn.Linear(96, 40), pool="mean", group_size=24).to(dtype)
    x = torch.randn(9, 96, dtype=dtype)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer.merged()(x))


def test_a_group_pooled_layer_propagates_gradients_as_its_merged_layer_does():
    layer = qa_lora(nn.Linear(96, 40)).bfloat16()
    x, grad = torch.randn(9, 96).bfloat16(), torch.randn(9, 40).bfloat16()
    merged = products(layer.merged(), x, grad)
    assert torch.equal(products(layer, x, grad)["grad_input"], merged["grad_input"])


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_low_rank_layers_weight_is_its_merged_layers_within_one_rounding(base):
    """The rows of a unit matrix are multiplied exactly, so the output is the weight in bfloat16. A and B are
    of that type, so only the order of float32 sums differs, which seldom changes a rounding."""
    layer = lora(nn.Linear(96, 40, bias=False), adapter_dtype="bfloat16", **base).bfloat16()
    found = layer(torch.eye(96).bfloat16()).t().double()
    merged = layer.merged().weight.double()
    assert ((found - merged).abs() <= torch.finfo(torch.bfloat16).eps * merged.abs()).all()
    assert (found == merged).double().mean() > 0.99
    assert (found != layer.base.dequantize().double()).any()


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_low_rank_layer_is_its_merged_layer_in_float64(base):
    layer = lora(nn.Linear(64, 24), **base).to(torch.float64)
    x = torch.randn(9, 64, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.merged()(x), rtol=1e-12, atol=1e-12)  # sums of 64 terms


@pytest.mark.parametrize("make", [lora, qa_lora])
@pytest.mark.parametrize("dtype", TYPES)
def test_training_starts_at_the_base(make, dtype):
    config = {"base": "nf4"} if make is lora else {}
    layer = make(nn.Linear(64, 24), size=0.0, **config).to(dtype)
    x = torch.randn(9, 64, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("make", [lora, qa_lora])
def test_what_the_adapter_sees_and_gives_is_in_the_models_type(make):
    """Gradients in the adapter's own type; within bfloat16 of those that are computed beside the base."""
    config = {"base": "int4", "group_size": 16} if make is lora else {}
    layer = make(nn.Linear(64, 24), **config).bfloat16()
    x, grad = torch.randn(200, 64).bfloat16(), torch.randn(200, 24).bfloat16()
    merged = products(layer, x, grad)
    layer.config = type(layer.config)(**(config | {"rank": 4, "group_size": 16}))
    beside = products(layer, x, grad)
    assert merged["grad_lora_a"].dtype is torch.float32
    for name, wanted in beside.items():
        if wanted is None:
            assert merged[name] is None, name
            continue
        # a rounding of the weight, of hidden values and of the output each
        error = (merged[name].double() - wanted.double()).norm() / wanted.double().norm()
        assert error < 3 * 2**-8, name
    assert not torch.equal(merged["output"], beside["output"])


@pytest.mark.parametrize("make", [lora, qa_lora])
@pytest.mark.parametrize("compile", [False, True])
def test_neither_a_weight_nor_offsets_are_kept_for_backward(make, compile):
    """But for the payload, nothing of [N, K], and nothing of [N, G]: 96 x 160 and 96 x 10."""
    config = {"base": "nf4"} if make is lora else {}
    layer = make(nn.Linear(160, 96), **config)
    x = torch.randn(8, 160, requires_grad=True)
    kept = saved_for_backward(torch.compile(layer, fullgraph=True) if compile else layer, x)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    others = [tuple(t.shape) for t in kept if t.data_ptr() not in own]
    assert others
    assert all(shape in [(8, 160), (8, 10), (8, 4)] for shape in others)


@pytest.mark.parametrize("make", [lora, qa_lora])
def test_compiled_whole_equals_eager_in_both_passes(make):
    config = {"base": "nf4"} if make is lora else {}
    layer = make(nn.Linear(64, 24), **config)
    x, grad = torch.randn(2, 9, 64), torch.randn(2, 9, 24)
    eager = products(layer, x, grad)
    x = x.requires_grad_()
    layer.zero_grad()
    y = torch.compile(layer, fullgraph=True)(x)
    y.backward(grad)
    assert torch.equal(y, eager["output"])
    assert torch.equal(x.grad, eager["grad_input"])
    for name in ("lora_a", "lora_b"):
        # float32 sums that are fused
        torch.testing.assert_close(
            getattr(layer, name).grad, eager[f"grad_{name}"], rtol=1e-5, atol=1e-5, msg=name
        )


@pytest.mark.parametrize("make", [lora, qa_lora])
def test_a_second_derivative_is_refused(make):
    layer = make(nn.Linear(64, 24), **({"base": "nf4"} if make is lora else {}))
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="is taken with create_graph, but its products have no second"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("make", [lora, qa_lora])
def test_an_input_of_another_type_is_refused(make):
    layer = make(nn.Linear(64, 24), **({"base": "nf4"} if make is lora else {}))
    with pytest.raises(ValueError, match=r"input: torch.bfloat16, but the layer computes in torch.float32"):
        layer(torch.randn(3, 64).bfloat16())


def test_offsets_are_for_formats_that_have_them():
    layer = QuantLinear.from_linear(nn.Linear(64, 24), FORMATS["int4 zero"])
    a, b = torch.randn(3, 2), torch.randn(24, 3)
    with pytest.raises(ValueError, match=r"low_rank_offset_mm.format: .* has no offsets; use one with"):
        low_rank_offset_mm(torch.randn(5, 64), layer.payload, a, b, 1.0, layer.format)
    with pytest.raises(ValueError, match=r"low_rank_offset_mm_grad_input.format: .* has no offsets"):
        low_rank_offset_mm_grad_input(torch.randn(5, 24), layer.payload, a, b, 1.0, layer.format, 64)


def test_operators_keep_torchs_contract():
    """Schemas, fake tensors and aliasing, with torch's own checks."""
    format = FORMATS["int4 offset"]
    layer = QuantLinear.from_linear(nn.Linear(64, 24), format)
    parts = ([t.detach() for t in layer.payload], torch.randn(3, 2), torch.randn(24, 3), 0.5, format.key)
    for name, args in (
        ("low_rank_offset_mm", (torch.randn(5, 64), *parts, torch.randn(24))),
        ("low_rank_offset_mm_grad_input", (torch.randn(5, 24), *parts, 64)),
    ):
        op = getattr(torch.ops.qrecipes, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


LOW_BIT = {"base": "nf4"}


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            LoRAConfig,
            LOW_BIT | {"base_compute": "int8"},
            "lora.merged_forward: true, and base_compute is 'int8': .*; set base_compute to 'model', or",
        ),
        (LoRAConfig, LOW_BIT | {"dropout": 0.1}, "lora.merged_forward: true, and dropout is 0.1: .* 0.0, or"),
        (
            LoRAConfig,
            LOW_BIT | {"use_dora": True},
            "lora.merged_forward: true, and use_dora is True: .*False",
        ),
        (
            LoRAConfig,
            {},
            "lora.merged_forward: true, and base is 'bf16', .*; set base to 'nf4' or 'int4', or",
        ),
        (
            QALoRAConfig,
            {"base_compute": "int8"},
            "qa_lora.merged_forward: true, and base_compute is 'int8': .*; set base_compute to 'model', or",
        ),
        (QALoRAConfig, {"dropout": 0.5}, "qa_lora.merged_forward: true, and dropout is 0.5: .* 0.0, or"),
    ],
)
def test_what_has_no_merged_weight_is_refused(config, values, message):
    config(**values)
    with pytest.raises(ConfigError, match=message):
        config(**values, merged_forward=True)
