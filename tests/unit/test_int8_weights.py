"""INT8 weights against a NumPy model of the stored weight, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from harness import Trial, products, tiny_run
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchao.quantization import quantize_

from qrecipes.config.parse import load
from qrecipes.errors import ConfigError
from qrecipes.quant.primitives import sqnr_db
from qrecipes.quant.stored_int8 import StoredInt8
from qrecipes.training import checkpoint
from qrecipes.transforms.base import parameter_bytes
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.int8_weights import Int8WeightConfig, Int8WeightLinear, Int8Weights

SETTINGS = [{}, {"group_size": 16}, {"int8_forward": True, "emulate": True}]
ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}
"""Relative to the largest value: float32 sums; in bfloat16 the weight is rounded, and the result."""


class GatedBlock(nn.Module):
    """Layers as in a Llama's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(48)
        self.gate, self.up = (nn.Linear(48, 80, bias=False) for _ in range(2))
        self.down, self.square = nn.Linear(80, 48, bias=False), nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.square(x)
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def swapped(linear: nn.Linear, **config: object) -> Int8WeightLinear:
    return Int8WeightLinear.from_linear(linear, Int8WeightConfig(**config))


def rounded(matrix: np.ndarray, group_size: int | None = None) -> np.ndarray:
    """What INT8 keeps of a float32 matrix, with a scale a row or for each `group_size` columns."""
    groups = matrix.reshape(-1, group_size or matrix.shape[1])
    scale = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    q = np.rint(groups / np.where(scale == 0, np.float32(1), scale))
    return (q.astype(np.float64) * scale.astype(np.float64)).reshape(matrix.shape)


def model(
    linear: nn.Linear, x: torch.Tensor, grad_y: torch.Tensor, group_size: int | None, int8_forward: bool
) -> dict[str, torch.Tensor]:
    w = rounded(linear.weight.detach().float().numpy(), group_size)
    x_2d = x.float().numpy().reshape(-1, x.shape[-1])
    dy = grad_y.double().numpy().reshape(-1, grad_y.shape[-1])
    y = (rounded(x_2d) if int8_forward else x_2d.astype(np.float64)) @ w.T
    found = {
        "output": y.reshape(grad_y.shape),
        "grad_input": (dy @ w).reshape(x.shape),
        "grad_weight": dy.T @ x_2d.astype(np.float64),
    }
    if linear.bias is not None:
        found["output"] = found["output"] + linear.bias.detach().double().numpy()
        found["grad_bias"] = dy.sum(0)
    return {name: torch.from_numpy(value) for name, value in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_products_are_those_of_the_stored_weight(setting, bias, dtype):
    linear = nn.Linear(48, 24, bias=bias, dtype=dtype)
    x, grad_y = torch.randn(3, 11, 48, dtype=dtype), torch.randn(3, 11, 24, dtype=dtype)
    expected = model(linear, x, grad_y, setting.get("group_size"), "int8_forward" in setting)
    found = products(swapped(linear, **setting), x, grad_y)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype is dtype, name
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            value.double(), expected[name], rtol=0, atol=ROUNDINGS[dtype] * largest, msg=name
        )


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 1, 3, 48), (0, 48), (3, 0, 48)])
def test_any_leading_dimensions(shape, setting):
    layer = swapped(nn.Linear(48, 7), **setting)
    x, grad_y = torch.randn(shape), torch.randn(*shape[:-1], 7)
    found, plain = products(layer, x, grad_y), products(layer.merged(), x, grad_y)
    for name, value in found.items():
        assert value.shape == plain[name].shape, name
        assert type(value) is torch.Tensor, name
        assert sqnr_db(plain[name], value) > 30, name  # only rows of the input in INT8, if that


@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (1, 9), (9, 1), (31, 17), (0, 3), (3, 0)])
@pytest.mark.parametrize("int8_forward", [False, True])
def test_any_feature_counts(in_features, out_features, int8_forward):
    layer = swapped(nn.Linear(in_features, out_features), int8_forward=int8_forward, emulate=True)
    x, grad_y = torch.randn(11, in_features), torch.randn(11, out_features)
    found, plain = products(layer, x, grad_y), products(layer.merged(), x, grad_y)
    for name, value in found.items():
        assert value.shape == plain[name].shape, name
        assert sqnr_db(plain[name], value) > 30, name


