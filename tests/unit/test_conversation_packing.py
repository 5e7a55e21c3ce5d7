"""Conversations in batches: packing and padding change where a token stands, never what it learns."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.models.llama3_2._component_builders import llama3_2

from qrecipes.config.run import ConversationSection, DataSection, TaskSection
from qrecipes.data import build_data
from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.buckets import (
    CHUNK,
    BucketedTrainingData,
    BucketedValidationData,
    BucketOrder,
    PaddedConversations,
    usual_buckets,
)
from qrecipes.data.conversations import Conversations, Report
from qrecipes.data.order import Item, Share
from qrecipes.data.packed import PackedConversations, best_fit
from qrecipes.data.tokenizers import BytesTokenizer
from qrecipes.errors import CheckpointError

LENGTH = 32


def make(lengths, seed: int = 0) -> Conversations:
    """Conversations of these lengths with random tokens from 1, of which a random part is trained."""
    random = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])
    ids = random.integers(1, 100, starts[-1]).astype(np.uint32)
    return Conversations(ids, random.random(starts[-1]) < 0.5, starts, Report("a test", "numbers"))


lists_of_lengths = st.lists(st.integers(2, LENGTH), min_size=1, max_size=80)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_best_fit_packs_each_once_and_overfills_none(lengths, capacity):
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=60), st.integers(50, 80))
def test_best_fit_leaves_no_pack_that_an_earlier_one_had_room_for(lengths, capacity):
    """A pack is opened only when no open one had room: no two are both at most half full."""
    packs = best_fit(lengths, capacity)
    assert sum(sum(lengths[index] for index in pack) <= capacity / 2 for pack in packs) <= 1


def test_best_fit_takes_the_tightest_room():
    assert best_fit([6, 7, 3, 4, 1], 10) == [[0, 3], [1, 2], [4]]
    with pytest.raises(ValueError, match="length 11 is more than the 10"):
        best_fit([11], 10)


def rows_of(batch: Batch):
    """(tokens, targets) of each document of a packed batch, padding included."""
    for row in range(len(batch.inputs)):
        for number in batch.documents[row].unique_consecutive().tolist():
            place = batch.documents[row] == number
            yield batch.inputs[row][place].tolist(), batch.targets[row][place].tolist()


@settings(max_examples=50, deadline=None)
@given(lists_of_lengths, st.one_of(st.none(), st.integers(0, 3)))
def test_packing_loses_and_duplicates_nothing_and_keeps_every_target(lengths, seed):
    conversations = make(lengths)
    source = PackedConversations(conversations, LENGTH, seed=seed)
    batch = source.read([Item(0, index) for index in range(source.num_items)])
    expected = Counter()
    for index in range(len(lengths)):
        ids, trained = (part.tolist() for part in conversations.tokens(index))
        # The target of a token is the one after it, of the last none, and only trained ones count.
        targets = [i if t else IGNORE for i, t in zip(ids[1:], trained[1:], strict=True)]
        expected[tuple(ids), (*targets, IGNORE)] += 1
    found = Counter((tuple(ids), tuple(targets)) for ids, targets in rows_of(batch))
    padding = {key: count for key, count in found.items() if not any(key[0])}
    assert found - Counter(padding) == expected
    assert all(set(targets) == {IGNORE} for _, targets in padding)


@settings(max_examples=30, deadline=None)
@given(lists_of_lengths)
def test_documents_are_numbered_along_the_row_and_positions_count_from_their_start(lengths):
    source = PackedConversations(make(lengths), LENGTH, seed=0)
    batch = source.read([*(Item(0, index) for index in range(source.num_items)), None])
    assert batch.documents.dtype == torch.int32
    for row in range(len(batch.inputs)):
        numbers, counts = batch.documents[row].unique_consecutive(return_counts=True)
        assert numbers.tolist() == list(range(len(numbers)))  # padding, if any, has the last
        assert batch.positions[row].tolist() == [p for count in counts.tolist() for p in range(count)]
    assert batch.targets[-1].eq(IGNORE).all()


def test_packs_depend_on_the_seed_alone():
    conversations = make(np.random.default_rng(0).integers(2, LENGTH, 100))
    packs = [PackedConversations(conversations, LENGTH, seed=seed).packs for seed in (1, 1, 2, None)]
    assert packs[0] == packs[1] != packs[2] != packs[3]


# The loss


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=100,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=16,
        max_seq_len=LENGTH,
        intermediate_dim=32,
        rope_base=10000,
        scale_factor=1,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def losses(model, batch: Batch) -> list[float]:
    """Summed loss of each document, with a dense mask made here by hand; padding left out."""
    mask = positions = None
    if batch.documents is not None:
        length = batch.inputs.shape[1]
        mask = torch.zeros(len(batch.inputs), length, length, dtype=torch.bool)
        for row, documents in enumerate(batch.documents.tolist()):
            for i in range(length):
                for j in range(i + 1):
                    mask[row, i, j] = documents[i] == documents[j]
        positions = batch.positions
    with torch.no_grad():
        logits = model(batch.inputs, mask=mask, input_pos=positions)
    each = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORE, reduction="none")
    found = []
    for row in range(len(batch.inputs)):
        if batch.documents is None:
            found.append(each[row].sum().item())
            continue
        for number in batch.documents[row].unique():
            place = batch.documents[row] == number
            if batch.inputs[row][place].any():
                found.append(each[row][place].sum().item())
    return found


def test_a_packed_document_has_the_loss_it_has_alone():
    lengths = [5, 9, 20, 12, 3, 31, 2, 17]
    conversations, model = make(lengths), tiny_model()
    packed = PackedConversations(conversations, LENGTH, seed=3)
    padded = PaddedConversations(conversations, [8, 16, LENGTH])
    together = losses(model, packed.read([Item(0, i) for i in range(packed.num_items)]))
    alone = [losses(model, padded.read([Item(0, i)]))[0] for i in range(len(lengths))]
    in_one_batch = losses(model, padded.read([Item(0, i) for i in range(len(lengths))]))
    order = [index for pack in packed.packs for index in pack]
    # float32 sums of at most 32 terms of size 5, in another order
    assert together == pytest.approx([alone[index] for index in order], rel=1e-5)
    assert in_one_batch == pytest.approx(alone, rel=1e-5)


# Buckets


def test_usual_buckets_are_powers_of_two_and_the_longest():
    assert usual_buckets(1000) == (64, 128, 256, 512, 1000)
    assert usual_buckets(1024) == (64, 128, 256, 512, 1024)
    assert usual_buckets(64) == (64,)
    assert usual_buckets(30) == (30,)


BUCKETS = [8, 16, LENGTH]


def bucketed(lengths, *, batch_size=4, rank=0, world=1, seed=0, shuffle=True) -> BucketedTrainingData:
    source = PaddedConversations(make(lengths), BUCKETS)
    return BucketedTrainingData(source, Share(batch_size, rank, world), seed=seed, shuffle=shuffle)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=600),
    st.sampled_from([1, 3, 4, 8, 24, 64, 100]),
    st.booleans(),
)
def test_bucket_order_gives_every_row_once_an_epoch_in_blocks_of_one_bucket(bucket_of, stride, shuffle):
    buckets = np.array(bucket_of)
    block = -(-CHUNK // stride) * stride
    order = BucketOrder(buckets, block, seed=0, shuffle=shuffle)
    count, epochs = len(buckets), 3
    drawn = [order.item(position) for position in range(epochs * count)]
    for epoch in range(epochs):
        part = drawn[epoch * count : (epoch + 1) * count]
        assert sorted(item.index for item in part) == list(range(count))
        assert {item.epoch for item in part} == {epoch}
    # Of the micro-batches of an epoch, those of several buckets are where rests meet: at most one between
    # each two of three buckets and a block given up for the epoch's start, and one at each end of the epoch.
    mixed = sum(
        len({buckets[item.index] for item in drawn[first : first + stride]}) > 1
        for first in range(0, len(drawn), stride)
    )
    assert mixed <= epochs * 6


def test_blocks_are_of_one_bucket_exactly():
    buckets = np.random.default_rng(0).integers(0, 3, 1000)
    order = BucketOrder(buckets, CHUNK, seed=0, shuffle=True)
    for epoch in range(3):
        first = -(-epoch * 1000 // CHUNK)
        whole = [
            {int(buckets[order.item(p).index]) for p in range(n * CHUNK, (n + 1) * CHUNK)}
            for n in range(first, (epoch + 1) * 1000 // CHUNK)
        ]
        # Each bucket leaves a rest of less than a block: at most three blocks' worth, and one given up.
        assert sum(len(kinds) == 1 for kinds in whole) >= len(whole) - 4


def test_each_epoch_has_an_order_of_its_own_unless_unshuffled():
    buckets = np.random.default_rng(0).integers(0, 3, 300)
    drawn = BucketOrder(buckets, CHUNK, seed=0, shuffle=True)
    assert [drawn.item(p).index for p in range(300)] != [drawn.item(p).index for p in range(300, 600)]
    kept = BucketOrder(buckets, CHUNK, seed=0, shuffle=False)
    indices = np.array([kept.item(p).index for p in range(300)])
    for bucket in range(3):
        rows = indices[buckets[indices] == bucket]
        assert rows.tolist() == sorted(rows)  # the rest comes after the blocks in the first epoch


LENGTHS = np.random.default_rng(1).integers(2, LENGTH + 1, 230).tolist()


def step(data, count: int) -> list[Batch]:
    return [data.next_batch() for _ in range(count)]


def same_row(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for padding."""
    short, long = sorted((one, other), key=len)
    return torch.equal(short, long[: len(short)]) and not long[len(short) :].any()


