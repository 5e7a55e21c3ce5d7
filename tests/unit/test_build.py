"""Every builder is reached by its name, built on any device, and started near the uniform distribution."""

import math

import pytest
import torch
from torch import nn

from qrecipes.config.run import ModelSection
from qrecipes.errors import ConfigError
from qrecipes.models.build import build, list_builders, resolve_dtype

DECODER = {
    "vocab_size": 256,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 32,
}
HEAD = {"head_dim": 8}
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8.0}
VISION = {"patch_size": 14, "tile_size": 28, "num_heads": 2}
FUSED = {"clip_embed_dim": 32, "clip_num_layers": 4, "clip_hidden_states": [1], "num_layers_projection": 2}
FAMILIES = ["llama2", "llama3", "llama3_1", "llama3_2", "mistral", "qwen2", "gemma", "gemma2", "phi3"]
SMALL = {
    **{f"{family}.{family}": DECODER for family in FAMILIES},
    **{f"{family}.lora_{family}": DECODER | LORA for family in FAMILIES},
    "llama2.llama2_classifier": DECODER | {"num_classes": 3},
    "llama2.lora_llama2_classifier": DECODER | LORA | {"num_classes": 3},
    "mistral.mistral_classifier": DECODER | {"num_classes": 3},
    "mistral.lora_mistral_classifier": DECODER | LORA | {"num_classes": 3},
    "gemma.gemma": DECODER | HEAD,
    "gemma.lora_gemma": DECODER | LORA | HEAD,
    "gemma2.gemma2": DECODER | HEAD | {"query_pre_attn_scalar": 8},
    "gemma2.lora_gemma2": DECODER | LORA | HEAD | {"query_pre_attn_scalar": 8},
    "clip.clip_vision_encoder": VISION | {"embed_dim": 32, "num_layers": 2},
    "clip.lora_clip_vision_encoder": VISION | {"embed_dim": 32, "num_layers": 2, "lora_modules": ["q_proj"]},
    "clip.clip_text_encoder": {"embed_dim": 32, "num_heads": 2, "num_layers": 2},
    "t5.t5_encoder": {
        "embed_dim": 32,
        "mlp_dim": 64,
        "num_heads": 2,
        "head_dim": 16,
        "num_layers": 2,
        "rel_pos_num_buckets": 8,
        "rel_pos_max_dist": 16,
        "vocab_size": 64,
        "norm_eps": 1e-6,
        "max_seq_len": 16,
    },
    "llama3_2_vision.llama3_2_vision_encoder": VISION | FUSED | {"decoder_embed_dim": 32},
    "llama3_2_vision.llama3_2_vision_decoder": {
        key: value for key, value in DECODER.items() if key != "intermediate_dim"
    }
    | {"fusion_interval": 2, "num_special_tokens": 4, "encoder_max_seq_len": 32},
    "flux.mid_block": {"ch": 32},
    "flux.end_block": {"ch_in": 32, "ch_out": 3},
    "flux.resnet_layers": {"n": 2, "ch_in": 32, "ch_out": 32},
}
"""Arguments of the builders of whole models, and of parts that TOML can describe, that have no defaults."""

tokens = torch.arange(16).view(2, 8)


def section(source: str, **args) -> ModelSection:
    return ModelSection(source=source, args=args)


def small(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **args) -> nn.Module:
    torch.manual_seed(seed)
    return build(section(f"torchtune:{name}", **SMALL[name], **args), dtype=dtype)


def installed() -> dict[str, dict]:
    """SMALL without families that need what is not installed."""
    return {name: args for name, args in SMALL.items() if name in list_builders()}


def test_every_model_builder_is_found_and_built_on_meta(monkeypatch):
    """Those of published models take nothing but, for adapters, the names of the layers."""
    for layer in (nn.Linear, nn.Embedding):  # on meta there is nothing to draw, in most of the time
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    published = {
        name: builder
        for name, builder in list_builders().items()
        if set(builder.required) <= {"lora_attn_modules"} and not builder.name.startswith("qlora_")
    }
    assert len(published) >= 60
    for name, builder in published.items():
        args = {"lora_attn_modules": ["q_proj"]} if builder.required else {}
        model = build(section(f"torchtune:{name}", **args), dtype=torch.bfloat16, device="meta")
        assert all(parameter.is_meta for parameter in model.parameters()), name
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}, name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_quantizing_builder_is_built_on_meta():
    """torchtune chooses NF4 scales weight by weight, on meta too, which takes a minute for the largest."""
    for name, builder in list_builders().items():
        if builder.name.startswith("qlora_"):
            args = {"lora_attn_modules": ["q_proj"]}
            model = build(section(f"torchtune:{name}", **args), dtype=torch.bfloat16, device="meta")
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}, name


