"""What a model was trained to answer in goes with it: its template, and the tokens that end a text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from harness import command_line

from qrecipes.assets import resolve
from qrecipes.config.run import TokenizerSection
from qrecipes.data.chat import Message, encode_conversation, stop_ids
from qrecipes.data.tokenizers import load_tokenizer
from qrecipes.export.opened import open_model

ASKED = [Message(role="user", content="What does a bee do?")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The story teller, whose generation_config.json names two tokens that end a text."""
    folder = tmp_path_factory.mktemp("source") / "stories"
    shutil.copytree(resolve("asset:stories260k"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    return folder


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("chat") / "run"
    overrides = ["steps=1", "schedule.warmup_steps=0", "log.evaluate_batches=1", "export.at_end=true"]
    named = [f"model.source=hf:{source}", f"output={output}", "device=cpu"]
    assert command_line("run", "train", "--config", "tiny/chat", *named, *overrides) == 0
    return output


def test_an_export_ends_texts_where_its_run_does(trained, source):
    assert load_tokenizer(TokenizerSection(path=str(source))).end_ids == (2, 5)
    assert open_model(str(trained)).require_tokenizer().end_ids == (2, 5)
    assert open_model(str(trained / "export")).require_tokenizer().end_ids == (2, 5)


def test_an_export_writes_conversations_as_its_run_did(trained):
    """tiny/chat trains with a template that the model's tokenizer does not have."""
    found = []
    for name in (trained, trained / "export", f"hf:{trained / 'export' / 'huggingface'}"):
        opened = open_model(str(name))
        tokenizer = opened.require_tokenizer()
        ids = encode_conversation(
            tokenizer, ASKED, template=opened.chat_template, add_generation_prompt=True
        ).ids
        found.append((ids, stop_ids(tokenizer, opened.chat_template)))
    assert tokenizer.decode(found[0][0]).strip() == "Question: What does a bee do?\nAnswer:"
    assert found[0] == found[1] == found[2]


def test_transformers_writes_the_exported_folders_conversations_alike(trained):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "export" / "huggingface")
    theirs = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    opened = open_model(str(trained))
    ours = encode_conversation(
        opened.require_tokenizer(), ASKED, template=opened.chat_template, add_generation_prompt=True
    )
    assert theirs == ours.ids


def test_generate_writes_the_prompt_as_the_model_was_trained(trained, capsys):
    asked = ["--prompt", ASKED[0]["content"], "--chat-template", "--max-tokens", "1", "--temperature", "0"]
    assert command_line("generate", str(trained), *asked, "--device", "cpu") == 0
    tokenizer = open_model(str(trained)).require_tokenizer()
    prompt = encode_conversation(tokenizer, ASKED, template="question", add_generation_prompt=True).ids
    assert f"{len(prompt)} tokens of prompts" in capsys.readouterr().err


def test_sequences_longer_than_the_model_takes_are_refused(source, tmp_path, capsys):
    named = [f"model.source=hf:{source}", f"output={tmp_path}"]
    assert command_line("run", "train", "--config", "tiny/chat", *named, "data.sequence_length=1024") == 2
    said = "data.sequence_length: 1024 is more than the 512 tokens that the model takes"
    assert said in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_the_command_quietly(trained):
    """As `qrecipes cat ... | head -c 1` does."""
    command = [sys.executable, "-m", "qrecipes.cli.main", "schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141, error
    assert "Traceback" not in error
    assert "Exception" not in error
