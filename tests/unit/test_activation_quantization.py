"""Quantized activations of whole models, against forward passes written out with the quantizers in place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from harness import Trial, build_plain, peek, tiny_run
from torch import nn

from qrecipes.config.parse import dump, load
from qrecipes.config.run import ModelSection
from qrecipes.data import build_training_data
from qrecipes.errors import ConfigError, ProbeError
from qrecipes.models import activation_quantizers as quantizers_module
from qrecipes.models.activation_points import KEYS
from qrecipes.models.activation_quantizers import (
    PRESETS,
    activation_quantizers,
    quantize_activations,
    remove_activation_quantizers,
    suspended,
)
from qrecipes.models.build import build
from qrecipes.quant.activations import fake_quantize
from qrecipes.transforms.activation_quantization import ActivationQuantizationConfig
from qrecipes.transforms.chain import Chain
from qrecipes.transforms.int8_mixed_precision import Int8MixedPrecisionConfig

ARGS = {
    "vocab_size": 97,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 32,
}
IDS = torch.arange(40).reshape(2, 20) % 97


def decoder(family: str = "llama3_1", **changes: int) -> nn.Module:
    torch.manual_seed(0)
    args = ARGS | ({"head_dim": 8} if family == "gemma2" else {}) | changes
    section = ModelSection(source=f"torchtune:{family}.{family}", args=args, init_std=0.2)
    return build(section, dtype=torch.float64)


def vit() -> nn.Module:
    pytest.importorskip("timm")
    return build_plain(tiny_run("vit", None)).double().eval()


def rope(attention, x):
    return attention.pos_embeddings(x)


def written_out(model, ids, bits, *, per_head=("k", "v"), **grid):
    """A llama's logits, its layers called one by one and what `bits` names put on its grid between them."""

    def q(key, x, heads=0):
        if key not in bits:
            return x
        if heads and key in per_head:
            parts = [fake_quantize(part, bits[key], **grid) for part in x.chunk(heads, dim=-1)]
            return torch.cat(parts, dim=-1)
        return fake_quantize(x, bits[key], **grid)

    h = model.tok_embeddings(ids)
    b, s, _ = h.shape
    for layer in model.layers:
        attn, mlp = layer.attn, layer.mlp
        x = q("na", layer.sa_norm(h))
        query = q("q", attn.q_proj(x), 4).view(b, s, 4, 8)
        key = q("k", attn.k_proj(x), 2).view(b, s, 2, 8)
        value = q("v", attn.v_proj(x), 2).view(b, s, 2, 8)
        query, key = q("qe", rope(attn, query)), q("ke", rope(attn, key))
        key, value = (t.repeat_interleave(2, dim=2).transpose(1, 2) for t in (key, value))
        scores = query.transpose(1, 2) @ key.transpose(2, 3) / 8**0.5
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        h = h + q("o", attn.output_proj(q("ao", mixed, 4)))
        y = q("nm", layer.mlp_norm(h))
        gated = mlp.activation(q("g", mlp.w1(y))) * q("u", mlp.w3(y))
        h = h + q("d", mlp.w2(q("mm", gated)))
    return model.output(model.norm(h)).float()  # as torchtune's decoders do


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_the_tensor_that_it_names(key):
    model = decoder()
    wanted = written_out(model, IDS, {key: 4})
    plain = model(IDS)
    found = quantize_activations(model, {key: 4})(IDS)
    # float64, but float32 inside norms and rotations
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_outputs": False},
        {"symmetric": True},
        {"zero_point": "float", "per_head": ("ao",)},
        {"per_head": ()},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_their_conventions(preset, options):
    model = decoder()
    bits = {k: b for k, b in PRESETS[preset].items() if options.get("norm_outputs", True) or k[0] != "n"}
    grid = {k: v for k, v in options.items() if k != "norm_outputs"}
    wanted = written_out(model, IDS, bits, **grid)
    found = quantize_activations(model, preset, **options)(IDS)
    # float64, but float32 inside norms and rotations
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_presets_are_the_papers():
    eight = {"na", "k", "v", "qe", "ke", "ao", "nm", "mm"}
    assert set(PRESETS["a8"]) == set(PRESETS["a8kv4"]) == set(PRESETS["a4"]) == eight
    assert {k for k, b in PRESETS["a8kv4"].items() if b == 4} == {"k", "v"}
    assert set(PRESETS["a8"].values()) == {8}
    assert set(PRESETS["a4"].values()) == {4}


