"""Checkpointing inside a compiled graph: what the forward pass keeps, and what the backward pass computes
again. The graphs are divided by the compiler's partitioner and run as they are, without generated code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks

from qrecipes.parallel.recompute import RecomputeForward

TOKENS, WIDTH, HIDDEN = 24, 16, 40


def recomputing(graphs: dict[str, fx.GraphModule]) -> Callable[..., Any]:
    """A backend of torch.compile that keeps the graphs of both passes in `graphs`."""

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: fx.GraphModule, inputs: list[Any]) -> Any:
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        RecomputeForward()(joint.graph)
        return min_cut_rematerialization_partition(joint, inputs, **options)

    return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=partition)


def sizes_kept(run: Callable[[], Tensor], parameters: list[Tensor]) -> list[tuple[int, ...]]:
    own = {p.data_ptr() for p in parameters}
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tuple(tensor.shape)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sorted(found.values())


def products(graph: fx.GraphModule) -> int:
    aten = torch.ops.aten
    return sum(node.target in (aten.mm.default, aten.addmm.default) for node in graph.graph.nodes)


def perceptron(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN, bias=False),
        nn.SiLU(),
        nn.Dropout(dropout),
        nn.Linear(HIDDEN, WIDTH, bias=False),
    )


def test_only_inputs_are_kept_and_the_last_product_is_not_computed_again():
    model, graphs = perceptron(), {}
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    compiled = torch.compile(model, backend=recomputing(graphs), fullgraph=True)
    assert sizes_kept(lambda: compiled(x), [*model.parameters(), x]) == []
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *model.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert products(graphs["forward"]) == 2
    assert products(graphs["backward"]) == 1 + 4  # the first layer's again, and two gradients a layer


def test_what_is_drawn_is_kept_and_the_rest_computed_again():
    """With another draw in the backward pass a gradient would be zero elsewhere than the output is."""
    model, graphs = perceptron(dropout=0.5), {}
    model[3].weight = nn.Parameter(torch.eye(WIDTH, HIDDEN))  # the output shows what was dropped
    compiled = torch.compile(model, backend=recomputing(graphs), fullgraph=True)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    kept = sizes_kept(lambda: compiled(x), [*model.parameters(), x])
    assert kept == 2 * [(TOKENS, HIDDEN)]  # what dropout gives: the mask, and what it lets through
    y = compiled(x)
    (of_rows,) = torch.autograd.grad(y.sum(), [model[0].weight], retain_graph=True)
    hidden = nn.functional.silu(x.detach() @ model[0].weight.detach().t())
    dropped = y == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(y, torch.where(dropped, 0.0, 2 * hidden[:, :WIDTH]))
    derivative = torch.func.vmap(torch.func.vmap(torch.func.grad(nn.functional.silu)))
    slope = derivative(x.detach() @ model[0].weight.detach().t())[:, :WIDTH]
    wanted = torch.where(dropped, 0.0, 2 * slope).t() @ x.detach()
    torch.testing.assert_close(of_rows[:WIDTH], wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_attention_is_computed_again_unless_it_draws(dropout):
    heads, size = 2, 8

    def attend(x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, size)).transpose(1, 2) for part in x.chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)

    x = torch.randn(2, 5, 3 * heads * size, requires_grad=True)
    graphs: dict[str, fx.GraphModule] = {}
    compiled = torch.compile(attend, backend=recomputing(graphs), fullgraph=True)
    kept = sizes_kept(lambda: compiled(x), [x])
    assert bool(kept) == bool(dropout)
    compiled(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_compiled_graphs_are_cached_by_the_pass():
    assert RecomputeForward().uuid() == RecomputeForward().uuid()
    assert RecomputeForward().uuid() is not None
