"""Activation checkpointing inside a compiled graph: the compiler's own partition into both passes, told to
keep the inputs alone.

The alternative, `torch.utils.checkpoint` in what is compiled, keeps what a custom autograd.Function saves
(torch 2.11); around what is compiled it runs all of the forward pass again, and Python with it.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import inductor_prims
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

SEEDS = {inductor_prims.seed, inductor_prims.seeds}
"""What random numbers of a compiled graph come from."""


class RecomputeForward(CustomGraphPass):
    """A pass over the joint graph of both passes, before it is divided.

    Where nothing is drawn at random, the budget for activations is set to nothing, which leaves the inputs.
    Otherwise each node of the forward pass is marked: what operators that can draw give is kept, all else
    computed again.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Mark the nodes of `graph`, in place."""
        calls = [node for node in graph.nodes if node.op == "call_function"]
        if not any(draws(node) for node in calls):
            for node in calls:
                node.meta["memory_budget"] = 0.0
            return
        of_gradients = {node for node in graph.nodes if node.op == "placeholder" and "tangent" in node.name}
        for node in calls:
            if not of_gradients.isdisjoint(node.all_input_nodes):
                of_gradients.add(node)
                continue
            keep = is_seeded(node.args[0] if node.target is operator.getitem else node)
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0

    def uuid(self) -> Any:
        """Of this file: compiled graphs are cached by it."""
        return get_hash_for_files((str(Path(__file__).resolve()),))


def is_seeded(node: Any) -> bool:
    """Whether the node's operator may draw random numbers."""
    return node.target in SEEDS or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def draws(node: fx.Node) -> bool:
    """Whether it does: attention without dropout only could."""
    if not is_seeded(node):
        return False
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    if "dropout_p" not in names:
        return True
    index = names.index("dropout_p")
    given = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return bool(given != 0.0)