def test_gradients_are_those_of_the_forward_pass_written_out():
    model = decoder()
    twin = copy.deepcopy(model)
    quantize_activations(model, "a4")(IDS).square().sum().backward()
    written_out(twin, IDS, PRESETS["a4"]).square().sum().backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = expected[name].grad
        # float32 inside norms and rotations
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_a_vision_transformers_attention_is_quantized_by_parts():
    model = vit()
    block = model.blocks[0]
    attn = block.attn
    x = torch.randn(2, 5, attn.qkv.in_features, dtype=torch.float64)
    query, key, value = attn.qkv(x).chunk(3, dim=-1)
    heads = [
        torch.stack(t.chunk(attn.num_heads, dim=-1), dim=1)
        for t in (query, *(per_head(t, 4, attn.num_heads) for t in (key, value)))
    ]
    heads[:2] = [fake_quantize(t, 3) for t in heads[:2]]
    mixed = (heads[0] @ heads[1].transpose(2, 3) * attn.scale).softmax(-1) @ heads[2]
    mixed = fake_quantize(mixed.transpose(1, 2).flatten(2), 5)
    wanted = attn.proj(mixed)
    quantize_activations(model, {"k": 4, "v": 4, "qe": 3, "ke": 3, "ao": 5})
    torch.testing.assert_close(attn(x), wanted, rtol=0, atol=1e-10)  # sums in float64


def per_head(x, bits, num_heads):
    return torch.cat([fake_quantize(part, bits) for part in x.chunk(num_heads, dim=-1)], dim=-1)


def test_every_key_of_a_vision_transformer_is_on_its_grid():
    model = vit()
    images = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    plain = model(images)
    keys = [key for key in KEYS if key != "g"]  # its feed-forward layer has no gate
    for key in keys:
        found = quantize_activations(model, {key: 3})(images)
        assert (found - plain).abs().max() > 1e-4 * plain.abs().max(), key
        remove_activation_quantizers(model)
    assert torch.equal(model(images), plain)


@pytest.mark.parametrize("make", [decoder, vit])
def test_insertion_and_removal_leave_names_tensors_and_outputs(make):
    model = make()
    x = IDS if make is decoder else torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64)
    before, names = model(x), list(model.state_dict())
    modules = [name for name, _ in model.named_modules()]
    quantize_activations(model, "a4")
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == modules
    assert not torch.equal(model(x), before)
    remove_activation_quantizers(model)
    assert torch.equal(model(x), before)
    assert not activation_quantizers(model)


def test_a_copy_has_quantizers_of_its_own():
    model = quantize_activations(decoder(), "a4")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    remove_activation_quantizers(model)
    assert (
        activation_quantizers(twin).keys() == activation_quantizers(quantize_activations(model, "a4")).keys()
    )
    assert not set(map(id, activation_quantizers(twin).values())) & set(
        map(id, activation_quantizers(model).values())
    )


def test_two_transforms_quantize_and_finalize_their_own_activations():
    """As a method of weights does that quantizes keys and values itself, before this one adds the others."""
    run = tiny_run("llm", None)
    first = ActivationQuantizationConfig(pattern={"k": 4, "ke": 8})
    second = ActivationQuantizationConfig(pattern={"na": 8, "qe": 8})
    chain = Chain.from_configs([first, second])
    model = chain.swap(build_plain(run))
    assert [
        set(t.layers(model)) & {"layers.0.attn.k_proj:k", "layers.0.attn:qe"} for t in chain.transforms
    ] == [
        {"layers.0.attn.k_proj:k"},
        {"layers.0.attn:qe"},
    ]
    chain.transforms[1].finalize(model)
    assert {name.rpartition(":")[2] for name in activation_quantizers(model)} == {"k", "ke"}
    chain.transforms[0].finalize(model)
    assert not activation_quantizers(model)


def test_suspended_quantizers_do_nothing_and_go_on_afterwards():
    model = decoder()
    plain = model(IDS)
    quantize_activations(model, "a4")
    low = model(IDS)
    with suspended(*activation_quantizers(model).values()):
        assert torch.equal(model(IDS), plain)
    assert torch.equal(model(IDS), low)


def test_other_layers_keep_their_quantizers_only_if_they_come_first():
    run = tiny_run("llm", None)
    int8 = Int8MixedPrecisionConfig(min_size=0, emulate=True)
    low = ActivationQuantizationConfig()
    model = build_plain(run)
    chain = Chain.from_configs([int8, low])
    chain.swap(model)
    methods = {row.fqn: row.method for row in chain.receipt.layers}
    assert methods["layers.0.attn.k_proj"] == "int8_mixed_precision"
    assert methods["layers.0.attn.k_proj:k"] == "activation_quantization"
    assert "activation_quantization: 16 tensors between layers" in chain.receipt.summary()
    with pytest.raises(ConfigError, match=r"later transform replaced .*:.*put activation_quantization after"):
        Chain.from_configs([low, int8]).swap(build_plain(run))


def test_the_probe_tells_each_tensors_sqnr_and_leaves_the_model_alone():
    run = tiny_run("llm", "activation_quantization")
    trial = Trial.of(run, probe=True)
    rows = [row for row in trial.chain.receipt.layers if row.method]
    assert len(rows) == 16
    assert all(20 < row.sqnr_db["output"] < 80 for row in rows)  # 8 bits: about 6 dB a bit, less the crest
    assert all(quantizer.seen is None for quantizer in activation_quantizers(trial.model).values())
    assert all(parameter.grad is None for parameter in trial.model.parameters())


def test_the_probe_refuses_quantizers_that_do_nothing(monkeypatch):
    monkeypatch.setattr(quantizers_module, "fake_quantize", lambda x, bits, **_: x)
    with pytest.raises(ProbeError, match="is bit-equal to the original: activation_quantization is not on"):
        Trial.of(tiny_run("llm", "activation_quantization"), probe=True)


