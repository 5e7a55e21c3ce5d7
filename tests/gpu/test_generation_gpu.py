"""Generation on a GPU: replayed CUDA graphs give the tokens of the eager loop."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from qrecipes.config.run import ModelSection
from qrecipes.data.tokenizers import BytesTokenizer
from qrecipes.generation import Generator, Sampling
from qrecipes.models.build import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["Once upon a time, there", "a", "Hello"]


@pytest.fixture
def model():
    """Random over bytes, in float32; its weights are large, so that the likeliest token leads clearly."""
    torch.manual_seed(1)
    args = {
        "vocab_size": 257,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 64,
        "intermediate_dim": 128,
        "max_seq_len": 512,
    }
    section = ModelSection(source="torchtune:llama3_1.llama3_1", args=args, init_std=0.3)
    return build(section, dtype=torch.float32).eval()


def test_cuda_graphs_are_replayed_and_change_no_token(model):
    """Two batches, the second not full, against the eager loop on the CPU."""
    sampling = Sampling(max_tokens=24, temperature=0)
    wanted = Generator(model, BytesTokenizer()).generate(PROMPTS, sampling, stop_tokens=[])
    counters.clear()
    generator = Generator(model.cuda(), BytesTokenizer(), batch_size=2, compile=True)
    for _ in range(2):
        assert generator.generate(PROMPTS, sampling, stop_tokens=[]) == wanted
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_draws_are_those_of_the_cpu(model):
    """Each row's numbers are drawn on the CPU, so a text does not depend on the device."""
    sampling = Sampling(max_tokens=24, temperature=0.7, top_k=20, seed=4)
    wanted = Generator(model, BytesTokenizer()).generate(PROMPTS, sampling, stop_tokens=[])
    assert Generator(model.cuda(), BytesTokenizer()).generate(PROMPTS, sampling, stop_tokens=[]) == wanted
