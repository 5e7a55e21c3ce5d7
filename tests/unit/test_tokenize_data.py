"""Text becomes shards that hold its tokens in order, however many processes work and however often they are
killed."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from harness import command_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipes.config.run import DataSection, TaskSection, TokenizerSection
from qrecipes.config.tokenization import Tokenization, load
from qrecipes.data import build_training_data, load_tokenizer
from qrecipes.data import corpus as corpus_module
from qrecipes.data import shards as shards_module
from qrecipes.data import tokenize as tokenize_module
from qrecipes.data.encoding import encode_in_order
from qrecipes.data.packing import pack
from qrecipes.data.tokenize import tokenize
from qrecipes.data.tokens import open_tokens
from qrecipes.errors import ConfigError, DataError, QRecipesError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "tokenize_data.py"
BYTES = TokenizerSection(kind="bytes")


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Waiting for the disk matters when the power fails, which no test here does."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


STORIES = TokenizerSection(path="asset:stories260k")


def configured(folder: Path, *files: Path, **kwargs) -> Tokenization:
    defaults = {"tokenizer": BYTES, "output": str(folder), "files": tuple(map(str, files))}
    return Tokenization(**(defaults | kwargs))


def write_lines(path: Path, documents) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def framed(documents) -> list[int]:
    """What the bytes tokenizer makes of documents."""
    return [token for text in documents if text.strip() for token in (*text.encode(), 256)]


def tokens_in(folder: Path, split: str = "train") -> list[int]:
    """The shards' integers, read without any of our code."""
    dtype = json.loads((folder / "index.json").read_text())["dtype"]
    files = sorted((folder / split).glob("*.bin"))
    return [
        int(token) for file in files for token in np.fromfile(file, {"uint16": "<u2", "uint32": "<u4"}[dtype])
    ]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def numbered(count: int) -> list[str]:
    return [f"document {i} " + "x" * (i * 7 % 40) for i in range(count)]


TEXTS = st.lists(
    st.one_of(st.text(max_size=30), st.sampled_from(["", " \n", "same", "long " * 30])), max_size=12
)


@given(
    corpora=st.lists(TEXTS, min_size=1, max_size=3).filter(lambda c: any(t.strip() for d in c for t in d)),
    shard_tokens=st.integers(3, 200),
    characters=st.integers(1, 60),
)
@settings(deadline=None, max_examples=60)
def test_shards_joined_are_the_tokens_of_the_documents_in_order(corpora, shard_tokens, characters):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "CHUNK_CHARACTERS", characters)
        root = Path(name)
        corpora = [[t.encode("utf-8", "replace").decode() for t in documents] for documents in corpora]
        files = [write_lines(root / f"{i}.jsonl", documents) for i, documents in enumerate(corpora)]
        out = root / "out"
        report = tokenize(configured(out, *files, shard_tokens=shard_tokens), workers=0)
        documents = [text for each in corpora for text in each]
        expected = framed(documents)
        assert tokens_in(out) == expected
        shards = json.loads((out / "index.json").read_text())["splits"]["train"]["shards"]
        sizes = [shard["tokens"] for shard in shards]
        assert sizes[:-1] == [shard_tokens] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= shard_tokens
        ends = np.flatnonzero(np.array(expected) == 256) // shard_tokens
        assert [shard["documents"] for shard in shards] == [int((ends == i).sum()) for i in range(len(sizes))]
        assert report.documents == {"train": sum(bool(t.strip()) for t in documents)}
        assert report.blank_documents == sum(not t.strip() for t in documents)
        assert report.tokens == {"train": len(expected)}
        assert report.text_bytes == {"train": sum(len(t.encode()) for t in documents if t.strip())}
        stream = open_tokens([str(out)], "uint16", key="data.files", verify=True)
        assert stream.read(0, len(stream)).tolist() == expected


