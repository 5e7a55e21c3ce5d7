"""Every shipped configuration parses, passes its checks, and its transforms find layers, without memory or
data."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from qrecipes.config import parse
from qrecipes.locate import shipped
from qrecipes.models.build import build
from qrecipes.transforms.chain import Chain

CONFIGS = sorted(
    str(p.relative_to(shipped("configs")).with_suffix("")) for p in shipped("configs").rglob("*.toml")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_swaps_on_the_meta_device(name):
    run = parse.load(name)
    if run.model.source.startswith("timm:") and not importlib.util.find_spec("timm"):
        pytest.skip("needs timm")
    args = {key: value for key, value in run.model.args.items() if key != "pretrained"}
    model = build(replace(run.model, args=args), dtype=torch.bfloat16, device="meta")
    chain = Chain.from_configs(run.transform)
    swapped = chain.swap(model)
    assert len(chain.receipt.methods) == len(run.transform)
    assert not any(transform.layers(chain.finalize(swapped)) for transform in chain.transforms)


@pytest.mark.parametrize("name", CONFIGS)
def test_first_line_is_the_command_that_runs_it(name):
    first, second = (shipped("configs") / f"{name}.toml").read_text().splitlines()[:2]
    assert first.startswith("# run: qrecipes run ")
    assert f"--config {name}" in first
    assert second.startswith("# ")
