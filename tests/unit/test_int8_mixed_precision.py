"""INT8 mixed precision against a NumPy model of the quantized arithmetic, in float64."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from harness import products
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchao.quantization import quantize_

from qrecipes.cli.main import main
from qrecipes.errors import ConfigError
from qrecipes.quant import int8_matmul
from qrecipes.quant.primitives import sqnr_db
from qrecipes.transforms import int8_mixed_precision
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.int8_mixed_precision import (
    Int8MixedPrecision,
    Int8MixedPrecisionConfig,
    Int8MixedPrecisionLinear,
)

SWITCHES = [
    dict(zip(("output", "grad_input", "grad_weight"), on, strict=True))
    for on in itertools.product([True, False], repeat=3)
    if any(on)
]
DRAWS = 100_000
ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Relative to the largest value: three float32 roundings and a bias; one or two bfloat16 roundings."""


EMULATED = {"emulate": True, "min_size": 0, "min_size_grad_weight": 0}
"""For small layers on a CPU."""


def swapped(linear: nn.Linear, **config: bool) -> Int8MixedPrecisionLinear:
    return Int8MixedPrecisionLinear.from_linear(linear, Int8MixedPrecisionConfig(**EMULATED, **config))


def rounded(matrix: np.ndarray, axis: int) -> np.ndarray:
    """What INT8 keeps of a matrix with one scale for each slice along `axis`, in float64."""
    if matrix.shape[axis] == 0:
        return matrix.astype(np.float64)
    scale = np.abs(matrix).max(axis, keepdims=True) / np.float32(127)
    q = np.rint(matrix / np.where(scale == 0, np.float32(1), scale))
    return q.astype(np.float64) * scale.astype(np.float64)


