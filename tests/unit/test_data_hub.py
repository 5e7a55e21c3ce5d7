"""Hugging Face datasets: whole and streamed, from local folders, resumed to the token."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict

from qrecipes.config.run import DataSection, TaskSection
from qrecipes.data import build_data, build_training_data
from qrecipes.data.tokenizers import BytesTokenizer
from qrecipes.errors import CheckpointError, DataError

TEXTS = [f"<{i}>" + "abcdefghij"[: i % 9] * (i % 5) for i in range(60)]
"""Documents of many lengths, some longer than a sequence."""
LENGTH = 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Three Parquet shards."""
    path = tmp_path / "corpus"
    path.mkdir()
    for shard in range(3):
        Dataset.from_dict({"text": TEXTS[shard * 20 : shard * 20 + 20]}).to_parquet(
            path / f"train-{shard}.parquet"
        )
    return str(path)


@pytest.fixture(params=["parquet", "jsonl", "save_to_disk", "save_to_disk with splits"])
def any_folder(request, folder, tmp_path: Path) -> str:
    path = tmp_path / "other"
    match request.param:
        case "parquet":
            return folder
        case "jsonl":
            path.mkdir()
            (path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        case "save_to_disk":
            Dataset.from_dict({"text": TEXTS}).save_to_disk(path)
        case "save_to_disk with splits":
            DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}).save_to_disk(path)
    return str(path)


def section(path: str, **kwargs) -> DataSection:
    defaults = {"source": "dataset", "files": (path,), "sequence_length": LENGTH, "batch_size": 2}
    return DataSection(**(defaults | kwargs))


def build(data: DataSection, *, rank=0, world=1, seed=0):
    return build_training_data(data, BytesTokenizer(), task=TaskSection(), seed=seed, rank=rank, world=world)


def packed(texts=TEXTS) -> list[int]:
    return [token for text in texts for token in (*text.encode(), 256)]


def rows(data, batches: int) -> torch.Tensor:
    drawn = [data.next_batch() for _ in range(batches)]
    for batch in drawn:
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    return torch.cat([torch.cat([batch.inputs, batch.targets[:, -1:]], 1) for batch in drawn])


def windows(tokens: list[int]) -> list[list[int]]:
    return [tokens[i : i + LENGTH + 1] for i in range(0, len(tokens) - LENGTH, LENGTH)]


def test_whole_dataset_is_its_documents_in_order(any_folder):
    data = build(section(any_folder, shuffle=False))
    expected = windows(packed())
    assert data.num_sequences == len(expected)
    assert rows(data, 5).tolist() == expected[:10]


def test_stream_is_its_documents_in_order(any_folder):
    data = build(section(any_folder, shuffle=False, streaming=True))
    assert data.num_sequences is None
    expected = windows(packed() * 3)  # documents of one epoch flow into the next
    assert rows(data, len(expected) // 2).tolist() == expected[: len(expected) // 2 * 2]
    assert data.epoch >= 2


def test_shuffled_stream_gives_the_same_sequences_in_another_order(folder, monkeypatch):
    monkeypatch.setattr("qrecipes.data.hub.BLOCK_SEQUENCES", 10)
    plain = rows(build(section(folder, shuffle=False, streaming=True)), 10).tolist()
    mixed = rows(build(section(folder, streaming=True)), 10).tolist()
    assert mixed != plain
    for block in (slice(0, 10), slice(10, 20)):
        assert sorted(mixed[block]) == sorted(plain[block])
    assert mixed != rows(build(section(folder, streaming=True), seed=1), 10).tolist()


def test_shards_of_a_shuffled_stream_come_in_another_order_each_epoch(folder):
    orders = []
    for shuffle in (True, False):
        reader = build(section(folder, shuffle=shuffle, streaming=True)).reader
        tokens = reader.window(4 * len(packed()))
        text = "".join(map(chr, tokens)).split(chr(256))
        orders.append([text[i : i + len(TEXTS)] for i in range(0, 4 * len(TEXTS), len(TEXTS))])
    shuffled, plain = orders
    assert plain == [TEXTS] * 4
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in shuffled)
    assert any(epoch != TEXTS for epoch in shuffled)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3)])  # 3 shards: by shard, and by document
