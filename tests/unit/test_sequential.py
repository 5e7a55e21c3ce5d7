"""Layers replaced in the order in which they run: the inputs that each is told, the order, the memory."""

from __future__ import annotations

import pytest
import torch
from harness import build_plain, tiny_run
from torch import nn

from qrecipes.data import build_training_data
from qrecipes.errors import ConfigError
from qrecipes.models.post_training import linear_layers
from qrecipes.models.sequential import replace_in_order
from qrecipes.training.task import forward_batch
from qrecipes.transforms.base import TransformConfig

ORDER = [
    ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
    ["attn.output_proj"],
    ["mlp.w1", "mlp.w3"],
    ["mlp.w2"],
]
VIT_ORDER = [["attn.qkv"], ["attn.proj"], ["mlp.fc1"], ["mlp.fc2"]]


def batches(run, count: int):
    data = build_training_data(run.data, None, task=run.task, seed=0, rank=0, world=1)
    return [data.next_batch().head(2, 16) for _ in range(count)]


def forwards_of(samples):
    return [lambda model, batch=batch: forward_batch(model, batch) for batch in samples]


HEADS = TransformConfig().skip


def chosen(model: nn.Module, skip=HEADS) -> dict[str, nn.Linear]:
    layers, _ = linear_layers(model, TransformConfig(skip=skip).reason_to_skip)
    return layers


def coarser(layer: nn.Linear) -> nn.Linear:
    """Another layer, whose outputs differ from the original's."""
    other = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    other.weight.data = (layer.weight.data * 40).round() / 40
    if layer.bias is not None:
        other.bias = layer.bias
    return other


def replaced_with_records(model: nn.Module, samples, layers=None, **places):
    """The groups in order, with the Hessian that each was given."""
    found: list[tuple[list[str], torch.Tensor]] = []

    def replacement(group, hessian):
        found.append((list(group), hessian.clone()))
        return {fqn: coarser(layer) for fqn, layer in group.items()}

    replace_in_order(model, layers or chosen(model), forwards_of(samples), replacement, **places)
    return found


def hessian_by_hand(model: nn.Module, fqn: str, samples) -> torch.Tensor:
    """X^T X / T of a layer's inputs in whole forward passes of the model as it is, in float64."""
    seen = []
    hook = model.get_submodule(fqn).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for forward in forwards_of(samples):
            forward(model.eval())
    hook.remove()
    x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen]).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize(
    ("family", "order", "stack"), [("llm", ORDER, "layers"), ("vit", VIT_ORDER, "blocks")]
)
def test_each_layer_sees_the_inputs_that_replaced_layers_before_it_give(family, order, stack):
    """Against whole forward passes of a second model, in which the same layers are replaced by hand."""
    run = tiny_run(family, None)
    model, twin = build_plain(run), build_plain(run)
    samples = batches(run, 3)
    found = replaced_with_records(model, samples)
    expected = [[f"{stack}.{i}.{name}" for name in group] for i in range(2) for group in order]
    assert [names for names, _ in found] == expected
    for names, hessian in found:
        for fqn in names:
            by_hand = hessian_by_hand(twin, fqn, samples)
            torch.testing.assert_close(hessian.double(), by_hand, rtol=1e-4, atol=1e-5)  # float32 sums
        for fqn in names:
            parent, _, child = fqn.rpartition(".")
            setattr(twin.get_submodule(parent), child, coarser(twin.get_submodule(fqn)))
    for forward in forwards_of(samples):
        with torch.no_grad():
            assert torch.equal(forward(model.eval()), forward(twin.eval()))


def test_rows_of_several_documents_keep_their_mask_and_positions():
    run = tiny_run("llm", None)
    model, twin = build_plain(run), build_plain(run)
    (batch,) = batches(run, 1)
    documents = torch.tensor([[0] * 6 + [1] * 10, [0] * 16], dtype=torch.int32)
    positions = torch.tensor([[*range(6), *range(10)], [*range(16)]])
    packed = type(batch)(batch.inputs, batch.targets, documents, positions)
    names, hessian = replaced_with_records(model, [packed])[1]
    assert names == ["layers.0.attn.output_proj"]
    for fqn in ("q_proj", "k_proj", "v_proj"):
        setattr(twin.layers[0].attn, fqn, coarser(getattr(twin.layers[0].attn, fqn)))
    by_hand = hessian_by_hand(twin, names[0], [packed])
    torch.testing.assert_close(hessian.double(), by_hand, rtol=1e-4, atol=1e-5)  # float32 sums
    whole = hessian_by_hand(twin, names[0], [batch])
    assert not torch.allclose(hessian.double(), whole, rtol=1e-2)


