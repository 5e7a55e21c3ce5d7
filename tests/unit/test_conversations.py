"""Rows of every shape and file become conversations; bad rows say where they are, and none is lost
silently."""

from __future__ import annotations

import gzip
import json
import lzma
import warnings
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from qrecipes.config import parse
from qrecipes.config.run import ConversationSection, DataSection, TaskSection
from qrecipes.data import build_data, build_training_data
from qrecipes.data.conversations import hold_out, read_conversations
from qrecipes.data.formats import detect
from qrecipes.data.rows import Row, are_local, read_rows
from qrecipes.data.tokenizers import BytesTokenizer
from qrecipes.errors import ConfigError, DataError

ROWS = [
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"instruction": "sagt hé, 漢字", "input": "", "output": 'a "b",\nc'},
    {"instruction": "go", "input": "", "output": "went"},
]
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


def section(*files: Path | str, **kwargs) -> DataSection:
    """Conversations in the plain template; keywords of ConversationSection go there."""
    own = {key: kwargs.pop(key) for key in list(kwargs) if key in ConversationSection.__dataclass_fields__}
    conversation = ConversationSection(**({"template": "plain"} | own))
    defaults = {"source": "conversations", "sequence_length": 64, "batch_size": 1}
    return DataSection(files=tuple(map(str, files)), conversation=conversation, **(defaults | kwargs))


def read(*files: Path | str, **kwargs):
    data = section(*files, **kwargs)
    return read_conversations(data.files, data.split, data, BytesTokenizer(), "data.files")


def texts(conversations) -> list[str]:
    """Each conversation as text, "|" where it ends."""
    tokens = (conversations.tokens(i)[0].tolist() for i in range(len(conversations)))
    return [bytes(ord("|") if token == 256 else token for token in ids).decode() for ids in tokens]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode_file(kind: str, rows) -> bytes:
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind == "jsonl":
        return "\n\n".join(map(json.dumps, rows)).encode()
    if kind == "csv":
        import csv
        import io

        sink = io.StringIO()
        writer = csv.DictWriter(sink, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        return b"\xef\xbb\xbf" + sink.getvalue().encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["", ".xz", ".gz"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, kind, compression):
    compress = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[compression]
    path = tmp_path / f"rows.{kind}{compression}"
    path.write_bytes(compress(encode_file(kind, ROWS)))
    rows, origin = read_rows((str(path),), "train", "data.files")
    assert [dict(row.values) for row in rows] == ROWS
    assert origin == str(path)
    assert texts(read(path)) == ["add\n\n1 2\n\n3|", 'sagt hé, 漢字\n\na "b",\nc|', "go\n\nwent|"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a", "type": "GSM_SV", "original_question": "no"},  # MetaMathQA
        {"instruction": "q", "input": "", "output": "a", "text": "q a"},  # Alpaca
        {"instruction": "q", "context": None, "response": "a", "category": "no"},  # Dolly
        {"prompt": "q", "completion": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {
            "prompt": "no",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"role": "prompter", "content": "q"}, {"role": "model", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": "a"},
            ]
        },
    ],
    ids=lambda row: ",".join(row),
)
def test_formats_are_detected(tmp_path, row):
    assert texts(read(write(tmp_path / "a.jsonl", [row]))) == ["q\n\na|"]


def test_text_is_learnt_whole(tmp_path):
    found = read(write(tmp_path / "a.jsonl", [{"text": "one <|endoftext|>"}, {"text": "two"}]))
    assert texts(found) == ["one <|endoftext|>|", "two|"]
    assert found.trained.all()


def test_columns_are_mapped(tmp_path):
    rows = [{"q": "one", "more": "x", "answer": "wrong", "a": "two", "persona": "kind"}]
    columns = {"instruction": "q", "input": "more", "output": "a", "system": "persona"}
    assert texts(read(write(tmp_path / "a.jsonl", rows), columns=columns)) == ["kind\n\none\n\nx\n\ntwo|"]
    chats = [{"dialog": TALK}]
    found = read(write(tmp_path / "b.jsonl", chats), columns={"messages": "dialog"})
    assert texts(found) == ["hi\n\nho|so\n\nno|"]


def test_the_first_row_may_not_be_ambiguous(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "prompt": "p", "answer": "a"}])
    with pytest.raises(
        DataError, match=r"line 1: columns 'prompt' and 'question' could each be the instruct"
    ):
        read(path)
    assert texts(read(path, columns={"instruction": "question"})) == ["q\n\na|"]