def test_the_number_of_processes_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 300)
    file = write_lines(tmp_path / "a.jsonl", numbered(200))
    folders = []
    for workers in (0, 1, 3):
        folders.append(tmp_path / f"out{workers}")
        made = configured(folders[-1], file, tokenizer=STORIES, shard_tokens=500, validation_fraction=0.2)
        tokenize(made, workers=workers)
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])
    assert len(list((folders[0] / "train").glob("*.bin"))) > 5


@pytest.mark.parametrize("kind", ["hf", "tiktoken", "sentencepiece"])
def test_tokens_are_those_that_training_on_the_text_would_use(tmp_path, kind, request):
    section = tokenizer_section(tmp_path, kind)
    texts = ["once upon a time", "there was a cat", "</s> is text here"]
    file = write_lines(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    tokenize(configured(out, file, tokenizer=section), workers=0)
    tokenizer = load_tokenizer(section)
    before = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    expected = [token for text in texts for token in (*before, *tokenizer.encode(text), tokenizer.eos_id)]
    assert tokens_in(out) == expected
    packed = pack(texts, tokenizer, key="data.files", origin="test")
    assert tokens_in(out) == packed.read(0, len(packed)).tolist()


def tokenizer_section(folder: Path, kind: str) -> TokenizerSection:
    """A small tokenizer of that kind, its file compressed where the kind allows it."""
    import base64
    import lzma

    folder = folder / kind
    folder.mkdir()
    if kind == "hf":
        return STORIES
    if kind == "tiktoken":
        lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
        file = folder / "ranks.tiktoken.xz"
        file.write_bytes(lzma.compress("".join(lines).encode()))
        return TokenizerSection(path=str(file), kind="tiktoken", pattern="gpt2")
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["once upon a time there was a cat"] * 20), model_prefix=str(folder / "small"),
        vocab_size=30, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return TokenizerSection(path=str(folder / "small.model"))


@pytest.mark.parametrize("kind", ["hf", "tiktoken", "sentencepiece"])
def test_the_copied_tokenizer_is_the_one_that_made_the_shards(tmp_path, kind):
    section = tokenizer_section(tmp_path, kind)
    file = write_lines(tmp_path / "a.jsonl", numbered(5))
    out = tmp_path / "out"
    tokenize(configured(out, file, tokenizer=section), workers=0)
    original, copy = (load_tokenizer(s) for s in (section, replace(section, path=str(out / "tokenizer"))))
    assert copy.encode("once upon a time 12") == original.encode("once upon a time 12")
    assert (copy.bos_id, copy.eos_id) == (original.bos_id, original.eos_id)
    # The reader compares it with the index, so this would be refused otherwise.
    assert len(open_tokens([str(out)], "uint16", key="data.files", tokenizer=copy))


def test_the_copy_brings_what_names_the_end_of_text(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "[stop]": 2}, "a"))
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": 2}')
    section = TokenizerSection(path=str(tmp_path / "model"))
    out = tmp_path / "out"
    tokenize(configured(out, write_lines(tmp_path / "a.jsonl", ["b", "b"]), tokenizer=section), workers=0)
    assert tokens_in(out) == [1, 2, 1, 2]
    assert load_tokenizer(TokenizerSection(path=str(out / "tokenizer"))).eos_id == 2


class Crash(Exception):  # noqa: N818 - no error of the program
    """Where a test has the process die."""


def crash_at(patch, call: int, *, after: bool) -> None:
    """Die at the `call`-th rename of a file, before or after it happens."""
    count = 0

    def rename(source, target):
        nonlocal count
        count += 1
        if after:
            os.rename(source, target)
        if count == call:
            raise Crash
        if not after:
            os.rename(source, target)

    patch.setattr(shards_module.os, "replace", rename)


