"""What ships with the package is found, and what does not is named."""

import json
import lzma
from pathlib import Path

import pytest

from qrecipes import assets
from qrecipes.errors import ConfigError


def test_every_asset_states_its_source_and_licence():
    assert assets.names() == ["smalltalk", "stories260k", "tinyshakespeare"]
    for name in assets.names():
        text = (assets.resolve(f"asset:{name}") / "README.md").read_text(encoding="utf-8")
        assert "Source" in text
        assert "Licence" in text


def test_other_names_are_paths_unchanged():
    for name in ("data/train.txt", "/absolute", "OWNER/NAME", "assets"):
        assert assets.resolve(name) == Path(name)


def test_file_inside_an_asset():
    config = json.loads(assets.resolve("asset:stories260k/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_corpus_parts_are_whole_speeches_and_nine_to_one():
    parts = [
        lzma.decompress(assets.resolve(f"asset:tinyshakespeare/{part}.txt.xz").read_bytes())
        for part in ("train", "validation")
    ]
    assert sum(map(len, parts)) == 1_115_394  # the original's size
    assert 0.89 < len(parts[0]) / 1_115_394 < 0.91
    assert parts[0].endswith(b"\n\n")
    assert not parts[1].startswith(b"\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("asset:tinyshakespear", ["did you mean 'tinyshakespeare'?", "stories260k"]),
        ("asset:", ["no such asset", "smalltalk, stories260k, tinyshakespeare"]),
        ("asset:../models", ["no such asset"]),
        ("asset:tinyshakespeare/train.txt", ["did you mean 'train.txt.xz'?", "validation.txt.xz"]),
        ("asset:stories260k/../../errors.py", ["no such file"]),
    ],
)
def test_unknown_asset_is_refused_with_what_there_is(name, words):
    with pytest.raises(ConfigError) as error:
        assets.resolve(name)
    for word in (name, *words):
        assert word in str(error.value)
