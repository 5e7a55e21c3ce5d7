"""Chains, receipts and the probe, with methods made for the test."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qrecipes.config.run import OptimSection
from qrecipes.errors import ConfigError, ProbeError
from qrecipes.export.merge_report import sharing_parameters
from qrecipes.training.optim import build_optimizer
from qrecipes.transforms.base import REGISTRY, Bounds, LinearTransform, ParamGroup, TransformConfig, register
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.int8_weights import Int8WeightConfig, Int8WeightLinear


@dataclass(frozen=True, kw_only=True)
class NoisyConfig(TransformConfig):
    """A method whose noise can be chosen."""

    noise: float = 1e-2


class NoisyLinear(nn.Linear):
    """Adds a fixed relative error to the output and, through it, to both gradients."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: NoisyConfig) -> NoisyLinear:
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.noise = linear.weight, linear.bias, config.noise
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * (1 + self.noise)

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


class Noisy(LinearTransform[NoisyConfig]):
    Config = NoisyConfig
    Layer = NoisyLinear
    sqnr_floor_db = 30.0

    @property
    def freezes_rest(self) -> bool:
        return False

    def bounds(self) -> Bounds:
        return Bounds(output=30.0, grad_input=30.0, grad_weight=30.0)


@dataclass(frozen=True, kw_only=True)
class OwningConfig(TransformConfig):
    """A method that owns its weights and freezes the rest."""


class OwningLinear(nn.Linear):
    """As NoisyLinear; owned."""

    forward, merged = NoisyLinear.forward, NoisyLinear.merged


class Owning(LinearTransform[OwningConfig]):
    Config = OwningConfig
    Layer = OwningLinear
    sqnr_floor_db = 30.0

    def bounds(self) -> Bounds:
        return Bounds(output=None, grad_input=None, grad_weight=None)

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        return [ParamGroup("owned", [layer.weight for layer in self.layers(model).values()])]


OwningLinear.from_linear = classmethod(  # its config has no noise
    lambda cls, linear, config: NoisyLinear.from_linear.__func__(cls, linear, NoisyConfig())
)