def test_stream_resumes_exactly_anywhere(folder, monkeypatch, shuffle, rank, world):
    """Within blocks, at their ends, and over ends of the data."""
    monkeypatch.setattr("qrecipes.data.hub.BLOCK_SEQUENCES", 6)
    monkeypatch.setattr("qrecipes.data.hub.READ_DOCUMENTS", 4)
    data = section(folder, shuffle=shuffle, streaming=True, batch_size=1)
    unbroken, resumed = build(data, rank=rank, world=world), build(data, rank=rank, world=world)
    epochs = set()
    for _ in range(40):
        epochs.add(unbroken.epoch)
        state = json.loads(json.dumps(unbroken.state_dict()))
        expected = rows(unbroken, 3)
        for _ in range(2):
            resumed.load_state_dict(state)
            assert torch.equal(rows(resumed, 3), expected)
    assert len(epochs) > 1


def test_ranks_of_a_stream_share_its_documents(folder):
    seen = []
    for rank in range(2):
        data = build(section(folder, shuffle=False, streaming=True), rank=rank, world=2)
        tokens = rows(data, 12)[:, :-1].flatten().tolist()
        text = "".join(map(chr, tokens)).split(chr(256))
        seen.append({document for document in text[:-1] if document in TEXTS})
    assert not seen[0] & seen[1]


def test_state_of_a_stream_holds_every_rank(folder, monkeypatch):
    data = section(folder, streaming=True)
    parts = [build(data, rank=rank, world=2) for rank in range(2)]
    for part in parts:
        part.next_batch()

    def gather(states, own):
        states[:] = [part._own_state() for part in parts]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    state = parts[0].state_dict()
    for rank, part in enumerate(parts):
        resumed = build(data, rank=rank, world=2)
        resumed.load_state_dict(state)
        assert torch.equal(rows(resumed, 3), rows(part, 3))


def test_stream_refuses_a_state_of_another_world(folder):
    data = section(folder, streaming=True)
    with pytest.raises(CheckpointError, match=r"made on 1 ranks, this is a stream on 2"):
        build(data, world=2).load_state_dict(build(data).state_dict())
    with pytest.raises(CheckpointError, match="not streamed"):
        build(data).load_state_dict(build(section(folder)).state_dict())


@pytest.mark.parametrize("streaming", [True, False])
def test_validation_split_is_held_out(tmp_path, streaming):
    saved = DatasetDict(
        {"train": Dataset.from_dict({"text": TEXTS}), "test": Dataset.from_dict({"text": ["held out"]})}
    )
    saved.save_to_disk(tmp_path / "saved")
    data = section(str(tmp_path / "saved"), validation_split="test", streaming=streaming)
    _, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    batches = list(held_out)
    assert sum(batch.count() for batch in batches) == len(packed(["held out"])) - 1
    assert batches[0].inputs[0].tolist() == packed(["held out"])[:LENGTH]


def test_validation_fraction_of_a_whole_dataset(folder):
    data = section(folder, validation_fraction=0.2, shuffle=False)
    training, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    assert training.num_sequences * LENGTH + 1 + len(held_out.source.stream) == len(packed())


def refusal(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        build(data).next_batch()
    return str(caught.value)


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_name_without_network_says_so(streaming, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = refusal(section("someone/something", streaming=streaming))
    assert "dataset someone/something, split train cannot be loaded" in text
    assert "check the name and the network" in text


@pytest.mark.parametrize("streaming", [True, False])
def test_missing_column_names_those_there_are(folder, streaming):
    assert "no column 'content'; there are text" in refusal(
        section(folder, text_column="content", streaming=streaming)
    )


def test_missing_split_is_named(any_folder):
    text = refusal(section(any_folder, split="nonsense"))
    assert "nonsense" in text
    assert "train" in text


@pytest.mark.parametrize("streaming", [True, False])
def test_column_without_text_is_refused(tmp_path, streaming):
    Dataset.from_dict({"text": [1, 2, 3]}).save_to_disk(tmp_path / "numbers")
    assert "column 'text' holds int, not text" in refusal(
        section(str(tmp_path / "numbers"), streaming=streaming)
    )


def test_more_ranks_than_documents_are_refused(tmp_path):
    Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="no text for this rank"):
        build(section(str(tmp_path / "one"), streaming=True), rank=1, world=2).next_batch()


def test_stream_of_blank_documents_ends_in_an_error(tmp_path):
    Dataset.from_dict({"text": [" ", ""]}).save_to_disk(tmp_path / "blank")
    assert "no text for this rank" in refusal(section(str(tmp_path / "blank"), streaming=True))