def test_quantizing_builder_on_meta():
    args = {"lora_attn_modules": ["q_proj"]}
    model = build(section("torchtune:qlora_llama3_2_1b", **args), dtype=torch.bfloat16, device="meta")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_no_builder_is_left_untested():
    """What is neither published nor in SMALL is a layer that takes modules, or a part of a tested model."""
    left = {
        name
        for name, builder in list_builders().items()
        if not set(builder.required) <= {"lora_attn_modules"} and name not in SMALL
    }
    layers = ("_mlp", "_attention", "_projection_head")
    whole = {name for name in left if not name.endswith(layers)}
    adapters_of_vision = {
        "llama3_2_vision.lora_llama3_2_vision_encoder",
        "llama3_2_vision.lora_llama3_2_vision_decoder",
    }
    assert whole <= adapters_of_vision


def test_component_builders_start_finite_and_equal_under_one_seed():
    """Equality shows that nothing is left uninitialized."""
    for name in installed():
        first, second = small(name).state_dict(), small(name).state_dict()
        other = small(name, seed=1).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first), name
        assert all(tensor.isfinite().all() for tensor in first.values()), name
        assert any(not torch.equal(first[key], other[key]) for key in first), name


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_run_in_bf16_with_rotary_caches_in_float32(family):
    model = small(f"{family}.{family}", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    expected = small(f"{family}.{family}")(tokens)
    logits = model(tokens)
    logits.float().square().mean().backward()
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < 0.05  # 8 bits of mantissa through two blocks
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama3_2.llama3_2", "llama2.llama2", "qwen2.qwen2"])
def test_loss_starts_at_log_vocabulary(name):
    """torchtune's own embeddings, N(0, 1), would start a tied model far above."""
    model = small(name)
    targets = torch.randint(0, 256, (64, 32))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(
            model(torch.randint(0, 256, (64, 32))).flatten(0, 1), targets.flatten()
        )
    assert abs(loss.item() - math.log(256)) < 0.1  # logits of standard deviation about 0.1


def test_weights_have_the_standard_deviation_asked_for():
    args = SMALL["qwen2.qwen2"]
    model = build(ModelSection(source="torchtune:qwen2.qwen2", args=args, init_std=0.5), dtype=torch.float32)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for weight in weights:
        assert abs(weight.std().item() - 0.5) < 5 * 0.5 / math.sqrt(
            2 * weight.numel()
        )  # five standard errors
    assert model.layers[0].attn.q_proj.bias.abs().max() == 0
    assert torch.equal(model.norm.scale, torch.ones(32))


def test_adapters_start_without_effect():
    plain, adapted = small("llama3_2.llama3_2"), small("llama3_2.lora_llama3_2")
    assert adapted.layers[0].attn.q_proj.lora_a.weight.abs().max() > 0
    adapted.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(adapted(tokens), plain(tokens))


def test_dora_magnitude_is_the_norm_of_its_weight():
    layer = small("llama3_2.lora_llama3_2", use_dora=True).layers[0].attn.q_proj
    torch.testing.assert_close(layer.magnitude, layer.weight.norm(dim=1))


def test_quantized_base_weights_have_the_type_and_spread_asked_for():
    args = SMALL["llama3_2.lora_llama3_2"] | {"embed_dim": 256, "quantize_base": True}
    model = build(section("torchtune:llama3_2.lora_llama3_2", **args), dtype=torch.bfloat16)
    weight = model.layers[0].attn.q_proj.weight
    assert type(weight.data).__name__ == "NF4Tensor"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert abs(weight.get_original_weight().float().std().item() - 0.02) < 0.001  # 5%, NF4 errs by less
    model(tokens).sum().backward()


def test_builders_are_reached_by_name_and_by_family():
    by_name = build(section("torchtune:llama3_2_1b"), dtype=torch.bfloat16, device="meta")
    by_family = build(section("torchtune:llama3_2.llama3_2_1b"), dtype=torch.bfloat16, device="meta")
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (by_name, by_family)]
    assert shapes[0] == shapes[1]
    builders = list_builders()
    assert builders["llama3_2.llama3_mlp"].exported is False
    assert builders["llama3_3.llama3_3_70b"].exported
    assert not any("tokenizer" in name or "transform" in name for name in builders)
    layer = build(section("torchtune:llama3_2.llama3_mlp", dim=8, hidden_dim=16), dtype=torch.float32)
    assert layer(torch.randn(2, 8)).shape == (2, 8)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("llama3_2_1b", ["torchtune:BUILDER", "timm:NAME"]),
        ("keras:x", ["torchtune:BUILDER"]),
        ("torchtune:", ["torchtune:BUILDER"]),
        ("torchtune:llama3_2_1bb", ["did you mean 'llama3_2_1b'"]),
        ("torchtune:llama3_2.lama3_2", ["did you mean 'llama3_2.llama3_2'"]),
        ("torchtune:lama3_2.llama3_2", ["did you mean 'llama3_2'", "qwen2_5"]),
        ("torchtune:llama3_mlp", ["torchtune:llama3.llama3_mlp", "torchtune:llama3_2.llama3_mlp"]),
        ("torchtune:llama3_tokenizer", ["no such builder"]),
    ],
)
def test_unknown_source_is_refused(source, words):
    with pytest.raises(ConfigError, match=r"^model\.source") as error:
        build(section(source), dtype=torch.float32)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab": 3}, ["model.args.vocab:", "did you mean 'vocab_size'?"]),
        ({"vocab_size": "256"}, ["model.args.vocab_size: expected int, got '256' (str)"]),
        ({"vocab_size": True}, ["model.args.vocab_size: expected int, got True (bool)"]),
        ({"intermediate_dim": 1.5}, ["model.args.intermediate_dim", "got 1.5 (float)"]),
        ({"num_heads": [4]}, ["model.args.num_heads", "(list)"]),
    ],
)
def test_wrong_arguments_are_refused_before_building(change, words):
    with pytest.raises(ConfigError) as error:
        build(section("torchtune:llama3_2.llama3_2", **(DECODER | change)), dtype=torch.float32)
    for word in words:
        assert word in str(error.value)