def model(layer: nn.Linear, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three products, each with its operands rounded along its own contraction, and the bias."""
    w = layer.weight.detach().float().numpy()
    x_2d = x.detach().float().numpy().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    dy = grad_y.float().numpy().reshape(math.prod(grad_y.shape[:-1]), grad_y.shape[-1])
    y = rounded(x_2d, 1) @ rounded(w, 1).T
    found = {
        "output": y.reshape(grad_y.shape),
        "grad_input": (rounded(dy, 1) @ rounded(w, 0)).reshape(x.shape),
        "grad_weight": rounded(dy, 0).T @ rounded(x_2d, 0),
    }
    if layer.bias is not None:
        found["output"] = found["output"] + layer.bias.detach().double().numpy()
        found["grad_bias"] = dy.astype(np.float64).sum(0)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def assert_equals_model(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype is dtype, name
        assert value.shape == expected[name].shape, name
        largest = expected[name].abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(
            value.double(), expected[name], rtol=0, atol=ROUNDINGS[dtype] * largest, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_each_product_rounds_its_operands_along_its_contraction(bias, dtype):
    linear = nn.Linear(40, 24, bias=bias, dtype=dtype)
    x, grad_y = torch.randn(33, 40, dtype=dtype), torch.randn(33, 24, dtype=dtype)
    layer = swapped(linear)
    assert_equals_model(products(layer, x, grad_y), model(layer, x, grad_y), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "+".join(name for name in s if s[name]))
def test_each_switch_changes_its_product_alone(switches, dtype):
    linear = nn.Linear(40, 24, dtype=dtype)
    x, grad_y = torch.randn(5, 7, 40, dtype=dtype), torch.randn(5, 7, 24, dtype=dtype)
    plain = products(linear, x, grad_y)
    found = products(swapped(linear, **switches), x, grad_y)
    in_int8 = products(swapped(linear), x, grad_y)
    for name, on in switches.items():
        assert torch.equal(found[name], in_int8[name] if on else plain[name]), name
        assert torch.equal(in_int8[name], plain[name]) is False, name
        assert sqnr_db(plain[name], in_int8[name]) > 35, name  # 8 bits on normal values: 40
    # a sum of 35 values in float32, whatever the switches; bfloat16 rounds it once
    torch.testing.assert_close(found["grad_bias"], grad_y.float().sum((0, 1)).to(dtype), rtol=1e-5, atol=1e-5)


SHAPES = {
    "one token": (40,),
    "batch of one": (1, 40),
    "odd": (13, 40),
    "three dimensions": (3, 5, 40),
    "five dimensions": (2, 1, 3, 2, 40),
    "empty batch": (0, 40),
    "empty inner": (3, 0, 40),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("switches", [{}, {"output": False}, {"grad_input": False, "grad_weight": False}])
def test_any_leading_dimensions(shape, switches):
    layer = swapped(nn.Linear(40, 7), **switches)
    x, grad_y = torch.randn(shape), torch.randn(*shape[:-1], 7)
    found, plain = products(layer, x, grad_y), products(layer.merged(), x, grad_y)
    for name, value in found.items():
        assert value.shape == plain[name].shape, name
        assert sqnr_db(plain[name], value) > 30, name  # a few values a slice: 8 bits give about 40
    if not switches:
        assert_equals_model(found, model(layer, x, grad_y), torch.float32)


@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (1, 9), (9, 1), (2, 3), (31, 17), (0, 3), (3, 0)]
)
def test_any_feature_counts(in_features, out_features):
    layer = swapped(nn.Linear(in_features, out_features))
    x, grad_y = torch.randn(11, in_features), torch.randn(11, out_features)
    assert_equals_model(products(layer, x, grad_y), model(layer, x, grad_y), torch.float32)


def test_strides_do_not_matter():
    layer = swapped(nn.Linear(40, 24))
    views = [
        torch.randn(40, 6, 5).permute(2, 1, 0),
        torch.randn(5, 6, 80)[..., ::2],
        torch.randn(40).expand(5, 6, 40),
    ]
    for x in views:
        assert not x.is_contiguous()
        grad_y = torch.randn(24, 5, 6).permute(1, 2, 0)
        assert_equals_model(products(layer, x, grad_y), model(layer, x, grad_y), torch.float32)
    y = layer(views[0])
    y.sum().backward()  # a gradient of stride 0
    assert torch.isfinite(layer.weight.grad).all()


def unbiased(samples: torch.Tensor, exact: torch.Tensor, step: float) -> bool:
    """Whether the mean over the first dimension is `exact`, to six standard errors of a spread `step` / 2."""
    bias = samples.double().mean(0) - exact.double()
    return bool((bias.abs() < 6 * 0.5 * step / math.sqrt(samples.shape[0])).all())


def test_stochastic_rounding_makes_every_product_right_on_average():
    """One operand lies on the grid, the other is rounded anew in each of many rows."""
    linear = nn.Linear(6, 3, bias=False)
    linear.weight.data = torch.tensor(
        [[127, 3, 0, 0, 0, 0], [-127, 0, 5, 0, 0, 0], [127, 0, 0, 0, 0, 127]]
    ).float()
    x = torch.tensor(
        [127 / 128, 0.27, -0.4, 0.81, 0.05, -0.6]
    )  # with a scale that float32 has: 127 stays 127
    layer = swapped(linear, stochastic_rounding=True)
    found = products(layer, x.expand(DRAWS, 6), torch.ones(DRAWS, 3))
    weight = linear.weight.detach()
    # a row adds two errors of at most one step of its scale, times 127
    assert unbiased(found["output"], x @ weight.t(), step=2 * 127 / 128)
    assert found["output"].unique(dim=0).shape[0] == 2**3  # three inputs beside the largest have a weight

    tokens = torch.tensor([[127.0, 5.0], [-30.0, 127.0], [64.0, 0.0]])  # on the grid along the tokens
    wide = swapped(nn.Linear(2, DRAWS, bias=False), stochastic_rounding=True)
    dy_3 = torch.tensor([0.7, -0.21, 0.055])
    found = products(wide, tokens, dy_3[:, None].expand(3, DRAWS))
    assert unbiased(found["grad_weight"], dy_3 @ tokens, step=3 * 127 * 0.7 / 127)

    tall = swapped(nn.Linear(DRAWS, 2, bias=False), stochastic_rounding=True)
    tall.weight.data = torch.tensor([[0.3], [-0.11]]).expand(2, DRAWS).contiguous()
    found = products(tall, torch.zeros(1, DRAWS), torch.tensor([[127.0, 64.0]]))
    assert unbiased(found["grad_input"].t(), torch.tensor([0.3 * 127 - 0.11 * 64]), step=2 * 127 * 0.3 / 127)


def test_stochastic_rounding_repeats_under_one_seed():
    layer = swapped(nn.Linear(40, 24), stochastic_rounding=True)
    x, grad_y = torch.randn(33, 40), torch.randn(33, 24)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(products(layer, x, grad_y))
    for name in ("output", "grad_input", "grad_weight"):
        assert torch.equal(runs[0][name], runs[1][name]), name
        assert not torch.equal(runs[0][name], runs[2][name]), name


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("degrees", [1.5, 3.0, 30.0])
def test_bounds_hold_on_heavy_tails(degrees, dtype, stochastic_rounding):
    heavy = torch.distributions.StudentT(degrees)
    x, grad_y = heavy.sample((256, 96)).to(dtype), heavy.sample((256, 64)).to(dtype)
    x[:, 5] *= 100
    linear = nn.Linear(96, 64, dtype=dtype)
    config = Int8MixedPrecisionConfig(**EMULATED, stochastic_rounding=stochastic_rounding)
    found = products(Int8MixedPrecisionLinear.from_linear(linear, config), x, grad_y)
    plain = products(linear, x, grad_y)
    bounds = Int8MixedPrecision(config).bounds()
    for name in ("output", "grad_input", "grad_weight"):
        assert sqnr_db(plain[name], found[name]) > getattr(bounds, name), name


def test_bounds_name_the_products_in_int8():
    for switches in SWITCHES:
        bounds = Int8MixedPrecision(Int8MixedPrecisionConfig(**switches)).bounds()
        assert {name: getattr(bounds, name) is not None for name in switches} == switches


def test_only_input_and_weight_are_kept_for_backward():
    layer = swapped(nn.Linear(40, 24))
    x = torch.randn(4, 8, 40, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(t.data_ptr() for t in kept) == sorted([x.data_ptr(), layer.weight.data_ptr()])
    assert all(t.dtype is torch.float32 for t in kept)


@pytest.mark.parametrize(
    ("trained", "needed"),
    [
        ({"x", "weight", "bias"}, {"grad_input", "grad_weight"}),
        ({"x"}, {"grad_input"}),
        ({"weight"}, {"grad_weight"}),
        ({"bias"}, set()),
    ],
)
def test_only_needed_gradients_are_computed(trained, needed, monkeypatch):
    layer = swapped(nn.Linear(40, 24))
    x = torch.randn(8, 40, requires_grad="x" in trained)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    y = layer(x)
    shapes = []
    int32_mm = int8_matmul._int32_mm
    monkeypatch.setattr(
        int8_matmul, "_int32_mm", lambda a, b: shapes.append(int32_mm(a, b).shape) or int32_mm(a, b)
    )
    y.backward(torch.randn(8, 24))
    assert set(shapes) == {{"grad_input": (8, 40), "grad_weight": (24, 40)}[name] for name in needed}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == trained - {"x"}
    assert (x.grad is not None) == ("x" in trained)


@pytest.mark.parametrize(
    ("backend", "dtype", "switches"),
    [
        ("inductor", torch.bfloat16, {}),
        *itertools.product(["aot_eager"], [torch.float32], SWITCHES),
    ],
)
def test_compiled_equals_eager(backend, dtype, switches, monkeypatch):
    """And hands every matmul its contraction contiguous: others run at a quarter of the speed on Hopper."""
    layer = swapped(nn.Linear(40, 24, dtype=dtype), **switches)
    x, grad_y = torch.randn(3, 11, 40, dtype=dtype), torch.randn(3, 11, 24, dtype=dtype)
    strides = []
    int32_mm = int8_matmul._int32_mm
    monkeypatch.setattr(
        int8_matmul, "_int32_mm", lambda a, b: strides.append((a.stride(1), b.stride(0))) or int32_mm(a, b)
    )
    eager = products(layer, x, grad_y)
    layer.compile(fullgraph=True, backend=backend)
    compiled = products(layer, x, grad_y)
    assert strides == [(1, 1)] * 2 * sum((SWITCHES[0] | switches).values())
    for name, value in eager.items():
        # the same operations, in another order at most: far above the 40 dB between INT8 and high precision
        assert sqnr_db(value, compiled[name]) > (100 if dtype is torch.float32 else 60), name


def test_compiled_stochastic_rounding_rounds():
    layer = swapped(nn.Linear(40, 24), stochastic_rounding=True)
    x, grad_y = torch.randn(33, 40), torch.randn(33, 24)
    plain = products(layer.merged(), x, grad_y)
    layer.compile(fullgraph=True)
    first, second = products(layer, x, grad_y), products(layer, x, grad_y)
    for name in ("output", "grad_input", "grad_weight"):
        assert not torch.equal(first[name], second[name]), name
        assert sqnr_db(plain[name], first[name]) > 30, name  # 40 dB less the 3 dB of stochastic rounding


def test_parameters_are_taken_over_as_they_are():
    linear = nn.Linear(40, 24)
    linear.weight.requires_grad_(False)
    before = torch.get_rng_state()
    layer = swapped(linear)
    merged = layer.merged()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(merged) is nn.Linear
    for other in (layer, merged):
        assert other.weight is linear.weight
        assert other.bias is linear.bias
        assert (other.in_features, other.out_features) == (40, 24)
        assert list(other.state_dict()) == ["weight", "bias"]
    assert swapped(nn.Linear(40, 24, bias=False)).bias is None
    assert repr(swapped(linear, output=False)) == (
        "Int8MixedPrecisionLinear(in_features=40, out_features=24, bias=True, int8=grad_input+grad_weight)"
    )


def test_works_on_the_meta_device():
    layer = swapped(nn.Linear(40, 24, device="meta", dtype=torch.bfloat16))
    x = torch.empty(3, 5, 40, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, y.device.type, y.dtype) == ((3, 5, 24), "meta", torch.bfloat16)
    assert layer.weight.grad.shape == (24, 40)


def test_torchao_quantize_applies_the_configuration():
    network = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))
    weight = network[0].weight
    x = torch.randn(9, 40)
    plain = network(x)
    quantize_(network, Int8MixedPrecisionConfig(**EMULATED, grad_weight=False))
    assert [type(m) for m in network] == [Int8MixedPrecisionLinear, nn.ReLU, Int8MixedPrecisionLinear]
    assert network[0].weight is weight
    assert network[0].config == Int8MixedPrecisionConfig(**EMULATED, grad_weight=False)
    assert not torch.equal(network(x), plain)
    assert sqnr_db(plain, network(x)) > 30  # two layers of about 40 dB


def test_torchao_quantize_may_leave_alone_what_is_skipped_by_name():
    network = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("body", "lm_head", "output", "other")})
    config = Int8MixedPrecisionConfig(**EMULATED)
    quantize_(network, config, filter_fn=config.selects)
    assert [name for name, m in network.items() if type(m) is nn.Linear] == ["lm_head", "output"]
    assert not config.selects(nn.ReLU(), "body")
    assert not config.selects(network["other"], "model.lm_head")


def test_swap_then_finalize_gives_the_plain_model_back():
    network = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 8))
    x = torch.randn(9, 40)
    plain, parameters = network(x), list(network.parameters())
    method = Int8MixedPrecision(Int8MixedPrecisionConfig(**EMULATED, skip=("2",)))
    network = method.swap(network)
    assert list(method.layers(network)) == ["0"]
    assert method.freezes_rest is False
    assert method.param_groups(network) == []
    network = method.finalize(network)
    assert type(network[0]) is nn.Linear
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert torch.equal(network(x), plain)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_propagates(poison):
    layer = swapped(nn.Linear(40, 24))
    x, grad_y = torch.randn(6, 40), torch.randn(6, 24)
    x[2, 7], grad_y[3, 5] = poison, poison
    found = products(layer, x, grad_y)
    assert (~torch.isfinite(found["output"])).all(1).tolist() == [False, False, True, False, False, False]
    assert (~torch.isfinite(found["grad_input"])).all(1).tolist() == [False, False, False, True, False, False]
    assert not torch.isfinite(found["grad_weight"][:, 7]).any()
    assert not torch.isfinite(found["grad_weight"][5]).any()
    assert torch.isfinite(found["grad_weight"][0, 0])


def test_second_derivatives_are_refused():
    layer = swapped(nn.Linear(4, 3))
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph, but .* no second derivative; add .* skip"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_all_switches_off_is_refused():
    with pytest.raises(
        ConfigError, match=r"int8_mixed_precision: .* all false.*set at least one .* or remove"
    ):
        Int8MixedPrecisionConfig(output=False, grad_input=False, grad_weight=False)


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match=r"torch.float16 weights; .*; use one of these as model.dtype"):
        swapped(nn.Linear(4, 3, dtype=torch.float16))
    with pytest.raises(
        ValueError, match=r"input: torch.float32, the weight is torch.bfloat16, .* use one dtype"
    ):
        swapped(nn.Linear(4, 3, dtype=torch.bfloat16))(torch.randn(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", [{}, {"output": False}, {"grad_input": False}], ids=str)
def test_int8_input_kept_for_backward_changes_no_bit(switches, dtype):
    linear = nn.Linear(40, 24, dtype=dtype)
    x, grad_y = torch.randn(3, 11, 40, dtype=dtype), torch.randn(3, 11, 24, dtype=dtype)
    found = products(swapped(linear, **switches, save_int8_input=True), x, grad_y)
    expected = products(swapped(linear, **switches), x, grad_y)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def bytes_kept(layer: nn.Linear, x: torch.Tensor) -> int:
    """Bytes of what autograd keeps beside the parameters."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        layer(x)
    return sum(size for pointer, size in kept.items() if pointer != layer.weight.data_ptr())


def test_int8_input_takes_half_the_bytes_of_bfloat16():
    linear = nn.Linear(64, 24, dtype=torch.bfloat16)
    x = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    assert bytes_kept(swapped(linear), x) == x.nbytes
    scales = 64 * 4
    assert bytes_kept(swapped(linear, save_int8_input=True), x) == x.nbytes // 2 + scales


def test_int8_input_is_not_made_where_nobody_needs_it(monkeypatch):
    layer = swapped(nn.Linear(8, 4), save_int8_input=True)
    monkeypatch.setattr(int8_mixed_precision, "quantize_columns", None)
    with torch.no_grad():
        layer(torch.randn(3, 8))
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 8, requires_grad=True))