def test_two_ranks_see_what_one_sees_with_rows_of_one_length():
    whole = bucketed(LENGTHS, batch_size=8)
    ranks = [bucketed(LENGTHS, batch_size=4, rank=rank, world=2) for rank in range(2)]
    for _ in range(200):
        expected, parts = whole.next_batch(), [data.next_batch() for data in ranks]
        assert parts[0].inputs.shape == parts[1].inputs.shape
        assert torch.equal(torch.cat([part.inputs for part in parts]), expected.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts]), expected.targets)
        assert expected.inputs.shape[1] in BUCKETS


def test_two_micro_batches_are_one_of_twice_the_rows():
    large, small = bucketed(LENGTHS, batch_size=8), bucketed(LENGTHS, batch_size=4)
    for _ in range(100):
        expected = large.next_batch().inputs
        found = [row for _ in range(2) for row in small.next_batch().inputs]
        assert all(same_row(one, other) for one, other in zip(expected, found, strict=True))


def test_resuming_anywhere_is_exact_also_on_other_ranks():
    data = bucketed(LENGTHS, batch_size=8)
    step(data, 37)  # into the second epoch
    state = json.loads(json.dumps(data.state_dict()))
    expected = step(data, 40)
    again = bucketed(LENGTHS, batch_size=8)
    again.load_state_dict(state)
    ranks = [bucketed(LENGTHS, batch_size=4, rank=rank, world=2) for rank in range(2)]
    for part in ranks:
        part.load_state_dict(state)
    for batch in expected:
        assert torch.equal(again.next_batch().inputs, batch.inputs)
        assert torch.equal(torch.cat([part.next_batch().inputs for part in ranks]), batch.inputs)