def test_a_format_is_described_with_its_columns():
    row = Row("here", {"query": "q", "response": "a"})
    assert (
        detect(row, ConversationSection()).describe()
        == "instruction (instruction = query, output = response)"
    )


def test_a_csv_file_spells_messages_in_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(encode_file("csv", [{"messages": json.dumps(TALK)}]))
    assert texts(read(path)) == ["hi\n\nho|so\n\nno|"]


def test_the_system_message_comes_from_the_row_or_the_run(tmp_path):
    own = [{"role": "system", "content": "mine"}, *TALK[:2]]
    path = write(tmp_path / "a.jsonl", [{"messages": own}, {"messages": TALK[:2]}])
    assert texts(read(path, system="yours")) == ["mine\n\nhi\n\nho|", "yours\n\nhi\n\nho|"]


@pytest.mark.parametrize(
    ("train_on", "expected"), [("answers", "ho|no|"), ("last_answer", "no|"), ("all", "hi\n\nho|so\n\nno|")]
)
def test_what_is_learnt(tmp_path, train_on, expected):
    found = read(write(tmp_path / "a.jsonl", [{"messages": TALK}]), train_on=train_on)
    ids, trained = found.tokens(0)
    assert "".join(chr(i) if i < 256 else "|" for i in ids[trained]) == expected


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": }\n',
            r"a\.jsonl: line 2: not JSON at column 10: Expecting value",
        ),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"line 2: holds an array, not an object with named columns"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl: line 2: not UTF-8 at byte 24 \(0xff\)"),
        (
            "a.json",
            b'[{"text": "x"},\n {"text" "y"}]',
            r"a\.json: not JSON in line 2 at column 10: Expecting ':'",
        ),
        ("a.json", b'{"text": "x"}', r"a\.json: holds an object, not an array of objects"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json: row 2: holds a number, not an object"),
        ("a.json", b'["\xff"]', r"a\.json: not UTF-8 at byte 2"),
        ("a.csv", b"text,n\nx,1\ny\n", r"a\.csv: row 2 \(line 3\): 1 fields, and the header names 2 columns"),
        ("a.csv", b'text\nx\n"y\n', r"a\.csv: line 3: not CSV: unexpected end of data"),
        ("a.csv", b"text\n\xe9\n", r"a\.csv: not UTF-8 at byte 5 \(0xe9\)"),
        ("a.csv", b"", r"a\.csv: empty"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: damaged or no Parquet file"),
        ("a.jsonl.xz", b"no", r"a\.jsonl\.xz: damaged or cut short"),
        ("a.txt", b"no", r"cannot be loaded"),  # no file of rows by its name, so the name of a dataset
    ],
)
def test_unreadable_files_say_where(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(tmp_path / name)


def chat(*turns: tuple[object, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (chat(("user", "hi")), r"line 2: column 'messages': the assistant says nothing \(user\)"),
        (chat(), r"the assistant says nothing \(no messages\)"),
        (chat(("user", None), ("assistant", "a")), r"column 'messages', message 1, 'content' holds nothing"),
        (chat(("user", 3), ("assistant", "a")), r"message 1, 'content' holds int, not text"),
        (chat(("robot", "x")), r"message 1: role 'robot' is not one of system, user, human"),
        ({"messages": [{"role": "user"}]}, r"message 1: no 'content'; there are role"),
        ({"messages": ["x"]}, r"message 1 is str, not an object with 'role' and 'content'"),
        ({"messages": "x"}, r"column 'messages' holds text that is no JSON list"),
        ({"messages": None}, r"column 'messages' holds nothing, not a list of messages"),
        ({"text": "x"}, r"line 2: no column 'messages'; there are text"),
        (chat(("user", "a\ud800"), ("assistant", "a")), r"'content' holds half of a surrogate pair"),
        (chat(("user", "\ufdd0"), ("assistant", "a")), r"line 2: 'content' holds U\+FDD0"),
        (chat(("tool", "x"), ("assistant", "a")), r"line 2: the chat template \(plain\) refuses.*of tool"),
    ],
)
def test_a_malformed_row_is_an_error_that_says_where_or_is_dropped_and_counted(tmp_path, bad, words):
    path = write(tmp_path / "a.jsonl", [{"messages": TALK}, bad, {"messages": TALK}])
    with pytest.raises(DataError, match=words) as error:
        read(path)
    assert f"{path}: line 2: " in str(error.value)
    assert 'malformed = "drop"' in str(error.value)
    found = read(path, malformed="drop")
    assert (len(found), found.report.malformed, found.report.rows) == (2, 1, 3)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q"}, r"tell no format: expected a request and an answer"),
        ({"instruction": 3, "output": "a"}, r"line 1: column 'instruction' holds int, not text"),
        ({"instruction": "q", "output": None}, r"column 'output' holds nothing, not text"),
    ],
)
def test_a_missing_or_wrong_column_is_named(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read(write(tmp_path / "a.jsonl", [row]))


def test_a_mapped_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"query": "q", "response": "a"}])
    with pytest.raises(
        DataError,
        match=r"no column 'reply', which data\.conversation\.columns\.output names; "
        r"there are query, response",
    ):
        read(path, columns={"output": "reply"})
    with pytest.raises(
        DataError, match=r"no column for messages, which the format 'messages' needs; there are"
    ):
        read(path, format="messages")
    later = write(tmp_path / "b.jsonl", [{"query": "q", "response": "a"}, {"query": "q"}])
    with pytest.raises(DataError, match=r"line 2: no column 'response'; there are query"):
        read(later)