def test_kept_int8_input_compiles_to_the_same():
    layer = swapped(nn.Linear(40, 24), save_int8_input=True)
    x, grad_y = torch.randn(33, 40), torch.randn(33, 24)
    eager = products(layer, x, grad_y)
    layer.compile(fullgraph=True, backend="aot_eager")
    for name, value in products(layer, x, grad_y).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-6, atol=1e-6, msg=name)  # sums of grad_bias


def test_int8_input_without_grad_weight_is_refused():
    with pytest.raises(
        ConfigError, match=r"save_int8_input: true, but grad_weight is false .* set grad_weight"
    ):
        Int8MixedPrecisionConfig(grad_weight=False, save_int8_input=True)


def test_no_tensor_cores_is_an_error_that_names_the_remedy():
    layer = Int8MixedPrecisionLinear.from_linear(nn.Linear(32, 16), Int8MixedPrecisionConfig())
    with pytest.raises(ConfigError, match=r"cpu, but INT8 products need .* set emulate = true"):
        layer(torch.randn(3, 32))
    with pytest.raises(ConfigError, match=r"emulate = true"):
        Int8MixedPrecision(Int8MixedPrecisionConfig()).check_device(torch.device("cpu"))
    Int8MixedPrecision(Int8MixedPrecisionConfig(emulate=True)).check_device(torch.device("cpu"))


