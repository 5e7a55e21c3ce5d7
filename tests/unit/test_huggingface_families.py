"""Every decoder family of torchtune against transformers: the same logits, in and out, or a refusal."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qrecipes.config.run import ModelSection
from qrecipes.errors import ConfigError, ExportError, WeightsError
from qrecipes.models.build import build, check_source
from qrecipes.models.families import FAMILIES
from qrecipes.models.sources import pretrained, resolve, source_folder
from qrecipes.models.weights import load_pretrained, save_huggingface, state_dict_to_huggingface

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}  # slow rotation, so it is scaled
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "attn_logit_softcapping": 2.0}
MODELS = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama_one_kv_head": ("Llama", {"num_key_value_heads": 1}),
    "llama_all_kv_heads": ("Llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 1234.5}}),
    "llama_3_1": ("Llama", WIDE | {"hidden_size": 128, "rope_parameters": LLAMA3_ROPE}),
    "llama_3_2": (
        "Llama",
        WIDE | {"hidden_size": 128, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_theta": 1_000_000.0}}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma_one_kv_head": ("Gemma", {"head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2_tight_caps": ("Gemma2", GEMMA2 | {"final_logit_softcapping": 3.0}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3_all_kv_heads": ("Phi3", {"sliding_window": 64, "num_key_value_heads": 4}),
}


def write(folder: Path, name: str, *, shard: str = "1GB", dtype=torch.float32, **change):
    """A random checkpoint of transformers, with logits of the size that trained models have."""
    kind, own = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SMALL | own | change))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            matrix = parameter.dim() > 1  # norms keep their one, or Gemma's zero, and vary around it
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5 if matrix else parameter + 0.3 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return model.eval()


def load(folder: Path, *, dtype: torch.dtype = torch.float32, **args) -> nn.Module:
    section = ModelSection(source=f"hf:{folder}", args=args)
    model = build(section, dtype=dtype).eval()
    assert load_pretrained(model, section) == folder
    return model


def tokens(length: int = 48) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def theirs(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


@torch.no_grad()
def ours(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids)


def rewrite_config(folder: Path, **change) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))


def test_every_family_of_the_table_is_tried():
    assert {f"{kind}ForCausalLM" for kind, _ in MODELS.values()} == {f.architecture for f in FAMILIES}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    reference = write(tmp_path, name)
    model, ids = load(tmp_path), tokens()
    expected = theirs(reference, ids)
    assert expected.std() > 0.5  # neither constant nor saturated
    # float32 rounding of three layers, relative to logits of a few units
    torch.testing.assert_close(ours(model, ids), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gemma2", "phi3"])
def test_bfloat16_stays_within_its_rounding(name, tmp_path):
    """Both round in other places, so the yardstick is how far transformers itself strays in bfloat16."""
    exact, ids = theirs(write(tmp_path, name), tokens()), tokens()
    rounded = theirs(write(tmp_path, name, dtype=torch.bfloat16), ids)
    model = load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    strays = (rounded - exact).norm()
    assert (ours(model, ids) - exact).norm() < 1.5 * strays  # a wrong scale of Gemma's embedding would be 3x
    assert strays < 0.2 * exact.norm()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_what_transformers_saved(name, tmp_path):
    reference, ids = write(tmp_path / "in", name), tokens()
    save_huggingface(load(tmp_path / "in"), tmp_path / "in", tmp_path / "out")
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(theirs(again, ids), theirs(reference, ids))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "in" / file).read_text()) == json.loads(
            (tmp_path / "out" / file).read_text()
        )


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "phi3"])
def test_shards_go_in_and_out(name, tmp_path):
    """Stacked tensors of Phi-3 are larger than a shard of this size, and have one of their own."""
    write(tmp_path / "whole", name)
    reference = write(tmp_path / "in", name, shard="10KB")
    model = load(tmp_path / "in")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 3
    expected = load(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())

    save_huggingface(model, tmp_path / "in", tmp_path / "out", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = [load_file(tmp_path / "out" / file) for file in sorted(set(index["weight_map"].values()))]
    sizes = [sum(t.numel() * t.element_size() for t in shard.values()) for shard in shards]
    assert index["metadata"]["total_size"] == sum(sizes)
    for shard, size in zip(shards, sizes, strict=True):
        assert size <= 10_000 or len(shard) == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(theirs(again, tokens()), theirs(reference, tokens()))


def test_stacked_rows_are_read_part_by_part(tmp_path):
    from qrecipes.models.checkpoint_files import Checkpoint

    write(tmp_path, "phi3")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    parts = list(Checkpoint.open(tmp_path).read({name: [(48, 96), (0, 48)]}))
    whole = load_file(tmp_path / "model.safetensors")[name]
    assert torch.equal(torch.cat([parts[1][2], parts[0][2]]), whole)


@pytest.mark.parametrize("name", ["llama_3_2", "mistral", "qwen2_tied", "gemma", "gemma2", "phi3"])
def test_skipping_the_random_weights_changes_nothing(name, tmp_path):
    """Deterministic torch fills empty memory with NaN, so whatever was forgotten would show."""
    write(tmp_path, name)
    section = ModelSection(source=f"hf:{tmp_path}")
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        model = build(section, dtype=torch.float32)
        assert all(parameter.isnan().all() for parameter in model.parameters())
        load_pretrained(model, section)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    ordinary = build(section, dtype=torch.float32, initialize=True)
    assert not any(parameter.isnan().any() for parameter in ordinary.parameters())
    load_pretrained(ordinary, section)
    for kind in ("named_parameters", "named_buffers"):
        first, second = dict(getattr(model, kind)()), dict(getattr(ordinary, kind)())
        assert list(first) == list(second)
        for key in first:
            assert torch.equal(first[key], second[key]), key
            assert first[key].dtype == second[key].dtype


def test_adapters_are_initialized_all_the_same(tmp_path):
    """The checkpoint has none, so their random start must not be skipped."""
    write(tmp_path, "llama_tied")
    resolved = resolve(ModelSection(source=f"hf:{tmp_path}"))
    args = resolved.args | {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4.0}
    section = replace(resolved, source="torchtune:llama3_2.lora_llama3_2", args=args, weights=str(tmp_path))
    torch.use_deterministic_algorithms(True)
    try:
        model = build(section, dtype=torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    load_pretrained(model, section)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert torch.equal(ours(model, tokens()), ours(load(tmp_path), tokens()))


@pytest.mark.parametrize("name", ["llama", "llama_3_2", "mistral", "qwen2", "gemma", "gemma2", "phi3"])
def test_an_explicit_builder_takes_the_same_weights(name, tmp_path):
    write(tmp_path, name)
    section = resolve(ModelSection(source=f"hf:{tmp_path}"))
    assert section.source.startswith("torchtune:")
    assert section.weights == str(tmp_path)
    model = build(section, dtype=torch.float32).eval()
    load_pretrained(model, section)
    assert torch.equal(ours(model, tokens()), ours(load(tmp_path), tokens()))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"num_heads": 8, "num_kv_heads": 4}, "head_dim 8, model 4"),
        ("llama", {"norm_eps": 1e-5}, "rms_norm_eps 1e-06, model 1e-05"),
        ("llama_3_2", {"scale_factor": 8}, "rope scaling"),
        ("mistral", {"rope_base": 20_000}, "rope_theta"),
        ("qwen2", {"rope_base": 10_000.0}, "rope_theta"),
        ("phi3", {"norm_eps": 1e-6}, "rms_norm_eps 1e-05, model 1e-06"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "scale of attention scores"),
        ("gemma2", {"hidden_capping_value": 50.0}, "attn_logit_softcapping 2.0, model 50.0"),
        ("gemma2", {"final_capping_value": 20.0}, "final_logit_softcapping 30.0, model 20.0"),
        ("gemma2", {"sliding_window_size": 9}, "sliding_window"),
    ],
)
def test_arguments_that_no_shape_shows_are_compared_with_the_config(name, change, words, tmp_path):
    write(tmp_path, name)
    section = ModelSection(source=f"hf:{tmp_path}", args=change)
    with pytest.raises(WeightsError, match=re.escape(words)):
        load_pretrained(build(section, dtype=torch.float32), section)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma", "gemma2", "phi3"])
def test_weights_do_not_slip_into_another_family(name, tmp_path):
    """Some families have the same names and shapes."""
    write(tmp_path / "right", name)
    write(tmp_path / "wrong", "llama", **{k: v for k, v in MODELS[name][1].items() if k == "head_dim"})
    section = replace(
        resolve(ModelSection(source=f"hf:{tmp_path / 'right'}")), weights=str(tmp_path / "wrong")
    )
    model = build(section, dtype=torch.float32)
    if name == "mistral":  # it computes the same
        load_pretrained(model, section)
        return
    with pytest.raises(WeightsError):
        load_pretrained(model, section)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias True (only False)"),
        ("llama", {"mlp_bias": True}, "mlp_bias True (only False)"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu (only silu)"),
        ("llama", {"head_dim": 16}, "head_dim 16 (only hidden_size / num_attention_heads, 8)"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 (only 1.0)"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "type 'yarn'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "type 'linear'"),
        (
            "llama",
            {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2.0}},
            "low_freq_factor 2.0 (only 1)",
        ),
        ("llama", {"rope_parameters": LLAMA3_ROPE | {"factor": 2.5}}, "factor 2.5 (only whole numbers)"),
        ("mistral", {"rope_parameters": LLAMA3_ROPE}, "type 'llama3' (only default)"),
        ("mistral", {"hidden_act": "relu"}, "hidden_act relu"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn'"),
        ("gemma", {"hidden_act": "gelu_fast"}, "hidden_act gelu_fast"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings False (only True)"),
        ("gemma", {"attention_bias": True}, "attention_bias"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation silu"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping null"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping null"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "type 'longrope'"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.75}}, "partial_rotary_factor 0.75"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop 0.1"),
        ("phi3", {"tie_word_embeddings": True}, "tie_word_embeddings True (only False)"),
    ],
)
def test_what_torchtune_does_not_compute_is_refused_by_name(name, change, words, tmp_path):
    write(tmp_path, name)
    rewrite_config(tmp_path, **change)
    section = ModelSection(source=f"hf:{tmp_path}")
    with pytest.raises(WeightsError, match=re.escape(words)) as error:
        build(section, dtype=torch.float32, device="meta")
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ConfigError, match=re.escape(words)):  # so `qrecipes check` refuses it, too
        check_source(section)


def test_other_architectures_are_named_with_those_that_are_supported(tmp_path):
    write(tmp_path, "llama")
    rewrite_config(tmp_path, architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(WeightsError, match="MambaForCausalLM is not supported") as error:
        build(ModelSection(source=f"hf:{tmp_path}"), dtype=torch.float32)
    assert all(family.architecture in str(error.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": 16}),
        ("phi3", {"sliding_window": 16}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_window_that_torchtune_lacks_limits_the_length(name, change, tmp_path):
    """Within the window all is equal, beyond it transformers forgets what torchtune remembers."""
    reference = write(tmp_path, name, **change)
    with pytest.warns(UserWarning, match=r"sliding_window is 16.*max_seq_len is 16 of 64"):
        model = load(tmp_path)
    assert model.max_seq_len == 16
    torch.testing.assert_close(
        ours(model, tokens(16)), theirs(reference, tokens(16)), rtol=1e-5, atol=2e-5
    )  # as in test_logits_are_those_of_transformers
    assert load(tmp_path, max_seq_len=12).max_seq_len == 12
    with pytest.raises(ConfigError, match=r"model\.args\.max_seq_len: 17: sliding_window is 16"):
        load(tmp_path, max_seq_len=17)
    section = resolve(ModelSection(source=f"hf:{tmp_path}", args={"max_seq_len": 16}))
    section = replace(section, args=section.args | {"max_seq_len": 64})
    with pytest.raises(ConfigError, match="sliding_window is 16"):  # an explicit builder, too
        load_pretrained(build(section, dtype=torch.float32), section)


def test_a_window_that_is_switched_off_limits_nothing(tmp_path):
    write(tmp_path, "qwen2", use_sliding_window=False)
    rewrite_config(tmp_path, sliding_window=16)
    assert load(tmp_path).max_seq_len == 64
    rewrite_config(tmp_path, use_sliding_window=True, layer_types=["full_attention"] * 3)
    assert load(tmp_path).max_seq_len == 64


def test_no_window_limits_nothing(tmp_path):
    """Mistral without the key has a window of 4096, with null it has none."""
    write(tmp_path, "mistral")
    rewrite_config(tmp_path, max_position_embeddings=8192)
    assert load(tmp_path).max_seq_len == 8192
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="sliding_window is 4096"):
        assert load(tmp_path).max_seq_len == 4096


def test_gemma2_slides_over_the_window_of_transformers(tmp_path):
    """The comparison above crosses the window: with a longer one, the logits are others."""
    write(tmp_path, "gemma2")
    near = ours(load(tmp_path), tokens())
    rewrite_config(tmp_path, sliding_window=64)
    far = ours(load(tmp_path), tokens())
    assert torch.equal(near[:, :8], far[:, :8])
    assert not torch.allclose(near[:, 8:], far[:, 8:], atol=1e-2)


def test_gemma2_caps_its_logits_whoever_builds_it(tmp_path):
    import copy

    section = resolve_gemma2(tmp_path)
    model = build(section, dtype=torch.float32, initialize=True).eval()
    assert "norm.rms_norm.scale" in model.state_dict()
    with torch.no_grad():
        model.tok_embeddings.weight.mul_(1000)
        logits = model(tokens())
    assert logits.abs().max() <= 3.0  # the cap; without it they are in the thousands
    assert logits.abs().max() > 2.9
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.tok_embeddings.weight.zero_()
        assert not twin(tokens()).any()  # the head is tied to the twin's own embedding


def resolve_gemma2(folder: Path) -> ModelSection:
    write(folder, "gemma2_tight_caps")
    return replace(resolve(ModelSection(source=f"hf:{folder}")), weights=None)


def test_gradients_are_those_of_transformers(tmp_path):
    """Through Gemma 2's cap, tied head, scaled embedding and shifted norms."""
    reference, ids = write(tmp_path, "gemma2_tight_caps"), tokens(24)
    model = load(tmp_path)
    (reference(ids).logits.float() ** 2).sum().backward()
    (model(ids) ** 2).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    config = json.loads((tmp_path / "config.json").read_text())
    for name, gradient in state_dict_to_huggingface(gradients, config).items():
        expected = reference.get_parameter(name).grad
        # float32 sums over 48 tokens
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_arguments_override_the_config(tmp_path):
    write(tmp_path, "llama")
    assert load(tmp_path, max_seq_len=24).max_seq_len == 24
    with pytest.raises(ConfigError, match=r"model\.args\.max_seq_length.*did you mean 'max_seq_len'"):
        load(tmp_path, max_seq_length=24)
    section = ModelSection(source=f"hf:{tmp_path}", args={"num_layers": 2})
    with pytest.raises(WeightsError, match="unexpected"):
        load_pretrained(build(section, dtype=torch.float32), section)