def test_empty_answers_are_dropped_and_counted_with_a_warning(tmp_path):
    rows = [
        {"question": "q", "answer": "a"},
        {"question": "q", "answer": " \n"},
        {"question": "q", "answer": ""},
    ]
    data = section(write(tmp_path / "a.jsonl", rows))
    with pytest.warns(UserWarning, match=r"data\.files: of 3 rows 2 with an empty answer dropped"):
        built = build_training_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    assert "1 of 3 rows (2 with an empty answer dropped)" in built.describe()
    multi = [{"messages": [*TALK, {"role": "assistant", "content": ""}]}, {"messages": TALK}]
    assert read(write(tmp_path / "b.jsonl", multi)).report.blank == 1
    blank = [{"text": "x"}, {"text": " "}]
    assert read(write(tmp_path / "c.jsonl", blank)).report.blank == 1


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": ""}])
    with pytest.raises(
        DataError, match=r"no conversation to learn from: 0 of 1 rows \(1 with an empty answer"
    ):
        read(path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"0 of 0 rows from .*empty\.jsonl as nothing"):
        read(tmp_path / "empty.jsonl")


LONG = [
    {"question": "q", "answer": "a" * 28},  # "q\n\n", 28, end: 32 tokens
    {"question": "q", "answer": "a" * 29},
    {"question": "q" * 30, "answer": "a"},  # no answer in the first 32
    {"question": "q" * 29, "answer": "a"},  # 33
]


def test_what_is_too_long_is_truncated_and_counted(tmp_path):
    found = read(write(tmp_path / "a.jsonl", LONG), sequence_length=32)
    assert texts(found) == ["q\n\n" + "a" * 28 + "|", "q\n\n" + "a" * 29, "q" * 29 + "\n\na"]
    report = found.report
    assert (report.rows, report.kept, report.truncated, report.unanswered) == (4, 3, 2, 1)
    assert "1 with no answer in the tokens that fit dropped, 2 truncated" in found.describe()


def test_what_is_too_long_is_dropped_and_counted(tmp_path):
    found = read(write(tmp_path / "a.jsonl", LONG), sequence_length=33, too_long="drop")
    assert found.lengths.tolist() == [32, 33, 33]
    assert (found.report.kept, found.report.too_long) == (3, 1)
    assert "1 too long dropped" in found.describe()


def test_what_is_too_long_is_an_error_that_says_where(tmp_path):
    with pytest.raises(
        DataError, match=r"line 2: 33 tokens, 1 more than data\.sequence_length; raise it, or"
    ):
        read(write(tmp_path / "a.jsonl", LONG), sequence_length=32, too_long="error")


