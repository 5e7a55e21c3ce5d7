"""Perplexity against transformers and against formulas, over blocks and sliding windows."""

from __future__ import annotations

import gzip
import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from harness import build_plain, methods, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qrecipes.data.tokenizers import BytesTokenizer
from qrecipes.errors import ConfigError, DataError, WeightsError
from qrecipes.evaluation import perplexity, read_text, scoring
from qrecipes.evaluation.perplexity import Window, _blocks, _sliding, decoded_bytes
from qrecipes.export.opened import open_model
from qrecipes.transforms.chain import Chain

TEXT = (
    "Once upon a time there was a little girl named Lily. She had a red ball — it was très joli, 東京 🙂. "
    "One day she went to the park and saw a big dog. The dog wanted to play with the ball too.\n\n"
) * 4


@pytest.fixture(scope="module")
def stories():
    return open_model("hf:asset:stories260k", dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    """The same model by transformers: an oracle of another make."""
    transformers = pytest.importorskip("transformers")
    from qrecipes.assets import resolve

    path = resolve("asset:stories260k")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def their_nats(theirs, ids: list[int], predicted: int) -> float:
    """Minus the log-probability of the last `predicted` of `ids`, by transformers."""
    logits = theirs(torch.tensor([ids])).logits[0, :-1].double()
    losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return float(losses[len(losses) - predicted :].sum())


def test_blocks_score_as_transformers_scores_each_block(stories, theirs):
    ids = stories.tokenizer.encode(TEXT)
    block = 64
    blocks = [ids[i : i + block] for i in range(0, len(ids) - block + 1, block)]
    expected = sum(their_nats(theirs, b, block - 1) for b in blocks) / (len(blocks) * (block - 1))
    found = perplexity(stories.model, stories.tokenizer, TEXT, block=block)
    assert found.loss == pytest.approx(expected, rel=1e-5)  # float32 in two orders of summation
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert found.tokens == len(blocks) * (block - 1)
    assert found.tokens_left_out == len(ids) - len(blocks) * block > 0


@pytest.mark.parametrize("stride", [1, 7, 32, 63])
def test_a_sliding_window_scores_each_token_after_what_its_window_holds(stories, theirs, stride):
    block, count = 64, 150
    ids = stories.tokenizer.encode(TEXT)[:count]
    total = their_nats(theirs, ids[:block], block - 1)
    for j in range(block, count):  # token by token, each in the first window that reaches it
        window = -(-(j + 1 - block) // stride) * stride
        total += their_nats(theirs, ids[window : j + 1], 1)
    found = perplexity(stories.model, stories.tokenizer, TEXT, block=block, stride=stride, tokens=count)
    assert found.tokens == count - 1
    assert found.loss == pytest.approx(total / (count - 1), rel=1e-5)  # float32


def test_a_smaller_stride_gives_a_lower_perplexity(stories):
    """More context before each token: what the option is for."""
    results = [
        perplexity(stories.model, stories.tokenizer, TEXT, block=64, stride=stride, tokens=200).perplexity
        for stride in (63, 32, 4)
    ]
    assert results == sorted(results, reverse=True)


def test_bos_takes_a_place_of_each_block_and_predicts_its_first_token(stories, theirs):
    ids = stories.tokenizer.encode(TEXT)[:126]
    bos = stories.tokenizer.bos_id
    expected = sum(their_nats(theirs, [bos, *ids[i : i + 63]], 63) for i in (0, 63)) / 126
    found = perplexity(stories.model, stories.tokenizer, TEXT, block=64, tokens=126, bos=True)
    assert found.tokens == 126
    assert found.loss == pytest.approx(expected, rel=1e-5)  # float32


def test_a_stride_with_bos_gives_each_window_its_bos(stories, theirs):
    ids = stories.tokenizer.encode(TEXT)[:80]
    bos = stories.tokenizer.bos_id
    total = their_nats(theirs, [bos, *ids[:31]], 31)
    for start in range(16, 80, 16):
        done, stop = start - 16 + 31, min(start + 31, 80)
        total += their_nats(theirs, [bos, *ids[start:stop]], max(stop - done, 0)) if stop > done else 0.0
    found = perplexity(stories.model, stories.tokenizer, TEXT, block=32, stride=16, tokens=80, bos=True)
    assert found.tokens == 80
    assert found.loss == pytest.approx(total / 80, rel=1e-5)  # float32


@given(length=st.integers(2, 300), block=st.integers(2, 40), stride=st.integers(1, 39), bos=st.booleans())
def test_windows_predict_every_token_once_with_block_minus_stride_before_it(length, block, stride, bos):
    content = block - bos
    if not 1 <= stride < block or length < content or content < 1:
        return
    windows = list(_sliding(length, content, stride, bos))
    predicted = [j for w in windows for j in range(w.first, w.stop)]
    assert predicted == list(range(0 if bos else 1, length))
    for number, window in enumerate(windows):
        assert window.stop - window.start <= content
        assert window.first < window.stop
        if number:
            assert window.first - window.start >= content - stride


@given(length=st.integers(2, 300), block=st.integers(2, 40))
def test_blocks_are_whole_and_side_by_side(length, block):
    windows = list(_blocks(length, block, bos=False))
    assert windows == [Window(i * block, i * block + 1, (i + 1) * block) for i in range(length // block)]


@pytest.mark.parametrize("batch_size", [2, 3, 50])
def test_batches_change_nothing(stories, batch_size):
    """Rows of unlike length share a batch where a stride leaves a short last window."""
    one, many = (
        perplexity(
            stories.model, stories.tokenizer, TEXT, block=64, stride=40, tokens=150, batch_size=size
        ).loss
        for size in (1, batch_size)
    )
    assert many == pytest.approx(one, rel=1e-6)  # other shapes, another order of summation


class LargestLogits(TorchDispatchMode):
    """Most elements of any tensor whose last dimension is the vocabulary, but for the head's weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.largest = weight, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if (
                isinstance(value, torch.Tensor)
                and value.ndim
                and value.shape[-1] == len(self.weight)
                and value.data_ptr() != self.weight.data_ptr()
            ):
                self.largest = max(self.largest, value.numel())
        return result


def test_logits_of_all_tokens_never_exist_at_once(stories, monkeypatch):
    """[B, S, V] here has 8 x 63 x 512 elements; a chunk is bound to 10 x 512."""
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 10 * 512)
    whole = perplexity(stories.model, stories.tokenizer, TEXT, block=64)
    with LargestLogits(stories.model.tok_embeddings.weight) as watch:
        found = perplexity(stories.model, stories.tokenizer, TEXT, block=64)
    assert 0 < watch.largest <= 10 * 512
    assert found.loss == whole.loss


def test_bits_per_byte_of_a_byte_tokenizer_are_bits_per_token():
    run = tiny_run("llm", None)
    found = perplexity(build_plain(run), BytesTokenizer(), "plain ascii text " * 10, block=16)
    assert found.bytes == found.tokens
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2), rel=1e-12)  # float64


def test_bits_per_byte_do_not_depend_on_where_blocks_begin(stories):
    """All but the first token of the text are predicted: their bytes are the text's without its first."""
    tokenizer = stories.tokenizer
    ids = tokenizer.encode(TEXT)
    found = perplexity(stories.model, tokenizer, TEXT, block=64, stride=32)
    first = len(tokenizer.decode(ids[:1]).encode())
    assert found.bytes == len(TEXT.encode()) - first
    assert found.bits_per_byte == pytest.approx(
        found.loss * found.tokens / math.log(2) / found.bytes, rel=1e-12
    )
    assert found.decodes_exactly


@settings(max_examples=60, deadline=None)
@given(data=st.data(), text=st.text(st.sampled_from("ab é東🙂\n"), min_size=1, max_size=60))
def test_bytes_of_spans_add_up_to_those_of_the_text(stories, data, text):
    """Wherever the borders are, inside a character too: 🙂 is four byte tokens here."""
    tokenizer = stories.tokenizer
    ids = tokenizer.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    borders = [0, *cuts, len(ids)]
    total = sum(decoded_bytes(tokenizer, ids, a, b) for a, b in pairwise(borders))
    assert total == len(tokenizer.decode(ids).encode())


def test_a_tokenizer_that_loses_text_is_reported(stories):
    class Lowercase:
        """Decodes to another text, as tokenizers that normalize do."""

        bos_id = None

        def encode(self, text):
            return stories.tokenizer.encode(text.lower())

        def decode(self, ids):
            return stories.tokenizer.decode(ids)

    assert not perplexity(stories.model, Lowercase(), TEXT, block=64).decodes_exactly


def test_bfloat16_logits_are_normalized_in_float32():
    low = open_model("hf:asset:stories260k", dtype="bfloat16")
    ids = torch.tensor([low.tokenizer.encode(TEXT)[:64]])
    with torch.no_grad():
        logits = low.model(ids[:, :-1])[0]
    expected = F.cross_entropy(logits.double(), ids[0, 1:])
    found = perplexity(low.model, low.tokenizer, TEXT, block=64, tokens=64)
    # the same bfloat16 logits; log-probabilities of 8 bits would be 1e-4 off
    assert found.loss == pytest.approx(float(expected), rel=1e-6)


def test_a_character_counts_with_the_token_that_completes_it(stories):
    """The smile is four tokens of a byte each."""
    tokenizer = stories.tokenizer
    ids = tokenizer.encode("Lily 🙂.")
    borders = [decoded_bytes(tokenizer, ids, 0, stop) for stop in range(len(ids) + 1)]
    smile = [b - a for a, b in pairwise(borders)][-5:-1]
    assert smile == [0, 0, 0, 4]


@pytest.mark.parametrize("method", methods())
def test_a_model_that_is_still_in_training_is_measured_and_left_as_it_was(method):
    run = tiny_run("llm", method)
    plain = build_plain(run)
    before = perplexity(plain, BytesTokenizer(), "some text to measure " * 8, block=32).loss
    model = Chain.from_configs(run.transform).swap(plain).train()
    found = perplexity(model, BytesTokenizer(), "some text to measure " * 8, block=32)
    assert found.loss == pytest.approx(before, rel=0.02)  # 8-bit or lower, random weights of a tiny model
    assert model.training
    assert "unembed" not in vars(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block": 5000}, ConfigError, "use at most 512"),
        ({"block": 1}, ConfigError, "--block: 1 is out of range"),
        ({"block": 64, "stride": 64}, ConfigError, "must be 1 to 63"),
        ({"block": 64, "stride": 0}, ConfigError, "must be 1 to 63"),
        ({"block": 64, "batch_size": 0}, ConfigError, "--batch-size"),
        ({"block": 64, "tokens": 1}, ConfigError, "--tokens"),
        ({"block": 64, "tokens": 40}, DataError, "use --block 40 or less"),
    ],
)
def test_wrong_numbers_are_refused(stories, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(stories.model, stories.tokenizer, TEXT, **options)


def test_a_tokenizer_of_another_model_is_refused():
    model = build_plain(tiny_run("llm", None))
    stranger = BytesTokenizer()
    stranger.encode = lambda text: [model.tok_embeddings.num_embeddings] * 40  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="tokenizer that it was trained with"):
        perplexity(model, stranger, "text", block=16)


def test_bos_without_a_bos_token_is_refused():
    with pytest.raises(ConfigError, match="no beginning-of-text token"):
        perplexity(build_plain(tiny_run("llm", None)), BytesTokenizer(), "text" * 20, block=16, bos=True)


def test_a_model_that_is_no_decoder_is_refused():
    with pytest.raises(ConfigError, match="predicts no text"):
        perplexity(build_plain(tiny_run("vit", None)), BytesTokenizer(), "text" * 20, block=16)


def test_a_broken_model_is_no_perplexity():
    model = build_plain(tiny_run("llm", None))
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(WeightsError, match="nan"):
        perplexity(model, BytesTokenizer(), "text" * 20, block=16)


def test_rows_are_joined_and_other_files_are_read_as_they_stand(tmp_path):
    rows = tmp_path / "rows.jsonl.gz"
    with gzip.open(rows, "wt") as file:
        file.writelines(json.dumps({"body": body}) + "\n" for body in ("one", "two"))
    assert read_text(str(rows), column="body") == "one\n\ntwo"
    plain = tmp_path / "wiki.test.raw"
    plain.write_text(" \n = Title = \n", encoding="utf-8")
    assert read_text(str(plain)) == " \n = Title = \n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("rows.jsonl", b'{"body": "a"}\n', "give --column"),
        ("rows.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_text(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="is a folder"):
        read_text(str(tmp_path))