@pytest.mark.parametrize("after", [False, True])
def test_dying_at_any_rename_loses_and_doubles_nothing(tmp_path, monkeypatch, after):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 150)
    monkeypatch.setattr(tokenize_module, "COMMIT_S", 0.0)
    files = [write_lines(tmp_path / f"{i}.jsonl", [*numbered(12), " "]) for i in range(2)]
    sizes = {"shard_tokens": 70, "validation_fraction": 0.3}
    tokenize(configured(tmp_path / "unbroken", *files, **sizes), workers=0)
    expected = contents(tmp_path / "unbroken")
    for call in range(1, 200):
        made = configured(tmp_path / f"broken{call}", *files, **sizes)
        with monkeypatch.context() as patch:
            crash_at(patch, call, after=after)
            try:
                tokenize(made, workers=0)
            except Crash:
                pass
            else:
                break  # the whole work takes fewer renames
        tokenize(made, workers=0)
        assert contents(tmp_path / f"broken{call}") == expected, call
    assert 20 < call < 199


def test_dying_again_and_again_still_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 150)
    monkeypatch.setattr(tokenize_module, "COMMIT_S", 0.0)
    file = write_lines(tmp_path / "a.jsonl", numbered(40))
    tokenize(configured(tmp_path / "unbroken", file, shard_tokens=100), workers=0)
    made = configured(tmp_path / "broken", file, shard_tokens=100)
    deaths = 0
    while True:
        with monkeypatch.context() as patch:
            crash_at(patch, 6, after=deaths % 2 == 0)
            try:
                report = tokenize(made, workers=0)
                break
            except Crash:
                deaths += 1
    assert deaths > 3
    assert report.new_bytes < report.text_bytes["train"] / 2  # the last process did its own part only
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_sigkill_leaves_no_process_and_the_same_command_goes_on(tmp_path):
    text = "".join(f"the {i}th line of a corpus, " + "and on " * (i % 9) + "\n---\n" for i in range(60_000))
    (tmp_path / "a.txt").write_text(text)
    arguments = [str(tmp_path / "a.txt"), "--document-separator=---", "--tokenizer-kind", "bytes"]
    arguments += ["--shard-tokens", "80000"]
    command = [sys.executable, str(TOOL), *arguments, "--output", str(tmp_path / "killed"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "killed/train/00003.bin").exists() or process.poll() is not None)
    helpers = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "index.json").exists()
    assert len(helpers) >= 3, helpers  # a fork server, and two workers
    wait_for(lambda: not any(Path(f"/proc/{helper}").exists() for helper in helpers))
    separated = configured(tmp_path / "killed", tmp_path / "a.txt", document_separator="---")
    separated = replace(separated, shard_tokens=80_000)
    report = tokenize(separated, workers=0)
    assert tokens_in(tmp_path / "killed") == framed(text.split("\n---\n"))
    assert report.documents == {"train": 60_000}
    tokenize(replace(separated, output=str(tmp_path / "unbroken")), workers=0)
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    try:
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
        return [int(child) for file in files for child in file.read_text().split()]
    except FileNotFoundError:  # it has just ended
        return []


def descendants(pid: int) -> list[int]:
    return [*children(pid), *(below for child in children(pid) for below in descendants(child))]


def test_a_dead_worker_is_reported_and_the_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 10_000)
    file = write_lines(tmp_path / "a.jsonl", numbered(20_000))
    made = configured(tmp_path / "out", file)

    def kill_workers(report):
        here = os.getpid()
        for worker in set(descendants(here)) - set(children(here)):  # children of the fork server
            os.kill(worker, signal.SIGKILL)

    with pytest.raises(QRecipesError, match=r"a worker process was killed, .* run the same command again"):
        tokenize(made, workers=1, notify=kill_workers)
    tokenize(made, workers=0)
    assert tokens_in(tmp_path / "out") == framed(numbered(20_000))


def test_what_a_worker_raises_is_raised_here():
    no_text = corpus_module.Chunk("train", [7], corpus_module.Cursor(), 0)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'encode'"):
        list(encode_in_order([no_text] * 3, BYTES, dtype="uint16", validation_fraction=0.0, workers=1))


def test_one_document_may_span_many_shards(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 500)
    report = tokenize(configured(tmp_path / "out", tmp_path / "a.txt", shard_tokens=64), workers=0)
    assert report.shards == 79  # 5001 / 64
    assert tokens_in(tmp_path / "out") == framed(["abcdefghij" * 500])


