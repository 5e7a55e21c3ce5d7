"""Text files become documents, documents one run of tokens, and bad files say what is wrong where."""

from __future__ import annotations

import gzip
import json
import lzma
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qrecipes.config.run import DataSection, TaskSection
from qrecipes.data import build_data, build_training_data, build_validation_data
from qrecipes.data.packing import pack
from qrecipes.data.tokenizers import BytesTokenizer
from qrecipes.errors import ConfigError, DataError

DOCUMENTS = ["first document\nof two lines", "the second, naïve one", "漢字 and more"]


def section(*files: Path | str, **kwargs) -> DataSection:
    defaults = {"source": "text", "files": tuple(map(str, files)), "sequence_length": 4, "batch_size": 1}
    return DataSection(**(defaults | kwargs))


def build(data: DataSection, tokenizer=None, **kwargs):
    where = {"task": TaskSection(), "seed": 0, "rank": 0, "world": 1} | kwargs
    return build_training_data(data, tokenizer or BytesTokenizer(), **where)


def tokens(data) -> list[int]:
    return data.source.stream.read(0, len(data.source.stream)).tolist()


def packed(*documents: str) -> list[int]:
    return [token for document in documents for token in (*document.encode(), 256)]


def encode_file(kind: str) -> bytes:
    """DOCUMENTS as a file of that kind."""
    if kind == "txt":
        return "\n---\n".join(DOCUMENTS).encode()
    if kind == "jsonl":
        return "".join(json.dumps({"id": i, "text": d}) + "\n\n" for i, d in enumerate(DOCUMENTS)).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["", ".xz", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_kind_of_file_holds_the_same_documents(tmp_path, kind, compression):
    compress = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[compression]
    path = tmp_path / f"corpus.{kind}{compression}"
    path.write_bytes(compress(encode_file(kind)))
    assert tokens(build(section(path, document_separator="---"))) == packed(*DOCUMENTS)


def test_a_txt_file_is_one_document_to_the_byte(tmp_path):
    text = "one\r\n---\n\n  two \n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert tokens(build(section(tmp_path / "a.txt"))) == packed(text)


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "world"}')
    assert tokens(build(section(tmp_path / "a.txt", tmp_path / "b.jsonl"))) == packed("hello", "world")


def test_separated_documents_may_be_blank_and_end_in_carriage_returns(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"---\none\r\n---\r\n\n \n---\ntwo\n--- \nthree\n---\n")
    data = build(section(tmp_path / "a.txt", document_separator="---"))
    assert tokens(data) == packed("one\r", "two\n--- \nthree")


def test_globs_are_sorted_and_each_file_read_once(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 3)
    assert tokens(build(section(tmp_path / "c.txt", tmp_path / "*.txt"))) == packed("ccc", "aaa", "bbb")


def test_a_name_with_glob_characters_can_be_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("bracketed")
    assert tokens(build(section(tmp_path / "a[1].txt"))) == packed("bracketed")


def test_text_column_is_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "wrong", "content": "right"}\n')
    assert tokens(build(section(tmp_path / "a.jsonl", text_column="content"))) == packed("right")


class Marked(BytesTokenizer):
    """Bytes with another beginning and end."""

    def __init__(self, bos_id: int | None, eos_id: int | None, vocab_size: int = 300) -> None:
        self.bos_id, self.eos_id, self.vocab_size = bos_id, eos_id, vocab_size


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (298, 299, [298, 97, 299, 298, 98, 299]),
        (298, None, [298, 97, 298, 98]),
        (None, 299, [97, 299, 98, 299]),
        (299, 299, [97, 299, 98, 299]),  # once, as GPT-2 has it
    ],
)
def test_documents_are_framed_by_what_the_tokenizer_has(bos, eos, expected):
    stream = pack(["a", "b"], Marked(bos, eos), key="data.files", origin="test")
    assert stream.read(0, len(stream)).tolist() == expected