def test_random_weights_take_the_shape_alone(tmp_path):
    write(tmp_path / "in", "qwen2")
    (tmp_path / "in" / "model.safetensors").unlink()
    section = ModelSection(source=f"hf:{tmp_path / 'in'}", args={"num_layers": 2}, weights="random")
    assert pretrained(section) is None
    torch.manual_seed(3)
    model = build(section, dtype=torch.float32)
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)  # init_std, 3,072 draws
    with pytest.raises(ConfigError, match=r"model\.weights"):
        load_pretrained(model, section)
    with pytest.raises(ExportError, match=r"layers\.2.*model lacks it"):
        save_huggingface(model, tmp_path / "in", tmp_path / "out")
    save_huggingface(model, tmp_path / "in", tmp_path / "out", args=section.args)
    assert torch.equal(ours(load(tmp_path / "out"), tokens()), ours(model.eval(), tokens()))


def test_weights_may_come_from_another_folder(tmp_path):
    write(tmp_path / "shape", "llama")
    write(tmp_path / "weights", "llama")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    doubled = {name: tensor * 2 for name, tensor in tensors.items()}
    save_file(doubled, tmp_path / "weights" / "model.safetensors", metadata={"format": "pt"})
    section = ModelSection(source=f"hf:{tmp_path / 'shape'}", weights=str(tmp_path / "weights"))
    model = build(section, dtype=torch.float32)
    assert load_pretrained(model, section) == tmp_path / "weights"
    assert torch.equal(model.tok_embeddings.weight, doubled["model.embed_tokens.weight"])
    assert source_folder(section) == tmp_path / "shape"