def test_a_run_without_tensor_cores_stops_before_its_model_is_built(tmp_path, capsys):
    overrides = ["transform.0.emulate=false", f'output="{tmp_path}"', 'device="cpu"']
    with pytest.raises(SystemExit, match="2"):
        main(["run", "train", "--config", "tiny/llm_int8_mixed_precision", *overrides])
    assert "emulate = true" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_autocast_is_refused_by_name():
    layer = swapped(nn.Linear(32, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast is on"):
        layer(torch.randn(3, 32))


def test_layers_too_small_to_gain_are_left_alone_and_the_receipt_says_why():
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 512, bias=False))
    chain = Chain.from_configs([Int8MixedPrecisionConfig()])
    chain.swap(model)
    assert [type(layer) for layer in model] == [Int8MixedPrecisionLinear, nn.Linear]
    first, second = chain.receipt.layers
    assert first.method == "int8_mixed_precision"
    assert second.method is None
    assert second.reason == "512 x 2048 is too small to gain: 410 < min_size 700"
    with pytest.raises(ConfigError, match=r"0 \(16 x 32 .*: 11 < min_size 700\); choose .* or remove"):
        Chain.from_configs([Int8MixedPrecisionConfig()]).swap(nn.Sequential(nn.Linear(32, 16)))
    everything = nn.Sequential(nn.Linear(32, 16))
    Chain.from_configs([Int8MixedPrecisionConfig(min_size=0)]).swap(everything)
    assert isinstance(everything[0], Int8MixedPrecisionLinear)


