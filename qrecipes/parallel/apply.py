"""Compilation and activation checkpointing, then FSDP2, block by block.

Recomputation runs a block again, the compiled block where it is compiled, or is left to the compiler; FSDP2
gathers and frees around either. Nothing is wrapped, so names in state dicts stay those of the builder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import fx, nn
from torch._dynamo import lookup_backend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from qrecipes import compat
from qrecipes.models.view import block_sites
from qrecipes.parallel.recompute import RecomputeForward

Backend: TypeAlias = Callable[[fx.GraphModule, list[Any]], Any]
"""Of torch.compile."""

if TYPE_CHECKING:
    from qrecipes.config.run import ParallelSection
    from qrecipes.parallel.process import Process
    from qrecipes.transforms.chain import Chain


def parallelize(model: nn.Module, parallel: ParallelSection, process: Process, chain: Chain) -> nn.Module:
    """Make `model`, which `chain` has swapped, recompute, compile and shard as asked, in place. Sharding
    replaces its Parameter objects."""
    blocks = [site.block for site in block_sites(model)]
    every = {"none": 0, "full": 1, "selective": parallel.selective_every}[parallel.checkpointing]
    chosen = set(blocks[::every]) if every else set()
    in_graph = parallel.compile and parallel.recompute_in_graph
    if parallel.compile:
        compiler = recomputing_backend(pointwise=parallel.recompute_pointwise)
        recomputing = recomputing_backend(pointwise=parallel.recompute_pointwise, forward=True)
        for block in blocks:  # one backend for all alike, or Dynamo compiles each anew
            backend = recomputing if in_graph and block in chosen else compiler
            block.forward = torch.compile(block.forward, backend=backend)
    if not in_graph:
        for block in chosen:
            recompute(block)
    if process.mesh is not None:
        chain.before_shard(model)
        shard(model, blocks, parallel, process)
    return model


def recompute(block: nn.Module) -> None:
    """Keep only the block's inputs for the backward pass, in which its forward runs a second time.

    Around what is compiled, not inside it: traced into the graph, torch 2.11 keeps what a custom
    autograd.Function saves.
    """
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def recomputing_backend(
    *, pointwise: bool = False, forward: bool = False, backend: str | Backend = "inductor"
) -> str | Backend:
    """A backend of torch.compile: `backend`, which the backward pass has compute again what is asked for.

    `pointwise`: results that it has to write to memory, because a product reads them. `forward`: all of the
    forward pass.
    """
    if not pointwise and not forward:
        return backend
    sparing = {"ban_recompute_materialized_backward": False} if pointwise else {}
    passes = {"joint_custom_post_pass": RecomputeForward()} if forward else {}

    def compile_graph(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        with functorch_config.patch(sparing), inductor_config.patch(passes):
            return lookup_backend(backend)(graph, inputs)

    return compile_graph


def shard(model: nn.Module, blocks: list[nn.Module], parallel: ParallelSection, process: Process) -> None:
    """FSDP2: one group a block, and one for what is outside them (a tied embedding must stay with the
    head)."""
    compat.repair_fsdp2_integers()
    policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, parallel.reduce_dtype))
    for block in blocks:
        fully_shard(
            block, mesh=process.mesh, mp_policy=policy, reshard_after_forward=parallel.reshard_after_forward
        )
    fully_shard(model, mesh=process.mesh, mp_policy=policy)
