"""Every kind of tokenizer gives text back and never reads special tokens out of text."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import regex
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qrecipes.config.run import TokenizerSection
from qrecipes.data.markup import Markup
from qrecipes.data.tokenizers import PATTERNS, load_tokenizer
from qrecipes.errors import ConfigError, DataError

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog", "log the mat"] * 10
TRICKY = [
    "",
    " ",
    "the cat",
    "  two  spaces\n\n and lines\r\n",
    "naïve 漢字 🙂",
    "12345 6",
    "it's DON'T we'Ll",
]
SPELLED = "<s> </s> <|endoftext|> <|begin_of_text|> <|end_of_text|>"


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    folder = tmp_path / "hf"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def rank_file(tmp_path: Path) -> Path:
    merges = [b"th", b"the", b" c", b" ca", b" cat", b"at", b"og"]
    tokens = [bytes([value]) for value in range(256)] + merges
    return write_ranks(tmp_path / "ranks.tiktoken", tokens)


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["hf", "tiktoken", "sentencepiece", "bytes"])
def tokenizer(request: pytest.FixtureRequest):
    names = {"hf": "hf_folder", "tiktoken": "rank_file", "sentencepiece": "sentencepiece_file"}
    path = str(request.getfixturevalue(names[request.param])) if request.param in names else None
    return load_tokenizer(TokenizerSection(kind=request.param, path=path))


@pytest.mark.parametrize("text", [*TRICKY, SPELLED])
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_spelled_out_are_text(tokenizer):
    ids = tokenizer.encode(SPELLED)
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids


def test_markup_takes_special_tokens_at_their_word_except_across_a_cut(tokenizer):
    spelled, number = next(iter(tokenizer.special_tokens.items()))
    text = f"the cat{spelled}naïve 漢字 🙂{spelled} the mat"
    whole, cut, plain = tokenizer.encode_markup(
        [Markup(text), Markup(text, (text.rindex(spelled) + 1,)), Markup("a dog")]
    )
    assert [text[a:b] for i, (a, b) in zip(whole.ids, whole.spans, strict=True) if i == number] == [
        spelled
    ] * 2
    assert cut.ids.count(number) == 1
    assert plain.ids == tokenizer.encode("a dog")
    assert tokenizer.decode(cut.ids).count(spelled) == 1  # as text
    for marked in (whole, cut):
        assert marked.spans == sorted(marked.spans)
        covered = {place for a, b in marked.spans for place in range(a, b)}
        # Some tokenizers drop spaces at the end of a piece, or give them no characters of their own.
        assert not "".join(letter for place, letter in enumerate(text) if place not in covered).strip()


def test_encoding_many_equals_encoding_each(tokenizer):
    assert tokenizer.encode_batch(TRICKY) == [tokenizer.encode(text) for text in TRICKY]


def test_nothing_is_added(tokenizer):
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("the " * 40)) >= 40


def test_every_token_is_below_the_vocabulary_size(tokenizer):
    ids = [i for text in (*TEXTS, *TRICKY) for i in tokenizer.encode(text)]
    special = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    assert max(ids + special) < tokenizer.vocab_size


def test_special_and_unknown_tokens_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.vocab_size + 5]) == "the cat"


def test_files_are_all_that_is_needed_elsewhere(tokenizer, tmp_path):
    if not tokenizer.files:
        pytest.skip("bytes need no file")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in tokenizer.files:
        (elsewhere / file.name).write_bytes(file.read_bytes())
    copy = load_tokenizer(TokenizerSection(path=str(elsewhere)))
    assert type(copy) is type(tokenizer)
    assert copy.encode("the cat") == tokenizer.encode("the cat")
    assert (copy.bos_id, copy.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_bytes_are_utf8():
    tokenizer = load_tokenizer(TokenizerSection(kind="bytes"))
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (257, None, 256)


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({}, (0, 2)),  # the usual names
        ({"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}, (0, 1)),
        (
            {"tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}},
            (0, 1),
        ),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": "<|endoftext|>"}}, (None, 2)),
        (
            {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False, "eos_token": "</s>"}},
            (None, 1),
        ),
        ({"generation_config.json": {"bos_token_id": 0, "eos_token_id": [1, 2]}}, (0, 1)),
        # the post-processor puts 0 before a text, and so the beginning-of-text token before none
        ({"config.json": {"bos_token_id": 2, "eos_token_id": 1}}, (None, 1)),
        (
            {
                "tokenizer_config.json": {"eos_token": "</s>"},
                "generation_config.json": {"bos_token_id": 0, "eos_token_id": 2},
                "config.json": {"bos_token_id": 2},
            },
            (0, 1),
        ),
    ],
)
def test_beginning_and_end_come_from_the_files_beside(hf_folder, configs, expected):
    for name, content in configs.items():
        (hf_folder / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(TokenizerSection(path=str(hf_folder)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


def test_auto_tells_the_kind_by_content(hf_folder, rank_file, sentencepiece_file, tmp_path):
    renamed = tmp_path / "llama3" / "tokenizer.model"
    renamed.parent.mkdir()
    renamed.write_bytes(rank_file.read_bytes())
    kinds = {
        hf_folder: "HFTokenizer",
        hf_folder / "tokenizer.json": "HFTokenizer",
        rank_file: "TiktokenTokenizer",
        renamed: "TiktokenTokenizer",
        renamed.parent: "TiktokenTokenizer",
        sentencepiece_file: "SentencePieceTokenizer",
        sentencepiece_file.parent: "SentencePieceTokenizer",
    }
    loaded = {path: type(load_tokenizer(TokenizerSection(path=str(path)))).__name__ for path in kinds}
    assert loaded == kinds


def test_a_replaced_rank_file_is_read_anew(tmp_path):
    """tiktoken's own loader would give the first file again, from its cache by path."""
    single = [bytes([value]) for value in range(256)]
    path = write_ranks(tmp_path / "ranks.tiktoken", [*single, b"ab"])
    first = load_tokenizer(TokenizerSection(path=str(path))).encode("ab")
    write_ranks(path, [*single, b"xy"])
    assert (first, load_tokenizer(TokenizerSection(path=str(path))).encode("ab")) == ([256], [97, 98])


