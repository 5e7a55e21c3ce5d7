"""GPTQ on a pretrained model of 135 million parameters: minutes on a CPU.

QRECIPES_SMOLLM2 names a Hugging Face folder of SmolLM2-135M-Instruct, QRECIPES_EVAL_DATA a folder with
wikitext2/wiki.test.raw.
"""

from __future__ import annotations

import os

import pytest

from qrecipes.data.calibration import windows_of_text
from qrecipes.evaluation import perplexity, read_text
from qrecipes.evaluation.task_data import find
from qrecipes.export.opened import open_model
from qrecipes.models.post_training import PostTraining, linear_layers, quantize_model
from qrecipes.quant.formats import AffineFormat
from qrecipes.training.task import forward_batch
from qrecipes.transforms.base import TransformConfig

MODEL, DATA = os.environ.get("QRECIPES_SMOLLM2"), os.environ.get("QRECIPES_EVAL_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL, reason="QRECIPES_SMOLLM2 names no folder of SmolLM2-135M-Instruct"),
    pytest.mark.skipif(not DATA, reason="QRECIPES_EVAL_DATA names no folder of task files"),
]


def test_gptq_beats_rounding_to_nearest_at_3_bits():
    """Calibrated on the second half of WikiText-2's test text, measured on the beginning of the first."""
    text = read_text(str(find(DATA, "wikitext2/wiki.test.raw")))
    half = len(text) // 2
    format = AffineFormat(bits=3, group_size=32, symmetric=False)
    found = {}
    for method in ("rtn", "gptq"):
        opened = open_model(f"hf:{MODEL}", dtype="float32")
        tokenizer = opened.require_tokenizer()
        samples = windows_of_text(text[half:], tokenizer, name="wikitext2", samples=16, length=512)
        layers, _ = linear_layers(opened.model, TransformConfig().reason_to_skip)
        assert len(layers) == 210
        quantize_model(
            opened.model,
            layers,
            PostTraining(format=format, method=method),
            forwards=[lambda m, b=b: forward_batch(m, b) for b in samples] if method == "gptq" else (),
        )
        measured = perplexity(opened.model, tokenizer, text[:half], block=1024, tokens=8 * 1024, batch_size=2)
        found[method] = measured.perplexity
    print(f"\nWikiText-2, 8 blocks of 1024: {found}")
    assert found["gptq"] < 0.9 * found["rtn"]