def test_grad_weight_of_smaller_layers_stays_in_high_precision_and_the_receipt_says_where():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96, bias=False), nn.Linear(96, 32, bias=False))
    original = copy.deepcopy(model)
    config = Int8MixedPrecisionConfig(
        min_size=0, min_size_grad_weight=40, save_int8_input=True, emulate=True, skip=()
    )
    chain = Chain.from_configs([config])
    x = torch.randn(64, 96)
    chain.swap(model, loss=lambda network: network(x).square().sum())  # probed: each to its own products
    first, second = chain.receipt.layers
    assert set(first.sqnr_db) == {"output", "grad_input", "grad_weight"}
    assert set(second.sqnr_db) == {"output", "grad_input"}
    assert first.partly is None
    assert second.partly == "not grad_weight: size 24 < min_size_grad_weight 40"
    assert "2 of 2 linear layers" in chain.receipt.summary()
    assert "in part 1 (not grad_weight: size 24 < min_size_grad_weight 40)" in chain.receipt.summary()

    def grad_weight(layer: nn.Module) -> torch.Tensor:
        return torch.autograd.grad(layer(x), layer.weight, torch.ones(64, layer.out_features))[0]

    assert torch.equal(grad_weight(model[1]), grad_weight(original[1]))
    assert not torch.equal(grad_weight(model[0]), grad_weight(original[0]))


def test_a_layer_whose_only_int8_product_would_be_a_small_grad_weight_is_left_alone():
    config = Int8MixedPrecisionConfig(
        min_size=0, min_size_grad_weight=40, output=False, grad_input=False, emulate=True
    )
    with pytest.raises(ConfigError, match=r"32 x 96 is too small to gain: 24 < min_size_grad_weight 40"):
        Chain.from_configs([config]).swap(nn.Sequential(nn.Linear(96, 32)))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"stochastic_rounding": True},
        {"save_int8_input": True},
        {"int8_all_gather": True},
        {"output": False},
    ],
    ids=str,
)
def test_what_is_not_finite_reaches_output_and_gradients(how, poison):
    layer = swapped(nn.Linear(32, 16, bias=False), **how)
    x = torch.randn(4, 32)
    x[2, 5] = poison
    x.requires_grad_(True)
    y = layer(x)
    assert (~torch.isfinite(y)).all(1).tolist() == [False, False, True, False]
    y[0].sum().backward()  # the poisoned token's gradient is zero, yet its input enters grad_weight
    assert (~torch.isfinite(layer.weight.grad)).all(0).tolist() == [k == 5 for k in range(32)]
