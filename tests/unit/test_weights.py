"""Pretrained weights fit exactly or are refused by name; what is saved is what transformers loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qrecipes import assets
from qrecipes.config.run import ModelSection
from qrecipes.errors import ConfigError, ExportError, WeightsError
from qrecipes.models.build import build
from qrecipes.models.weights import (
    Checkpoint,
    load_pretrained,
    locate,
    save_huggingface,
    state_dict_to_huggingface,
)
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.lr_qat import LRQATConfig

STORIES = {
    "vocab_size": 512,
    "num_layers": 5,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 64,
    "intermediate_dim": 172,
    "max_seq_len": 512,
    "rope_base": 10_000,
    "scale_factor": 1,
    "norm_eps": 1e-5,
}
SOURCE = "torchtune:llama3_2.llama3_2"


def model_for(
    weights: str | Path, *, dtype: torch.dtype = torch.float32, **change
) -> tuple[nn.Module, ModelSection]:
    section = ModelSection(source=SOURCE, args=STORIES | change, weights=str(weights))
    torch.manual_seed(1)
    return build(section, dtype=dtype, initialize=True).eval(), section


def loaded(weights: str | Path, **change) -> nn.Module:
    model, section = model_for(weights, **change)
    load_pretrained(model, section)
    return model


@pytest.fixture
def stories(tmp_path) -> Path:
    """A copy of the shipped model that a test may damage."""
    return Path(shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "stories"))


def rewrite_config(folder: Path, **change) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))


def untie(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(512, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(folder, tie_word_embeddings=False)


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return reference(tokens).logits


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens)


def test_shipped_model_computes_what_transformers_computes():
    tokens = torch.randint(0, 512, (2, 200))
    ours = logits(loaded("asset:stories260k"), tokens)
    reference = transformers_logits(assets.resolve("asset:stories260k"), tokens)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)  # float32, logits up to 20
    assert ours.abs().max() > 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("sharded", [True, False])
def test_checkpoints_of_transformers_load_and_save_exactly(tmp_path, tied, num_kv_heads, sharded):
    """Random Llamas with and without grouped keys, tied and untied, in one file and in many."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
    )
    original = transformers.LlamaForCausalLM(config)
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.3)
    original.save_pretrained(tmp_path / "theirs", max_shard_size="10KB" if sharded else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file() == sharded
    args = STORIES | {
        "vocab_size": 96,
        "embed_dim": 32,
        "intermediate_dim": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": num_kv_heads,
        "tie_word_embeddings": tied,
    }
    model = loaded(tmp_path / "theirs", **args)
    tokens = torch.randint(0, 96, (2, 48))
    ours = logits(model, tokens)
    torch.testing.assert_close(ours, transformers_logits(tmp_path / "theirs", tokens), rtol=1e-4, atol=1e-4)

    save_huggingface(model, tmp_path / "theirs", tmp_path / "ours")
    written, expected = load_file(tmp_path / "ours" / "model.safetensors"), original.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    again = loaded(tmp_path / "ours", **args)
    assert torch.equal(logits(again, tokens), ours)
    torch.testing.assert_close(ours, transformers_logits(tmp_path / "ours", tokens), rtol=1e-4, atol=1e-4)


def test_scaled_rotary_embeddings_of_llama_3_1(tmp_path):
    """The scaled frequencies are compared with the model's, and the logits with transformers'."""
    transformers = pytest.importorskip("transformers")
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling |= {"rope_type": "llama3", "factor": 32.0, "rope_theta": 500_000.0}
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
        rope_parameters=scaling,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokens = torch.randint(0, 512, (1, 300))
    ours = logits(loaded(tmp_path, rope_base=500_000, scale_factor=32), tokens)
    torch.testing.assert_close(ours, transformers_logits(tmp_path, tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(WeightsError, match="rope scaling"):
        loaded(tmp_path, rope_base=500_000, scale_factor=8)


def test_scale_factor_one_is_the_plain_rotary_embedding():
    from torchtune.modules import RotaryPositionalEmbeddings

    model, _ = model_for("asset:stories260k")
    plain = RotaryPositionalEmbeddings(8, max_seq_len=512, base=10_000)
    assert torch.equal(model.layers[0].attn.pos_embeddings.cache, plain.cache)


def test_weights_are_cast_to_the_type_of_the_parameters():
    exact, rounded = loaded("asset:stories260k"), loaded("asset:stories260k", dtype=torch.bfloat16)
    for (name, theirs), ours in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(theirs.to(torch.bfloat16), ours), name


def test_loading_returns_the_folder_of_the_weights():
    folder = assets.resolve("asset:stories260k")
    for weights in ("asset:stories260k", folder, folder / "model.safetensors"):
        model, section = model_for(weights)
        assert load_pretrained(model, section) == folder


def test_tied_checkpoint_fills_both_ends_of_an_untied_model(tmp_path):
    model = loaded("asset:stories260k", tie_word_embeddings=False)
    assert torch.equal(model.output.weight, model.tok_embeddings.weight)
    assert model.output.weight.data_ptr() != model.tok_embeddings.weight.data_ptr()
    tokens = torch.randint(0, 512, (1, 20))
    torch.testing.assert_close(logits(model, tokens), logits(loaded("asset:stories260k"), tokens))

    with torch.no_grad():
        model.output.weight.mul_(2)
    save_huggingface(model, assets.resolve("asset:stories260k"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(
        transformers_logits(tmp_path, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (
            LRQATConfig(rank=4, activation_bits=8, kv_bits=4),
            "the inputs of 35 layers and k, ke, qe, v, and what",
        ),
        (LRQATConfig(rank=4), None),
    ],
    ids=["W4A8KV4", "W4"],
)
def test_a_folder_that_cannot_say_what_is_quantized_comes_with_a_note(tmp_path, capsys, config, lost):
    chain = Chain.from_configs([config])
    model = chain.finalize(chain.swap(loaded("asset:stories260k", tie_word_embeddings=False)))
    save_huggingface(model, assets.resolve("asset:stories260k"), tmp_path)
    found = capsys.readouterr().err
    assert (f"{tmp_path}: the model quantizes {lost}" in found) if lost else "quantizes" not in found


def test_untied_checkpoint_is_refused_by_a_tied_model(stories):
    untie(stories)
    with pytest.raises(WeightsError, match="tie_word_embeddings = false"):
        loaded(stories)


def test_untied_checkpoint_loads_into_an_untied_model(stories):
    untie(stories)
    output = loaded(stories, tie_word_embeddings=False).output.weight
    assert torch.equal(output, load_file(stories / "model.safetensors")["lm_head.weight"])


def test_output_layer_of_a_tied_checkpoint_is_passed_over(stories):
    """Old checkpoints store the embedding twice."""
    untie(stories)
    rewrite_config(stories, tie_word_embeddings=True)
    model = loaded(stories)
    assert torch.equal(model.tok_embeddings.weight, loaded("asset:stories260k").tok_embeddings.weight)


def test_rotary_tables_of_old_checkpoints_are_passed_over(stories):
    tensors = load_file(stories / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, stories / "model.safetensors")
    loaded(stories)


def test_adapters_keep_their_values_and_take_the_base():
    args = STORIES | {"lora_attn_modules": ["q_proj"], "lora_rank": 4, "lora_alpha": 8}
    section = ModelSection(source="torchtune:llama3_2.lora_llama3_2", args=args, weights="asset:stories260k")
    model = build(section, dtype=torch.float32).eval()
    before = model.layers[0].attn.q_proj.lora_a.weight.clone()
    load_pretrained(model, section)
    tokens = torch.randint(0, 512, (1, 20))
    assert torch.equal(model.layers[0].attn.q_proj.lora_a.weight, before)
    torch.testing.assert_close(logits(model, tokens), logits(loaded("asset:stories260k"), tokens))


def test_magnitudes_of_dora_follow_the_loaded_weights():
    args = STORIES | {"lora_attn_modules": ["q_proj"], "lora_rank": 4, "lora_alpha": 8, "use_dora": True}
    section = ModelSection(source="torchtune:llama3_2.lora_llama3_2", args=args, weights="asset:stories260k")
    model = build(section, dtype=torch.float32).eval()
    load_pretrained(model, section)
    tokens = torch.randint(0, 512, (1, 20))
    expected = logits(loaded("asset:stories260k"), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_own_format_loads_as_it_is(tmp_path):
    """Names that already are the model's are copied without reordering, whatever the model."""
    model = loaded("asset:stories260k")
    save_file(model.state_dict(), tmp_path / "anything.safetensors")
    other = loaded(tmp_path / "anything.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_own_format_loads_into_timm_with_its_statistics(tmp_path):
    pytest.importorskip("timm")
    section = ModelSection(source="timm:resnet18", args={"num_classes": 3}, weights=str(tmp_path))
    trained = build(section, dtype=torch.float32)
    trained(torch.randn(4, 3, 32, 32))  # moves the running statistics
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 3}))
    model = build(section, dtype=torch.float32)
    load_pretrained(model, section)
    expected = trained.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    other = build(ModelSection(source="timm:resnet18", args={"num_classes": 4}), dtype=torch.float32)
    with pytest.raises(WeightsError, match=r"fc\.weight: found \[3, 512\], expected \[4, 512\]"):
        load_pretrained(other, section)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"vocab_size": 600},
            ["model.embed_tokens.weight: found [512, 64], expected [600, 64]", "1 of another"],
        ),
        (
            {"intermediate_dim": 100},
            ["15 of another shape", "found [172, 64], expected [100, 64]", "(10 more)"],
        ),
        ({"num_layers": 4}, ["9 unexpected", "model.layers.4."]),
        ({"num_layers": 6}, ["9 missing", "layers.5."]),
        ({"num_heads": 4, "num_kv_heads": 2}, ["num_attention_heads 8, model 4", "head_dim 8, model 16"]),
        ({"rope_base": 500_000}, ["rope_theta", "rope_base"]),
        ({"scale_factor": 32}, ["rope scaling", "scale_factor"]),
        ({"norm_eps": 1e-6}, ["rms_norm_eps 1e-05, model 1e-06"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied(change, words):
    """Four heads of 16 have the shapes of eight of 8, and rotary tables and norms have no shapes at all."""
    model, section = model_for("asset:stories260k", **change)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_pretrained(model, section)
    for word in ("stories260k", *words):
        assert word in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            ["GPT2LMHeadModel", "LlamaForCausalLM"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act gelu"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "llama3"]),
        ({"num_attention_heads": None}, ["lacks num_attention_heads"]),
    ],
)
def test_config_that_is_no_plain_llama_is_refused(stories, change, words):
    rewrite_config(stories, **change)
    with pytest.raises(WeightsError) as error:
        loaded(stories)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("family", "word"), [("gemma", "GemmaRMSNorm"), ("phi3", "Phi3Rotary"), ("qwen2", "bias")]
)
def test_llama_weights_do_not_slip_into_another_architecture(family, word):
    args = {key: value for key, value in STORIES.items() if key != "scale_factor"}
    args |= {"head_dim": 8} if family == "gemma" else {}
    section = ModelSection(source=f"torchtune:{family}.{family}", args=args, weights="asset:stories260k")
    with pytest.raises(WeightsError, match=word):
        load_pretrained(build(section, dtype=torch.float32), section)


def test_llama_weights_do_not_fit_a_vision_model():
    pytest.importorskip("timm")
    section = ModelSection(source="timm:resnet18", weights="asset:stories260k")
    with pytest.raises(WeightsError, match="the model is a ResNet"):
        load_pretrained(build(section, dtype=torch.float32), section)


def shard(folder: Path) -> list[Path]:
    """Split the model of `folder` into two files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = {files[0]: names[:20], files[1]: names[20:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / file for file in files]


def test_sharded_equals_whole(stories):
    shard(stories)
    sharded, whole = loaded(stories), loaded("asset:stories260k")
    assert all(torch.equal(a, b) for a, b in zip(sharded.parameters(), whole.parameters(), strict=True))


def test_missing_shard_is_named(stories):
    shard(stories)[1].unlink()
    with pytest.raises(WeightsError, match=r"1 of 2 shards are missing: model-00002-of-00002\.safetensors"):
        loaded(stories)


@pytest.mark.parametrize("size", [0, 100, 5_000, 500_000])
def test_truncated_file_is_named(stories, size):
    file = shard(stories)[0]
    file.write_bytes(file.read_bytes()[: min(size, file.stat().st_size - 1)])
    with pytest.raises(WeightsError, match=r"model-00001-of-00002\.safetensors: truncated"):
        loaded(stories)


def test_damaged_config_is_named(stories):
    (stories / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config\.json: not readable"):
        loaded(stories)


def test_folder_with_pickled_weights_says_what_is_there(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"no model\.safetensors.*it has pytorch_model\.bin"):
        loaded(tmp_path)


def test_missing_weights(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightsError, match="no such file or folder"):
        loaded(tmp_path / "nothing")
    with pytest.raises(
        WeightsError, match=r"OWNER/NAME: no such folder here.*outgoing traffic.*use a folder"
    ):
        locate("OWNER/NAME")
    with pytest.raises(ConfigError, match="did you mean 'stories260k'"):
        locate("asset:stories")


def test_hub_repository_is_fetched_once_and_used(monkeypatch):
    import huggingface_hub

    asked = []
    folder = assets.resolve("asset:stories260k")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kwargs: asked.append(name) or str(folder)
    )
    loaded("OWNER/NAME")
    assert asked == ["OWNER/NAME"]


def test_loading_without_a_source_is_refused():
    model, section = model_for("asset:stories260k")
    with pytest.raises(ConfigError, match=r"model\.weights"):
        load_pretrained(model, ModelSection(source=section.source))


def test_tensors_are_read_one_at_a_time():
    checkpoint = Checkpoint.open(assets.resolve("asset:stories260k"))
    stream = checkpoint.read({name: [None] for name in checkpoint.files})
    name, _, tensor = next(stream)
    assert tuple(tensor.shape) == checkpoint.shapes[name]
    assert len(list(stream)) == len(checkpoint.files) - 1


def test_round_trip_of_names_and_rows_is_exact():
    """Random values in every place, so that a row in the wrong place shows."""
    model, _ = model_for("asset:stories260k", tie_word_embeddings=False)
    config = json.loads((assets.resolve("asset:stories260k") / "config.json").read_text())
    written = state_dict_to_huggingface(model.state_dict(), config | {"tie_word_embeddings": False})
    query = model.layers[2].attn.q_proj.weight
    assert torch.equal(written["model.layers.2.self_attn.q_proj.weight"][8 + 4 + 1], query[8 + 2 * 1 + 1])
    assert torch.equal(written["model.layers.2.self_attn.v_proj.weight"], model.layers[2].attn.v_proj.weight)
    assert "lm_head.weight" in written
    assert "lm_head.weight" not in state_dict_to_huggingface(model.state_dict(), config)


def test_saved_folder_carries_tokenizer_and_corrected_config(tmp_path):
    folder = assets.resolve("asset:stories260k")
    save_huggingface(loaded(folder), folder, tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    assert config == original | {"torch_dtype": "bfloat16"}
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def test_what_is_no_llama_is_not_saved_as_one(tmp_path):
    folder = assets.resolve("asset:stories260k")
    with pytest.raises(ExportError, match=r"no place in a LlamaForCausalLM: weight.*finalize"):
        save_huggingface(nn.Linear(2, 2), folder, tmp_path)
    with pytest.raises(ExportError, match=r"no config\.json"):
        save_huggingface(loaded(folder), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_on_meta_is_not_filled():
    section = ModelSection(source=SOURCE, args=STORIES, weights="asset:stories260k")
    with pytest.raises(ValueError, match="meta"):
        load_pretrained(build(section, dtype=torch.float32, device="meta"), section)