def test_the_probe_refuses_quantizers_that_are_not_called(monkeypatch):
    monkeypatch.setattr(
        quantizers_module._AttentionCall, "__call__", lambda self, *a, **k: self.call(*a, **k)
    )
    with pytest.raises(ProbeError, match=r"attn:qe: was not computed: activation_quantization is not on"):
        Trial.of(tiny_run("llm", "activation_quantization"), probe=True)


def test_evaluation_leaves_the_quantizers_on():
    run = tiny_run("llm", "activation_quantization")
    trial = Trial.of(run)
    batch = peek(build_training_data(run.data, None, task=run.task, seed=0, rank=0, world=1))
    before = trial.model(batch.inputs)
    trial.model.eval()(batch.inputs)
    assert torch.equal(trial.model.train()(batch.inputs), before)


@pytest.mark.parametrize("pattern", ['"a8kv4"', "{ na = 8, k = 4, v = 4 }"])
def test_patterns_in_toml_survive_a_dump(pattern, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        f'extends = "tiny/llm"\n[[transform]]\nname = "activation_quantization"\npattern = {pattern}\n'
    )
    run = load(str(path))
    path.write_text(dump(run))
    assert load(str(path)).transform == run.transform
    assert run.transform[0].scheme.pattern["k"] == 4


def test_targets_and_skip_choose_modules():
    run = tiny_run("llm", "activation_quantization")
    config = replace(run.transform[0], targets=("*.1.*",), skip=("*.mlp.*",))
    chain = Chain.from_configs([config])
    model = chain.swap(build_plain(run))
    names = set(activation_quantizers(model))
    attention = {"k_proj:k", "v_proj:v", "output_proj:ao"}
    chosen = {"sa_norm:na", "mlp_norm:nm", "attn:qe", "attn:ke"} | {f"attn.{name}" for name in attention}
    assert names == {f"layers.1.{name}" for name in chosen}


class _Odd(nn.Module):
    """A model whose blocks are built in another way."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))


@pytest.mark.parametrize(
    ("model", "pattern", "says"),
    [
        (decoder, {"aw": 8}, r"pattern.aw: attention's scores .* use qe, ke and v"),
        (decoder, {"ra": 8}, r"pattern.ra: no activation has this name; use na, q, k"),
        (decoder, {"k": 1}, r"pattern.k: 1 bits are out of range; use 2 to 8"),
        (decoder, {}, r"names no activation"),
        (decoder, "a3", r"no preset is called 'a3'; use a8, a8kv4, a4"),
        (lambda: decoder("gemma2"), "a8", r"layers.0.attn: Gemma2Attention has no hook for qe"),
        (vit, {"g": 8}, r"blocks.0.mlp: Mlp has no g to quantize"),
        (
            _Odd,
            {"na": 8},
            r"layers.0: TransformerEncoderLayer has no na to quantize.*or add 'layers.0' to skip",
        ),
        (_Odd, {"k": 8}, r"layers.0: TransformerEncoderLayer has no k to quantize"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(model, pattern, says):
    with pytest.raises(ConfigError, match=says):
        quantize_activations(model(), pattern)


@pytest.mark.parametrize(
    ("make", "layer", "key"),
    [
        (decoder, "layers.1.attn.v_proj", "na"),
        (decoder, "layers.1.mlp.w3", "nm"),
        (decoder, "layers.0.attn.output_proj", "ao"),
        (decoder, "layers.0.mlp.w2", "mm"),
        (vit, "blocks.1.attn.qkv", "na"),
        (vit, "blocks.1.mlp.fc1", "nm"),
        (vit, "blocks.1.attn.proj", "ao"),
        (vit, "blocks.1.mlp.fc2", "mm"),
    ],
)
def test_a_tensor_is_not_quantized_twice(make, layer, key):
    model = make()
    model.get_submodule(layer).input_format = "eight bits"
    with pytest.raises(ConfigError, match=rf":{key}: {layer} quantizes its input itself.*leave {key} out"):
        quantize_activations(model, {"k": 8, key: 8})
    assert not activation_quantizers(model)
    quantize_activations(model, {k: 8 for k in ("na", "nm", "ao", "mm") if k != key})


def test_gemma2_takes_what_its_attention_shows():
    model = decoder("gemma2")
    plain = model(IDS)
    quantize_activations(model, {"na": 8, "k": 4, "v": 4, "ao": 8, "nm": 8, "mm": 8})
    assert not torch.equal(model(IDS), plain)


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"norm_outputs: false, but the pattern quantizes na"):
        ActivationQuantizationConfig(pattern={"na": 8}, norm_outputs=False)
    with pytest.raises(ConfigError, match=r"per_head: 'mm' holds no heads"):
        ActivationQuantizationConfig(per_head=("mm",))
    model = quantize_activations(decoder(), "a8")
    with pytest.raises(ConfigError, match=r"layers.0.attn.k_proj:k: is quantized already"):
        quantize_activations(model, {"k": 4})