def test_source_folder_of_each_kind_of_section(tmp_path):
    write(tmp_path / "hf", "llama")
    (tmp_path / "own").mkdir()
    shutil.copyfile(tmp_path / "hf" / "model.safetensors", tmp_path / "own" / "model.safetensors")
    folder = str(tmp_path / "hf")
    builder = "torchtune:llama2.llama2"
    assert source_folder(ModelSection(source=f"hf:{folder}", weights="random")) == tmp_path / "hf"
    assert source_folder(ModelSection(source=builder, weights=folder)) == tmp_path / "hf"
    assert source_folder(ModelSection(source=builder, weights=str(tmp_path / "own"))) is None
    assert source_folder(ModelSection(source=builder)) is None
    with pytest.raises(WeightsError, match=r"model\.source: .*: no such file or folder"):
        source_folder(ModelSection(source=f"hf:{tmp_path}/nothing/there"))
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        source_folder(ModelSection(source=f"hf:{tmp_path / 'own'}"))


def test_damaged_folders_are_refused(tmp_path):
    write(tmp_path / "in", "llama", shard="10KB")
    section = ModelSection(source=f"hf:{tmp_path / 'in'}")
    model = build(section, dtype=torch.float32)
    index = tmp_path / "in" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = next(iter(content["weight_map"].values()))

    def refused(words: str) -> None:
        with pytest.raises(WeightsError, match=words):
            load_pretrained(model, section)

    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"model.more.weight": file}}))
    refused(rf"names 1 tensors that its shards lack, such as model\.more\.weight in {re.escape(file)}")
    index.write_text("{}")
    refused("has no weight_map")
    index.write_text(json.dumps(content))
    shard = tmp_path / "in" / file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refused(rf"{re.escape(file)}: truncated")
    shard.unlink()
    refused(rf"1 of \d+ shards are missing: {re.escape(file)}")


