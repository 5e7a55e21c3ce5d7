"""LR-QAT: its formulas in float64, the fused integers, and what it refuses."""

from __future__ import annotations

import math
import re

import pytest
import torch
from harness import Trial, predict, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torchao.quantization import quantize_

from qrecipes.config.run import ModelSection
from qrecipes.errors import ConfigError, TrainingError
from qrecipes.models.activation_quantizers import activation_quantizers
from qrecipes.models.build import build
from qrecipes.quant.affine import AffineGrid, quantize_affine
from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.input_linear import QuantInputLinear
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.low_rank_storage import decode
from qrecipes.quant.packing import signed_range
from qrecipes.quant.ranges import lp_grid
from qrecipes.training.step import clip_gradients
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.lr_qat import LRQATConfig, LRQATLinear


def corrected(linear: nn.Module, size: float = 0.5, **config) -> LRQATLinear:
    """A layer whose correction moves about half of the levels, with a grid other than the one it began
    with."""
    layer = LRQATLinear.from_linear(linear, LRQATConfig(**({"rank": 4, "alpha": 4.0} | config)))
    with torch.no_grad():
        if layer.low_rank_a is not None:
            layer.low_rank_a.normal_(0, size * math.sqrt(linear.in_features / 4))
        if layer.qat.scale_domain == "linear":
            layer.scale.mul_(torch.rand_like(layer.scale) * 0.2 + 0.9)
        else:
            layer.scale.add_(torch.rand_like(layer.scale) * 0.2 - 0.1)
        if layer.zero is not None:
            layer.zero.add_(torch.rand_like(layer.zero) * 2 - 1)
    return layer


def by_groups(values: torch.Tensor, groups: int) -> torch.Tensor:
    return values.unflatten(1, (groups, -1))