def test_the_parts_of_the_weight_are_all_that_is_stored():
    linear = nn.Linear(64, 24, dtype=torch.bfloat16)
    row, grouped = swapped(linear), swapped(linear, group_size=16)
    assert parameter_bytes(linear) == 2 * 64 * 24 + 2 * 24
    assert parameter_bytes(row) == 64 * 24 + 4 * 24 + 2 * 24
    assert parameter_bytes(grouped) == 64 * 24 + 4 * 24 * 4 + 2 * 24


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_copy_of_the_weight_is_kept_for_backward(setting, compiled):
    """Only the input and the INT8 parts, also by what the compiler chooses to keep."""
    layer = swapped(nn.Linear(48, 24, bias=False, dtype=torch.bfloat16), **setting)
    if compiled:
        layer.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(5, 7, 48, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    sizes = sorted(t.nbytes for t in kept)
    assert sizes == sorted([x.nbytes, layer.weight.q.nbytes, layer.weight.scale.nbytes])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_no_copy_is_kept_by_a_compiled_block_of_several_layers(setting):
    """A dequantized weight that stood in the graph would be read far apart, in which case the partitioner
    does not compute it again, but keeps it."""
    block = GatedBlock().bfloat16()
    quantize_(block, Int8WeightConfig(**setting))
    block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(20, 48, dtype=torch.bfloat16, requires_grad=True)
    block(x).sum().backward()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x)
    assert kept
    weights = [t for t in kept if t.is_floating_point() and t.numel() in (48 * 80, 48 * 48)]
    assert not weights, [(t.shape, t.dtype) for t in weights]


@pytest.mark.parametrize(
    ("backend", "dtype", "setting"),
    [
        ("inductor", torch.bfloat16, {}),
        ("aot_eager", torch.float32, {}),
        ("aot_eager", torch.float32, {"group_size": 16}),
        ("aot_eager", torch.float32, {"int8_forward": True, "emulate": True}),
    ],
    ids=str,
)
def test_compiled_equals_eager(backend, dtype, setting):
    layer = swapped(nn.Linear(48, 24, dtype=dtype), **setting)
    x, grad_y = torch.randn(3, 11, 48, dtype=dtype), torch.randn(3, 11, 24, dtype=dtype)
    eager = products(layer, x, grad_y)
    layer.compile(fullgraph=True, backend=backend)
    for name, value in products(layer, x, grad_y).items():
        # the same operations, in another order at most: far above the 40 dB of INT8
        assert sqnr_db(eager[name], value) > (100 if dtype is torch.float32 else 50), name


def test_updates_do_not_compile_the_layer_anew_and_are_seen():
    layer = swapped(nn.Linear(48, 24))
    x = torch.randn(11, 48)
    torch._dynamo.utils.counters.clear()
    layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(4):
        layer(x).square().sum().backward()
        value = layer.weight.dequantize() - 1e-3 * layer.weight.grad
        layer.weight.requantize_(value, stochastic=True)
        layer.zero_grad()
        torch.testing.assert_close(layer(x), layer.merged()(x), rtol=1e-5, atol=1e-5)  # float32 sums
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_merged_is_a_plain_layer_of_equal_outputs():
    for dtype in (torch.float32, torch.bfloat16):
        layer = swapped(nn.Linear(48, 24, dtype=dtype), group_size=16)
        merged = layer.merged()
        assert type(merged) is nn.Linear
        assert type(merged.weight) is nn.Parameter
        assert merged.weight.dtype is dtype
        assert merged.bias is layer.bias
        x = torch.randn(9, 48, dtype=dtype)
        assert torch.equal(layer(x), merged(x))


def test_repr_says_how_the_weight_is_stored():
    assert repr(swapped(nn.Linear(48, 24), group_size=16)) == (
        "Int8WeightLinear(in_features=48, out_features=24, bias=True, group_size=16, int8_forward=False)"
    )


def test_bias_and_training_flag_are_taken_over():
    linear = nn.Linear(48, 24)
    linear.weight.requires_grad_(False)
    before = torch.get_rng_state()
    layer = swapped(linear)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.merged().weight.requires_grad
    x = torch.randn(3, 48, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.dequantize().sum(0).expand(3, 48))


