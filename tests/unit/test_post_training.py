"""A model's layers made low-bit: which ones, by which method, and what is measured of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import build_plain, tiny_run
from torch import nn

from qrecipes.data import build_training_data
from qrecipes.errors import ConfigError
from qrecipes.models.post_training import PostTraining, linear_layers, quantize_model
from qrecipes.quant.formats import AffineFormat, NF4Format
from qrecipes.quant.gptq import gptq
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.ranges import RANGES
from qrecipes.training.task import forward_batch
from qrecipes.transforms.base import TransformConfig

W3 = AffineFormat(bits=3, group_size=16, symmetric=False)
FLOAT = replace(W3, zero_point="float")


def model_and_forwards(count: int = 4):
    run = tiny_run("llm", None)
    data = build_training_data(run.data, None, task=run.task, seed=0, rank=0, world=1)
    samples = [data.next_batch() for _ in range(count)]
    return build_plain(run).eval(), [lambda m, b=b: forward_batch(m, b) for b in samples]


def chosen(model: nn.Module) -> dict[str, nn.Linear]:
    return linear_layers(model, TransformConfig().reason_to_skip)[0]


@pytest.mark.parametrize("method", ["rtn", "mse", "lp", "hqq"])
def test_range_methods_round_to_nearest_on_their_grids(method):
    model, _ = model_and_forwards()
    format = FLOAT if method == "hqq" else W3
    weights = {fqn: layer.weight.clone() for fqn, layer in chosen(model).items()}
    errors = quantize_model(model, chosen(model), PostTraining(format=format, method=method))
    assert [error.name for error in errors] == list(weights)
    for error in errors:
        layer, w = model.get_submodule(error.name), weights[error.name]
        expected = QuantLinear.from_linear(_linear(w), format, ranges=RANGES[method])
        assert all(torch.equal(a, b) for a, b in zip(layer.payload, expected.payload, strict=True))
        assert error.weight_error == pytest.approx(float((w - layer.dequantize()).norm() / w.norm()))
        stored = sum(t.numel() * t.element_size() for t in layer.payload)
        assert error.bits_per_weight == pytest.approx(8 * stored / w.numel())
        assert error.output_error is None
        assert error.damping is None


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def test_output_error_is_measured_on_the_inputs_that_reach_the_layer():
    """By hand: a hook on the layer of the model in which the layers before it are low-bit."""
    model, forwards = model_and_forwards()
    weights = {fqn: layer.weight.clone() for fqn, layer in chosen(model).items()}
    errors = quantize_model(model, chosen(model), PostTraining(format=W3), forwards=forwards)
    assert len(errors) == 14
    for error in errors:
        layer, seen = model.get_submodule(error.name), []
        hook = layer.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].flatten(0, 1))
        )
        with torch.no_grad():
            for forward in forwards:
                forward(model)
        hook.remove()
        x, w = torch.cat(seen), weights[error.name]
        expected = float((x @ (w - layer.dequantize()).T).norm() / (x @ w.T).norm())
        assert error.output_error == pytest.approx(expected, rel=1e-3)  # float32 sums


def test_gptq_of_layers_with_the_same_input_is_that_of_each_alone():
    model, forwards = model_and_forwards()
    original = {fqn: layer.weight.clone() for fqn, layer in chosen(model).items()}
    seen = []
    hook = model.layers[0].attn.q_proj.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for forward in forwards:
            forward(model)
    hook.remove()
    x = torch.cat(seen)
    errors = quantize_model(model, chosen(model), PostTraining(format=W3, method="gptq"), forwards=forwards)
    for name in ("q_proj", "k_proj", "v_proj"):
        fqn = f"layers.0.attn.{name}"
        alone = gptq(original[fqn], x.T @ x / len(x), W3)
        # the Hessian's sums are of another order: an integer in a thousand may fall otherwise
        assert (model.get_submodule(fqn).integers() != alone.q).float().mean() < 1e-2
    assert {error.damping for error in errors} == {0.01}


def test_gptq_loses_less_of_every_layers_output_than_rounding():
    found = {}
    for method in ("rtn", "gptq"):
        model, forwards = model_and_forwards()
        errors = quantize_model(
            model, chosen(model), PostTraining(format=W3, method=method), forwards=forwards
        )
        found[method] = {error.name: error.output_error for error in errors}
    for name, error in found["gptq"].items():
        assert error < found["rtn"][name], name


@pytest.mark.parametrize("format", [W3, FLOAT, AffineFormat(bits=2), AffineFormat(bits=8, group_size=32)])
def test_gptq_takes_every_format_and_keeps_the_type_and_bias(format):
    run = tiny_run("vit", None)
    model = build_plain(run, torch.bfloat16)
    data = build_training_data(run.data, None, task=run.task, seed=0, rank=0, world=1)
    batch = data.next_batch()
    biases = {fqn: layer.bias for fqn, layer in chosen(model).items()}
    ranges = "hqq" if format.has_offset else "rtn"
    settings = PostTraining(format=format, method="gptq", ranges=ranges)
    quantize_model(model, chosen(model), settings, forwards=[lambda m: forward_batch(m, batch)])
    for fqn, bias in biases.items():
        layer = model.get_submodule(fqn)
        assert isinstance(layer, QuantLinear)
        assert layer.bias is bias
        assert layer.compute_dtype is torch.bfloat16
        assert layer.format == format
    with torch.no_grad():
        assert forward_batch(model.eval(), batch).isfinite().all()


def test_nf4_is_that_of_the_layer_alone():
    model, forwards = model_and_forwards(1)
    weight = model.layers[1].mlp.w2.weight.clone()
    errors = quantize_model(model, chosen(model), PostTraining(format=NF4Format()), forwards=forwards)
    expected = QuantLinear.from_linear(_linear(weight), NF4Format())
    assert torch.equal(model.layers[1].mlp.w2.dequantize(), expected.dequantize())
    assert all(error.output_error > 0 for error in errors)


def test_layers_left_alone_are_named_with_their_reason():
    model, _ = model_and_forwards()
    model.layers[0].mlp.w1.weight = model.layers[0].mlp.w3.weight
    model.layers[1].attn.q_proj = QuantLinear.from_linear(model.layers[1].attn.q_proj, W3)

    class Own(nn.Linear):
        pass

    model.layers[1].attn.k_proj = Own(64, 32)
    layers, left = linear_layers(model, TransformConfig(skip=("*.v_proj",)).reason_to_skip)
    assert left == {
        "layers.0.mlp.w1": "its weight is also layers.0.mlp.w3.weight",
        "layers.0.mlp.w3": "its weight is also layers.0.mlp.w1.weight",
        "layers.0.attn.v_proj": "skip pattern '*.v_proj'",
        "layers.1.attn.v_proj": "skip pattern '*.v_proj'",
        "layers.1.attn.q_proj": "is low-bit already, affine of 3 bits",
        "layers.1.attn.k_proj": "Own is no plain nn.Linear",
    }
    assert set(layers) | set(left) == {
        f for f, m in model.named_modules() if isinstance(m, (nn.Linear, QuantLinear))
    }


def test_impossible_requests_are_refused_before_any_work():
    model, forwards = model_and_forwards(1)
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.q_proj: group_size 48 does not divide 64"):
        quantize_model(model, chosen(model), PostTraining(format=AffineFormat(group_size=48)))
    with pytest.raises(ConfigError, match="'gptq' needs calibration samples"):
        quantize_model(model, chosen(model), PostTraining(format=W3, method="gptq"))
    with pytest.raises(ConfigError, match="no plain linear layer is left"):
        quantize_model(model, {}, PostTraining(format=W3))
    with pytest.raises(ConfigError, match="'mse', but NF4 has fixed levels"):
        PostTraining(format=NF4Format(), method="mse")
    with pytest.raises(ConfigError, match="'hqq' optimizes float zero points"):
        PostTraining(format=W3, method="gptq", ranges="hqq")
    with pytest.raises(ConfigError, match=r"method: 'awq'; use one of rtn"):
        PostTraining(method="awq")
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    model.layers[0].attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.q_proj: the weight is not finite"):
        quantize_model(model, chosen(model), PostTraining(format=W3))
    with pytest.raises(ConfigError, match=r"layers\.0\.attn\.q_proj, .*: the weight is not finite"):
        quantize_model(
            model, _without(chosen(model)), PostTraining(format=W3, method="gptq"), forwards=forwards
        )


def _without(layers):
    return {fqn: layer for fqn, layer in layers.items() if fqn.startswith("layers.0.attn")}