class Rounded(torch.autograd.Function):
    """clip(rnd(x)), straight through the rounding, and through the clipping where the rounded value is
    within.

    x + (rnd(x) - x).detach() may miss the integer, and torch.clamp has a gradient of 1 at its bounds in some
    versions, of 0 in others.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, bits: int) -> torch.Tensor:
        least, greatest = signed_range(bits)
        rounded = x.round()
        ctx.save_for_backward((rounded >= least) & (rounded <= greatest))
        return rounded.clamp(least, greatest)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class Dense(nn.Module):
    """The paper's formulas in float64, every intermediate a dense matrix, gradients by autograd."""

    def __init__(self, layer: LRQATLinear) -> None:
        super().__init__()
        self.bits, self.scaling = layer.qat.bits, layer.rounding.scaling
        self.phi = decode(layer.phi, layer.rounding).double()
        self.domain, self.groups = layer.qat.scale_domain, layer.scale.shape[1]
        for name in ("scale", "zero", "low_rank_a", "low_rank_b", "bias"):
            p = getattr(layer, name)
            setattr(self, name, None if p is None else nn.Parameter(p.detach().double()))

    def weight(self) -> torch.Tensor:
        z = self.phi
        if self.low_rank_a is not None:
            z = z + self.scaling * self.low_rank_a @ self.low_rank_b
        q = by_groups(Rounded.apply(z, self.bits), self.groups)
        if self.zero is not None:
            q = q - Rounded.apply(self.zero, self.bits).unsqueeze(-1)
        scale = self.scale.exp() if self.domain == "log" else self.scale
        return (q * scale.unsqueeze(-1)).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight(), self.bias)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    storage=st.sampled_from(["fixed_point8", "int4", "bf16", "fp16", "fp32"]),
    symmetric=st.booleans(),
    size=st.sampled_from([None, 16, 24]),
    rank=st.sampled_from([0, 1, 5]),
    domain=st.sampled_from(["linear", "log"]),
    tokens=st.lists(st.integers(0, 3), min_size=0, max_size=2),
    bias=st.booleans(),
)
def test_output_and_gradients_are_the_papers(bits, storage, symmetric, size, rank, domain, tokens, bias):
    if bits > {"fixed_point8": 7, "int4": 4}.get(storage, 8):
        storage = "fp32"
    torch.manual_seed(0)
    layer = corrected(
        nn.Linear(48, 12, bias=bias),
        bits=bits,
        storage=storage,
        symmetric=symmetric,
        group_size=size,
        rank=rank,
        scale_domain=domain,
    )
    twin = Dense(layer)
    x = torch.randn(*tokens, 48, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    found, expected = layer(x), twin(wide)
    grad = torch.randn(found.shape)
    found.backward(grad)
    expected.backward(grad.double())
    tolerance = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums of up to 48 terms near 1
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), wide.grad, **tolerance)
    for name, p in layer.named_parameters():
        if p.requires_grad:
            theirs = getattr(twin, name).grad
            atol = 2e-5 * max(1.0, theirs.abs().max().item())  # gradients of levels are as large as weights
            torch.testing.assert_close(p.grad.double(), theirs, rtol=2e-5, atol=atol, msg=name)
        else:
            assert p.grad is None, name


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.sampled_from([None, 32]),
    storage=st.sampled_from(["fixed_point8", "int4", "fp16", "fp32"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_the_merged_layer_has_the_integers_grid_and_weight_of_the_forward_pass(
    bits, symmetric, size, storage, dtype
):
    if bits > {"fixed_point8": 7, "int4": 4}.get(storage, 8):
        storage = "fp32"
    torch.manual_seed(0)
    layer = corrected(nn.Linear(64, 24), bits=bits, symmetric=symmetric, group_size=size, storage=storage)
    layer = layer.to(dtype)
    merged = layer.merged()
    twin = Dense(layer)
    least, greatest = signed_range(bits)
    z = twin.phi + twin.scaling * twin.low_rank_a.detach() @ twin.low_rank_b.detach()
    clear = (z - z.floor() - 0.5).abs() > 1e-5  # float32 may round a half to the other side
    assert clear.float().mean() > 0.9
    q = merged.integers()
    assert torch.equal(q.double()[clear], z.round().clamp(least, greatest)[clear])
    assert merged.format.bits == (bits if bits in (2, 3, 4, 8) else 8)
    assert torch.equal(merged.scale, layer.effective_scale())
    x = torch.randn(9, 64, dtype=dtype)
    assert torch.equal(merged(x), layer(x))
    assert not any(p.requires_grad for p in merged.parameters())


def test_training_starts_at_the_rounded_weight():
    """A is zero: the integers are those of the same grid found after training, bit for bit where phi is
    exact."""
    linear = nn.Linear(96, 24)
    for storage in ("fp32", "int4"):
        layer = LRQATLinear.from_linear(linear, LRQATConfig(storage=storage, rank=8))
        grid = lp_grid(linear.weight.detach(), AffineFormat(bits=4))
        assert torch.equal(layer.merged().integers(), quantize_affine(linear.weight.detach(), grid, 4))
        assert torch.equal(layer.merged().scale, grid.scale)


def test_fixed_point_rounds_twice_near_halves_only():
    linear = nn.Linear(512, 64)
    ours = LRQATLinear.from_linear(linear, LRQATConfig(rank=8)).integers()
    grid = lp_grid(linear.weight.detach(), AffineFormat(bits=4))
    once = quantize_affine(linear.weight.detach(), grid, 4)
    different = (ours != once).float().mean()
    # 1/16 of the weights become exact halves, and half of those go to the other side
    assert 0.02 < different < 0.045
    assert (ours.int() - once.int()).abs().max() == 1


@pytest.mark.parametrize("groups", [None, 32])
def test_loftq_puts_what_integers_lose_into_the_correction(groups):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-1, 1, 48).unsqueeze(1))  # scales that differ by 100
    settings = {"storage": "int4", "rank": 16, "alpha": 2.0, "group_size": groups}
    plain = LRQATLinear.from_linear(linear, LRQATConfig(**settings))
    loftq = LRQATLinear.from_linear(linear, LRQATConfig(**settings, init="loftq"))
    assert torch.equal(loftq.scale, plain.scale)

    def lost(layer: LRQATLinear) -> float:
        """Of the weight, by what is before rounding."""
        z = decode(layer.phi, layer.rounding) + layer.rounding.scaling * layer.low_rank_a @ layer.low_rank_b
        w = (by_groups(z, layer.scale.shape[1]) * layer.scale.unsqueeze(-1)).flatten(1)
        return (w - linear.weight).norm().item()

    best = plain
    with torch.no_grad():
        residual = linear.weight - plain.merged().dequantize()
    singular = torch.linalg.svdvals(residual)
    assert lost(best) == pytest.approx(float(residual.norm()), rel=1e-4)
    # one SVD of the residual would leave the rest of its singular values; more alternations do no worse, and
    # groups of different scales are only weighted by their mean
    bound = float(singular[16:].norm()) * (1.0001 if groups is None else 1.05)
    assert lost(loftq) <= bound < 0.8 * lost(plain)


