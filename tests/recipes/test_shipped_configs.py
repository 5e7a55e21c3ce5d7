"""Every shipped configuration parses, passes its checks, and its transforms find layers, without memory or
data."""

from __future__ import annotations

import importlib.util
import json
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


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152}
SMOLLM2_135M = LLAMA | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SMOLLM2_1_7B = SMOLLM2_135M | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rope_theta": 130000.0,
}
LLAMA_7B = LLAMA | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
LLAMA_2_7B = LLAMA_7B | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
EIGHT_HEADS = {"num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5}
LLAMA_3_8B = (
    LLAMA_7B | EIGHT_HEADS | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
)
MISTRAL_7B = (
    LLAMA_7B
    | EIGHT_HEADS
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
    }
)
PUBLISHED = {
    "hf:huggyllama/llama-7b": LLAMA_7B,
    "hf:meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "hf:meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "hf:mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "hf:HuggingFaceTB/SmolLM2-1.7B": SMOLLM2_1_7B,
    "hf:HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2_1_7B,
    "hf:models/SmolLM2-135M-Instruct": SMOLLM2_135M,
}
"""config.json of the models that configurations name and that are not here: a test has no network."""


def as_local(section, folder):
    """The model section with a folder that holds the published config.json in place of the hub's name."""
    if section.source not in PUBLISHED:
        return section
    (folder / "config.json").write_text(json.dumps(PUBLISHED[section.source]))
    return replace(section, source=f"hf:{folder}")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_swaps_on_the_meta_device(name, tmp_path):
    run = parse.load(name)
    if run.model.source.startswith("timm:") and not importlib.util.find_spec("timm"):
        pytest.skip("needs timm")
    args = {key: value for key, value in run.model.args.items() if key != "pretrained"}
    section = as_local(replace(run.model, args=args), tmp_path)
    model = build(section, dtype=torch.bfloat16, device="meta")
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


def test_the_60m_llama_has_the_size_of_the_literature():
    """Width 512, 8 layers, hidden 1376, an embedding and an untied head of 32,000: by hand 58,073,600."""
    model = build(parse.load("llm/pretrain_llama_60m").model, dtype=torch.bfloat16, device="meta")
    block = 4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512
    assert sum(p.numel() for p in model.parameters()) == 2 * 32_000 * 512 + 8 * block + 512 == 58_073_600
