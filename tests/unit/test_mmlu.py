"""MMLU with five examples, counted a second time from the rows and the model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402
from tokenizers import Tokenizer as Fast  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers  # noqa: E402

from qrecipes.data.tokenizers import load_own_tokenizer  # noqa: E402
from qrecipes.evaluation import evaluate_tasks  # noqa: E402
from qrecipes.evaluation.adapter import DecoderLM  # noqa: E402
from qrecipes.evaluation.harness import load_tasks  # noqa: E402
from qrecipes.export.opened import open_model  # noqa: E402

LETTERS = "ABCD"
OWN = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
CATEGORIES = ("mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")


@pytest.fixture(scope="module")
def opened():
    return open_model("hf:asset:stories260k", dtype="float32")


def subjects_of_lm_eval() -> dict[str, str]:
    """Subject -> category, from lm-eval's own definitions."""
    found = {}
    for path in OWN.glob("mmlu_*.yaml"):
        own = load_yaml(path, resolve_func=False)
        found[own["dataset_name"]] = own["tag"].removesuffix("_tasks")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every subject with six development examples, of which five count, and one to three questions."""
    random = torch.Generator().manual_seed(0)
    words = ["cat", "dog", "ball", "tree", "sun", "house", "Lily", "Tom", "ran", "sat"]

    def text(n: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (n,), generator=random))

    def row(subject: str) -> dict:
        answer = int(torch.randint(4, (), generator=random))
        return {
            "subject": subject,
            "question": text(4),
            "choices": [text(1) for _ in LETTERS],
            "answer": answer,
        }

    subjects = sorted(subjects_of_lm_eval())
    path = tmp_path_factory.mktemp("data")
    (path / "mmlu").mkdir()
    splits = {
        "dev": [row(subject) for subject in subjects for _ in range(6)],
        "test": [row(subject) for i, subject in enumerate(subjects) for _ in range(1 + i % 3)],
    }
    for split, rows in splits.items():
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (path / "mmlu" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return path


def read(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "mmlu" / f"{split}.jsonl").open(encoding="utf-8")]


def question(row: dict) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


def prompt(row: dict, examples: list[dict]) -> str:
    """The subject's header, its first five examples with their answers, and the question."""
    header = "The following are multiple choice questions (with answers) about "
    header += row["subject"].replace("_", " ") + ".\n\n"
    same = [example for example in examples if example["subject"] == row["subject"]][:5]
    return header + "".join(f"{question(e)} {LETTERS[e['answer']]}\n\n" for e in same) + question(row)


@torch.no_grad()
def likeliest(opened, text: str) -> int:
    """The letter whose tokens, as they stand after the prompt, have the largest log-probability together."""
    tokenizer = opened.require_tokenizer()
    beginning = [tokenizer.special_tokens["<s>"]]
    scores = []
    for letter in LETTERS:
        before, both = (beginning + tokenizer.encode(t) for t in (text, f"{text} {letter}"))
        logits = opened.model(torch.tensor([both]))[0].double().log_softmax(-1)
        scores.append(sum(float(logits[i - 1, both[i]]) for i in range(len(before), len(both))))
    return scores.index(max(scores))


def test_scores_by_subject_category_and_in_all_are_a_second_count(opened, folder):
    found = evaluate_tasks(opened.model, opened.require_tokenizer(), ["mmlu"], data=folder)
    examples = read(folder, "dev")
    right: dict[str, list[bool]] = {}
    for row in read(folder, "test"):
        right.setdefault(row["subject"], []).append(likeliest(opened, prompt(row, examples)) == row["answer"])
    assert 0.1 < sum(map(sum, right.values())) / sum(map(len, right.values())) < 0.5  # neither none nor all
    divided = subjects_of_lm_eval()
    for subject, answers in right.items():
        scores = found[f"{divided[subject]}::{subject}"]
        assert scores.metrics["acc"] == sum(answers) / len(answers), subject
        assert (scores.samples, scores.num_fewshot) == (len(answers), 5)
    groups = {name: [s for s in right if divided[s] == name] for name in CATEGORIES} | {"mmlu": list(right)}
    assert sum(len(groups[name]) for name in CATEGORIES) == 57
    for name, subjects in groups.items():
        answers = [answer for subject in subjects for answer in right[subject]]
        assert found[name].metrics["acc"] == pytest.approx(sum(answers) / len(answers)), name
        assert found[name].samples == len(answers)


def test_prompts_are_header_five_examples_and_question(folder):
    objects, _ = load_tasks(["mmlu"], folder)
    examples, rows = read(folder, "dev"), {row["subject"]: row for row in read(folder, "test")}
    tasks = [task for group in objects for task in group.get_all_tasks()]
    assert len(tasks) == 57
    for task in tasks:
        task.set_fewshot_seed(0)
        row = rows[task.task_name.split("::")[1]]
        assert task.fewshot_context(row, 5) == prompt(row, examples)


def letter_tokenizer(folder: Path, kind: str):
    """`one`: a letter with the space before it is a token. `two`: the space is one by itself. `marked`: words
    begin with a mark, and so does a text, as with Llama: a letter by itself is what it is after a space."""
    characters = sorted({*"Answer: ABCD\n", "▁", "Ġ"})
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(characters)}
    mark = {"one": "Ġ", "two": "Ġ", "marked": "▁"}[kind]
    merges = []
    if kind != "two":
        for letter in LETTERS:
            vocabulary[mark + letter] = len(vocabulary)
            merges.append((mark, letter))
    fast = Fast(models.BPE(vocab=vocabulary, merges=merges))
    if kind == "marked":
        fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
        fast.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    else:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return load_own_tokenizer(folder), vocabulary


@pytest.mark.parametrize(("kind", "tokens"), [("one", ["Ġ{}"]), ("two", ["Ġ", "{}"]), ("marked", ["▁{}"])])
def test_a_letter_is_scored_as_the_tokens_that_it_has_after_the_prompt(opened, tmp_path, kind, tokens):
    """Not as those that it has by itself: " A" and "A" are other tokens with most tokenizers."""
    tokenizer, vocabulary = letter_tokenizer(tmp_path, kind)
    lm = DecoderLM(opened.model, tokenizer, bos=False)
    alone = [tokenizer.encode(letter) for letter in LETTERS]
    for letter, by_itself in zip(LETTERS, alone, strict=True):
        context, continuation = lm._encode_pair("Answer:", f" {letter}")
        assert context == tokenizer.encode("Answer:")
        assert continuation == [vocabulary[token.format(letter)] for token in tokens]
        assert (continuation == by_itself) is (kind == "marked")