def test_works_on_the_meta_device():
    for setting in SETTINGS:
        layer = swapped(nn.Linear(48, 24, device="meta", dtype=torch.bfloat16), **setting)
        x = torch.empty(3, 5, 48, device="meta", dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert (y.shape, y.device.type, y.dtype) == ((3, 5, 24), "meta", torch.bfloat16)
        assert layer.weight.grad.shape == (24, 48)
        assert layer.merged().weight.is_meta


def test_state_dict_holds_plain_tensors_and_loads_back_to_the_bit():
    layer = swapped(nn.Linear(48, 24), group_size=16)
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert {name: (type(t), t.dtype) for name, t in saved.items()} == {
        "weight": (torch.Tensor, torch.int8),
        "weight_scale": (torch.Tensor, torch.float32),
        "bias": (torch.Tensor, torch.float32),
    }
    other = swapped(nn.Linear(48, 24), group_size=16)
    weight = other.weight
    other.load_state_dict(saved)
    assert other.weight is weight
    empty = swapped(nn.Linear(48, 24, device="meta"), group_size=16)
    empty.load_state_dict(saved, assign=True)
    for loaded in (other, empty):
        assert isinstance(loaded.weight, StoredInt8)
        assert torch.equal(loaded.weight.q, layer.weight.q)
        assert torch.equal(loaded.weight.scale, layer.weight.scale)
        assert torch.equal(loaded.bias, layer.bias)
        assert loaded.weight.requires_grad


def test_state_dicts_that_do_not_fit_are_refused_by_name():
    layer = nn.Sequential(swapped(nn.Linear(48, 24), group_size=16))
    saved = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight_scale"):
        layer.load_state_dict({name: t for name, t in saved.items() if not name.endswith("scale")})
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
        layer.load_state_dict({name: t for name, t in saved.items() if not name.endswith("bias")})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.other"):
        layer.load_state_dict(saved | {"0.other": torch.zeros(1)})
    rows = nn.Sequential(swapped(nn.Linear(48, 24))).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight_scale: .* shape \(24, 1\), where .*\(24, 3\)"):
        layer.load_state_dict(rows)
    with pytest.raises(RuntimeError, match=r"0\.weight: torch.float32 of shape .* where torch.int8"):
        layer.load_state_dict(saved | {"0.weight": torch.zeros(24, 48)})


def test_a_bfloat16_run_resumes_bit_for_bit(tmp_path):
    """With moments that are rounded stochastically, too."""
    run = tiny_run("llm", "int8_weights", output=str(tmp_path), steps=6)
    unbroken = Trial.of(run, dtype=torch.bfloat16).advance(6)
    first = Trial.of(run, dtype=torch.bfloat16)
    beginning = first.advance(3)
    position = first.data.state_dict()
    folder = checkpoint.save(run, 3, first.model, first.optimizer, position, first.process)
    second = Trial.of(run, dtype=torch.bfloat16)
    second.done, position = checkpoint.restore(folder, run, second.model, second.optimizer, second.process)
    second.data.load_state_dict(position)
    assert beginning + second.advance(3) == unbroken
    saved = load_file(folder / checkpoint.MODEL)
    assert saved["layers.0.attn.q_proj.weight"].dtype is torch.int8
    assert saved["layers.0.attn.q_proj.weight_scale"].dtype is torch.float32
    moments = load_file(folder / checkpoint.OPTIMIZER)
    assert moments["exp_avg_sq/layers.0.attn.q_proj.weight"].dtype is torch.bfloat16


def test_torchao_quantize_applies_the_configuration():
    network = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8))
    quantize_(network, Int8WeightConfig(group_size=16))
    assert [type(m) for m in network] == [Int8WeightLinear, nn.ReLU, Int8WeightLinear]


