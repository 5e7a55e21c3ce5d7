"""From a Hugging Face folder through a run to an export that needs neither the run nor the folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from harness import command_line, write_run
from safetensors.torch import load_file

from qrecipes import assets, load_export
from qrecipes.config import parse
from qrecipes.config.run import ModelSection
from qrecipes.data.tokenizers import tokenizer_of
from qrecipes.errors import ConfigError, DataError, WeightsError
from qrecipes.export.opened import open_model
from qrecipes.export.store import load_export_and_run, load_run
from qrecipes.models.build import build
from qrecipes.models.weights import load_pretrained

TOKENS = torch.arange(3, 67).reshape(2, 32)


@pytest.fixture
def stories(tmp_path) -> Path:
    """A copy of the shipped model that a test may damage."""
    return Path(shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "stories"))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS)


def write(folder: Path, source: Path, lr: float = 1e-3, **model: object) -> Path:
    """One step of a run that starts from `source`; its file."""
    return write_run(folder, {"source": f"hf:{source}", **model}, steps=1, optim__lr=lr)


def test_a_run_starts_from_the_weights_and_the_tokenizer_of_its_folder(stories, tmp_path):
    """With a learning rate too small for float32 to see, the run's only step changes nothing."""
    config = write(tmp_path, stories, lr=1e-30)
    assert parse.load(str(config)).tokenizer is None
    assert command_line("run", "train", "--config", str(config)) == 0
    model, run = load_run(tmp_path / "run")
    assert torch.equal(logits(model), logits(open_model(f"hf:{stories}").model))
    assert tokenizer_of(run).vocab_size == 512


def test_export_outlives_the_folder_it_came_from(stories, tmp_path):
    config = write(tmp_path, stories)
    assert command_line("run", "train", "--config", str(config)) == 0
    assert command_line("export", str(tmp_path / "run"), "--output", str(tmp_path / "export")) == 0
    trained, _ = load_run(tmp_path / "run")
    expected = logits(trained)
    assert not torch.equal(expected, logits(open_model(f"hf:{stories}").model))
    text = "Once upon a time"
    ids = open_model(f"hf:{stories}").require_tokenizer().encode(text)
    shutil.rmtree(stories)
    shutil.rmtree(tmp_path / "run")
    shutil.move(tmp_path / "export", tmp_path / "elsewhere")

    assert torch.equal(logits(load_export(tmp_path / "elsewhere")), expected)
    opened = open_model(str(tmp_path / "elsewhere"))
    assert torch.equal(logits(opened.model), expected)
    assert opened.require_tokenizer().encode(text) == ids
    theirs = open_model(f"hf:{tmp_path / 'elsewhere' / 'huggingface'}")
    torch.testing.assert_close(logits(theirs.model), expected, rtol=0, atol=0)
    assert theirs.require_tokenizer().encode(text) == ids
    model = json.loads((tmp_path / "elsewhere" / "manifest.json").read_text())["model"]
    assert model["source"] == "torchtune:llama3_2.llama3_2"
    assert model["from"] == f"hf:{stories}"


def test_export_can_be_trained_on_without_its_source(stories, tmp_path):
    """The run inside an export, too, names nothing outside."""
    assert command_line("run", "train", "--config", str(write(tmp_path, stories))) == 0
    command_line("export", str(tmp_path / "run"), "--output", str(tmp_path / "export"))
    shutil.rmtree(stories)
    _, run = load_export_and_run(tmp_path / "export")
    assert build(run.model, dtype=torch.float32).tok_embeddings.weight.isfinite().all()
    assert tokenizer_of(run).vocab_size == 512


def test_shape_alone_is_trained_and_exported(stories, tmp_path):
    (stories / "model.safetensors").unlink()
    config = write(tmp_path, stories, weights="random", args={"num_layers": 2})
    assert command_line("run", "train", "--config", str(config)) == 0
    assert command_line("export", str(tmp_path / "run")) == 0
    folder = tmp_path / "run" / "export" / "huggingface"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert torch.equal(
        logits(open_model(f"hf:{folder}").model), logits(load_export(tmp_path / "run" / "export"))
    )


def test_a_tokenizer_of_more_tokens_than_embeddings_is_refused(stories):
    content = json.loads((stories / "tokenizer.json").read_text())
    token = {"id": 512, "content": "<new>", "special": True, "single_word": False}
    content["added_tokens"].append(token | {"lstrip": False, "rstrip": False, "normalized": False})
    (stories / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"tokenizer has 513 tokens, and the model embeds 512"):
        open_model(f"hf:{stories}")


def test_a_run_whose_tokenizer_does_not_fit_is_refused(stories, tmp_path, capsys):
    config = write(tmp_path, stories, weights="random", args={"vocab_size": 500})
    assert command_line("run", "train", "--config", str(config)) == 2
    assert "500" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_opens_but_takes_no_text(stories):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stories / name).unlink()
    opened = open_model(f"hf:{stories}")
    assert opened.tokenizer is None
    with pytest.raises(ConfigError, match="has no tokenizer"):
        opened.require_tokenizer()
    (stories / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        open_model(f"hf:{stories}")


def test_a_file_of_weights_means_its_folder(stories):
    opened = open_model(f"hf:{stories / 'model.safetensors'}")
    assert torch.equal(logits(opened.model), logits(open_model(f"hf:{stories}").model))


def test_check_reads_the_config_json_of_a_local_folder(stories, tmp_path, capsys):
    config = write(tmp_path, stories)
    assert command_line("check", str(config)) == 0
    (stories / "config.json").write_text(
        (stories / "config.json").read_text().replace("LlamaForCausalLM", "MambaForCausalLM")
    )
    assert command_line("check", str(config)) == 2
    assert "MambaForCausalLM is not supported" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_computes_what_transformers_computes(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = os.environ.get("QRECIPES_SMOLLM2")
    if not folder:
        pytest.skip("QRECIPES_SMOLLM2 does not name the folder of SmolLM2-135M-Instruct")
    opened = open_model(f"hf:{folder}", dtype="float32")
    tokenizer = opened.require_tokenizer()
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris. " * 20)])
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs = opened.model(ids), reference(ids).logits
    # float32 rounding over 30 layers; logits up to 40
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    from qrecipes.models.weights import save_huggingface

    save_huggingface(opened.model, Path(folder), tmp_path / "out", dtype=torch.bfloat16)
    before, after = (load_file(Path(f) / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_loading_twice_into_one_model_is_loading_once(stories):
    section = ModelSection(source=f"hf:{stories}")
    model = build(section, dtype=torch.float32)
    load_pretrained(model, section)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_pretrained(model, section)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())