def test_complete_folder_is_left_alone(tmp_path):
    made = configured(tmp_path / "out", write_lines(tmp_path / "a.jsonl", numbered(9)), shard_tokens=50)
    first = tokenize(made, workers=0)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = tokenize(made, workers=0)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert (again.tokens, again.documents, again.shards) == (first.tokens, first.documents, first.shards)
    assert (again.new_bytes, again.seconds, again.mb_per_s) == (0, 0.0, 0.0)


# What is held out


@given(
    documents=st.lists(st.text(min_size=1, max_size=8), min_size=30, max_size=60),
    fraction=st.floats(0.1, 0.9),
)
@settings(deadline=None, max_examples=30)
def test_held_out_documents_are_drawn_by_their_text(documents, fraction):
    documents = [t.encode("utf-8", "replace").decode() for t in documents]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = configured(
            root / "out", write_lines(root / "a.jsonl", documents), validation_fraction=fraction
        )
        try:
            tokenize(made, workers=0)
        except DataError as error:  # few distinct documents may all fall on one side
            assert "no text to train on" in str(error) or "held out no document" in str(error)  # noqa: PT017
            return
        sides = {split: split_documents(tokens_in(root / "out", split)) for split in ("train", "validation")}
    kept = [t for t in documents if t.strip()]
    assert sorted(sides["train"] + sides["validation"]) == sorted(kept)
    assert not set(sides["train"]) & set(sides["validation"])
    assert sides["train"] == [t for t in kept if t in set(sides["train"])]  # in their order


def split_documents(tokens: list[int]) -> list[str]:
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == 256:
            found.append([])
        else:
            found[-1].append(token)
    return [bytes(document).decode() for document in found[:-1]]


def test_the_share_held_out_is_the_one_asked_for(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(4000)])
    report = tokenize(configured(tmp_path / "out", file, validation_fraction=0.1), workers=0)
    assert sum(report.documents.values()) == 4000
    assert abs(report.documents["validation"] - 400) < 4 * 19  # standard deviation of the count: 19


def test_adding_documents_moves_none_to_the_other_side(tmp_path):
    for count in (50, 80):
        file = write_lines(tmp_path / f"{count}.jsonl", numbered(count))
        tokenize(configured(tmp_path / f"out{count}", file, validation_fraction=0.3), workers=0)
    few, many = (set(split_documents(tokens_in(tmp_path / f"out{n}", "validation"))) for n in (50, 80))
    assert few == many & set(numbered(50))


def test_held_out_files_become_their_own_split(tmp_path):
    a, b = (write_lines(tmp_path / f"{name}.jsonl", [name * 3, name * 4]) for name in "ab")
    report = tokenize(configured(tmp_path / "out", a, validation_files=(str(b),)), workers=0)
    assert tokens_in(tmp_path / "out") == framed(["aaa", "aaaa"])
    assert tokens_in(tmp_path / "out", "validation") == framed(["bbb", "bbbb"])
    assert report.documents == {"train": 2, "validation": 2}
    with pytest.raises(DataError, match=r"a\.jsonl is also in files"):
        tokenize(configured(tmp_path / "other", a, validation_files=(str(a),)), workers=0)


