"""Weights gathered as INT8, without processes: what ranks send, what comes of it, what computes on it."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from harness import products
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qrecipes.assets import resolve
from qrecipes.errors import ConfigError
from qrecipes.quant.int8_gathered import GatheredAsInt8, Int8Rows, gathered_as_int8, int8_rows
from qrecipes.quant.int8_quantize import quantize_rows
from qrecipes.quant.primitives import dequantize_int8, quantize_int8, sqnr_db
from qrecipes.quant.sharded import is_composite, local, parts, whole, write_whole_
from qrecipes.transforms.int8_mixed_precision import (
    Int8MixedPrecision,
    Int8MixedPrecisionConfig,
    Int8MixedPrecisionLinear,
)

GATHERED = {"int8_all_gather": True}
EMULATED = {"emulate": True, "min_size": 0, "min_size_grad_weight": 0}
"""For small layers on a CPU."""


def swapped(linear: nn.Linear, **config: bool) -> Int8MixedPrecisionLinear:
    return Int8MixedPrecisionLinear.from_linear(linear, Int8MixedPrecisionConfig(**EMULATED, **config))


def gather(weight: torch.Tensor, world: int, stochastic_rounding: bool = False) -> Int8Rows:
    """What every rank has after a gather, from the parts that FSDP2 would make of the weight."""
    mesh = SimpleNamespace(size=lambda: world)
    whole_weight = GatheredAsInt8(weight, weight.shape[0], stochastic_rounding)
    chunks = list(torch.chunk(whole_weight, world))
    chunks += [whole_weight[:0]] * (world - len(chunks))
    sent = [chunk.fsdp_pre_all_gather(mesh)[0] for chunk in chunks]
    assert len({tuple(part.shape for part in rank) for rank in sent}) == 1  # or the collective would fail
    gathered = tuple(torch.cat(part) for part in zip(*sent, strict=True))
    return chunks[0].fsdp_post_all_gather(gathered, None, weight.dtype)[0]


def after_gather(layer: Int8MixedPrecisionLinear) -> Int8MixedPrecisionLinear:
    """The layer as it is between a gather and the freeing of what was gathered."""
    layer = copy.copy(layer)
    layer._parameters = {
        "weight": nn.Parameter(gather(layer.weight.detach(), 2), requires_grad=layer.weight.requires_grad),
        "bias": layer.bias,
    }
    return layer


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_ranks_send_is_the_whole_weight_quantized(rows, width, world, dtype):
    """Bit for bit, also where ranks have fewer rows than others, or none."""
    weight = torch.randn(rows, width, dtype=dtype)
    found = gather(weight, world)
    q, scale = quantize_int8(weight, 1)
    assert (found.dtype, found.shape, found.stride()) == (dtype, weight.shape, weight.stride())
    assert torch.equal(found.q, q)
    assert torch.equal(found.scale, scale)
    assert (found.q.dtype, found.scale.dtype) == (torch.int8, torch.float32)
    assert int8_rows(nn.Parameter(found)) == (found.q, found.scale)
    assert int8_rows(weight) == (None, None)


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_shows_after_a_gather(poison, stochastic_rounding):
    """In its output channel, through which it reaches the gradient of every input."""
    how = {"stochastic_rounding": stochastic_rounding}
    layer = swapped(nn.Linear(40, 23), **GATHERED, **how)
    layer.weight.data[5, 7] = poison
    layer._parameters["weight"] = nn.Parameter(gather(layer.weight.detach(), 2, stochastic_rounding))
    found = products(layer, torch.randn(3, 40), torch.randn(3, 23))
    assert (~torch.isfinite(found["output"])).all(0).tolist() == [n == 5 for n in range(23)]
    assert not torch.isfinite(found["grad_input"]).any()


def test_stochastic_rounding_draws_anew_each_gather():
    weight = torch.randn(64, 40)
    first, second = gather(weight, 2, stochastic_rounding=True), gather(weight, 2, stochastic_rounding=True)
    assert torch.equal(first.scale, second.scale)
    assert not torch.equal(first.q, second.q)
    steps = weight / first.scale
    for rows in (first, second):  # one of the two neighbours; 1e-4: one float32 division of up to 127
        assert ((rows.q - steps).abs() < 1 + 1e-4).all()


def test_the_weight_that_is_updated_is_the_one_that_is_sent():
    """Operations in place, out of place and on several tensors at once, as optimizers make them."""
    plain = torch.randn(6, 4)
    weight = gathered_as_int8(nn.Parameter(plain))
    twin = plain.clone()
    grad = torch.randn(6, 4)
    with torch.no_grad():
        for tensor in (weight, twin):
            assert tensor.mul_(0.9) is tensor
            assert tensor.add_(grad, alpha=-0.1) is tensor
            torch._foreach_addcdiv_([tensor], [grad], [grad.abs() + 1], value=0.5)
            tensor.copy_(tensor.float() * 1.5)
        assert type(weight * 2) is torch.Tensor
        assert type(torch.zeros_like(weight)) is torch.Tensor
        assert type(grad + weight) is torch.Tensor
    assert torch.equal(local(weight.detach()), twin)
    assert torch.equal(gather(plain, 1).q, quantize_rows(twin)[0])  # the memory of `plain` was updated


def test_a_parameter_keeps_its_class_where_it_is_moved_and_cut():
    weight = gathered_as_int8(nn.Parameter(torch.randn(6, 4)))
    kept = {
        "detach": weight.detach(),
        "Parameter": nn.Parameter(weight),
        "dtype": weight.to(torch.bfloat16),
        "device": weight.to("meta"),
        "deepcopy": copy.deepcopy(weight),
        "view": weight.view(-1),
        "rows": weight.narrow(0, 2, 3),
        "chunk": torch.chunk(weight, 2)[1],
    }
    for name, tensor in kept.items():
        assert isinstance(tensor, GatheredAsInt8), name
        assert (tensor.num_rows, tensor.plain.dtype) == (6, tensor.dtype), name
    assert not gathered_as_int8(nn.Parameter(torch.randn(2, 2), requires_grad=False)).requires_grad


def test_a_parameter_is_moved_as_fsdp2_moves_it():
    """It exchanges the Parameter with one on the device; another type stands for the device here."""
    weight = gathered_as_int8(nn.Parameter(torch.randn(6, 4)))
    with torch.no_grad():
        moved = nn.Parameter(weight.to(torch.bfloat16))
    torch.utils.swap_tensors(weight, moved)
    assert (type(weight), weight.dtype, weight.plain.dtype) == (
        GatheredAsInt8,
        torch.bfloat16,
        torch.bfloat16,
    )
    module = nn.Linear(4, 6)
    module.weight = gathered_as_int8(module.weight)
    module.to(torch.bfloat16)
    assert (type(module.weight), module.weight.plain.dtype) == (GatheredAsInt8, torch.bfloat16)


def test_checkpoints_see_a_plain_tensor():
    weight = gathered_as_int8(nn.Parameter(torch.randn(6, 4)))
    assert not is_composite(weight)
    assert type(whole(weight)) is torch.Tensor
    assert [type(part) for part in parts(weight).values()] == [torch.Tensor]
    write_whole_(weight, torch.ones(6, 4))
    assert torch.equal(whole(weight), torch.ones(6, 4))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\), where a matrix is needed .*; leave it as it is"):
        gathered_as_int8(nn.Parameter(torch.randn(4)))


def test_nothing_computes_on_a_gathered_weight_but_its_layer():
    rows = gather(torch.randn(6, 4), 2)
    for compute in (
        lambda: rows + 1,
        lambda: nn.functional.linear(torch.randn(3, 4), rows),
        lambda: nn.functional.embedding(torch.tensor([1]), rows),
        lambda: rows.double(),
        lambda: rows.as_strided((4, 6), (1, 4)),
        lambda: torch.cat([rows, rows]),
    ):
        with pytest.raises(NotImplementedError, match="gathered as INT8 and is nowhere in high precision"):
            compute()
    assert torch.equal(torch.zeros_like(rows), torch.zeros(6, 4))
    assert "Int8Rows(shape=(6, 4)" in repr(rows)


SETTINGS = [{}, {"save_int8_input": True}, {"grad_input": False}, {"grad_weight": False}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("switches", SETTINGS, ids=str)
def test_a_gathered_layer_computes_what_one_process_computes(switches, bias, dtype):
    layer = swapped(nn.Linear(40, 23, bias=bias, dtype=dtype), **switches, **GATHERED)
    x, grad_y = torch.randn(3, 11, 40, dtype=dtype), torch.randn(3, 11, 23, dtype=dtype)
    expected, found = products(layer, x, grad_y), products(after_gather(layer), x, grad_y)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SETTINGS, ids=str)
def test_only_grad_input_changes_and_multiplies_the_rounded_weight(switches, dtype):
    """It is that of a layer whose weight is what its INT8 rows stand for."""
    linear = nn.Linear(40, 24, dtype=dtype)
    x, grad_y = torch.randn(33, 40, dtype=dtype), torch.randn(33, 24, dtype=dtype)
    without = products(swapped(linear, **switches), x, grad_y)
    found = products(swapped(linear, **switches, **GATHERED), x, grad_y)
    rounded = copy.deepcopy(linear)
    rounded.weight.data = dequantize_int8(*quantize_int8(linear.weight.detach(), 1), dtype)
    of_rounded = products(swapped(rounded, **switches), x, grad_y)
    for name, value in without.items():
        if name == "grad_input":
            assert torch.equal(found[name], of_rounded[name])
            assert not torch.equal(found[name], value)
        else:
            assert torch.equal(found[name], value), name


def story_weights() -> dict[str, torch.Tensor]:
    tensors = load_file(resolve("asset:stories260k/model.safetensors"))
    return {name: t.bfloat16() for name, t in tensors.items() if "proj" in name}


def test_what_the_rounded_weight_costs_grad_input():
    """On every layer of a pretrained model: the numbers in the option's docstring."""
    weights = story_weights()
    assert len(weights) == 35
    costs = []
    for name, weight in weights.items():
        linear = nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.bfloat16)
        linear.weight.data = weight
        x, grad_y = torch.randn(256, weight.shape[1]).bfloat16(), torch.randn(256, weight.shape[0]).bfloat16()
        exact = grad_y.double() @ weight.double()
        gathers_bfloat16 = products(swapped(linear), x, grad_y)["grad_input"]
        gathers_int8 = products(swapped(linear, **GATHERED), x, grad_y)["grad_input"]
        assert sqnr_db(gathers_bfloat16, gathers_int8) > 38, name  # of three seeds 38.2 to 40.9
        costs.append(sqnr_db(exact, gathers_bfloat16) - sqnr_db(exact, gathers_int8))
    assert min(costs) > 0.5  # 1.1 to 2.7, 1.7 on average
    assert max(costs) < 3.0


