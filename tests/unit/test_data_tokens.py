"""Tokenized shards are mapped, not read, joined in order, and checked against their index."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from qrecipes.config.run import DataSection, TaskSection, TokenizerSection
from qrecipes.config.tokenization import Tokenization
from qrecipes.data import build_data, build_training_data, load_tokenizer
from qrecipes.data import tokens as tokens_module
from qrecipes.data.tokenize import tokenize
from qrecipes.data.tokens import open_tokens, write_shard
from qrecipes.data.vocabulary import PROBE, fingerprint
from qrecipes.errors import DataError


def section(*files: Path | str, **kwargs) -> DataSection:
    defaults = {"source": "tokens", "files": tuple(map(str, files)), "sequence_length": 4, "batch_size": 2}
    return DataSection(**(defaults | kwargs))


def build(data: DataSection, tokenizer=None):
    return build_training_data(data, tokenizer, task=TaskSection(), seed=0, rank=0, world=1)


def refusal(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        build(data)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_are_one_run_of_tokens_across_their_bounds(tmp_path, dtype):
    tokens = np.arange(70, 101)
    for i, piece in enumerate(np.split(tokens, [3, 3, 20])):
        write_shard(tmp_path / f"{i}.bin", piece, dtype)
    data = build(section(tmp_path / "*.bin", shuffle=False, token_dtype="uint16"))
    assert data.num_sequences == 7
    for i in range(3):
        batch = data.next_batch()
        assert batch.inputs.flatten().tolist() == tokens[i * 8 : i * 8 + 8].tolist()
        assert torch.equal(batch.targets, batch.inputs + 1)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert data.max_token() == 100
    assert data.describe() == "7 sequences of 4, 31 tokens from 4 shards"


def test_without_an_index_the_section_says_the_type(tmp_path):
    np.array([1, 70000, 3, 4, 5], "<u4").tofile(tmp_path / "a.bin")
    assert build(section(tmp_path / "a.bin", token_dtype="uint32")).max_token() == 70000


def test_shards_are_mapped_from_disk(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(10))
    stream = build(section(tmp_path / "a.bin")).source.stream
    assert all(isinstance(piece, np.memmap) for piece in stream.pieces)


def test_index_is_optional_in_its_parts(tmp_path):
    np.arange(10, dtype="<u4").tofile(tmp_path / "a.bin")
    (tmp_path / "a.json").write_text('{"dtype": "uint32", "vocabulary": "other keys are fine"}')
    assert build(section(tmp_path / "a.bin")).max_token() == 9


def test_held_out_fraction_is_the_end(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(41))
    data = section(tmp_path / "a.bin", validation_fraction=0.2, shuffle=False)
    training, held_out = build_data(data, None, task=TaskSection(), seed=0, rank=0, world=1)
    assert training.num_sequences == 8
    assert training.max_token() == 32
    targets = torch.cat([batch.targets for batch in held_out]).flatten()
    assert targets[targets != -100].tolist() == list(range(34, 41))


def test_held_out_shards_are_named_apart(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(41))
    write_shard(tmp_path / "b.bin", np.arange(100, 106))
    data = section(tmp_path / "a.bin", validation_files=(str(tmp_path / "b.bin"),))
    _, held_out = build_data(data, None, task=TaskSection(), seed=0, rank=0, world=1)
    assert sum(batch.count() for batch in held_out) == 5
    assert held_out.max_token() == 105


def test_writing_refuses_what_does_not_fit(tmp_path):
    for tokens in (np.array([1 << 16]), np.array([-1])):
        with pytest.raises(ValueError, match="do not fit uint16"):
            write_shard(tmp_path / "a.bin", tokens)
    assert not (tmp_path / "a.bin").exists()


def test_odd_file_size_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(11))
    text = refusal(section(tmp_path / "a.bin"))
    assert f"{tmp_path / 'a.bin'}: 11 bytes is no multiple of 2 (uint16)" in text
    assert "cut short, or data.token_dtype" in text


def test_a_shard_cut_at_a_token_is_found_by_its_index(tmp_path):
    write_shard(tmp_path / "a.bin", np.arange(10))
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-4])
    assert "holds 8 tokens of uint16, its index says 10" in refusal(section(tmp_path / "a.bin"))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ('{"dtype": ', "a.json: not JSON"),
        ("[]", "a.json: holds list"),
        (json.dumps({"dtype": "float32"}), "a.json: dtype 'float32'; expected uint16 or uint32"),
    ],
)
def test_wrong_index_is_refused(tmp_path, index, expected):
    write_shard(tmp_path / "a.bin", np.arange(10))
    (tmp_path / "a.json").write_text(index)
    assert expected in refusal(section(tmp_path / "a.bin"))


def test_missing_empty_and_other_files_are_refused(tmp_path):
    assert "data.files: nothing matches" in refusal(section(tmp_path / "*.bin"))
    (tmp_path / "a.bin").write_bytes(b"")
    assert "0 tokens from 1 shard are fewer than one sequence of 4" in refusal(section(tmp_path / "a.bin"))
    (tmp_path / "a.npy").write_bytes(b"")
    assert "unknown kind of file; data.files takes .bin" in refusal(section(tmp_path / "a.npy"))
    (tmp_path / "b.bin.xz").write_bytes(b"")
    assert "cannot be mapped while compressed" in refusal(section(tmp_path / "b.bin.xz"))


# Folders of tokenized data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of eleven shards and a held-out one, which tests copy before they break it."""
    root = tmp_path_factory.mktemp("tokens")
    (root / "a.txt").write_text("\n---\n".join(f"story number {i} of a cat" for i in range(100)))
    (root / "b.txt").write_text("held out")
    tokenize(
        Tokenization(
            output=str(root / "data"),
            files=(str(root / "a.txt"),),
            validation_files=(str(root / "b.txt"),),
            document_separator="---",
            tokenizer=TokenizerSection(path="asset:stories260k"),
            shard_tokens=130,
        ),
        workers=0,
    )
    return root / "data"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "data")