# Splits written down by hand from what each pattern is published to do.
@pytest.mark.parametrize(
    ("pattern", "text", "pieces"),
    [
        ("gpt2", "I'LL say it's 12345", ["I", "'", "LL", " say", " it", "'s", " 12345"]),
        ("cl100k", "I'LL say it's 12345", ["I", "'LL", " say", " it", "'s", " ", "123", "45"]),
        ("llama3", "I'LL say it's 12345", ["I", "'LL", " say", " it", "'s", " ", "123", "45"]),
        ("qwen2", "it's 123", ["it", "'s", " ", "1", "2", "3"]),
        ("qwen2", "a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
    ],
)
def test_patterns_split_as_published(pattern, text, pieces):
    assert regex.findall(PATTERNS[pattern], text) == pieces


@pytest.mark.parametrize(
    ("pattern", "bos", "eos", "size"),
    # distances of the published numbers from 128000, 100256, 50256 and 151643 ranks
    [("llama3", 0, 1, 256), ("cl100k", None, 1, 21), ("gpt2", None, 0, 1), ("qwen2", None, 0, 3)],
)
def test_special_tokens_are_numbered_from_the_ranks(rank_file, pattern, bos, eos, size):
    ranks = len(rank_file.read_text().splitlines())
    tokenizer = load_tokenizer(TokenizerSection(path=str(rank_file), pattern=pattern))
    assert tokenizer.bos_id == (None if bos is None else ranks + bos)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (ranks + eos, ranks + size)


def message(section: TokenizerSection, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        load_tokenizer(section)
    return str(caught.value)


def test_missing_path_is_named(tmp_path):
    text = message(TokenizerSection(path=str(tmp_path / "nowhere")))
    assert "nowhere" in text
    assert "tokenizer.json, a tiktoken or sentencepiece file" in text


def test_empty_folder_says_what_was_looked_for(tmp_path):
    text = message(TokenizerSection(path=str(tmp_path)))
    assert "looked for tokenizer.json, tokenizer.model or *.tiktoken, *.model" in text
    assert "looked for tokenizer.json;" in message(TokenizerSection(kind="hf", path=str(tmp_path)))


def test_hub_repository_without_network_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    text = message(TokenizerSection(path="someone/something"))
    assert "'someone/something' is no local file or folder" in text
    assert "check the name and the network" in text


def test_an_asset_that_is_not_there_is_a_config_error():
    assert "asset:no-such-asset" in message(TokenizerSection(path="asset:no-such-asset"), ConfigError)


@pytest.mark.parametrize("kind", ["hf", "tiktoken", "sentencepiece"])
def test_a_file_of_another_kind_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"not": "a tokenizer"}\n')
    assert str(path) in message(TokenizerSection(kind=kind, path=str(path)))


def test_auto_refuses_what_it_cannot_tell(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text("the\ncat\n")
    assert "set tokenizer.kind" in message(TokenizerSection(path=str(path)))


def test_damaged_ranks_are_refused(rank_file):
    lines = rank_file.read_text().splitlines()
    rank_file.write_text("\n".join([*lines[:5], "!!! not a rank", *lines[6:]]))
    assert "line 6" in message(TokenizerSection(path=str(rank_file)))
    rank_file.write_text("\n".join(lines[:5] + lines[6:]))
    assert "262 ranks are not 0 to 261" in message(TokenizerSection(path=str(rank_file)))
    rank_file.write_text("\n".join(lines[:200]))
    assert "no rank for 56 of the 256 bytes, such as 0xc8" in message(TokenizerSection(path=str(rank_file)))


def test_damaged_config_beside_is_named(hf_folder):
    (hf_folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: not JSON" in message(TokenizerSection(path=str(hf_folder)))
