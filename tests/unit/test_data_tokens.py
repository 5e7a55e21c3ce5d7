"""Tokenized shards are mapped, not read, joined in order, and checked against their index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qrecipes.config.run import DataSection, TaskSection
from qrecipes.data import build_data, build_training_data
from qrecipes.data.tokens import write_shard
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