def test_what_is_zero_gets_a_scale_that_can_leave_it():
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight[:3] = 0
    layer = LRQATLinear.from_linear(linear, LRQATConfig(rank=4))
    assert layer.scale[:3].unique().item() == pytest.approx(layer.scale[3:].mean().item(), rel=1e-6)
    assert not layer.integers()[:3].any()
    nn.init.zeros_(linear.weight)
    layer = LRQATLinear.from_linear(linear, LRQATConfig(rank=4))
    assert torch.equal(layer.scale, torch.full((8, 1), 1 / (7 * 8)))


@pytest.mark.parametrize(
    "format", [AffineFormat(bits=4), AffineFormat(bits=3, group_size=16, symmetric=False)]
)
@pytest.mark.parametrize("storage", ["int4", "fixed_point8", "fp16"])
def test_a_quantized_layer_is_a_base_with_its_integers_and_grid(format, storage):
    layer = QuantLinear.from_linear(nn.Linear(64, 24), format).bfloat16()
    config = LRQATConfig(
        bits=format.bits, group_size=format.group_size, symmetric=format.symmetric, storage=storage, rank=8
    )
    ours = LRQATLinear.from_linear(layer, config)
    merged = ours.merged()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    assert torch.equal(ours(x), layer(x))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("integer", [False, True])
def test_nothing_of_the_weights_size_is_kept_but_the_frozen_one(compile, integer):
    inputs = {"activation_bits": 8, "integer_forward": True} if integer else {}
    layer = LRQATLinear.from_linear(nn.Linear(160, 96), LRQATConfig(rank=4, **inputs))
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(8, 160, requires_grad=True)
    call = torch.compile(layer, fullgraph=True) if compile else layer
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(x)
    y.sum().backward()
    large = [t for t in kept if t.numel() >= 96 * 160]
    assert {t.data_ptr() for t in large} == {layer.phi.data_ptr()}
    assert layer.low_rank_a.grad.any()


INTEGER = {"activation_bits": 8, "integer_forward": True, "rank": 4}


