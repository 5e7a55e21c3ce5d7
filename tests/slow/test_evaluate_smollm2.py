"""A pretrained model of 135 million parameters: the numbers that transformers and lm-eval give.

QRECIPES_SMOLLM2 names a Hugging Face folder of SmolLM2-135M-Instruct, QRECIPES_EVAL_DATA a folder of task
files as qrecipes/evaluation/tasks/README.md describes, QRECIPES_EVAL_LIMIT how many rows of each to score.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qrecipes.evaluation import evaluate_tasks, perplexity, read_text
from qrecipes.evaluation.harness import load_tasks
from qrecipes.evaluation.task_data import find
from qrecipes.export.opened import open_model

MODEL, DATA = os.environ.get("QRECIPES_SMOLLM2"), os.environ.get("QRECIPES_EVAL_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not MODEL, reason="QRECIPES_SMOLLM2 names no folder of SmolLM2-135M-Instruct"),
    pytest.mark.skipif(not DATA, reason="QRECIPES_EVAL_DATA names no folder of task files"),
]

BLOCK = 1024


@pytest.fixture(scope="module")
def smollm2():
    return open_model(f"hf:{MODEL}", dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@torch.no_grad()
def test_perplexity_of_wikitext2_is_that_of_transformers_on_the_same_tokens(smollm2, theirs):
    transformers = pytest.importorskip("transformers")
    text = read_text(str(find(DATA, "wikitext2/wiki.test.raw")))
    count = 4 * BLOCK
    ids = transformers.AutoTokenizer.from_pretrained(MODEL)(text[:40_000]).input_ids[:count]
    assert len(ids) == count
    losses = [
        F.cross_entropy(theirs(torch.tensor([block])).logits[0, :-1], torch.tensor(block[1:]))
        for block in (ids[i : i + BLOCK] for i in range(0, count, BLOCK))
    ]
    expected = float(torch.stack(losses).mean().exp())
    found = perplexity(smollm2.model, smollm2.tokenizer, text, block=BLOCK, tokens=count, batch_size=2)
    assert found.perplexity == pytest.approx(expected, rel=1e-3)  # float32 through 30 layers
    assert found.decodes_exactly


def test_perplexity_of_20_blocks_of_wikitext2_is_the_known_one(smollm2):
    """23.23: measured with transformers in float32, 20 blocks of 1024 without a beginning-of-text token."""
    text = read_text(str(find(DATA, "wikitext2/wiki.test.raw")))
    found = perplexity(smollm2.model, smollm2.tokenizer, text, block=BLOCK, tokens=20 * BLOCK, batch_size=2)
    assert found.perplexity == pytest.approx(23.23, abs=0.01)  # known to two places
    assert found.tokens == 20 * (BLOCK - 1)


LIMIT = int(os.environ.get("QRECIPES_EVAL_LIMIT", "20"))


@pytest.mark.parametrize("name", ["piqa", "arc_easy", "hellaswag"])
def test_scores_are_those_of_lm_eval_with_transformers(smollm2, theirs, name):
    lm_eval = pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="lm-eval's class for transformers imports it")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    assert Path(MODEL).is_dir()
    found = evaluate_tasks(smollm2.model, smollm2.tokenizer, [name], data=DATA, limit=LIMIT)[name]
    other = HFLM(
        pretrained=theirs,
        tokenizer=transformers.AutoTokenizer.from_pretrained(MODEL),
        device="cpu",
        batch_size=4,
    )
    expected = lm_eval.simple_evaluate(
        model=other,
        tasks=load_tasks([name], DATA)[0],
        limit=LIMIT,
        task_manager=TaskManager(include_defaults=False),
    )["results"][name]
    print(f"\n{name}: ours {found.metrics}, theirs {expected}")
    for metric in ("acc", "acc_norm"):
        # the same log-likelihoods but for rounding: at most one choice in a near tie falls otherwise
        assert abs(found.metrics[metric] - expected[f"{metric},none"]) <= 1.01 / LIMIT
        assert found.stderrs[metric] == pytest.approx(expected[f"{metric}_stderr,none"], abs=0.02)


@torch.no_grad()
def test_mmlu_takes_the_likeliest_letter(smollm2, theirs):
    """As the paper of QA-LoRA scores: the largest of four logits of transformers' model after the prompt."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("lm_eval")
    encode = transformers.AutoTokenizer.from_pretrained(MODEL).encode
    letters = [encode(f" {letter}", add_special_tokens=False) for letter in "ABCD"]
    assert all(len(ids) == 1 for ids in letters)  # a token each, with the space before it
    found = evaluate_tasks(smollm2.model, smollm2.tokenizer, ["mmlu_stem"], data=DATA, limit=1)
    right = {}
    for task in load_tasks(["mmlu_stem"], DATA)[0][0].get_all_tasks():
        task.set_fewshot_seed(0)
        row = task.eval_docs[0]
        ids = encode(task.fewshot_context(row, 5))
        choices = theirs(torch.tensor([ids])).logits[0, -1, [ids[0] for ids in letters]]
        right[task.task_name] = int(choices.argmax()) == row["answer"]
    assert {name: bool(found[name].metrics["acc"]) for name in right} == right
    assert found["mmlu_stem"].metrics["acc"] == pytest.approx(sum(right.values()) / len(right))
