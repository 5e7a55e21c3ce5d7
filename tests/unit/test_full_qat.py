"""Full quantization-aware training: LSQ's formulas in float64, the merged integers, and its learned
scales."""

from __future__ import annotations

import pytest
import torch
from harness import Trial, predict, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qrecipes.errors import ConfigError, TrainingError
from qrecipes.quant.input_linear import QuantInputLinear
from qrecipes.quant.packing import signed_range
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.full_qat import FullQATConfig, FullQATLinear


def clipping(linear: nn.Linear, **config) -> FullQATLinear:
    """A layer on a grid that clips some weights."""
    layer = FullQATLinear.from_linear(linear, FullQATConfig(**config))
    with torch.no_grad():
        if layer.qat.scale_domain == "linear":
            layer.scale.mul_(torch.rand_like(layer.scale) * 0.5 + 0.4)
        else:
            layer.scale.sub_(torch.rand_like(layer.scale))
        if layer.zero is not None:
            layer.zero.add_(torch.rand_like(layer.zero) * 2 - 1)
    return layer


def by_hand(layer: FullQATLinear, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients, one weight at a time, from the case that each is in: LSQ's equations 1 to 5."""
    bits = layer.qat.bits
    least, greatest = signed_range(bits)
    W, raw = layer.weight.detach().double(), layer.scale.detach().double()
    scale = raw.exp() if layer.qat.scale_domain == "log" else raw
    N, K = W.shape
    size = K // scale.shape[1]
    g = dy.double().t() @ x.double()
    w_hat, dW = torch.empty_like(W), torch.zeros_like(W)
    ds, dz = torch.zeros_like(scale), torch.zeros_like(scale)
    for n in range(N):
        for k in range(K):
            G = k // size
            s, z = scale[n, G], 0
            if layer.zero is not None:
                z = layer.zero[n, G].round().clamp(least, greatest).item()
            v = W[n, k] / s
            level = v.round() + z
            if level < least or level > greatest:
                end = least if level < least else greatest
                w_hat[n, k] = s * (end - z)
                ds[n, G] += g[n, k] * (end - z)
                dz[n, G] -= g[n, k] * s
            else:
                w_hat[n, k] = s * (level - z)
                dW[n, k] = g[n, k]
                ds[n, G] += g[n, k] * (v.round() - v)
    if layer.qat.scale_domain == "log":
        ds = ds * scale
    found = {"output": x.double() @ w_hat.t(), "x": dy.double() @ w_hat, "weight": dW, "scale": ds}
    if layer.zero is not None:
        rounded = layer.zero.detach().round()
        found["zero"] = dz * ((rounded >= least) & (rounded <= greatest))
    if layer.bias is not None:
        found["output"] = found["output"] + layer.bias.detach().double()
        found["bias"] = dy.double().sum(0)
    return found


@settings(max_examples=15, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.sampled_from([None, 16]),
    domain=st.sampled_from(["linear", "log"]),
    bias=st.booleans(),
)
def test_output_and_gradients_are_those_of_lsq(bits, symmetric, size, domain, bias):
    torch.manual_seed(0)
    layer = clipping(
        nn.Linear(32, 6, bias=bias), bits=bits, symmetric=symmetric, group_size=size, scale_domain=domain
    )
    x, dy = torch.randn(4, 32, requires_grad=True), torch.randn(4, 6)
    y = layer(x)
    y.backward(dy)
    expected = by_hand(layer, x.detach(), dy)
    found = {"output": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters()}
    assert found.keys() == expected.keys()
    for name, ours in found.items():
        # float32 sums of up to 32 terms
        torch.testing.assert_close(ours.double(), expected[name], rtol=2e-5, atol=2e-5, msg=name)


@settings(max_examples=15, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.sampled_from([None, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_merged_layer_multiplies_the_weight_of_the_forward_pass(bits, symmetric, size, dtype):
    torch.manual_seed(0)
    layer = clipping(nn.Linear(64, 24), bits=bits, symmetric=symmetric, group_size=size).to(dtype)
    merged = layer.merged()
    x = torch.randn(9, 64, dtype=dtype)
    assert torch.equal(merged(x), layer(x))
    least, greatest = signed_range(bits)
    assert merged.integers().min() >= least
    assert merged.integers().max() <= greatest
    assert layer.scale.dtype is torch.float32


@pytest.mark.parametrize("inputs", [8, 4])
def test_the_integer_forward_is_the_fake_quantized_one_but_for_rounding(inputs):
    torch.manual_seed(0)
    settings = {"bits": 4, "activation_bits": inputs}
    integer = clipping(nn.Linear(96, 24), **settings, integer_forward=True)
    fake = clipping(nn.Linear(96, 24), **settings)
    fake.load_state_dict(integer.state_dict())
    x, dy = torch.randn(7, 96), torch.randn(7, 24)
    found = []
    for layer in (integer, fake):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        found.append({"y": y, "x": leaf.grad} | {n: p.grad for n, p in layer.named_parameters()})
    for name, theirs in found[1].items():
        # float32 sums of 96 terms
        torch.testing.assert_close(found[0][name], theirs, rtol=1e-5, atol=2e-5, msg=name)
    merged = integer.merged()
    assert isinstance(merged, QuantInputLinear)
    assert torch.equal(merged(x), integer(x))


def test_only_the_input_and_parameters_are_kept_for_backward():
    layer = clipping(nn.Linear(160, 96))
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(8, 160, requires_grad=True)).sum().backward()
    large = {t.data_ptr() for t in kept if t.numel() >= 96 * 160}
    assert large == {layer.weight.data_ptr()}


@pytest.mark.parametrize("train_rest", [True, False])
def test_what_is_not_swapped_trains_if_asked(train_rest):
    run = tiny_run("llm", "full_qat")
    chain = Chain.from_configs([FullQATConfig(train_rest=train_rest)])
    from harness import build_plain

    model = chain.swap(build_plain(run))
    groups = {group.name: group for group in chain.param_groups(model)}
    assert groups.keys() == {"weights", "scales"} | ({"rest"} if train_rest else set())
    assert model.get_submodule("norm").scale.requires_grad is train_rest
    assert groups["scales"].lr_scale == 0.01
    assert groups["scales"].weight_decay == 0


def test_scales_learn():
    """A scale that is far too small grows: what it clips pulls it."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    layer = FullQATLinear.from_linear(linear, FullQATConfig())
    best = layer.scale.detach().clone()
    target = linear.weight.detach().clone()
    with torch.no_grad():
        layer.scale.mul_(0.3)
    layer.weight.requires_grad_(False)
    optimizer = torch.optim.Adam([layer.scale], lr=3e-4)
    x = torch.eye(64)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - target.t()).square().sum().backward()
        optimizer.step()
    assert ((layer.scale / best) > 0.8).all()


def test_a_grid_that_clips_nothing_passes_the_probe():
    """Over the whole range dW is dL/dW_hat itself, bit for bit a plain layer's: no sign of being off."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 24)), torch.randn(16, 32)
    chain = Chain.from_configs([FullQATConfig(bits=4, ranges="rtn")])
    model = chain.swap(model, loss=lambda m: m(x).square().sum())
    assert isinstance(model[0], FullQATLinear)


def test_a_trained_model_merges_to_equal_logits():
    trial = Trial.of(tiny_run("llm", "full_qat"))
    trial.advance(3)
    batch = trial.data.next_batch()
    before = predict(trial.model, batch)
    assert torch.equal(predict(trial.chain.finalize(trial.model), batch), before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 9}, "full_qat.bits: 9; use 2 to 8"),
        ({"group_size": 20}, "full_qat.group_size: 20 is no multiple of 8"),
        ({"activation_bits": 1}, "full_qat.activation_bits: 1; use 2 to 8"),
        ({"kv_bits": 9}, "full_qat.kv_bits: pattern.k: 9 bits are out of range"),
        ({"zero_lr": float("nan")}, "full_qat.zero_lr: nan"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        FullQATConfig(**values)


def test_a_weight_that_is_not_finite_does_not_merge():
    chain = Chain.from_configs([FullQATConfig()])
    model = chain.swap(nn.Sequential(nn.Linear(64, 24)))
    with torch.no_grad():
        model[0].weight[3, 5] = float("inf")
    with pytest.raises(TrainingError, match="full_qat: weight of 0 is not finite, and integers cannot"):
        chain.finalize(model)