def test_no_counts_no_warning(tmp_path):
    data = section(write(tmp_path / "a.jsonl", ROWS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = build_training_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    assert "3 of 3 rows from" in built.describe()


# Local files and datasets


@pytest.mark.parametrize(
    ("files", "local"),
    [
        (("a.jsonl",), True),
        (("data/*.json.xz", "b.csv"), True),
        (("asset:smalltalk/conversations.jsonl",), True),
        (("openai/gsm8k", "main"), False),
        (("tatsu-lab/alpaca",), False),
        (("folder",), False),
    ],
)
def test_names_tell_files_from_datasets(files, local):
    assert are_local(files, "data.files") is local


def test_files_and_datasets_do_not_mix(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.files: 'openai/gsm8k' names a dataset, and the other"):
        read(tmp_path / "a.jsonl", "openai/gsm8k")


@pytest.fixture
def saved(tmp_path: Path) -> str:
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]
    parts = {"train": Dataset.from_list(rows[:3]), "test": Dataset.from_list(rows[3:])}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def test_a_saved_dataset_and_its_splits(saved):
    assert texts(read(saved)) == [f"q{i}\n\na{i}|" for i in range(3)]
    data = section(saved, validation_split="test", sequence_length=8, packing=False)
    training, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    assert (training.num_sequences, held_out.num_sequences) == (3, 2)


def test_a_folder_of_files_is_a_dataset(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", ROWS)
    assert len(read(tmp_path / "folder")) == 3


def test_rows_of_datasets_are_named(tmp_path):
    bad = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}]
    Dataset.from_list(bad).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        DataError, match=r"dataset .*saved, split train: row 2: column 'answer' holds nothing"
    ):
        read(tmp_path / "saved")


def test_a_dataset_that_is_not_here_says_what_to_check():
    with pytest.raises(
        DataError, match=r"dataset nobody/nothing \(main\), split train cannot be loaded.*network"
    ):
        read("nobody/nothing", "main")


def test_files_have_no_splits(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"data\.split: 'test', but files have no splits"):
        read(path, split="test")
    with pytest.raises(ConfigError, match=r"data\.validation_split: files have no splits"):
        build_data(
            section(path, validation_split="test"),
            BytesTokenizer(),
            task=TaskSection(),
            seed=0,
            rank=0,
            world=1,
        )


# Held-out conversations


def test_the_last_conversations_are_held_out_and_none_is_in_both(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
    found = read(write(tmp_path / "a.jsonl", rows))
    training, held_out = hold_out(found, 0.25)
    assert texts(training) + texts(held_out) == texts(found)
    assert len(held_out) == 2  # round(2.5) is even
    assert len(hold_out(found, 0.01)[1]) == 1
    with pytest.raises(DataError, match="leaves none to train on"):
        hold_out(training.part(0, 1), 0.5)


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_data_counts_its_own(tmp_path, packing):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
    data = section(write(tmp_path / "a.jsonl", rows), validation_fraction=0.2, packing=packing)
    training, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    assert (
        "8 conversations of 7 to 7 tokens (median 7), 56 tokens, 24 of them learnt (42.9%)"
        in training.describe()
    )
    assert "2 conversations" in held_out.describe()
    assert sum(batch.count() for batch in held_out) == 6  # a, the number and the end, twice
    assert training.max_token() == 256


def test_validation_files_are_read_by_the_same_rules(tmp_path):
    train, test = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:1])
    data = section(train, validation_files=(str(test),))
    _, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    assert held_out.num_sequences == 1
    shared = replace(data, validation_files=(str(train),))
    with pytest.warns(UserWarning, match="is also trained on"):
        build_data(shared, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)


# Configuration


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            'data.conversation.columns={question="q"}',
            r"data\.conversation\.columns: 'question' is not one of",
        ),
        ("data.conversation.length_buckets=[64,256]", r"length_buckets: have no use with packing"),
        (
            "data.conversation={packing=false,length_buckets=[256,64]}",
            r"length_buckets: \[256, 64\] do not ascend",
        ),
        (
            "data.conversation={packing=false,length_buckets=[64,128]}",
            r"length_buckets: the longest is 128, and data.sequence_length, the longest row, is 256",
        ),
        ("data.conversation={format='text',system='x'}", r"data\.conversation\.system: text has no turns"),
        ("data.streaming=true", r"data\.streaming: only source 'dataset' has it"),
        ("data.source=text", r"data\.conversation: has no use with data\.source 'text'"),
        ("data.conversation.format=chat", r"'chat' is not one of"),
        ("model.source=torchtune:llama3_2_1b", r"'conversations' is text, and there is no tokenizer"),
    ],
)
def test_impossible_combinations_stop_before_anything_is_read(override, words):
    with pytest.raises(ConfigError, match=words):
        parse.load("tiny/chat", [override])