def test_head_comes_last_where_it_is_selected():
    run = tiny_run("vit", None)
    model = build_plain(run)
    samples = batches(run, 2)
    found = replaced_with_records(model, samples, chosen(model, skip=()))
    names, hessian = found[-1]
    assert names == ["head"]
    by_hand = hessian_by_hand(model, "head", samples)
    torch.testing.assert_close(hessian.double(), by_hand, rtol=1e-4, atol=1e-5)  # float32 sums


def test_layers_that_are_not_selected_stay_and_are_not_in_the_way():
    run = tiny_run("llm", None)
    model = build_plain(run)
    kept = model.layers[0].attn.k_proj
    layers = chosen(model, skip=("*.k_proj", "*.w2", "layers.1.*"))
    found = replaced_with_records(model, batches(run, 1), layers)
    assert [len(names) for names, _ in found] == [2, 1, 2]
    assert model.layers[0].attn.k_proj is kept


def test_layer_called_twice_counts_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, **kwargs):
            return self.second(self.first(self.first(x)))

    run = tiny_run("llm", None)
    model = build_plain(run)
    model.layers[1] = Twice()
    samples, layers = batches(run, 2), chosen(model, skip=(*HEADS, "layers.0.*"))
    expected = hessian_by_hand(model, "layers.1.first", samples)
    names, hessian = replaced_with_records(model, samples, layers)[0]
    assert names == ["layers.1.first"]
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-5)  # float32 sums


def test_tensor_changed_in_place_between_two_layers_is_not_shared():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, **kwargs):
            x = x.clone()
            y = self.first(x)
            return y + self.second(x.mul_(2))

    run = tiny_run("llm", None)
    model = build_plain(run)
    model.layers[1] = Changes()
    found = replaced_with_records(model, batches(run, 1), chosen(model, skip=(*HEADS, "layers.0.*")))
    assert [names for names, _ in found] == [["layers.1.first"], ["layers.1.second"]]
    torch.testing.assert_close(found[1][1], 4 * found[0][1])


def test_one_block_at_a_time_goes_to_the_device_and_back():
    run = tiny_run("llm", None)
    model = build_plain(run)
    moves: list[tuple[nn.Module, str]] = []
    for block in model.layers:
        block.to = lambda device, block=block: moves.append((block, str(device)))
    model.to = lambda device: moves.append((model, str(device)))
    replaced_with_records(model, batches(run, 1), device=torch.device("cpu", 0))
    first, second = model.layers
    assert moves == [(first, "cpu:0"), (first, "cpu"), (second, "cpu:0"), (second, "cpu")]


def test_what_cannot_go_block_by_block_is_refused():
    run = tiny_run("llm", None)
    with pytest.raises(ConfigError, match="calibration: no samples"):
        replaced_with_records(build_plain(run), [])

    class Skips(nn.Module):
        """Does not take what the block before gives."""

        def __init__(self, model):
            super().__init__()
            self.tok_embeddings, self.layers = model.tok_embeddings, model.layers
            self.norm, self.output = model.norm, model.output

        def forward(self, tokens):
            h = self.tok_embeddings(tokens)
            return self.output(self.norm(self.layers[0](h) + self.layers[1](h)))

    model = Skips(build_plain(run))
    with pytest.raises(ConfigError, match="the blocks of Skips do not follow one another"):
        replaced_with_records(model, batches(run, 1))

    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, **kwargs):
            return self.used(x)

    model = build_plain(run)
    model.layers[1] = Idle()
    with pytest.raises(ConfigError, match=r"layers\.1\.idle: is not called by the first calibration sample"):
        replaced_with_records(model, batches(run, 1))


def test_model_is_left_in_the_mode_it_was_in_and_without_hooks():
    run = tiny_run("llm", None)
    model = build_plain(run).train()
    replaced_with_records(model, batches(run, 1))
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
