"""`qrecipes generate` from outside: what goes to stdout and to files, chats, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import command_line

from qrecipes.data.chat import Message
from qrecipes.export.opened import open_model
from qrecipes.generation import Generator, Sampling
from qrecipes.generation.chat import ChatFormat, chat
from qrecipes.generation.quantized_cache import CachePlan

MODEL = "hf:asset:stories260k"
GREEDY = ("--temperature", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def opened():
    return open_model(MODEL)


@pytest.fixture
def generator(opened):
    return Generator(opened.model, opened.require_tokenizer())


def added(generator: Generator, prompt: str, count: int) -> str:
    """The greedy continuation, through the library."""
    return generator.generate([prompt], Sampling(max_tokens=count, temperature=0))[0].text


def test_stdout_is_the_prompt_and_its_greedy_continuation(generator, capsys):
    prompt = "Once upon a time"
    for streaming in ((), ("--stream",), ("--no-stream",)):
        assert not command_line(
            "generate", MODEL, "--prompt", prompt, "--max-tokens", "20", *GREEDY, *streaming
        )
        captured = capsys.readouterr()
        assert captured.out == prompt + added(generator, prompt, 20) + "\n"
        assert "5 tokens of prompts at" in captured.err
        assert "19 decoded at" in captured.err


def test_a_stop_string_ends_the_printed_text(generator, capsys):
    whole = added(generator, "Once upon a time", 30)
    arguments = ("--prompt", "Once upon a time", "--max-tokens", "30", "--stop", "@", "--stop", "girl")
    assert not command_line("generate", MODEL, *arguments, *GREEDY)
    assert capsys.readouterr().out == "Once upon a time" + whole.partition("girl")[0] + "\n"
    assert "girl" in whole


def test_a_file_of_prompts_gives_each_its_own_text_in_order(generator, tmp_path, capsys):
    prompts = ["Lily", "Once upon a time, there was", "One day"]
    source, output = tmp_path / "prompts.txt", tmp_path / "new" / "texts.jsonl"
    source.write_text("\n".join(prompts) + "\n")
    arguments = ("--prompts", str(source), "--max-tokens", "12", "--batch-size", "2")
    assert not command_line("generate", MODEL, *arguments, "--output", str(output), *GREEDY)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    texts = [added(generator, prompt, 12) for prompt in prompts]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["text"] for row in rows] == texts
    assert rows[0] == {
        "prompt": "Lily",
        "text": texts[0],
        "finish_reason": "length",
        "prompt_tokens": len(generator.encode("Lily")),
        "tokens": 12,
    }
    assert capsys.readouterr().out == ""
    assert not command_line("generate", MODEL, *arguments, *GREEDY)
    printed = [prompt + text + "\n" for prompt, text in zip(prompts, texts, strict=True)]
    assert capsys.readouterr().out == "\n".join(printed)


def test_conversations_in_a_file_are_answered_and_prompts_continued(generator, tmp_path, capsys):
    said = [{"role": "user", "content": "Hi"}]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    source.write_text(json.dumps({"messages": said}) + "\n" + json.dumps({"prompt": "Lily"}) + "\n")
    arguments = ("--prompts", str(source), "--max-tokens", "8", "--output", str(output), *GREEDY)
    assert not command_line("generate", MODEL, *arguments)
    first, second = (json.loads(line) for line in output.read_text().splitlines())
    ids = ChatFormat(generator.tokenizer).encode(said)
    answer = generator.generate([ids], Sampling(max_tokens=8, temperature=0))[0]
    assert (first["messages"], first["text"]) == (said, answer.text)
    assert (second["prompt"], second["text"]) == ("Lily", added(generator, "Lily", 8))


def test_a_template_wraps_a_prompt_and_only_the_answer_is_printed(generator, capsys):
    ids = ChatFormat(generator.tokenizer, "plain", "Be kind.").encode([Message(role="user", content="Hi")])
    answer = generator.generate([ids], Sampling(max_tokens=8, temperature=0))[0].text
    arguments = ("--prompt", "Hi", "--chat-template", "plain", "--system", "Be kind.", "--max-tokens", "8")
    assert not command_line("generate", MODEL, *arguments, *GREEDY)
    assert capsys.readouterr().out == answer + "\n"


def test_seeds_reproduce_on_the_command_line(capsys):
    def draw(*arguments: str) -> str:
        common = ("--prompt", "Lily", "--max-tokens", "12", "--device", "cpu", "--temperature", "1.2")
        assert not command_line("generate", MODEL, *common, *arguments)
        return capsys.readouterr().out

    narrowed = ("--seed", "5", "--top-k", "50", "--top-p", "0.95")
    assert draw(*narrowed) == draw(*narrowed)
    assert len({draw("--seed", str(seed)) for seed in range(4)}) > 1


def in_chat(monkeypatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return command_line("generate", MODEL, "--chat", "--max-tokens", "9", *GREEDY, *arguments)


def test_a_chat_remembers_and_forgets(generator, monkeypatch, capsys):
    lines = "Hi there\nAnd then?\n\n/reset\nHi there\n/exit\nnever asked\n"
    assert not in_chat(monkeypatch, lines, "--chat-template", "plain")
    form, sampling = ChatFormat(generator.tokenizer, "plain"), Sampling(max_tokens=9, temperature=0)

    def reply(*messages: Message) -> str:
        return generator.generate([form.encode(messages)], sampling, stop_tokens=form.stop_tokens())[0].text

    asked = Message(role="user", content="Hi there")
    first = reply(asked)
    answered, further = Message(role="assistant", content=first), Message(role="user", content="And then?")
    second = reply(asked, answered, further)
    assert second not in (reply(further), reply(answered, further))  # or remembering would not show
    captured = capsys.readouterr()
    assert captured.out == f"{first}\n{second}\n{first}\n"
    assert "the conversation is forgotten" in captured.err
    assert "tokens/s" in captured.err


def test_a_chat_goes_on_after_what_it_cannot_answer(monkeypatch, capsys):
    assert not in_chat(monkeypatch, "word " * 600 + "\n/help\nHi\n")
    captured = capsys.readouterr()
    assert "error: the conversation: has 1" in captured.err
    assert "the model takes 512" in captured.err
    assert "/help: no such command; /reset forgets" in captured.err
    assert captured.out.count("\n") == 1


def test_an_answer_ends_where_the_model_is_full(generator):
    """The room is smaller than --max-tokens."""
    said: list[str] = []
    lines = iter(["Hi", "/exit"])
    form = ChatFormat(generator.tokenizer)
    ids = form.encode([Message(role="user", content="Hi")])
    small = Generator(generator._decoder.model, generator.tokenizer, max_length=len(ids) + 3)
    chat(small, form, Sampling(max_tokens=100), read=lambda: next(lines), write=said.append, note=str)
    assert small.speed.decode_tokens == 2


def test_ctrl_c_stops_the_answer_and_not_the_chat(generator):
    """And what had been said is part of the conversation."""
    lines = iter(["Hi", KeyboardInterrupt(), "Go on", EOFError()])
    said: list[str] = []
    conversations: list[list[Message]] = []

    class Watched(ChatFormat):
        def encode(self, messages):
            conversations.append(list(messages))
            return super().encode(messages)

    def read() -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(text: str) -> None:
        said.append(text)
        if len(said) == 4:
            raise KeyboardInterrupt

    chat(
        generator,
        Watched(generator.tokenizer),
        Sampling(max_tokens=30, temperature=0),
        read=read,
        write=write,
        note=str,
    )
    assert len(said) > 10
    assert [len(messages) for messages in conversations] == [1, 3]
    assert conversations[1][1] == {"role": "assistant", "content": "".join(said[:4])}
    assert not generator._decoder.model.caches_are_setup()


def test_a_chat_through_a_pipe():
    command = [sys.executable, "-m", "qrecipes.cli.main", "generate", MODEL, "--chat"]
    done = subprocess.run(
        [*command, "--max-tokens", "5", *GREEDY],
        input="Hi\nHow are you?\n",
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 2
    assert "> " not in done.stdout


def refused(capsys, *arguments: str) -> tuple[int, str]:
    code = command_line("generate", *arguments, "--device", "cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"One\n\nTwo\n", "line 2: is empty, and a prompt needs text"),
        ("a.txt", b"", "a.txt: is empty; write one prompt a line"),
        ("a.txt", b"One\n\xff\n", "line 2: not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n', 'line 1: expected an object with either "prompt" or "messages"'),
        ("a.jsonl", b'{"prompt": 3}\n', 'line 1: "prompt" must be a text that is not empty, got 3'),
        ("a.jsonl", b'{"messages": []}\n', 'line 1: "messages" must be a list that is not empty'),
        ("a.jsonl", b'{"messages": [{"role": "human", "content": ""}]}\n', "line 1: message 1: expected"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "b"}]}\n',
            "line 1: the last message is the assistant's",
        ),
        ("a.csv", b"a\n", "unknown kind of file; --prompts takes .txt, .jsonl"),
        ("a.txt", b"One\n" + b"word " * 600 + b"\n", "line 2: has "),
        ("a.txt", b"One\n" + b"word " * 100 + b"\n", "line 2: its "),
    ],
)
def test_a_file_of_prompts_is_refused_by_its_line(name, content, message, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    code, error = refused(capsys, MODEL, "--prompts", str(path), "--max-tokens", "400")
    assert code in (1, 2)
    assert message in error
    assert str(path) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a", "--temperature", "-1"), "temperature: -1.0 is out of range"),
        (("--prompt", "a", "--batch-size", "0"), "--batch-size: 0 is out of range"),
        (("--prompt", "a", "--stop", ""), "--stop: is empty"),
        (("--prompt", "a", "--system", "b"), "--system: a prompt that is continued as it is has no place"),
        (("--prompt", "a", "--max-tokens", "600"), "--prompt: its 2 tokens and max_tokens = 600 exceed"),
        (("--chat", "--raw"), "--raw: a chat needs a template"),
        (("--chat", "--output", "a"), "--output: a chat goes to the terminal"),
        (("--chat", "--no-stream"), "--no-stream: a chat is always streamed"),
        (("--prompts", "a.txt", "--stream"), "--stream: the prompts of a file are continued side by side"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, capsys):
    code, error = refused(capsys, MODEL, *arguments)
    assert code == 2
    assert error.startswith("error: " + message)


def test_a_missing_file_and_a_missing_model_are_named(tmp_path, capsys):
    code, error = refused(capsys, MODEL, "--prompts", "nowhere.txt")
    assert (code, "--prompts: nothing matches 'nowhere.txt'" in error) == (1, True)
    code, error = refused(capsys, str(tmp_path / "nowhere"), "--prompt", "a")
    assert (code, "is neither a run nor an export" in error) == (2, True)


def test_a_stored_model_is_cast_when_asked(opened, monkeypatch, capsys):
    """`open_model` leaves a run's and an export's type as it is; --dtype is not passed over."""
    seen: list[torch.dtype] = []

    def watch(decoder, tokens, padding):
        seen.append(next(decoder.model.parameters()).dtype)
        return torch.zeros(len(tokens), 512)

    def stored(name, **wanted):
        return replace(opened, model=deepcopy(opened.model))

    monkeypatch.setattr("qrecipes.export.opened.open_model", stored)
    monkeypatch.setattr("qrecipes.generation.cache.CachedDecoder.prefill", watch)
    for dtype in ("auto", "bfloat16"):
        arguments = ("--prompt", "a", "--max-tokens", "1", "--dtype", dtype)
        assert not command_line("generate", "runs/any", *arguments, *GREEDY)
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.slow
def test_smollm2_continues_as_in_transformers(capsys):
    """The published library's own tokenizer, cache and loop, in float32."""
    folder = os.environ.get("QRECIPES_SMOLLM2")
    if not folder:
        pytest.skip("QRECIPES_SMOLLM2 does not name a folder of SmolLM2-135M-Instruct")
    transformers = pytest.importorskip("transformers")
    prompt = "The history of the bicycle begins"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(folder))
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    output = theirs.generate(tokens, max_new_tokens=40, do_sample=False, pad_token_id=2)
    arguments = ("--prompt", prompt, "--max-tokens", "40", *GREEDY)
    assert not command_line("generate", f"hf:{folder}", *arguments)
    assert capsys.readouterr().out == tokenizer.decode(output[0], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(("bits", "stored"), [("4", 4), ("8", 8), ("none", None)])
def test_kv_bits_are_those_of_the_cache(opened, bits, stored, capsys):
    arguments = ("--prompt", "Once upon a time", "--max-tokens", "20", "--no-stream", *GREEDY)
    assert not command_line("generate", MODEL, *arguments, "--kv-bits", bits)
    generator = Generator(opened.model, opened.require_tokenizer(), kv_bits=stored)
    assert capsys.readouterr().out == "Once upon a time" + added(generator, "Once upon a time", 20) + "\n"


def test_a_models_own_bits_need_a_model_that_has_them(capsys):
    arguments = ("--prompt", "Lily", "--max-tokens", "5", "--kv-bits", "model", *GREEDY)
    assert command_line("generate", MODEL, *arguments)
    assert "does not quantize its keys; give 8 or 4" in capsys.readouterr().err
    assert not command_line("generate", MODEL, *arguments, "--activations", "a8kv4")


def test_a_runs_configuration_names_the_bits_of_its_cache(tmp_path, capsys, monkeypatch):
    output, seen = tmp_path / "run", []
    small = ["steps=1", "data.sequence_length=32", "data.batch_size=2", "schedule.warmup_steps=0"]
    small += ["log.evaluate_batches=1", "generation.kv_bits=4"]
    assert not command_line("run", "train", "--config", "quickstart_baseline", f"output={output}", *small)
    of = CachePlan.of.__func__

    def remember(cls, attention, fqn, bits):
        seen.append(bits)
        return of(cls, attention, fqn, bits)

    monkeypatch.setattr(CachePlan, "of", classmethod(remember))
    for folder in (output, output / "export"):
        arguments = ("generate", str(folder), "--prompt", "Lily", "--max-tokens", "3", *GREEDY)
        assert not command_line(*arguments)
        assert set(seen) == {4}
        seen.clear()
        assert not command_line(*arguments, "--kv-bits", "8")
        assert set(seen) == {8}
        seen.clear()
        assert not command_line(*arguments, "--kv-bits", "none")
        assert not seen


def test_a_run_as_it_trained_generates_over_a_cache_of_its_own_bits(tmp_path, capsys):
    output = tmp_path / "run"
    small = ["steps=1", "data.sequence_length=32", "data.batch_size=2", "schedule.warmup_steps=0"]
    small += ["log.evaluate_batches=1", "export.at_end=false", "transform.0.name=activation_quantization"]
    small += ["transform.0.pattern=a8kv4"]
    assert not command_line("run", "train", "--config", "quickstart_baseline", f"output={output}", *small)
    texts = set()
    for way in (("--as-trained", "--kv-bits", "model"), ("--activations", "a8kv4", "--kv-bits", "4")):
        arguments = ("generate", str(output), "--prompt", "Lily", "--max-tokens", "20", *GREEDY)
        capsys.readouterr()
        assert not command_line(*arguments, *way)
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    assert command_line(*arguments, "--as-trained", "--activations", "a8kv4")
    assert "is quantized already" in capsys.readouterr().err