@settings(max_examples=20, deadline=None)
@given(
    bits=st.integers(2, 8),
    inputs=st.sampled_from([8, 6, 4]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    bias=st.booleans(),
)
def test_the_integer_forward_is_the_fake_quantized_one_but_for_rounding(bits, inputs, size, bias):
    """In values and in every gradient; the fake-quantized path multiplies what the integers stand for."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 24, bias=bias)
    storage = "fp32" if bits == 8 else "fixed_point8"
    integer = corrected(linear, bits=bits, storage=storage, **(INTEGER | {"activation_bits": inputs}))
    fake = LRQATLinear.from_linear(
        linear, LRQATConfig(bits=bits, storage=storage, rank=4, alpha=4.0, activation_bits=inputs)
    )
    fake.load_state_dict(integer.state_dict())
    x = size * torch.randn(7, 96)
    x[2] = 0
    grad = torch.randn(7, 24)
    found = {}
    for name, layer in (("integer", integer), ("fake", fake)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(grad)
        found[name] = {"y": y, "x": leaf.grad} | {
            n: p.grad for n, p in layer.named_parameters() if p.grad is not None
        }
    assert len(found["integer"]) == 5
    for name, ours in found["integer"].items():
        theirs = found["fake"][name]
        atol = 2e-6 * theirs.abs().max().item()  # float32 sums of 96 terms
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol, msg=name)
    merged = integer.merged()
    assert isinstance(merged, QuantInputLinear)
    assert torch.equal(merged(x), integer(x))


def test_the_integer_forward_is_exact_in_integers():
    """Against int64 sums in Python's order of scaling."""
    layer = corrected(nn.Linear(64, 24, bias=False), **INTEGER)
    x = torch.randn(5, 64)
    codes = (x / (x.abs().amax(1, keepdim=True) / 127)).round().long()
    sums = codes @ layer.integers().long().t()
    scale_x = x.abs().amax(1, keepdim=True) / 127
    assert torch.equal(layer(x), sums.float() * scale_x * layer.effective_scale().t())


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_are_quantized_token_by_token(symmetric):
    layer = corrected(nn.Linear(64, 24), activation_bits=4, activation_symmetric=symmetric)
    plain = corrected(nn.Linear(64, 24))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(6, 64) + 1
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        scale = x.abs().amax(1, keepdim=True) / 7
        rounded = (x / scale).round() * scale
    else:
        scale = (high - low) / 15
        zero = (-low / scale).round()
        rounded = ((x / scale).round() + zero).clamp(0, 15).sub(zero) * scale
    torch.testing.assert_close(layer(x), plain(rounded), rtol=1e-5, atol=1e-5)  # float32 sums
    assert not torch.allclose(layer(x), plain(x), rtol=1e-2, atol=1e-2)


def test_inputs_of_skipped_layers_are_left_alone():
    run = tiny_run("llm", "lr_qat")
    config = LRQATConfig(rank=4, activation_bits=8, activation_skip=("*.q_proj", "*.w1"))
    from harness import build_plain

    chain = Chain.from_configs([config])
    model = chain.swap(build_plain(run))
    layers = chain.transforms[0].layers(model)
    left = {fqn.split(".")[-1] for fqn, layer in layers.items() if layer.input_format is None}
    assert left == {"q_proj", "w1"}
    merged = chain.finalize(model)
    assert type(merged.get_submodule("layers.0.attn.q_proj")) is QuantLinear
    assert type(merged.get_submodule("layers.0.attn.k_proj")) is QuantInputLinear
    with pytest.raises(ConfigError, match=r"activation_skip: '\*.wq' matches none of the 14 layers"):
        Chain.from_configs([LRQATConfig(rank=4, activation_bits=8, activation_skip=("*.wq",))]).swap(
            build_plain(run)
        )


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_no_conversion_of_the_model_converts_what_trains(adapter_dtype):
    layer = corrected(nn.Linear(64, 24), adapter_dtype=adapter_dtype, symmetric=False, storage="fp16")
    before = {name: p.detach().clone() for name, p in layer.named_parameters() if name != "bias"}
    layer = layer.to(torch.bfloat16).half().bfloat16()
    assert before.keys() == {"scale", "zero", "phi", "low_rank_a", "low_rank_b"}
    for name, value in before.items():
        now = getattr(layer, name)
        assert now.dtype is value.dtype, name
        assert torch.equal(now, value), name
    assert layer.scale.dtype is layer.zero.dtype is torch.float32
    assert layer.bias.dtype is layer.compute_dtype is torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_small_step_moves_a_scale_of_a_bfloat16_model():
    """1e-5 from 0.01 is lost in bfloat16."""
    layer = LRQATLinear.from_linear(nn.Linear(64, 24).bfloat16(), LRQATConfig(rank=0, storage="int4"))
    with torch.no_grad():
        layer.scale.fill_(0.01).sub_(1e-5)
    assert torch.equal(layer.merged().scale, torch.full((24, 1), 0.01) - 1e-5)


def test_lsq_scales_the_gradient_of_scales_and_nothing_else():
    linear = nn.Linear(64, 24)
    plain, lsq = (
        LRQATLinear.from_linear(linear, LRQATConfig(rank=4, scale_gradient=kind, group_size=32))
        for kind in ("plain", "lsq")
    )
    lsq.load_state_dict(plain.state_dict())
    x = torch.randn(5, 64)
    outputs = []
    for layer in (plain, lsq):
        outputs.append(layer(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    torch.testing.assert_close(lsq.scale.grad, plain.scale.grad / math.sqrt(32 * 7))
    assert torch.equal(lsq.low_rank_a.grad, plain.low_rank_a.grad)


def test_scales_have_their_own_rate_and_no_decay():
    run = tiny_run("llm", "lr_qat_w2")
    trial = Trial.of(run)
    groups = {group["name"]: group for group in trial.optimizer.param_groups}
    assert groups.keys() == {"low_rank", "scales", "zeros"}
    assert groups["scales"]["lr"] == groups["zeros"]["lr"] == 0.01 * run.optim.lr
    assert groups["scales"]["weight_decay"] == groups["zeros"]["weight_decay"] == 0
    fixed = LRQATConfig(rank=4, scale_lr=0.0, zero_lr=0.0, symmetric=False)
    layer = LRQATLinear.from_linear(nn.Linear(64, 24), fixed)
    assert not layer.scale.requires_grad
    assert not layer.zero.requires_grad


def test_only_what_trains_has_gradients_and_enters_clipping():
    trial = Trial.of(tiny_run("llm", "lr_qat"))
    trial.task.loss(trial.model, trial.data.next_batch()).backward()
    with_gradient = {name for name, p in trial.model.named_parameters() if p.grad is not None}
    assert {name.rsplit(".", 1)[1] for name in with_gradient} == {"low_rank_a", "low_rank_b", "scale"}
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trial.model.parameters() if p.requires_grad))
    assert float(clip_gradients(trial.model, 0)) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", ["lr_qat", "lr_qat_w4a8", "lr_qat_w2", "peqa"])
def test_a_trained_model_merges_to_equal_logits(name):
    trial = Trial.of(tiny_run("llm", name))
    trial.advance(3)
    batch = trial.data.next_batch()
    before = predict(trial.model, batch)
    assert torch.equal(predict(trial.chain.finalize(trial.model), batch), before)


def collapsed(value: float, domain: str = "linear") -> nn.Sequential:
    config = LRQATConfig(rank=4, scale_domain=domain)
    model = Chain.from_configs([config]).swap(nn.Sequential(nn.Linear(64, 24)))
    with torch.no_grad():
        model[0].scale[3] = value
    return model, Chain.from_configs([config])


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        (0.0, "linear"),
        (-1.0, "linear"),
        (math.nan, "linear"),
        (math.inf, "linear"),
        (-40.0, "log"),
        (math.nan, "log"),
    ],
)
def test_collapsed_scales_stop_training_and_merging_by_name(value, domain):
    from qrecipes.transforms.base import StepContext

    model, chain = collapsed(value, domain)
    message = re.escape("lr_qat: 1 of 24 scales of 0 are not finite or have fallen to 1e-08")
    ctx = StepContext(100, model, torch.optim.SGD(model.parameters(), 1e-3))
    with pytest.raises(TrainingError, match=message):
        chain.before_step(ctx)
    with pytest.raises(TrainingError, match=message):
        chain.finalize(model)