def test_one_document_needs_no_separator_but_several_do():
    assert len(pack(["abc"], Marked(None, None), key="data.files", origin="test")) == 3
    with pytest.raises(
        DataError, match=r"neither a beginning nor an end of text.*eos_token in tokenizer_config.json"
    ):
        pack(["a", "b"], Marked(None, None), key="data.files", origin="test")


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_tokens_take_as_few_bytes_as_the_vocabulary_allows(vocab_size, itemsize):
    largest = vocab_size - 1
    stream = pack(["ab"], Marked(None, largest, vocab_size), key="data.files", origin="test")
    assert stream.pieces[0].dtype.itemsize == itemsize
    assert stream.read(0, 3).tolist() == [97, 98, largest]


def test_tokenizing_in_batches_changes_nothing(monkeypatch):
    texts = [chr(97 + i % 26) * (i % 7) for i in range(50)]
    whole = pack(texts, BytesTokenizer(), key="data.files", origin="test")
    monkeypatch.setattr("qrecipes.data.packing.BATCH_CHARACTERS", 10)
    monkeypatch.setattr("qrecipes.data.packing.BATCH_DOCUMENTS", 3)
    parts = pack(texts, BytesTokenizer(), key="data.files", origin="test")
    np.testing.assert_array_equal(whole.pieces[0], parts.pieces[0])
    assert whole.origin == "42 documents in test"  # the 8 empty ones are none


def test_held_out_files_are_read_whole(tmp_path):
    (tmp_path / "train.txt").write_text("to be trained on " * 5)
    (tmp_path / "held.txt").write_text("held out")
    data = section(tmp_path / "train.txt", validation_files=(str(tmp_path / "held.txt"),), batch_size=2)
    _, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    batches = list(held_out)
    assert [batch.inputs.tolist() for batch in batches] == [[packed("held out")[:4], packed("held out")[4:8]]]
    assert sum(batch.count() for batch in batches) == len(packed("held out")) - 1


def test_held_out_fraction_is_the_end_and_not_trained_on(tmp_path):
    text = "".join(chr(0x100 + i) for i in range(100))  # two bytes each
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = section(tmp_path / "a.txt", validation_fraction=0.25)
    training, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    end = tokens(held_out)
    assert tokens(training) + end == packed(text)
    assert len(end) == pytest.approx(0.25 * 201, abs=4)  # one sequence
    alone = build_validation_data(data, BytesTokenizer(), task=TaskSection(), seed=5, rank=0, world=1)
    assert tokens(alone) == end


