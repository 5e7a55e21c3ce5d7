"""Checkpointed blocks on a CUDA device have the gradients of blocks that keep everything."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

from qrecipes.config.run import ModelSection, ParallelSection
from qrecipes.models.build import build
from qrecipes.parallel.apply import parallelize
from qrecipes.parallel.process import Process
from qrecipes.transforms.base import TransformConfig
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.lora import LoRAConfig
from qrecipes.transforms.lr_qat import LRQATConfig
from qrecipes.transforms.qa_lora import QALoRAConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
VOCABULARY = 512
SIZES = {"num_layers": 2, "embed_dim": 1024, "num_heads": 8, "num_kv_heads": 8, "vocab_size": VOCABULARY}
CONFIGS: dict[str, TransformConfig] = {
    "LoRA": LoRAConfig(rank=64),
    "QLoRA": LoRAConfig(rank=64, base="nf4"),
    "QA-LoRA": QALoRAConfig(rank=64, group_size=32),
    "LR-QAT": LRQATConfig(bits=4),
}
HOWS = {
    "kept": ParallelSection(compile=True),
    "block": ParallelSection(compile=True, checkpointing="full"),
    "graph": ParallelSection(compile=True, checkpointing="full", recompute_in_graph=True),
    "eager": ParallelSection(),
}


def model_of(config: TransformConfig, layers: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    section = ModelSection(
        source="torchtune:llama2.llama2",
        args=SIZES | {"intermediate_dim": 2816, "max_seq_len": 1024} | layers,
        dtype="bfloat16",
    )
    model = build(section, dtype=torch.bfloat16, device=DEVICE)
    model = Chain.from_configs([config]).swap(model)
    with torch.no_grad():  # away from the start, where a factor of zeros leaves the other no gradient
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(("lora_b", "low_rank_a")):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def gradients(config: TransformConfig, parallel: ParallelSection, **layers: int) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = model_of(config, layers)
    model = parallelize(model, parallel, Process(0, 1, DEVICE, None), Chain())
    tokens = torch.randint(VOCABULARY, (4, 1025), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for _ in range(2):  # the second pass runs what the first compiled
        model.zero_grad()
        logits = model(tokens[:, :-1]).float()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_differ_by_roundings_only(name):
    """Along the kept blocks' gradient by less than 1%, and away from it by no more than twice what eager
    computation is, which rounds elsewhere."""
    found = {how: gradients(CONFIGS[name], parallel) for how, parallel in HOWS.items()}
    kept = found.pop("kept")
    assert kept
    problems = []
    for key, wanted in kept.items():
        away = {how: distance(grads[key], wanted) for how, grads in found.items()}
        for how in ("block", "graph"):
            along = float((found[how][key] * wanted).sum() / wanted.square().sum())
            if abs(along - 1) > 0.01 or away[how] > 2 * away["eager"] + 1e-3:
                problems.append(f"{how} {key}: {along:.4f} along, away {away}")
    assert not problems, "\n".join(problems[:20])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_graph_computes_again_is_what_it_computed(name):
    """Where fused operators round as single ones do, gradients are nearer to those of kept blocks than a
    tenth of what eager ones are: what is left is the order of sums in other kernels."""
    with inductor_config.patch(emulate_precision_casts=True):
        kept, again = (gradients(CONFIGS[name], HOWS[how]) for how in ("kept", "graph"))
    eager = gradients(CONFIGS[name], HOWS["eager"])
    usual = statistics.median(distance(eager[key], kept[key]) for key in kept)
    away = {key: distance(again[key], kept[key]) for key in kept}
    assert statistics.median(away.values()) <= 0.1 * usual, (usual, away)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Of gradients, relative to the norm of the second."""
    return float((found - wanted).norm() / wanted.norm())
