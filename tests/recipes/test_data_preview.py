"""`qrecipes data preview` shows what the model sees, and which of it is learnt."""

from __future__ import annotations

import json
import sys

import pytest
from harness import command_line

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.preview import BRACKETS, COLOR, Document, documents_of, render
from qrecipes.data.tokenizers import BytesTokenizer


@pytest.fixture
def config(tmp_path):
    rows = [{"question": f"how {n}?", "answer": f"so [{n}]"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
steps = 1
[model]
source = "torchtune:llama3_2_1b"
[tokenizer]
kind = "bytes"
[data]
source = "conversations"
files = ["{tmp_path}/rows.jsonl"]
validation_fraction = 0.3
shuffle = false
sequence_length = 40
[data.conversation]
template = "plain"
"""
    )
    return str(path)


def test_rows_as_the_model_sees_them(config, capsys):
    assert not command_line("data", "preview", config, "--rows", "1")
    assert capsys.readouterr().out == (
        "=== row 1: 30 tokens of 2 documents, 10 padding, 14 (46.7%) learnt ===\n"
        "--- document 1 of 2: 15 tokens ---\n"
        "how 0?\n\n[[so [0]<|endoftext|>]]\n"
        "--- document 2 of 2: 15 tokens ---\n"
        "how 1?\n\n[[so [1]<|endoftext|>]]\n"
        "=== 1 row, 14 (46.7%) of the tokens learnt; learnt tokens look [[like this]] ===\n"
        "training data: 1 sequences of 40, 75.0% full: 2 conversations of 15 to 15 tokens (median 15), 30 "
        "tokens, 14 of them learnt (46.7%); 3 of 3 rows from "
        + config.replace("run.toml", "rows.jsonl")
        + " as instruction (instruction = question, output = answer), template plain\n"
        "held-out data: 1 sequences of 40, 37.5% full: 1 conversations of 15 to 15 tokens (median 15), 15 "
        "tokens, 7 of them learnt (46.7%); 3 of 3 rows from "
        + config.replace("run.toml", "rows.jsonl")
        + " as instruction (instruction = question, output = answer), template plain\n"
    )


def test_overrides_and_options_stand_anywhere(config, capsys):
    padded = "data.conversation.packing=false"
    assert not command_line(
        "data", "preview", "--rows", "2", config, padded, "--no-color", "data.batch_size=1"
    )
    out = capsys.readouterr().out
    assert "=== row 2: 15 tokens of 1 document, 25 padding, 7 (46.7%) learnt ===" in out
    assert "--- document" not in out


def test_a_terminal_gets_color_unless_told_otherwise(config, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert not command_line("data", "preview", config, "--rows", "1")
    assert "how 0?\n\n\033[32mso [0]<|endoftext|>\033[0m\n" in capsys.readouterr().out
    assert not command_line("data", "preview", config, "--no-color")
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert not command_line("data", "preview", config)
    assert "\033" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("quickstart", "=== row 1: 65 tokens of 1 document, 0 padding, 64 (98.5%) learnt ==="),
        ("tiny/llm", "=== row 1: 65 tokens of 1 document, 0 padding, 64 (98.5%) learnt ==="),
    ],
)
def test_text_and_numbers_are_learnt_whole(name, learnt, capsys):
    assert not command_line("data", "preview", name, "--rows", "1", "data.sequence_length=64")
    assert learnt in capsys.readouterr().out


def test_what_it_cannot_show_is_refused(config, capsys):
    assert command_line("data", "preview", "tiny/vit") == 2
    assert "trains on images" in capsys.readouterr().err
    assert command_line("data", "preview", config, "--rows", "0") == 2
    assert command_line("data", "preview", config, "data.files=['no.jsonl']") == 1
    assert "nothing matches 'no.jsonl'" in capsys.readouterr().err


def test_a_character_of_several_tokens_is_shown_once_and_whole():
    ids = list("é<漢".encode())
    document = Document([*ids, 256], [False] * 3 + [True] * 4)
    assert render(document, BytesTokenizer(), BRACKETS) == "é<[[漢<|endoftext|>]]"


def test_color_is_set_on_each_line():
    document = Document(list(b"a\n\nb"), [True] * 4)
    assert render(document, BytesTokenizer(), COLOR) == "\033[32ma\033[0m\n\033[32m\033[0m\n\033[32mb\033[0m"


def test_documents_are_told_apart_by_their_numbers_and_padding_left_out():
    import torch

    batch = Batch(
        torch.tensor([[5, 6, 7, 8, 0, 0]]),
        torch.tensor([[6, IGNORE, 8, IGNORE, IGNORE, IGNORE]]),
        torch.tensor([[0, 0, 1, 1, 2, 2]], dtype=torch.int32),
        torch.tensor([[0, 1, 0, 1, 0, 1]]),
    )
    documents = [Document([5, 6], [False, True]), Document([7, 8], [False, True])]
    assert documents_of(batch, 0) == (documents, 2)
