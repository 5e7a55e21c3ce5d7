"""The contract that every registered method keeps, on a tiny decoder and a tiny vision transformer.

A method is collected from the registry, and configured by its own configs/tiny/{llm,vit}_METHOD.toml.
`VARIANTS` are more configurations of some of them.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import torch._inductor.config as inductor_config
from functorch.compile import min_cut_rematerialization_partition, nop
from harness import (
    FAMILIES,
    Repeats,
    Trial,
    build_plain,
    losses,
    methods,
    peek,
    predict,
    tiny_run,
    variants,
)
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import select_decomp_table

from qrecipes import load_export
from qrecipes.config.run import ParallelSection
from qrecipes.data import build_training_data
from qrecipes.errors import ConfigError, ProbeError
from qrecipes.export import store
from qrecipes.models.view import block_sites
from qrecipes.parallel import apply
from qrecipes.quant.primitives import sqnr_db
from qrecipes.training import checkpoint
from qrecipes.training.passes import WARMUP, RecordedPasses
from qrecipes.transforms import REGISTRY
from qrecipes.transforms.base import transform_for
from qrecipes.transforms.chain import Chain

DECODERS = [("llm", name) for name in (*methods(), *variants()) if "llm" in variants().get(name, ("llm",))]
"""The tiny decoder in each of its configurations."""
PARTITIONED = "aot_eager_decomp_partition"
"""A compiler up to Inductor: traced, differentiated, and cut into a forward and a backward graph, which
decides what is kept between them; without the time that code takes."""


def without_code(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """`PARTITIONED`, but for the pass over both graphs together that is configured for Inductor."""

    def partition(joint: fx.GraphModule, given: Any, **options: Any) -> Any:
        if inductor_config.joint_custom_post_pass is not None:
            inductor_config.joint_custom_post_pass(joint.graph)
        return min_cut_rematerialization_partition(joint, given, compiler="inductor", **options)

    compiler = aot_autograd(
        fw_compiler=nop, bw_compiler=nop, decompositions=select_decomp_table, partition_fn=partition
    )
    return compiler(graph, inputs)


@pytest.fixture(params=FAMILIES)
def family(request):
    if request.param == "vit":
        pytest.importorskip("timm")
    return request.param


@pytest.fixture(params=[*methods(), *variants()])
def config_name(request, family):
    if request.param in variants() and family not in variants()[request.param]:
        pytest.skip(f"there is no tiny {family} of this variant")
    return request.param


@pytest.fixture
def run(family, config_name, tmp_path):
    return tiny_run(family, config_name, output=str(tmp_path / "run"))


@pytest.fixture
def method(run):
    return transform_for(run.transform[0]).name


def first_batch(run):
    return peek(build_training_data(run.data, None, task=run.task, seed=run.seed, rank=0, world=1))


CHOICES = [
    (name, key)
    for name in methods()
    for key, hint in get_type_hints(REGISTRY[name].Config).items()
    if get_origin(hint) is Literal and "other" not in get_args(hint)
]


@pytest.mark.parametrize(("name", "key"), CHOICES)
def test_a_choice_that_is_none_is_refused_in_python_too(name, key):
    """No file was parsed, and "other" would pass for whichever choice the code asks for last."""
    transform = REGISTRY[name]
    with pytest.raises(ConfigError, match=rf"{key}: 'other'"):
        transform(replace(transform.Config(), **{key: "other"}))


def test_swap_keeps_the_function_within_the_floor(run, method):
    batch = first_batch(run)
    plain = build_plain(run)
    chain = Chain.from_configs(run.transform)
    swapped = chain.swap(copy.deepcopy(plain))
    sqnr = sqnr_db(predict(plain, batch), predict(swapped, batch))
    assert REGISTRY[method].sqnr_floor_db <= sqnr
    assert sqnr < float("inf") or chain.transforms[0].bounds().may_equal


def test_swap_changes_only_what_it_selected(run, method):
    plain = build_plain(run)
    chain = Chain.from_configs(run.transform)
    selected = set(chain.transforms[0].sites(plain))
    before = {fqn: type(m) for fqn, m in plain.named_modules()}
    swapped = chain.swap(plain)
    receipt = {row.fqn: row.method for row in chain.receipt.layers}
    assert {fqn for fqn, name in receipt.items() if name == method} == selected
    for fqn, module in swapped.named_modules():
        if fqn in before and not any(fqn == s or fqn.startswith(s + ".") for s in selected):
            assert type(module) is before[fqn], fqn
    assert all(row.reason for row in chain.receipt.layers if row.method is None)


def test_only_targeted_layers_are_swapped(run, method):
    """Half of the layers: the others keep their class, with the reason in the receipt."""
    config = replace(run.transform[0], targets=("*.0.*",))
    chain = Chain.from_configs([config])
    swapped = chain.swap(build_plain(run))
    others = [row for row in chain.receipt.layers if row.method is None]
    assert others
    assert all(row.reason for row in others)
    assert all(type(swapped.get_submodule(row.fqn)) is nn.Linear for row in others)


def test_selecting_no_layer_is_an_error(run):
    config = replace(run.transform[0], targets=("nothing.like.this",))
    with pytest.raises(ConfigError, match="select no plain linear layer"):
        Chain.from_configs([config]).swap(build_plain(run))


def test_probe_accepts_the_method(run):
    trial = Trial.of(run, probe=True)
    probed = [row for row in trial.chain.receipt.layers if row.method]
    assert probed
    assert all(row.sqnr_db for row in probed) or trial.chain.transforms[0].bounds().may_equal


def test_probe_refuses_a_method_that_does_nothing(run, method, monkeypatch):
    """What released torchao's INT8 training does: every layer swapped, nothing changed."""
    cls = REGISTRY[method]
    if not hasattr(cls, "Layer"):
        pytest.skip("the method replaces no single layers")
    from_linear = cls.Layer.from_linear

    def remember(linear, config):
        layer = from_linear(linear, config)
        layer.forward = lambda x: linear(x)
        return layer

    monkeypatch.setattr(cls.Layer, "from_linear", remember)
    with pytest.raises(ProbeError, match="is not on"):
        Trial.of(run, probe=True)