def joined(*names, **kwargs) -> list[int]:
    stream = open_tokens(map(str, names), "uint16", key="data.files", **kwargs)
    return stream.read(0, len(stream)).tolist()


def test_a_split_is_named_as_a_folder_or_by_its_files(folder):
    whole = [int(t) for path in sorted((folder / "train").glob("*.bin")) for t in np.fromfile(path, "<u2")]
    assert len(whole) > 1300
    assert joined(folder / "train") == joined(folder / "train" / "*.bin") == whole
    assert joined(folder / "validation", folder / "train") == joined(folder / "validation") + whole
    shutil.rmtree(folder / "validation")
    index = json.loads((folder / "index.json").read_text())
    del index["splits"]["validation"]
    (folder / "index.json").write_text(json.dumps(index))
    assert joined(folder) == joined(folder / "index.json") == whole


def test_several_splits_must_be_chosen_from(folder):
    text = refusal(section(folder))
    assert f"data.files: {folder} holds the splits train and validation; name one, such as" in text
    assert str(folder / "train") in text
    assert "has no split 'test'; it has train, validation" in refusal(section(folder / "test"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("form", ["train", "train/*.bin"])
def test_one_wrong_bit_is_found(folder, form, monkeypatch):
    flip(folder / "train" / "00007.bin", 100)
    assert "00007.bin: damaged: its SHA-256 is" in refusal(section(folder / form))
    assert len(joined(folder / form, verify=False)) > 1300
    monkeypatch.setattr(tokens_module, "VERIFY_BYTES", 100)
    assert len(joined(folder / form)) > 1300  # a large shard is read for its checksum only when asked
    with pytest.raises(DataError, match=r"00007\.bin: damaged"):
        joined(folder / form, verify=True)


def test_a_missing_or_short_shard_is_found(folder):
    shard = folder / "train" / "00003.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    assert "00003.bin: holds 129 tokens of uint16, its index says 130" in refusal(section(folder / "train"))
    shard.write_bytes(data[:-1])
    assert "00003.bin: 259 bytes is no multiple of 2" in refusal(section(folder / "train"))
    shard.unlink()
    text = refusal(section(folder / "train"))
    assert f"{shard}: missing, and {folder / 'index.json'} lists it" in text


def test_an_unfinished_folder_is_not_trained_on(folder):
    (folder / "index.json").rename(folder / "progress.json")
    for name in (folder, folder / "train"):
        assert "not all of its shards are written" in refusal(section(name))
    (folder / "progress.json").unlink()
    assert "is a folder without index.json; name its files" in refusal(section(folder / "train"))


@pytest.mark.parametrize(
    "text", ["{}", '{"splits": 3}', '{"splits": {"train": {"shards": [{"tokens": 1}]}}}']
)
def test_a_wrong_index_of_a_folder_is_refused(folder, text):
    (folder / "index.json").write_text(text)
    assert f"{folder / 'index.json'}: not the index of tokenized data" in refusal(section(folder / "train"))


def resaved(folder: Path, target: Path, **changes) -> Path:
    """The folder's tokenizer as another program would save it, perhaps with changes to its vocabulary."""
    target.mkdir()
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    for name, number in changes.items():
        content["model"]["vocab"][name] = number
    (target / "tokenizer.json").write_text(json.dumps(content, indent=None, ensure_ascii=False))
    shutil.copy(folder / "tokenizer" / "tokenizer_config.json", target)
    return target


@pytest.mark.parametrize("form", ["train", "train/*.bin"])
def test_another_vocabulary_than_the_runs_is_refused(folder, tmp_path, form):
    data = section(folder / form)
    same = load_tokenizer(TokenizerSection(path=str(resaved(folder, tmp_path / "same"))))
    assert build(data, same).num_sequences == build(data, None).num_sequences
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    names = [name for name, number in vocabulary.items() if number not in {0, 1, 2, *same.encode(PROBE)}]
    swapped = {names[0]: vocabulary[names[1]], names[1]: vocabulary[names[0]]}
    other = load_tokenizer(TokenizerSection(path=str(resaved(folder, tmp_path / "other", **swapped))))
    for tokenizer in (other, load_tokenizer(TokenizerSection(kind="bytes"))):
        with pytest.raises(DataError, match="another vocabulary than the tokenizer of") as caught:
            build(data, tokenizer)
        assert "set tokenizer.path to the one that made them" in str(caught.value)


def test_shards_of_two_vocabularies_are_not_mixed(folder, tmp_path):
    (tmp_path / "b.txt").write_text("bytes of a text")
    config = Tokenization(
        output=str(tmp_path / "other"),
        files=(str(tmp_path / "b.txt"),),
        tokenizer=TokenizerSection(kind="bytes"),
    )
    tokenize(config, workers=0)
    text = refusal(section(folder / "train", tmp_path / "other"))
    assert "00000.bin: was made with another vocabulary than" in text


def test_rules_of_splitting_are_part_of_the_vocabulary(tmp_path):
    """Equal tokens with other rules of splitting make other tokens of a text."""
    prints = set()
    for digits_apart in (False, True):
        model = tokenizers.models.BPE({"<unk>": 0, "1": 1, "2": 2, "12": 3}, [("1", "2")], unk_token="<unk>")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Digits(individual_digits=digits_apart)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        prints.add(fingerprint(load_tokenizer(TokenizerSection(path=str(tmp_path / "tokenizer.json")))))
    assert len(prints) == 2


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "SPARE_FILES", 300)
    for i in range(80):
        write_shard(tmp_path / f"{i:02}.bin", np.arange(i * 5, i * 5 + 5))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
        assert joined(tmp_path / "*.bin") == list(range(400))
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (50, 100))
        with pytest.raises(DataError, match=r"data\.files: 80 shards, and this process may open 100 files"):
            joined(tmp_path / "*.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Ranks, epochs and resuming, over many shards


def rows_of(parts, micro_batches: int) -> list[tuple[int, ...]]:
    """Sequences in the order of the run: micro-batch by micro-batch, rank by rank."""
    return [
        tuple(row)
        for _ in range(micro_batches)
        for part in parts
        for row in part.next_batch().inputs.tolist()
    ]


@pytest.fixture
def numbered(tmp_path):
    """100,000 is beyond uint16; sequences of 4 tell by their first token which they are."""
    tokens = np.arange(100_000, 100_000 + 4 * 24 + 1)
    for i, piece in enumerate(np.array_split(tokens, 13)):
        write_shard(tmp_path / f"{i:02}.bin", piece, "uint32")
    return section(tmp_path / "*.bin", batch_size=2)


def training(data: DataSection, world: int, seed: int = 3):
    return [
        build_training_data(data, None, task=TaskSection(), seed=seed, rank=rank, world=world)
        for rank in range(world)
    ]


def test_ranks_share_an_epoch_and_no_sequence(numbered):
    sequences = {tuple(range(100_000 + 4 * i, 100_004 + 4 * i)) for i in range(24)}
    by_rank = [set(rows_of([part], 4)) for part in training(numbered, 3)]
    assert all(len(rows) == 8 for rows in by_rank)
    assert by_rank[0] | by_rank[1] | by_rank[2] == sequences
    first, second = (rows_of(training(numbered, 3), 8)[i : i + 24] for i in (0, 24))
    assert set(first) == set(second) == sequences
    assert first != second
    assert first != sorted(first)
    assert rows_of(training(numbered, 3, seed=4), 4) != first


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4)])
def test_a_run_goes_on_within_an_epoch_on_other_ranks(numbered, before, after):
    whole = rows_of(training(numbered, 1), 36)
    parts = training(numbered, before)
    head = rows_of(parts, 5)
    state = json.loads(json.dumps(parts[0].state_dict()))
    others = training(numbered, after)
    for part in others:
        part.load_state_dict(state)
    tail = rows_of(others, 6)
    assert head + tail == whole[: len(head) + len(tail)]