def test_nothing_held_out_is_refused(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(
        DataError, match=r"validation_fraction: 1e-06 held out no document \(2 documents, 0 blank"
    ):
        tokenize(configured(tmp_path / "out", file, validation_fraction=1e-6), workers=0)


# Types


def words(folder: Path, count: int) -> TokenizerSection:
    """A tokenizer of `count` words w0, w1, ..., the last of them the end of text."""
    vocabulary = {f"w{i}": i for i in range(count - 1)} | {"</s>": count - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenizerSection(path=str(folder / "tokenizer.json"))


@pytest.mark.parametrize(("count", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_the_type_holds_the_last_number_of_the_vocabulary(tmp_path, count, dtype):
    section = words(tmp_path, count)
    file = write_lines(tmp_path / "a.jsonl", [f"w3 w{count - 2}"])
    tokenize(configured(tmp_path / "out", file, tokenizer=section), workers=0)
    assert json.loads((tmp_path / "out/index.json").read_text())["dtype"] == dtype
    assert tokens_in(tmp_path / "out") == [3, count - 2, count - 1]
    assert (tmp_path / "out/train/00000.bin").stat().st_size == 3 * (2 if dtype == "uint16" else 4)


def test_a_type_too_small_is_refused_and_a_larger_one_taken(tmp_path):
    section = words(tmp_path, 65537)
    file = write_lines(tmp_path / "a.jsonl", ["w1"])
    with pytest.raises(ConfigError, match="dtype: uint16 holds 65,536 values, the tokenizer has 65,537"):
        tokenize(configured(tmp_path / "out", file, tokenizer=section, dtype="uint16"), workers=0)
    assert not (tmp_path / "out").exists()
    tokenize(configured(tmp_path / "wide", file, dtype="uint32"), workers=0)
    assert tokens_in(tmp_path / "wide") == framed(["w1"])
    assert (tmp_path / "wide/train/00000.bin").stat().st_size == 4 * 3


# Bad input


def test_bytes_that_are_not_utf8_are_named_by_file_and_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n---\nna\xefve")
    made = configured(tmp_path / "out", tmp_path / "a.txt", document_separator="---")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 11 \(0xef\)"):
        tokenize(made, workers=0)


def test_after_a_wrong_line_is_mended_the_work_goes_on_behind_the_right_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(tokenize_module, "COMMIT_S", 0.0)
    file = write_lines(tmp_path / "a.jsonl", numbered(50))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:40], '{"text": \n', *lines[40:]]))
    made = configured(tmp_path / "out", file, shard_tokens=300)
    with pytest.raises(DataError, match=r"a\.jsonl: line 41: not JSON"):
        tokenize(made, workers=0)
    file.write_text("".join(lines))
    report = tokenize(made, workers=0)
    assert tokens_in(tmp_path / "out") == framed(numbered(50))
    assert report.new_bytes < report.text_bytes["train"] / 2


def interrupted(folder: Path, monkeypatch, *files: Path, **kwargs) -> Tokenization:
    """A tokenization that died in its second file."""
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(tokenize_module, "COMMIT_S", 0.0)
    made = configured(folder, *files, **kwargs)
    seen = 0

    def notify(report):
        nonlocal seen
        seen += 1
        if seen == 8:
            raise Crash

    with pytest.raises(Crash):
        tokenize(made, workers=0, notify=notify)
    return made


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shard_tokens": 99}, "progress.json was made with settings.shard_tokens = 100, now it is 99"),
        ({"dtype": "uint32"}, "made with dtype = 'uint16', now it is 'uint32'"),
        ({"tokenizer": STORIES}, "made with tokenizer.files"),
        ({"validation_fraction": 0.5}, "made with settings.validation_fraction = 0.0, now it is 0.5"),
    ],
)
def test_going_on_with_other_settings_is_refused(tmp_path, monkeypatch, change, expected):
    files = [write_lines(tmp_path / f"{i}.jsonl", numbered(20)) for i in range(2)]
    made = interrupted(tmp_path / "out", monkeypatch, *files, shard_tokens=100)
    with pytest.raises(ConfigError) as caught:
        tokenize(replace(made, **change), workers=0)
    assert expected in str(caught.value)
    assert "--overwrite" in str(caught.value)
    tokenize(replace(made, **change), workers=0, overwrite=True)
    tokenize(replace(made, **change, output=str(tmp_path / "fresh")), workers=0)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_going_on_in_a_changed_corpus_is_refused(tmp_path, monkeypatch):
    files = [write_lines(tmp_path / f"{i}.jsonl", numbered(20)) for i in range(2)]
    made = interrupted(tmp_path / "out", monkeypatch, *files, shard_tokens=100)
    with pytest.raises(ConfigError, match=r"files: number 1 was .*0\.jsonl.* now it is .*1\.jsonl"):
        tokenize(replace(made, files=(str(files[1]),)), workers=0)
    write_lines(files[1], ["another beginning", *numbered(20)[1:]])
    with pytest.raises(DataError, match=r"1\.jsonl: its first \d+ documents are not those that were"):
        tokenize(made, workers=0)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    made = configured(tmp_path / "out", write_lines(tmp_path / "a.jsonl", numbered(3)))
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"holds 'thesis\.tex' and is no folder of tokenized data"):
            tokenize(made, workers=0, overwrite=overwrite)
    assert contents(tmp_path / "out") == {"thesis.tex": b"precious"}