def test_a_scale_never_divides_by_less_than_its_floor():
    model, _ = collapsed(-1.0)
    assert model[0].effective_scale()[3].item() == pytest.approx(1e-8)
    y = model(torch.randn(2, 64))
    y.sum().backward()
    assert model[0].scale.grad[3] == 0
    assert model[0].scale.grad[4] != 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 8}, r"lr_qat.storage: bits: 8, but storage 'fixed_point8' takes 2 to 7"),
        ({"bits": 5, "storage": "int4"}, r"lr_qat.storage: bits: 5, but storage 'int4' takes 2 to 4"),
        ({"bits": 9, "storage": "fp32"}, "lr_qat.bits: 9; use 2 to 8"),
        ({"bits": 1}, "lr_qat.bits: 1; use 2 to 8"),
        ({"group_size": 20}, "lr_qat.group_size: 20 is no multiple of 8"),
        ({"rank": -1}, "lr_qat.rank: -1 is negative"),
        ({"rank": 0, "scale_lr": 0.0}, "lr_qat.rank: 0 trains scales only, and scale_lr is 0, so nothing"),
        ({"alpha": 0.0}, "lr_qat.alpha: 0.0 is not positive"),
        ({"p": 1.0}, "lr_qat.p: 1.0; use 2 to 5"),
        ({"scale_lr": -1.0}, "lr_qat.scale_lr: -1.0; use a number of at least 0"),
        ({"init": "loftq"}, "lr_qat.init: 'loftq' .*storage is 'fixed_point8'"),
        ({"init": "svd"}, "lr_qat.init: 'svd': Input should be 'zero' or 'loftq'"),
        ({"ranges": "hqq"}, "lr_qat.ranges: 'hqq': Input should be 'rtn', 'mse' or 'lp'"),
        ({"scale_domain": "exp"}, "lr_qat.scale_domain: 'exp': Input should be 'linear' or 'log'"),
        ({"scale_gradient": "none"}, "lr_qat.scale_gradient: 'none': Input should be 'plain' or 'lsq'"),
        (
            {"adapter_dtype": "float16"},
            "lr_qat.adapter_dtype: 'float16': Input should be 'float32' or 'bfloat16'",
        ),
        ({"rank": 2.5}, "lr_qat.rank: 2.5: Input should be a valid integer"),
        ({"bits": True}, "lr_qat.bits: True: Input should be a valid integer"),
        ({"group_size": 32.0}, "lr_qat.group_size: 32.0: Input should be a valid integer"),
        ({"kv_bits": 1}, "lr_qat.kv_bits: pattern.k: 1 bits are out of range; use 2 to 8"),
        ({"init": "loftq", "storage": "int4", "rank": 0}, "lr_qat.init: 'loftq' .*at rank 0"),
        ({"activation_bits": 9}, "lr_qat.activation_bits: 9; use 2 to 8"),
        ({"integer_forward": True}, "lr_qat.integer_forward: True, but inputs are not quantized"),
        ({"activation_symmetric": False}, "lr_qat.activation_symmetric: False, but inputs are not quantized"),
        ({"activation_skip": ("*.w1",)}, "lr_qat.activation_skip: .*inputs are not quantized"),
        (
            {"activation_bits": 8, "integer_forward": True, "activation_symmetric": False},
            "lr_qat.integer_forward: true, but asymmetric inputs .* set activation_symmetric = true, or",
        ),
        (
            {"activation_bits": 8, "integer_forward": True, "group_size": 32},
            "lr_qat.integer_forward: integer products scale whole rows",
        ),
        (
            {"activation_bits": 8, "integer_forward": True, "symmetric": False},
            "lr_qat.integer_forward: integer products scale whole rows",
        ),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LRQATConfig(**values)