def test_groups_partition_the_trainable_parameters(run):
    trial = Trial.of(run)
    grouped = [p for g in trial.optimizer.param_groups for p in g["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in trial.model.parameters() if p.requires_grad}


def test_every_trained_parameter_gets_a_gradient(run):
    trial = Trial.of(run)
    batch = trial.data.next_batch()
    trial.task.loss(trial.model.train(), batch).backward()
    trained = {name: p for name, p in trial.model.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without
    assert all(p.grad is None for p in trial.model.parameters() if not p.requires_grad)


def test_frozen_tensors_do_not_move_by_a_bit(run):
    trial = Trial.of(run)
    constants = trial.chain.constants(trial.model)  # what checkpoints leave out
    frozen = {n: p.detach().clone() for n, p in trial.model.named_parameters() if n in constants}
    trained = {n: p.detach().clone() for n, p in trial.model.named_parameters() if p.requires_grad}
    trial.advance(3)
    now = dict(trial.model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in frozen.items())
    assert any(not torch.equal(now[n], value) for n, value in trained.items())


def test_learns(run):
    found = losses(Trial.of(run).advance(12))
    assert found[-1] < found[0] - 0.05  # nats; the synthetic data are learnable from the first step


def test_finalize_keeps_the_trained_function(run):
    trial = Trial.of(run)
    trial.advance(3)
    batch = trial.data.next_batch()
    before = predict(trial.model, batch)
    final = trial.chain.finalize(trial.model)
    assert sqnr_db(before, predict(final, batch)) >= trial.chain.transforms[0].finalize_floor_db
    assert not any(transform.layers(final) for transform in trial.chain.transforms)


def test_finalize_twice_is_finalize_once(run):
    trial = Trial.of(run)
    trial.advance(2)
    batch = trial.data.next_batch()
    once = trial.chain.finalize(trial.model)
    output = predict(once, batch)
    assert torch.equal(output, predict(trial.chain.finalize(once), batch))


def test_export_reloads_to_equal_outputs(run, tmp_path):
    trial = Trial.of(run)
    trial.advance(2)
    batch = trial.data.next_batch()
    final = trial.chain.finalize(trial.model)
    folder = store.save(final, run, tmp_path / "export")
    assert torch.equal(predict(load_export(folder), batch), predict(final, batch))


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(run, checkpointing):
    section = replace(run.parallel, checkpointing=checkpointing, selective_every=2)
    assert Trial.of(replace(run, parallel=section)).advance(3) == Trial.of(run).advance(3)


@pytest.mark.parametrize(
    ("checkpointing", "expected"), [("none", [1, 1]), ("full", [2, 2]), ("selective", [2, 1])]
)
def test_checkpointed_blocks_run_again_in_the_backward_pass(run, checkpointing, expected):
    trial = Trial.of(replace(run, parallel=replace(run.parallel, checkpointing=checkpointing)))
    counts = [0, 0]
    for i, site in enumerate(block_sites(trial.model)):

        def count(*_, i=i):
            counts[i] += 1

        next(site.block.children()).register_forward_hook(count)
    trial.task.loss(trial.model, trial.data.next_batch()).backward()
    assert counts == expected


def test_compiled_blocks_equal_eager_without_graph_breaks(run, method, family):
    """Forward and gradients of each block under fullgraph, within float tolerance, compiled once.

    The layers are the same in both families, and so is the code that Inductor makes of them: vision
    transformers go through what comes before it.
    """
    trial = Trial.of(run)
    plain_loss = trial.task.loss(trial.model, peek(trial.data))
    plain_loss.backward()
    gradients = {n: p.grad.clone() for n, p in trial.model.named_parameters() if p.grad is not None}
    trial.optimizer.zero_grad()
    torch._dynamo.utils.counters.clear()
    for site in block_sites(trial.model):
        site.block.compile(fullgraph=True, backend="inductor" if family == "llm" else PARTITIONED)
    for _ in range(2):
        trial.optimizer.zero_grad()
        loss = trial.task.loss(trial.model, peek(trial.data))
        loss.backward()
    blocks = len(block_sites(trial.model))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= blocks
    # a fused reduction rounds differently, and one ulp can move a value to the next integer of a quantized
    # grid
    torch.testing.assert_close(loss, plain_loss, rtol=max(2e-3, REGISTRY[method].parity_rtol), atol=0)
    for name, parameter in trial.model.named_parameters():
        if name in gradients:
            assert sqnr_db(gradients[name], parameter.grad) > 25, name


@pytest.mark.parametrize("save_at", [3, 5])
def test_resume_is_bit_exact(run, save_at):
    run = replace(run, steps=8)
    unbroken = Trial.of(run).advance(8)
    first = Trial.of(run)
    beginning = first.advance(save_at)
    folder = checkpoint.save(
        run, save_at, first.model, first.optimizer, first.data.state_dict(), first.process
    )
    second = Trial.of(run)
    second.advance(1)  # whatever state it had must be overwritten
    second.done, position = checkpoint.restore(folder, run, second.model, second.optimizer, second.process)
    second.data.load_state_dict(position)
    assert beginning + second.advance(8 - save_at) == unbroken


def test_recorded_passes_train_as_those_of_python(run):
    """On tensors that stay where they are: what a CUDA graph needs of a method and its optimizer."""
    run = replace(run, optim=replace(run.optim, accumulate=2))
    python = Trial.of(run)
    wanted = python.advance(WARMUP + 3)
    recorded = Trial.of(run)
    recorded.passes = RecordedPasses(recorder := Repeats())
    assert recorded.advance(WARMUP + 3) == wanted
    assert recorder.recorded == 1
    mine, theirs = recorded.model.state_dict(), python.model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_accumulation_equals_a_larger_batch(run, method):
    large = Trial.of(run).advance(4)
    half = replace(
        run,
        data=replace(run.data, batch_size=run.data.batch_size // 2),
        optim=replace(run.optim, accumulate=2),
    )
    small = Trial.of(half).advance(4)
    rtol = REGISTRY[method].parity_rtol
    # norms too: Adam's losses do not see the gradient's scale
    torch.testing.assert_close(torch.tensor(small), torch.tensor(large), rtol=rtol, atol=0)


def test_accumulation_of_the_plain_model_is_exact_to_rounding(family):
    run = tiny_run(family, None)
    half = replace(
        run,
        data=replace(run.data, batch_size=run.data.batch_size // 2),
        optim=replace(run.optim, accumulate=2),
    )
    small, large = Trial.of(half).advance(4), Trial.of(run).advance(4)
    torch.testing.assert_close(torch.tensor(small), torch.tensor(large), rtol=1e-4, atol=0)  # float32 sums


def test_trains_in_bfloat16(run):
    found = losses(Trial.of(run, dtype=torch.bfloat16).advance(12))
    assert found[-1] < found[0] - 0.05  # nats


def test_evaluation_leaves_training_alone(run):
    from qrecipes.data import build_validation_data
    from qrecipes.training.evaluate import evaluate

    held_out = build_validation_data(run.data, None, task=run.task, seed=run.seed, rank=0, world=1)
    undisturbed = Trial.of(run).advance(4)
    trial = Trial.of(run)
    found = trial.advance(2)
    first = evaluate(trial.model, held_out, trial.task, trial.process)
    assert evaluate(trial.model, held_out, trial.task, trial.process) == first
    assert found + trial.advance(2) == undisturbed


def test_tiny_configs_compile_section_is_default(run):
    """The contract above compares with eager: tiny configurations must not turn on compilation themselves."""
    assert run.parallel == ParallelSection()


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself, or the plain ones that a subclass consists of, which compiled graphs take."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]


def saved_bytes(trial: Trial) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}
    stored = {part.data_ptr() for parameter in trial.model.parameters() for part in parts_of(parameter)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in stored:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    batch = peek(trial.data)
    trial.task.loss(trial.model, batch).backward()  # compiles, where it is compiled
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trial.task.loss(trial.model, batch)
    return sum(kept.values())


@pytest.mark.parametrize(("family", "config_name"), [*DECODERS, ("vit", methods()[0])], indirect=True)
def test_compiled_blocks_are_compiled_and_keep_no_more_under_checkpointing(run, monkeypatch):
    """What full checkpointing keeps in eager mode is the bound; a block that is not compiled shows too.

    Every configuration on a decoder, and a vision transformer's blocks once.
    """
    spared = partial(apply.recomputing_backend, backend=without_code)
    monkeypatch.setattr(apply, "recomputing_backend", spared)
    eager = saved_bytes(Trial.of(replace(run, parallel=ParallelSection(checkpointing="full"))))
    without = saved_bytes(Trial.of(run))
    for in_graph in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        parallel = ParallelSection(checkpointing="full", compile=True, recompute_in_graph=in_graph)
        compiled = saved_bytes(Trial.of(replace(run, parallel=parallel)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
        assert compiled <= 1.05 * eager
        assert compiled < 0.8 * without