def test_a_full_disk_is_reported_and_the_work_goes_on(tmp_path, monkeypatch):
    made = configured(tmp_path / "out", write_lines(tmp_path / "a.jsonl", numbered(30)), shard_tokens=100)

    def full(source, target):
        if "train" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(DataError, match="out: cannot be written: No space left on device"):
            tokenize(made, workers=0)
    tokenize(made, workers=0)
    assert tokens_in(tmp_path / "out") == framed(numbered(30))


def test_two_processes_do_not_write_one_folder(tmp_path):
    made = configured(tmp_path / "out", write_lines(tmp_path / "a.jsonl", numbered(3)))
    with (
        tokenize_module._alone(tmp_path / "out"),
        pytest.raises(ConfigError, match="another process is writing"),
    ):
        tokenize(made, workers=0)
    tokenize(made, workers=0)


def test_only_blank_documents_are_no_text(tmp_path):
    with pytest.raises(DataError, match=r"files: no text to train on \(3 documents, 3 blank\)"):
        tokenize(configured(tmp_path / "out", write_lines(tmp_path / "a.jsonl", ["", " ", "\n"])), workers=0)


def test_documents_that_nothing_separates_are_refused(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    section = TokenizerSection(path=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="several documents, and the tokenizer has neither"):
        tokenize(
            configured(tmp_path / "o", write_lines(tmp_path / "a.jsonl", ["a", "b"]), tokenizer=section),
            workers=0,
        )


# Datasets


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_by_split_and_gone_on_with(tmp_path, monkeypatch, streaming):
    from datasets import Dataset, DatasetDict

    splits = {"train": numbered(40), "test": ["held out one", "held out two"]}
    DatasetDict(
        {name: Dataset.from_dict({"id": range(len(d)), "body": d}) for name, d in splits.items()}
    ).save_to_disk(str(tmp_path / "saved"))
    kwargs = {
        "source": "dataset", "validation_split": "test", "text_column": "body", "streaming": streaming,
        "shard_tokens": 100,
    }  # fmt: skip
    made = interrupted(tmp_path / "out", monkeypatch, tmp_path / "saved", **kwargs)
    report = tokenize(made, workers=0)
    assert 0 < report.new_bytes < sum(report.text_bytes.values())
    assert tokens_in(tmp_path / "out") == framed(splits["train"])
    assert tokens_in(tmp_path / "out", "validation") == framed(splits["test"])
    with pytest.raises(DataError, match="no column 'text'; there are id, body"):
        tokenize(replace(made, text_column="text", output=str(tmp_path / "no")), workers=0)


def test_csv_is_read_as_a_dataset(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text('text,n\n"one, two",1\nthree,2\n')
    tokenize(configured(tmp_path / "out", tmp_path / "csv", source="dataset"), workers=0)
    assert tokens_in(tmp_path / "out") == framed(["one, two", "three"])


# The file and the flags


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tokenize_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "data").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_files_are_right_and_say_what_runs_them(path):
    made = load(path, {})
    assert made.output == f"data/{path.stem}"
    assert path.read_text().startswith(f"# tools/tokenize_data.py --config {path.stem}")


def test_flags_lie_over_the_file(tmp_path):
    (tmp_path / "a.toml").write_text(
        'output = "o"\nfiles = ["a.txt"]\nshard_tokens = 5\n[tokenizer]\nkind = "tiktoken"\npath = "x"\n'
    )
    made = load(tmp_path / "a.toml", {"shard_tokens": 7, "tokenizer": {"path": "y"}})
    section = TokenizerSection(kind="tiktoken", path="y")
    assert made == Tokenization(output="o", files=("a.txt",), shard_tokens=7, tokenizer=section)


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ('output = "o"\nshard_token = 5', {}, "a.toml:2: shard_token: unknown key; did you mean"),
        ('output = "o"\nfiles = ["a"]', {}, "a.toml:1: tokenizer: missing; required: The tokenizer"),
        ('output = "o"\nfiles = ["a"]\nshard_tokens = 0', {}, "a.toml:3: shard_tokens: 0 is out of range"),
        ('output = "o"\nfiles = ["a"]\nstreaming = true\n[tokenizer]\nkind = "bytes"', {},
         "a.toml:3: streaming: only source 'dataset' has it"),
        ('files = ["a"]\n[tokenizer]\nkind = "bytes"\npath = "x"', {"output": "o"},
         "a.toml:4: tokenizer.path: 'x' has no use"),
        ('files = ["a"]\n[tokenizer]\nkind = "bytes"', {"output": "o", "validation_fraction": 2.0},
         "command line: validation_fraction: 2.0 is out of range; must be less than 1"),
        ("output = ", {}, "a.toml:1: not TOML"),
    ],
)  # fmt: skip
def test_wrong_keys_are_named_with_their_line(tmp_path, text, flags, expected):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "a.toml", flags)
    assert expected in str(caught.value)