@pytest.fixture(autouse=True)
def _registered():
    register("noisy")(Noisy)
    register("owning")(Owning)
    yield
    del REGISTRY["noisy"], REGISTRY["owning"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def loss(model: nn.Module) -> torch.Tensor:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    return model(x).square().sum()


def test_receipt_tells_each_layer_and_why():
    chain = Chain.from_configs([NoisyConfig(targets=("0", "2"), skip=("2",))])
    chain.swap(small_model())
    rows = {row.fqn: (row.method, row.reason, row.shape, row.bytes_before) for row in chain.receipt.layers}
    assert rows == {
        "0": ("noisy", None, (32, 16), (32 * 16 + 32) * 4),
        "2": (None, "skip pattern '2'", (8, 32), (8 * 32 + 8) * 4),
        "4": (None, "no target pattern matches", (4, 8), (4 * 8 + 4) * 4),
    }
    assert chain.receipt.summary().startswith("noisy: 1 of 3 linear layers, 512 weights, 0.00 MB -> 0.00 MB")


def test_two_methods_share_a_model_not_a_layer():
    chain = Chain.from_configs([NoisyConfig(targets=("0",)), OwningConfig()])
    model = chain.swap(small_model())
    assert [row.method for row in chain.receipt.layers] == ["noisy", "owning", "owning"]
    assert [type(m) for m in chain.finalize(model) if isinstance(m, nn.Linear)] == [nn.Linear] * 3


def test_rest_is_frozen_if_any_member_says_so():
    chain = Chain.from_configs([NoisyConfig(targets=("0",)), OwningConfig(targets=("2",))])
    model = chain.swap(small_model())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.weight"]
    assert [(g.name, len(g.params)) for g in chain.param_groups(model)] == [("owned", 1)]


def test_rest_trains_where_nobody_freezes_it():
    chain = Chain.from_configs([NoisyConfig()])
    model = chain.swap(small_model())
    (group,) = chain.param_groups(model)
    assert (group.name, len(group.params)) == ("rest", len(list(model.parameters())))


def test_parameters_shared_by_two_groups_are_an_error():
    chain = Chain.from_configs([OwningConfig()])
    model = chain.swap(small_model())
    chain.transforms = chain.transforms * 2
    with pytest.raises(ConfigError, match="'owned' and 'owned' share a parameter"):
        chain.param_groups(model)


def test_an_unregistered_configuration_is_named():
    with pytest.raises(ConfigError, match=r"TransformConfig: no registered transform"):
        Chain.from_configs([TransformConfig()])


def test_receipt_before_swap_is_an_error():
    with pytest.raises(ConfigError, match=r"before chain\.swap"):
        Chain().receipt  # noqa: B018


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'noisy' is registered twice"):
        register("noisy")(Owning)


def test_a_model_that_is_one_layer_is_replaced_itself():
    chain = Chain.from_configs([NoisyConfig()])
    model = chain.swap(nn.Linear(4, 4))
    assert isinstance(model, NoisyLinear)
    assert type(chain.finalize(model)) is nn.Linear


def test_layers_are_merged_on_the_device_that_is_asked_for(monkeypatch):
    """A copy of each goes there, and what it becomes comes back; the layer itself is as it was."""
    trips: list[tuple[str, torch.device]] = []

    def to(layer: nn.Module, device: torch.device) -> nn.Module:
        trips.append((type(layer).__name__, device))
        return layer

    chain = Chain.from_configs([NoisyConfig(targets=("0",)), OwningConfig()])
    model = chain.swap(small_model())
    before = dict(model.named_modules())
    monkeypatch.setattr(nn.Module, "to", to)
    away, home = torch.device("cuda", 1), torch.device("cpu")
    chain.finalize(sharing_parameters(model), home)
    assert not trips
    merged = chain.finalize(sharing_parameters(model), away)
    there_and_back = [("OwningLinear", away), ("Linear", home)]
    assert trips == [*there_and_back, *there_and_back, ("NoisyLinear", away), ("Linear", home)]
    assert dict(model.named_modules()) == before
    for fqn in ("0", "2", "4"):
        assert type(merged.get_submodule(fqn)) is nn.Linear
        assert torch.equal(merged.get_submodule(fqn).weight, before[fqn].weight)


def test_probe_finds_the_noise():
    chain = Chain.from_configs([NoisyConfig(noise=1e-2)])
    chain.swap(small_model(), loss=loss)
    for row in chain.receipt.layers:
        # the output carries a relative error of 1e-2, which is 40 dB; the gradients carry the same factor
        assert row.sqnr_db == pytest.approx({"output": 40, "grad_input": 40, "grad_weight": 40}, abs=0.1)


def test_probe_refuses_noise_beyond_the_bound():
    with pytest.raises(
        ProbeError, match=r"0: output has an SQNR of 20\.0 dB; noisy allows no less than 30\.0 dB"
    ):
        Chain.from_configs([NoisyConfig(noise=0.1)]).swap(small_model(), loss=loss)


def test_probe_refuses_a_layer_that_changes_nothing():
    with pytest.raises(ProbeError, match="0: output is bit-equal to the original layer's: noisy is not on"):
        Chain.from_configs([NoisyConfig(noise=0.0)]).swap(small_model(), loss=loss)


def test_probe_refuses_nan():
    with pytest.raises(ProbeError, match=r"SQNR of (nan|-inf) dB"):
        Chain.from_configs([NoisyConfig(noise=float("nan"))]).swap(small_model(), loss=loss)


def test_probe_leaves_no_trace():
    """No gradients, no hooks, and the random state as it was."""
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    originals, state = list(model.modules()), torch.get_rng_state()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    chain = Chain.from_configs([NoisyConfig()])
    model = chain.swap(model, loss=lambda m: loss(m) + torch.rand(()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in [*originals, *model.modules()])
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_probe_works_behind_a_zero_initialized_layer():
    """There the recorded gradient is zero, and anything times zero is bit-equal."""
    model = small_model()
    nn.init.zeros_(model[4].weight)
    Chain.from_configs([NoisyConfig(skip=("4",))]).swap(model, loss=loss)


def test_a_layer_with_a_method_is_not_replaced_by_torchao_again():
    from torchao.quantization import quantize_

    model = Chain.from_configs([NoisyConfig()]).swap(small_model())
    with pytest.raises(ConfigError, match=r"NoisyLinear is not a plain nn.Linear"):
        quantize_(model, NoisyConfig())


class ReadsWeight(nn.Module):
    """Uses a layer's weight, and never calls the layer, as some vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(input=F.linear(x, self.first.weight))


def test_probe_refuses_a_layer_that_is_never_called():
    with pytest.raises(ProbeError, match="first: noisy replaced it, but its forward was not called"):
        Chain.from_configs([NoisyConfig()]).swap(ReadsWeight(), loss=loss)


def test_probe_refuses_a_model_none_of_whose_layers_is_called():
    with pytest.raises(ProbeError, match="first: noisy replaced it, but its forward was not called"):
        Chain.from_configs([NoisyConfig(targets=("first",))]).swap(ReadsWeight(), loss=loss)


def test_probe_sees_layers_called_by_keyword():
    chain = Chain.from_configs([NoisyConfig(skip=("first",))])
    chain.swap(ReadsWeight(), loss=loss)
    assert chain.receipt.layers[1].sqnr_db


def test_probe_accepts_a_zero_initialized_layer():
    """Its products are zero before and after: nothing could differ."""
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    Chain.from_configs([NoisyConfig()]).swap(model, loss=loss)


def test_frozen_parameters_do_not_move():
    chain = Chain.from_configs([OwningConfig(targets=("2",))])
    model = chain.swap(small_model())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(chain.param_groups(model), OptimSection(lr=0.1))
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [n for n, p in model.named_parameters() if not torch.equal(p, before[n])] == ["2.weight"]


def test_hooks_reach_every_transform_in_order(monkeypatch):
    seen = []
    for cls in (Noisy, Owning):
        for hook in ("before_step", "after_backward"):
            monkeypatch.setattr(cls, hook, lambda self, ctx, hook=hook: seen.append((self.name, hook)))
    chain = Chain.from_configs([NoisyConfig(), OwningConfig()])
    chain.before_step(None)
    chain.after_backward(None)
    expected = [(name, hook) for hook in ("before_step", "after_backward") for name in ("noisy", "owning")]
    assert seen == expected


def test_no_layer_lives_beyond_its_replacement(monkeypatch):
    """A model of frozen low-bit weights is built in the memory of the plain one, not in both."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    originals = [weakref.ref(layer.weight) for layer in model]
    alive = []
    replace = Int8WeightLinear.from_linear

    def from_linear(linear: nn.Linear, config: Int8WeightConfig) -> Int8WeightLinear:
        gc.collect()
        alive.append(sum(weight() is not None for weight in originals))
        return replace(linear, config)

    monkeypatch.setattr(Int8WeightLinear, "from_linear", from_linear)
    x = torch.randn(3, 8)
    Chain.from_configs([Int8WeightConfig()]).swap(model, loss=lambda m: m(x).sum())
    assert alive == [4, 3, 2, 1]