def test_without_held_out_data_there_is_none(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    where = {"task": TaskSection(), "seed": 0, "rank": 0, "world": 1}
    assert build_validation_data(section(tmp_path / "a.txt"), BytesTokenizer(), **where) is None


def test_evaluating_on_training_files_warns(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    data = section(tmp_path / "a.txt", validation_files=(str(tmp_path / "a.txt"),))
    with pytest.warns(UserWarning, match=r"a\.txt.*is also trained on"):
        build_validation_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(data)


def test_description_counts_documents_tokens_and_sequences(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 4000)
    expected = f"1,000 sequences of 4, 4,001 tokens from 1 document in {tmp_path / 'a.txt'}"
    assert build(section(tmp_path / "a.txt")).describe() == expected
    assert build(section(tmp_path / "a.txt")).max_token() == 256


def refusal(data: DataSection, error: type[Exception] = DataError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        build(data, **kwargs)
    return str(caught.value)


def test_missing_files_are_all_listed(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    text = refusal(section(tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "*.jsonl"))
    assert f"data.files: nothing matches '{tmp_path}/b.txt', '{tmp_path}/*.jsonl'" in text
    assert "a.txt" not in text


def test_a_folder_is_refused_with_a_glob_to_use(tmp_path):
    assert f"{tmp_path} is a folder; name its files, such as '{tmp_path}/*.txt'" in refusal(section(tmp_path))


def test_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.jsonl").write_text("")
    assert "data.files: no text in 2 files" in refusal(section(tmp_path / "a.txt", tmp_path / "b.jsonl"))


def test_corpus_shorter_than_a_sequence_gives_the_numbers(tmp_path):
    (tmp_path / "a.txt").write_text("1234567")
    text = refusal(section(tmp_path / "a.txt", sequence_length=8))
    assert "8 tokens from 1 document" in text
    assert "fewer than one sequence of 8 and its last target (9)" in text
    assert "lower data.sequence_length to 7 or less" in text
    assert build(section(tmp_path / "a.txt", sequence_length=7)).num_sequences == 1


def test_too_little_to_hold_out_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("1234567")
    assert "data.validation_fraction: 0.5 of 1 sequences" in refusal(
        section(tmp_path / "a.txt", validation_fraction=0.5)
    )


def test_text_without_tokenizer_is_refused(tmp_path):
    data = section(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r'tokenizer: missing.*\[tokenizer\] table.*kind = "bytes"'):
        build_training_data(data, None, task=TaskSection(), seed=0, rank=0, world=1)


def test_task_and_source_must_agree(tmp_path):
    text = refusal(section(tmp_path / "a.txt"), ConfigError, task=TaskSection(kind="classification"))
    assert 'set task.kind = "language_modeling"' in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "unfinished', "line 3: not JSON at column 21: Invalid control character"),
        ('["text"]', "line 3: holds list, not an object with a key 'text'"),
        (
            '{"content": "x", "id": 1}',
            "line 3: no column 'text'; there are content, id; set data.text_column",
        ),
        ('{"text": null}', "line 3: column 'text' holds NoneType, not text"),
        ('{"text": "\\ud83d"}', "line 3: 'text' holds half of a surrogate pair"),
    ],
)
def test_wrong_json_lines_are_named(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    assert f"{tmp_path / 'a.jsonl'}: {expected}" in refusal(section(tmp_path / "a.jsonl"))


def test_whole_surrogate_pairs_are_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42"}\n')
    assert tokens(build(section(tmp_path / "a.jsonl"))) == packed("🙂")


def test_parquet_without_the_column_names_those_there_are(tmp_path):
    pq.write_table(pa.table({"content": ["x"], "id": [1]}), tmp_path / "a.parquet")
    text = refusal(section(tmp_path / "a.parquet"))
    assert f"{tmp_path / 'a.parquet'}: no column 'text'; there are content, id" in text


def test_parquet_row_without_text_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    assert "row 2: column 'text' holds NoneType" in refusal(section(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "separator"), [("a.txt", None), ("a.txt", "---"), ("a.jsonl", None), ("a.txt.xz", None)]
)
def test_bytes_that_are_not_utf8_are_named(tmp_path, name, separator):
    data = '{"text": "déjà vu"}\n'.encode() + b'{"text": "na\xefve"}\n'
    (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    text = refusal(section(tmp_path / name, document_separator=separator))
    assert f"{tmp_path / name}: not UTF-8 at byte {data.index(0xEF)} (0xef)" in text


@pytest.mark.parametrize("name", ["a.csv", "a", "a.csv.gz", "a.xz"])
def test_unknown_kind_of_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("text")
    text = refusal(section(tmp_path / name))
    assert f"{tmp_path / name}: unknown kind of file; data.files takes .txt, .jsonl, .parquet" in text


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "not compressed"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_damaged_compression_is_named(tmp_path, suffix, damage, kind):
    data = encode_file(kind) * 20
    whole = {".xz": lzma.compress, ".gz": gzip.compress}[suffix](data)
    changed = whole[:-8] + bytes(255 - byte for byte in whole[-8:])  # the check sum lies there
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes({"cut": whole[:-20], "changed": changed, "not compressed": data}[damage])
    assert f"{path}: damaged or cut short" in refusal(section(path, document_separator="---"))


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(encode_file("parquet")[:-30])
    assert f"{tmp_path / 'a.parquet'}: damaged or no Parquet file" in refusal(section(tmp_path / "a.parquet"))