def test_the_tool_tokenizes_reports_and_verifies(tmp_path, tool, capsys):
    out, report = tmp_path / "out", tmp_path / "speed.json"
    arguments = [
        "--config",
        "tinyshakespeare",
        "--output",
        str(out),
        "--workers",
        "0",
        "--report",
        str(report),
    ]
    assert tool.main([*arguments, "--title", "mine"]) == 0
    printed = capsys.readouterr().out
    index = json.loads((out / "index.json").read_text())["splits"]
    assert f"train: 1 documents, {index['train']['tokens']:,} tokens" in printed
    assert "MB/s" in printed
    result = json.loads(report.read_text())["results"][0]
    assert result["title"] == "mine"
    assert result["tokens"] == sum(split["tokens"] for split in index.values())
    assert result["mb_per_s"] == pytest.approx(
        result["text_mb"] / result["seconds"], rel=0.05
    )  # rounded to 10 ms
    assert str(tmp_path) not in report.read_text()
    assert tool.main(["--verify", str(out)]) == 0
    assert "5 shards, every checksum right" in capsys.readouterr().out
    assert tool.main(["--verify", str(out / "validation")]) == 0
    shard = out / "train" / "00001.bin"
    data = bytearray(shard.read_bytes())
    data[1234] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"00001\.bin: damaged: its SHA-256 is"):
        tool.main(["--verify", str(out)])


def test_an_unknown_config_lists_the_known(tool):
    with pytest.raises(
        ConfigError, match="neither a file nor one of books, c4, fineweb_edu, local, slimpajama, tiny"
    ):
        tool.main(["--config", "pile"])


def test_training_reads_the_folder(tmp_path):
    out = tmp_path / "out"
    file = write_lines(tmp_path / "a.jsonl", numbered(60))
    tokenize(configured(out, file, shard_tokens=300, validation_fraction=0.2), workers=0)
    data = DataSection(
        source="tokens", files=(str(out / "train"),), sequence_length=16, batch_size=2, shuffle=False
    )
    training = build_training_data(data, load_tokenizer(BYTES), task=TaskSection(), seed=0, rank=0, world=1)
    assert training.next_batch().inputs.flatten().tolist() == tokens_in(out)[:32]
    assert (
        command_line(
            "run", "train", "--config", "tiny/llm", "steps=2", f"output={tmp_path / 'run'}", "device=cpu",
            "model.args.vocab_size=257", 'tokenizer.kind="bytes"', 'data.source="tokens"',
            f'data.files=["{out / "train"}"]', f'data.validation_files=["{out / "validation"}"]',
            "log.progress=false",
        )
        == 0
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("val_loss" in row for row in rows)