FLOAT = AffineFormat(bits=4, group_size=16, symmetric=False, zero_point="float")
REFUSED = {
    "lr_qat: 0: group_size 24 does not divide 64 input features; use group_size 16": (
        {"group_size": 24},
        None,
    ),
    r"lr_qat.rank: 25 is more than 0 of 24 x 64 can have; use at most 24": ({"rank": 25}, None),
    r"0: is quantized already, as AffineFormat\(bits=3": ({}, AffineFormat(bits=3)),
    r"0: is quantized already, as .*group_size=16": ({}, AffineFormat(bits=4, group_size=16)),
    r"0: is quantized already, as .*symmetric=False": ({}, AffineFormat(bits=4, symmetric=False)),
    r"0: is quantized already, as .*zero_point='float'": ({"group_size": 16, "symmetric": False}, FLOAT),
    r"0: is quantized already, as NF4Format": ({}, NF4Format()),
    r"lr_qat.init: 'loftq' needs the weight that 0 had": (
        {"storage": "int4", "init": "loftq"},
        AffineFormat(bits=4),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_sites_that_cannot_be_corrected_are_named_before_any_is(message):
    config, format = REFUSED[message]
    linear = nn.Linear(64, 24)
    model = nn.Sequential(linear if format is None else QuantLinear.from_linear(linear, format))
    kind = type(model[0])
    with pytest.raises(ConfigError, match=message):
        Chain.from_configs([LRQATConfig(**({"rank": 8} | config))]).swap(model)
    assert type(model[0]) is kind


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    linear = nn.Linear(64, 24)
    with torch.no_grad():
        linear.weight[1, 2] = value
    with pytest.raises(ConfigError, match="lr_qat: holds weights that are not finite"):
        LRQATLinear.from_linear(linear, LRQATConfig(rank=4))


def test_trained_numbers_are_those_of_the_paper():
    """80 million in A and B of LLaMA-2-7B at rank 32: 1.2% of it."""
    width, hidden = 4096, 11008
    with torch.device("meta"):
        layers = [nn.Linear(k, n, bias=False) for k, n in [(width, width)] * 4 + [(width, hidden)] * 2]
        layers.append(nn.Linear(hidden, width, bias=False))
    swapped = [LRQATLinear.from_linear(layer, LRQATConfig()) for layer in layers]
    factors = 32 * sum(layer.low_rank_a.numel() + layer.low_rank_b.numel() for layer in swapped)
    scales = 32 * sum(layer.scale.numel() for layer in swapped)
    assert round(factors / 1e6, 2) == 79.95
    assert round(scales / 1e6, 2) == 1.36


def test_grid_of_the_merged_layer_is_the_stored_one():
    layer = corrected(nn.Linear(64, 24), symmetric=False, bits=3)
    grid = layer.merged().grid
    assert isinstance(grid, AffineGrid)
    assert torch.equal(grid.zero, layer.zero.round().clamp(-4, 3).to(torch.int8))


@pytest.mark.parametrize("init", ["zero", "loftq"])
def test_parameters_are_contiguous_as_fsdp2_wants_them(init):
    layer = LRQATLinear.from_linear(nn.Linear(64, 48), LRQATConfig(storage="int4", rank=8, init=init))
    assert all(p.is_contiguous() for p in layer.parameters())


def test_attention_without_a_hook_is_named_with_a_remedy_that_exists():
    """Keys and values alone need none; queries and keys after rotation do."""
    sizes = {"vocab_size": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
    sizes |= {"intermediate_dim": 64, "max_seq_len": 32, "head_dim": 8}
    section = ModelSection(source="torchtune:gemma2.gemma2", args=sizes)

    def swapped(**config) -> nn.Module:
        model = build(section, dtype=torch.float32)
        return Chain.from_configs([LRQATConfig(rank=4, kv_bits=4, **config)]).swap(model)

    assert len(activation_quantizers(swapped())) == 2
    message = (
        r"lr_qat.kv_bits: layers.0.attn: Gemma2Attention has no hook for qe: [^;]*; leave kv_bits out, and"
    )
    with pytest.raises(ConfigError, match=message):
        swapped(activation_bits=8)


@pytest.mark.parametrize("name", ["low_rank_a", "low_rank_b", "zero"])
def test_what_is_not_finite_does_not_merge_into_finite_integers(name):
    chain = Chain.from_configs([LRQATConfig(rank=4, symmetric=False)])
    model = chain.swap(nn.Sequential(nn.Linear(64, 24)))
    with torch.no_grad():
        getattr(model[0], name)[1, 0] = math.nan
    assert not torch.isfinite(model(torch.randn(2, 64))).all()
    with pytest.raises(
        TrainingError, match=rf"lr_qat: {name} of 0 is not finite, and integers cannot say so"
    ):
        chain.finalize(model)
    with pytest.raises(TrainingError, match=rf"lr_qat: {name} of a layer is not finite"):
        model[0].merged()


def test_torchao_quantize_checks_what_it_can_and_refuses_what_needs_names():
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(48, 16), nn.Linear(16, 100))

    model = network()
    quantize_(model, LRQATConfig(rank=4))
    assert [type(layer) for layer in model] == [LRQATLinear, LRQATLinear]
    for config, message in (
        (LRQATConfig(kv_bits=4), r"lr_qat.kv_bits: 4 is about named parts .* use Chain.from_configs"),
        (
            LRQATConfig(activation_bits=8, activation_skip=("*",)),
            r"lr_qat.activation_skip: .* is about named parts",
        ),
        (LRQATConfig(rank=32), r"lr_qat.rank: 32 is more than a layer of 16 x 48 can have; use at most 16"),
        (LRQATConfig(rank=4, group_size=32), r"lr_qat: a layer: group_size 32 does not divide 48 .* skip"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize_(network(), config)