def test_missing_arguments_are_listed():
    args = {"vocab_size": 8, "num_layers": 1}
    with pytest.raises(ConfigError, match="num_heads, num_kv_heads, embed_dim, max_seq_len"):
        build(section("torchtune:llama3_2.llama3_2", **args), dtype=torch.float32)


def test_integer_serves_as_a_float():
    model = build(section("torchtune:llama3_2.llama3_2", **DECODER, attn_dropout=0), dtype=torch.float32)
    assert model(tokens).shape == (2, 8, 256)


def test_building_leaves_the_default_dtype_alone():
    torch.set_default_dtype(torch.float64)
    try:
        model = small("llama3_2.llama3_2")
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in [*model.parameters(), *model.buffers()]} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", torch.device("cuda", 0), torch.float32),
    ],
)
def test_dtype_follows_the_section_then_the_device(dtype, device, expected):
    assert resolve_dtype(ModelSection(source="timm:x", dtype=dtype), device) is expected


TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10},
    "vit_srelpos_small_patch16_224": {"img_size": 32, "depth": 1, "num_classes": 10},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2, "num_classes": 10},
    "resnet18": {"num_classes": 10},
}
"""Without buffers; with positions, rotary tables and running statistics in buffers."""


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm_models_train_in_both_types(name, dtype):
    pytest.importorskip("timm")
    model = build(section(f"timm:{name}", **TIMM[name]), dtype=dtype)
    size = TIMM[name].get("img_size", 32)
    logits = model(torch.randn(2, 3, size, size, dtype=dtype))
    logits.float().square().mean().backward()
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    statistics = [buffer for key, buffer in model.named_buffers() if key.endswith("running_var")]
    assert all(buffer.dtype is torch.float32 for buffer in statistics)
    assert bool(statistics) == (name == "resnet18")


def test_timm_keeps_its_own_initialization():
    timm = pytest.importorskip("timm")
    args = TIMM["vit_tiny_patch16_224"]
    torch.manual_seed(0)
    ours = build(section("timm:vit_tiny_patch16_224", **args), dtype=torch.float32).state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", **args).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_timm_on_meta_asks_for_no_weights():
    pytest.importorskip("timm")
    model = build(section("timm:vit_tiny_patch16_224", pretrained=True), dtype=torch.bfloat16, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("vit_tiny_patch16_225", {}, ["no such model", "vit_tiny_patch16_224"]),
        ("vit_tiny_patch16_224.nope", {}, ["model.source", "nope"]),
        ("vit_tiny_patch16_224", {"dept": 2}, ["model.args", "did you mean 'depth'?"]),
    ],
)
def test_timm_requests_that_fail_are_explained(name, args, words):
    pytest.importorskip("timm")
    with pytest.raises(ConfigError) as error:
        build(section(f"timm:{name}", **args), dtype=torch.float32)
    for word in words:
        assert word in str(error.value)


def test_pretrained_without_a_network_is_explained(monkeypatch):
    timm = pytest.importorskip("timm")

    def no_network(*args, **kwargs):
        raise OSError("connection refused")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(ConfigError, match=r"model\.args\.pretrained.*connection refused.*model\.weights"):
        build(section("timm:vit_tiny_patch16_224", pretrained=True), dtype=torch.float32)


def test_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ConfigError, match=r"qrecipes\[vision\]"):
        build(section("timm:vit_tiny_patch16_224"), dtype=torch.float32)