@pytest.mark.parametrize("degrees", [1.5, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_bounds_hold_on_heavy_tails(setting, degrees, dtype):
    linear = nn.Linear(96, 64, dtype=dtype)
    linear.weight.data = torch.distributions.StudentT(degrees).sample((64, 96)).to(dtype)
    x, grad_y = torch.randn(256, 96, dtype=dtype), torch.randn(256, 64, dtype=dtype)
    found, plain = products(swapped(linear, **setting), x, grad_y), products(linear, x, grad_y)
    bounds = Int8Weights(Int8WeightConfig(**setting)).bounds()
    for name in ("output", "grad_input"):
        assert sqnr_db(plain[name], found[name]) > getattr(bounds, name), name
    assert bounds.grad_weight is None
    assert torch.equal(found["grad_weight"], plain["grad_weight"])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_is_not_finite_propagates(setting, poison):
    layer = swapped(nn.Linear(48, 24), **setting)
    x = torch.randn(6, 48)
    x[2, 7] = poison
    assert torch.isfinite(layer(x)).all(1).tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_weight_that_is_not_finite_shows_in_its_channel_and_every_gradient(setting, poison):
    linear = nn.Linear(48, 24)
    linear.weight.data[5, 7] = poison
    found = products(swapped(linear, **setting), torch.randn(6, 48), torch.randn(6, 24))
    assert (~torch.isfinite(found["output"])).all(0).tolist() == [n == 5 for n in range(24)]
    size = setting.get("group_size", 48)
    assert (~torch.isfinite(found["grad_input"])).all(0).tolist() == [
        k // size == 7 // size for k in range(48)
    ]


def test_second_derivatives_are_refused():
    layer = swapped(nn.Linear(4, 3))
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph, but .* no second derivative; add it .* skip"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_int8_forward_without_tensor_cores_is_refused_unless_emulated():
    match = r"int8_weights.int8_forward: the device is cpu.*set int8_forward = false, or set emulate = true"
    with pytest.raises(ConfigError, match=match):
        Int8Weights(Int8WeightConfig(int8_forward=True)).check_device(torch.device("cpu"))
    with pytest.raises(ConfigError, match=match):
        swapped(nn.Linear(16, 16), int8_forward=True)(torch.randn(2, 16))
    Int8Weights(Int8WeightConfig(int8_forward=True, emulate=True)).check_device(torch.device("cpu"))
    Int8Weights(Int8WeightConfig()).check_device(torch.device("cpu"))


def test_int8_forward_with_groups_is_refused():
    with pytest.raises(ConfigError, match=r"int8_forward: true, but group_size is 16.*remove group_size"):
        Int8WeightConfig(group_size=16, int8_forward=True)


def test_a_group_size_that_does_not_divide_names_the_layer_and_the_nearest_that_does():
    network = nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 8))
    chain = Chain.from_configs([Int8WeightConfig(group_size=16)])
    with pytest.raises(
        ConfigError, match=r"int8_weights: 1: group_size 16 .* 24 input .*; use group_size 24"
    ):
        chain.swap(network)
    assert all(type(module) is nn.Linear for module in network)  # the model is as it was
    with pytest.raises(ConfigError, match=r"32 does not divide 48 input features; use group_size 24, or"):
        swapped(nn.Linear(48, 24), group_size=32)


def test_a_layer_that_no_group_size_divides_says_what_to_do():
    match = (
        r"int8_weights: 0: group_size 16 .* 100 input .*; use no group_size \(one scale a row\), or .* skip"
    )
    with pytest.raises(ConfigError, match=match):
        Chain.from_configs([Int8WeightConfig(group_size=16)]).swap(nn.Sequential(nn.Linear(100, 24)))


@pytest.mark.parametrize(
    ("size", "wrong"), [(0, "out of range"), (8, "out of range"), (20, "no multiple of 8"), (512, "out of")]
)
def test_group_sizes_that_no_format_has_are_refused(size, wrong):
    use = r"use a multiple of 8 from 16 to 256, or one scale for the whole row \(leave it out\)"
    match = rf"^int8_weights.group_size: {size} is {wrong}.*; {use}"
    with pytest.raises(ConfigError, match=match):
        Int8WeightConfig(group_size=size)


def test_half_precision_is_refused():
    network = nn.Sequential(nn.Linear(48, 24, dtype=torch.float16))
    with pytest.raises(ConfigError, match=r"0 has torch.float16 weights; .*; use one .* as model.dtype"):
        Chain.from_configs([Int8WeightConfig()]).swap(network)


def test_autocast_and_other_types_are_refused():
    layer = swapped(nn.Linear(4, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"input: torch.float32, but the weight passes for torch.bfloat16"):
        layer(torch.randn(2, 4))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"under autocast, .*; leave autocast out, and choose .* model.dtype"),
    ):
        layer(torch.randn(2, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ['optim.name="schedule_free_adamw"', 'schedule.kind="constant"'],
            r"optim\.name: 'schedule_free_adamw' keeps float32 .* set name to another optimizer, or",
        ),
        (
            ['optim.offload="state"'],
            r"optim\.offload: 'state' keeps float32 .* set offload to \"none\"",
        ),
    ],
    ids=["schedule_free_adamw", "offload"],
)
def test_optimizers_with_weights_of_their_own_are_refused_before_a_model_is_built(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load("tiny/llm_int8_weights", overrides)


def test_a_weight_that_two_modules_hold_is_refused():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.unembedding = nn.Embedding(24, 48), nn.Linear(48, 24, bias=False)
            self.unembedding.weight = self.embedding.weight

    with pytest.raises(
        ConfigError, match=r"embedding.weight is also unembedding.weight; .*; add 'unembedding' to skip"
    ):
        Chain.from_configs([Int8WeightConfig()]).swap(Tied())
    layer = nn.Linear(8, 8)
    with pytest.raises(ConfigError, match=r"0.weight is also 1.weight; .* belongs to one layer"):
        Chain.from_configs([Int8WeightConfig()]).swap(nn.Sequential(layer, layer))