def test_saving_replaces_only_a_model_of_hugging_face(tmp_path):
    write(tmp_path / "in", "llama")
    model = load(tmp_path / "in")
    with pytest.raises(ExportError, match="is the folder that the model came from"):
        save_huggingface(model, tmp_path / "in", tmp_path / "in")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="is no Hugging Face folder"):
        save_huggingface(model, tmp_path / "in", tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
    save_huggingface(model, tmp_path / "in", tmp_path / "out", max_shard_bytes=10_000)
    save_huggingface(model, tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "other", "out"]


def test_a_failed_save_leaves_the_former_one(tmp_path, monkeypatch):
    write(tmp_path / "in", "llama")
    model = load(tmp_path / "in")
    save_huggingface(model, tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("qrecipes.models.checkpoint_files.save_file", full)
    with pytest.raises(ExportError, match="No space left"):
        save_huggingface(model, tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_model_that_its_config_does_not_describe_is_not_saved(tmp_path):
    write(tmp_path / "in", "llama")
    write(tmp_path / "larger", "llama", vocab_size=100)
    write(tmp_path / "eps", "llama", rms_norm_eps=1e-3)
    write(tmp_path / "gemma", "gemma")
    model = load(tmp_path / "in")
    for folder, words in [
        ("larger", r"tok_embeddings\.weight: model \[96, 32\], config\.json \[100, 32\]"),
        ("eps", "rms_norm_eps 0.001, model 1e-06"),
        ("gemma", r"output\.weight"),
    ]:
        with pytest.raises(ExportError, match=words):
            save_huggingface(model, tmp_path / folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_does_not_ask_the_hub(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    check_source(ModelSection(source="hf:OWNER/NAME"))
    with pytest.raises(ConfigError, match=r"model\.source: .*no such file or folder"):
        check_source(ModelSection(source="hf:/no/such/folder"))