def test_resuming_with_blocks_of_another_size_is_refused():
    state = bucketed(LENGTHS, batch_size=8).state_dict()
    with pytest.raises(CheckpointError, match=r"blocks of 64 rows, now they have 72; resume with"):
        bucketed(LENGTHS, batch_size=24).load_state_dict(state)
    with pytest.raises(CheckpointError, match="230 sequences an epoch, now there are 229"):
        bucketed(LENGTHS[1:], batch_size=8).load_state_dict(state)


@pytest.mark.parametrize("world", [1, 2])
def test_held_out_rows_come_once_over_all_ranks_short_and_long_mixed(world):
    conversations = make(LENGTHS)
    source = PaddedConversations(conversations, BUCKETS)
    ranks = [BucketedValidationData(source, Share(4, rank, world)) for rank in range(world)]
    batches = [list(data) for data in ranks]
    assert all(len(data) == len(held) for data, held in zip(ranks, batches, strict=True))
    assert [batch.inputs.shape for batch in batches[0]] == [batch.inputs.shape for batch in batches[-1]]
    lengths = [batch.inputs.shape[1] for batch in batches[0]]
    assert lengths != sorted(lengths), "the first few batches are to be a sample"
    rows = Counter(
        tuple(row[row != 0].tolist()) for held in batches for batch in held for row in batch.inputs
    )
    del rows[()]
    assert rows == Counter(tuple(conversations.tokens(i)[0].tolist()) for i in range(len(LENGTHS)))


# From files


@pytest.mark.parametrize("packing", [True, False])
def test_batches_from_files_learn_the_answers_and_nothing_else(tmp_path, packing):
    rows = [{"question": "q" * n, "answer": "A" * n} for n in range(1, 30)]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(
        source="conversations",
        files=(str(tmp_path / "train.jsonl"),),
        validation_files=(str(tmp_path / "test.jsonl"),),
        sequence_length=64,
        batch_size=1,
        conversation=ConversationSection(template="plain", packing=packing),
    )
    training, held_out = build_data(data, BytesTokenizer(), task=TaskSection(), seed=0, rank=0, world=1)
    expected = Counter({ord("A"): sum(range(1, 30)), 256: 29})
    for batches in ([training.next_batch() for _ in range(training.num_sequences)], list(held_out)):
        targets = Counter(i for batch in batches for i in batch.targets[batch.targets != IGNORE].tolist())
        assert targets == expected
        assert all((batch.documents is not None) is packing for batch in batches)
    assert training.epoch == 1