def test_only_int8_of_the_weight_is_kept_for_backward():
    layer = after_gather(swapped(nn.Linear(40, 24, dtype=torch.bfloat16), **GATHERED))
    x = torch.randn(32, 40, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(t.data_ptr() for t in kept) == sorted(
        t.data_ptr() for t in (x, layer.weight.q, layer.weight.scale)
    )


def test_one_process_keeps_its_weight_for_backward_and_no_copy():
    layer = swapped(nn.Linear(40, 24), **GATHERED)
    x = torch.randn(32, 40, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted([x.data_ptr(), layer.weight.data_ptr()])


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("switches", [{}, {"save_int8_input": True}], ids=str)
def test_a_gathered_layer_compiles_without_graph_breaks(switches, backend):
    layer = after_gather(swapped(nn.Linear(40, 24), **switches, **GATHERED))
    x, grad_y = torch.randn(3, 11, 40), torch.randn(3, 11, 24)
    eager = products(layer, x, grad_y)
    torch._dynamo.utils.counters.clear()
    layer.compile(fullgraph=True, backend=backend)
    for _ in range(2):
        compiled = products(layer, x, grad_y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, value in eager.items():
        assert sqnr_db(value, compiled[name]) > 100, (
            name
        )  # the same operations in float32, as without gathers


def test_stochastic_rounding_is_the_gathers_in_the_forward_pass():
    """The layer does not round a gathered weight again: with inputs on the grid its output is exact."""
    linear = nn.Linear(4, 3, bias=False)
    layer = swapped(linear, stochastic_rounding=True, **GATHERED)
    gathered = after_gather(layer)
    rows = gathered.weight
    x = torch.eye(4) * 127
    expected = 127 * rows.q.t().float() * rows.scale.t()
    torch.testing.assert_close(gathered(x), expected, rtol=1e-6, atol=0)  # float32 scales


def test_before_shard_marks_the_methods_weights_alone():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    tied = nn.Linear(8, 8)
    tied.weight = network[0].weight
    network.append(tied)
    for option in (False, True):
        method = Int8MixedPrecision(Int8MixedPrecisionConfig(**EMULATED, skip=("1",), int8_all_gather=option))
        swapped_network = method.swap(copy.deepcopy(network))
        weights = [layer.weight for layer in swapped_network]
        method.before_shard(swapped_network)
        after = [layer.weight for layer in swapped_network]
        assert [isinstance(weight, GatheredAsInt8) for weight in after] == [option, False, option]
        assert after[0] is after[2]
        assert local(after[0]).data_ptr() == weights[0].data_ptr()
        assert not any(isinstance(layer.bias, GatheredAsInt8) for layer in swapped_network)


def test_a_weight_that_another_module_reads_is_refused():
    network = nn.ModuleDict({"embed": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)})
    network["head"].weight = network["embed"].weight
    method = Int8MixedPrecision(Int8MixedPrecisionConfig(**EMULATED, skip=(), **GATHERED))
    network = method.swap(network)
    with pytest.raises(ConfigError, match=r"head.weight is also embed.weight, .*; add 'head' to skip"):
        method.before_shard(network)


def test_an_output_in_high_precision_is_refused():
    with pytest.raises(
        ConfigError, match=r"int8_all_gather: true, but output is false .*; set output to true"
    ):
        Int8MixedPrecisionConfig(output=False, **GATHERED)


def test_checkpoints_fit_with_the_option_and_without():
    plain, gathered = Int8MixedPrecisionConfig(), Int8MixedPrecisionConfig(**GATHERED)
    assert gathered.fingerprint() == plain.fingerprint()
    assert Int8MixedPrecisionConfig(grad_weight=False).fingerprint() != plain.fingerprint()
    assert plain.fingerprint()["method"] == "Int8MixedPrecisionConfig"


def test_the_bounds_of_the_probe_hold():
    """Heavy tails and a few large channels, as without the option."""
    heavy = torch.distributions.StudentT(1.5)
    x, grad_y = heavy.sample((256, 96)), heavy.sample((256, 64))
    x[:, 5] *= 100
    linear = nn.Linear(96, 64)
    linear.weight.data = heavy.sample((64, 96)) * 0.02
    config = Int8MixedPrecisionConfig(**EMULATED, **GATHERED)
    found, plain = products(swapped(linear, **GATHERED), x, grad_y), products(linear, x, grad_y)
    bounds = Int8MixedPrecision(config).bounds()
    for name in ("output", "grad_input", "grad_weight"):
        assert sqnr_db(plain[name], found[name]) > getattr(bounds, name), name
