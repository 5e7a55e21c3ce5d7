"""Adapters out and in as peft keeps them; peft itself is the oracle where it is installed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Trial, command_line, tiny_run, write_run
from safetensors.torch import load_file, save_file
from torch import nn

from qrecipes import assets
from qrecipes.config import parse
from qrecipes.errors import ConfigError, ExportError, WeightsError
from qrecipes.export import peft, store
from qrecipes.models.build import build
from qrecipes.models.weights import huggingface_places, load_pretrained
from qrecipes.transforms import LoRAConfig, QALoRAConfig
from qrecipes.transforms.chain import Chain

TOKENS = torch.arange(3, 67).reshape(2, 32)
LORA = {"name": "lora", "rank": 4, "alpha": 8.0}
KINDS = {
    "lora": LORA,
    "dora": LORA | {"use_dora": True},
    "rslora": LORA | {"use_rslora": True},
    "bfloat16": LORA | {"adapter_dtype": "bfloat16"},
    "some layers": LORA | {"targets": ["*.q_proj", "*.1.mlp.w2"]},
    "nf4": LORA | {"base": "nf4"},
    "nf4 dora loftq": LORA | {"base": "nf4", "use_dora": True, "init": "loftq"},
    "qa_lora": {"name": "qa_lora", "rank": 4, "group_size": 16, "skip": ["*.w2"]},
}


@pytest.fixture
def stories(tmp_path) -> Path:
    return Path(shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "stories"))


def write(folder: Path, source: Path, transform: dict, **model: object) -> Path:
    """Two steps of a run that starts from `source`; its file."""
    return write_run(folder, {"source": f"hf:{source}", **model}, transform, optim__lr=3e-2)


def trained(tmp_path: Path, stories: Path, transform: dict) -> Path:
    config = write(tmp_path, stories, transform)
    assert command_line("run", "train", "--config", str(config)) == 0
    return tmp_path / "run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a trained run of each kind, exported with its adapters; each is made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            stories = Path(shutil.copytree(assets.resolve("asset:stories260k"), folder / "stories"))
            made[kind] = trained(folder, stories, KINDS[kind])
            assert command_line("export", str(made[kind]), "--peft", "--no-huggingface") == 0
        return made[kind]

    return of


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same_logits(exported, kind):
    """peft's model of the written files, in float32, against the trained model before any merge."""
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    run = exported(kind)
    folder = run / "export" / "peft"
    config = library.PeftConfig.from_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, dtype=torch.float32
    )
    base = plain(TOKENS).logits.detach()
    adapted = library.PeftModel.from_pretrained(plain, folder).eval()
    ours, _, _ = store.load_swapped(run)
    expected = logits(ours)
    found = adapted(TOKENS).logits.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert (found - base).abs().max() > 100 * (found - expected).abs().max()  # the adapter matters


def test_an_adapter_that_peft_wrote_starts_a_run(stories, tmp_path):
    """peft adapts the model, ours loads it: equal logits; another order of rows would show in q and k."""
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    wanted = library.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "k_proj", "down_proj"]
    )
    adapted = library.get_peft_model(plain, wanted).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    config = LORA | {"use_dora": True, "targets": ["*.q_proj", "*.k_proj", "*.w2"]}
    model, chain, run = swapped(tmp_path, stories, config)
    before = logits(model)
    peft.load_peft(tmp_path / "theirs", model, chain, run.model)
    theirs = adapted(TOKENS).logits.detach()
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)  # float32 sums
    assert (before - theirs).abs().max() > 0.1


def started(source: Path, **settings):
    """A model that peft adapts at its queries, as training leaves it: with another B than it began with."""
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wanted = library.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **settings)
    return library.get_peft_model(plain, wanted).eval()


@torch.no_grad()
def stir(adapted: nn.Module) -> torch.Tensor:
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return adapted(TOKENS).logits


@pytest.mark.parametrize("begun", ["pissa", "olora"])
def test_an_adapter_that_began_by_changing_its_base_is_refused_until_peft_converts_it(
    stories, tmp_path, begun
):
    """PiSSA and OLoRA take the adapter that they begin with out of the base, which the files do not hold."""
    adapted = started(stories, init_lora_weights=begun)
    adapted.peft_config["default"].init_lora_weights = True  # as peft's guide has it, before the first save
    adapted.save_pretrained(tmp_path / "begun")
    adapted.peft_config["default"].init_lora_weights = begun
    theirs = stir(adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    run = {"targets": ["*.q_proj"]}
    model, chain, described = swapped(tmp_path, stories, LORA | run)
    before = logits(model)
    with pytest.raises(WeightsError, match=rf"init_lora_weights is '{begun}', which changed the base"):
        peft.load_peft(tmp_path / "theirs", model, chain, described.model)
    assert torch.equal(logits(model), before)
    adapted.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "begun")
    )
    model, chain, described = swapped(tmp_path, stories, LORA | run | {"rank": 8, "alpha": 16.0})
    peft.load_peft(tmp_path / "converted", model, chain, described.model)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)  # float32 sums
    assert (before - theirs).abs().max() > 0.1


@pytest.mark.parametrize("begun", [False, "gaussian", "orthogonal"])
def test_an_adapter_that_began_beside_its_base_starts_a_run(stories, tmp_path, begun):
    adapted = started(stories, init_lora_weights=begun)
    theirs = stir(adapted)
    adapted.save_pretrained(tmp_path / "theirs")
    model, chain, run = swapped(tmp_path, stories, LORA | {"targets": ["*.q_proj"]})
    peft.load_peft(tmp_path / "theirs", model, chain, run.model)
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)  # float32 sums


@torch.no_grad()
def test_a_group_pooled_adapter_of_peft_merges_into_the_groups_that_it_pools(stories, tmp_path):
    """peft adapts only GPTQ's layers so, and merges none; its forward is called for one layer here. It takes
    means times the number of groups: 4 here, of 16 inputs, so that neither factor passes for the other."""
    library = pytest.importorskip("peft")
    from peft.tuners.lora import Linear
    from peft.tuners.lora.variants import QALoraLinearVariant

    wanted = library.LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj"], use_qalora=True, qalora_group_size=16
    )
    theirs = Linear(nn.Linear(64, 32, bias=False), "default", library.LoraConfig(r=4), r=4, lora_alpha=8)
    QALoraLinearVariant.init(theirs, "default", wanted)
    theirs.lora_B["default"].weight.normal_(0, 0.2)
    folder = tmp_path / "theirs"
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.v_proj"
    a, b = theirs.lora_A["default"].weight.clone(), theirs.lora_B["default"].weight.clone()
    assert a.shape == (4, 4)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / peft.TENSORS)
    wanted.base_model_name_or_path = str(stories)
    wanted.save_pretrained(folder)
    pooled = {"name": "qa_lora", "rank": 4, "alpha": 8.0, "group_size": 16, "targets": ["*.0.attn.v_proj"]}
    model, chain, run = swapped(tmp_path, stories, pooled)
    peft.load_peft(folder, model, chain, run.model)
    layer = model.get_submodule("layers.0.attn.v_proj")
    x = torch.randn(5, 64)
    expected = QALoraLinearVariant.forward(theirs.eval(), "default", x, layer.base(x))
    for found in (layer(x), layer.merged()(x)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums
    assert (expected - layer.base(x)).abs().max() > 0.1


def swapped(tmp_path: Path, stories: Path, transform: dict):
    run = parse.load(str(write(tmp_path, stories, transform)))
    model = build(run.model, dtype=torch.float32).eval()
    load_pretrained(model, run.model)
    chain = Chain.from_configs(run.transform)
    return chain.swap(model), chain, run


@pytest.mark.parametrize("kind", KINDS)
def test_written_adapters_load_again_bit_for_bit(exported, kind):
    """Into the trained model with its adapters set to zero."""
    run = exported(kind)
    model, chain, described = store.load_swapped(run)
    expected = logits(model)
    with torch.no_grad():
        for group in chain.param_groups(model):
            for parameter in group.params:
                parameter.zero_()
    peft.load_peft(run / "export" / "peft", model, chain, described.model)
    assert torch.equal(logits(model), expected)


def test_a_run_goes_on_from_an_adapter(exported, stories, tmp_path):
    run = exported("lora")
    (tmp_path / "second").mkdir()
    config = write(tmp_path / "second", stories, LORA, adapter=f"{run}/export/peft")
    assert command_line("run", "train", "--config", str(config)) == 0
    losses = [
        [row["val_loss"] for row in map(json.loads, (folder / "metrics.jsonl").open()) if "val_loss" in row]
        for folder in (run, tmp_path / "second" / "run")
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-6)  # float32 through a file of float32


def test_rows_of_queries_and_keys_change_places_as_the_weights_do(stories):
    """B of q_proj times A, put over Hugging Face's weight, is ours put over ours."""
    config = json.loads((stories / "config.json").read_text())
    places = huggingface_places(["layers.0.attn.q_proj", "layers.0.attn.v_proj", "layers.0.mlp.w2"], config)
    assert [place.name for place in places.values()] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.down_proj",
    ]
    stored = load_file(stories / "model.safetensors")
    section = replace(tiny_run("llm", None).model, source=f"hf:{stories}", args={})
    model = build(section, dtype=torch.float32)
    load_pretrained(model, section)
    for fqn, place in places.items():
        ours = model.get_submodule(fqn).weight.detach()
        assert torch.equal(place.to_huggingface(ours), stored[f"{place.name}.weight"])
        assert torch.equal(place.to_ours(stored[f"{place.name}.weight"]), ours)
    q = model.get_submodule("layers.0.attn.q_proj").weight.detach()
    assert not torch.equal(places["layers.0.attn.q_proj"].to_huggingface(q), q)


@pytest.fixture
def adapter(exported, tmp_path) -> Path:
    """A copy of the adapter of a run over every linear layer."""
    return Path(shutil.copytree(exported("lora") / "export" / "peft", tmp_path / "adapter"))


def change(adapter: Path, **values) -> None:
    path = adapter / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_bad_adapters_are_refused_by_name(adapter, stories, tmp_path):
    model, chain, run = swapped(tmp_path, stories, LORA)
    before = logits(model)
    described = (adapter / peft.CONFIG).read_text()
    tensors = load_file(adapter / peft.TENSORS)

    def refused(pattern, error=WeightsError):
        with pytest.raises(error, match=pattern):
            peft.load_peft(adapter, model, chain, run.model)
        (adapter / peft.CONFIG).write_text(described)
        save_file(tensors, adapter / peft.TENSORS)
        assert torch.equal(logits(model), before)

    change(adapter, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    refused(r"was made for meta-llama/Llama-2-7b-hf, and the model is .*stories")
    change(adapter, peft_type="VERA")
    refused("peft_type is 'VERA'")
    change(adapter, bias="all")
    refused("bias is 'all'; only 'none'")
    change(adapter, modules_to_save=["lm_head"])
    refused(r"modules_to_save is \['lm_head'\]")
    change(adapter, alora_invocation_tokens=[5, 6])
    refused(r"alora_invocation_tokens is \[5, 6\]")
    change(adapter, init_lora_weights="loftq")
    refused("init_lora_weights is 'loftq', which changed the base's weights")
    change(adapter, lora_alpha=64)
    refused("is scaled by 16, and the layer's by 2", ConfigError)
    (adapter / peft.CONFIG).write_text("{")
    refused("is no adapter of peft")

    def put(change_names):
        save_file({change_names(n): t for n, t in tensors.items()}, adapter / peft.TENSORS)

    put(lambda name: name.replace("layers.4.", "layers.31."))
    refused(r"adapts 7 layers that this run's model has not.*model.layers.31")
    put(lambda name: name.replace("lora_A", "lora_embedding_A"))
    refused("lora_embedding_A.*; it must hold lora_A and lora_B")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name][:-8].clone()}, adapter / peft.TENSORS)
    refused("q_proj.b: has 56 rows, and the model's layer gives 64 outputs")
    name = name.replace("lora_B", "lora_A")
    save_file(tensors | {name: tensors[name][:, :-1].clone()}, adapter / peft.TENSORS)
    refused(
        r"adapter of layers.0.attn.q_proj.a: has shape \(4, 63\), and the layer's has \(4, 64\)", ConfigError
    )


def test_an_adapter_over_a_dequantized_base_tells_of_what_model(exported, stories, tmp_path):
    """Its `base/` is a name that says nothing; a model of another name with the same shapes is refused."""
    folder = exported("nf4") / "export" / "peft"
    assert json.loads((folder / peft.CONFIG).read_text())["base_model_name_or_path"].endswith("/base")
    model, chain, run = swapped(tmp_path, stories, KINDS["nf4"])
    peft.load_peft(folder, model, chain, run.model)
    other = Path(shutil.copytree(stories, tmp_path / "tales"))
    model, chain, run = swapped(tmp_path, other, KINDS["nf4"])
    with pytest.raises(WeightsError, match=r"was made for .*/stories, and the model is .*/tales"):
        peft.load_peft(folder, model, chain, run.model)


def test_an_adapter_of_layers_that_are_left_out_is_refused(adapter, stories, tmp_path):
    model, chain, run = swapped(tmp_path, stories, LORA | {"skip": ["*.w1"]})
    with pytest.raises(WeightsError, match=r"adapts 5 layers .*gate_proj.*targets leave them out"):
        peft.load_peft(adapter, model, chain, run.model)


@pytest.mark.parametrize(
    ("transform", "pattern"),
    [
        (LORA | {"rank": 2}, "set the transform's rank"),
        (LORA | {"use_dora": True}, "lacks DoRA's magnitudes, and the layer has them"),
        (
            {"name": "qa_lora", "rank": 4, "alpha": 8.0, "group_size": 16, "skip": ["*.w2"]},
            "gate_proj|down_proj",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused(adapter, stories, tmp_path, transform, pattern):
    model, chain, run = swapped(tmp_path, stories, transform)
    with pytest.raises((ConfigError, WeightsError), match=pattern):
        peft.load_peft(adapter, model, chain, run.model)


def test_a_lora_is_no_group_pooled_adapter(stories, tmp_path):
    run = trained(tmp_path, stories, LORA | {"targets": ["*.q_proj"]})
    store.export_run(run, peft=True, huggingface=False)
    pooled = {"name": "qa_lora", "rank": 4, "alpha": 8.0, "group_size": 16, "targets": ["*.q_proj"]}
    model, chain, described = swapped(tmp_path, stories, pooled)
    with pytest.raises(ConfigError, match="is no group-pooled adapter of groups of 16"):
        peft.load_peft(run / "export" / "peft", model, chain, described.model)


def test_only_adapters_of_hugging_face_models_are_written(tmp_path):
    run = tiny_run("llm", "lora")
    trial = Trial.of(run)
    with pytest.raises(ExportError, match="came from none"):
        peft.save_peft(trial.model, trial.chain, run, tmp_path / "peft")


def test_a_run_without_adapters_has_none_to_write(stories, tmp_path):
    run = trained(tmp_path, stories, {"name": "int8_mixed_precision", "min_size": 0, "emulate": True})
    with pytest.raises(ExportError, match="has no low-rank adapters"):
        store.export_run(run, peft=True, huggingface=False)


def test_adapters_of_two_ranks_are_refused(stories, tmp_path):
    run = parse.load(str(write(tmp_path, stories, LORA)))
    configs = (
        LoRAConfig(rank=4, targets=("*.q_proj",)),
        QALoRAConfig(rank=2, group_size=16, targets=("*.k_proj",)),
    )
    chain = Chain.from_configs(configs)
    model = chain.swap(build(run.model, dtype=torch.float32))
    with pytest.raises(ExportError, match="of 2 kinds"):
        peft.save_peft(model, chain, run, tmp_path / "peft")


def test_a_layer_without_an_adapter_takes_none(stories, tmp_path):
    model, chain, _ = swapped(tmp_path, stories, LORA | {"targets": ["*.q_proj"]})
    given = chain.transforms[0].layers(model)["layers.0.attn.q_proj"].adapter()
    chain.load_adapters(model, {"layers.0.attn.q_proj": given})
    with pytest.raises(
        ConfigError, match=r"1 of 2 adapters have no layer to go to: layers.0.attn.k_proj; widen"
    ):
        chain.load_adapters(model, {"layers.0.attn.q_proj": given, "layers.0.attn.k_proj": given})


@pytest.fixture
def phi3(tmp_path) -> Path:
    """A random Phi-3 of transformers with the story model's tokenizer: queries, keys and values are one layer
    there, and gate and up."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "phi3"
    shutil.copytree(assets.resolve("asset:stories260k"), folder)
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Phi3Config(**shape, **heads, **ids, sliding_window=None)
    torch.manual_seed(0)
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


STACKED = {
    "all": LORA,
    "dora": LORA | {"use_dora": True},
    "rslora": LORA | {"use_rslora": True},
    "queries and values": LORA | {"targets": ["*.q_proj", "*.v_proj", "*.w3", "*.w2"]},
    "keys": LORA | {"targets": ["*.k_proj"]},
    "nf4": LORA | {"base": "nf4"},
    "qa_lora": {"name": "qa_lora", "rank": 4, "group_size": 16},
}


def stirred(tmp_path: Path, source: Path, transform: dict):
    """A swapped model whose adapters do something, its transforms and run."""
    model, chain, run = swapped(tmp_path, source, transform)
    with torch.no_grad():
        for group in chain.param_groups(model):
            for parameter in group.params:
                parameter.mul_(1.1) if parameter.ndim == 1 else parameter.normal_(0, 0.2)
    return model, chain, run


@pytest.mark.parametrize("kind", STACKED)
def test_adapters_of_stacked_layers_load_again_bit_for_bit(phi3, tmp_path, kind):
    model, chain, run = stirred(tmp_path, phi3, STACKED[kind])
    expected = logits(model)
    peft.save_peft(model, chain, run, tmp_path / "peft")
    again, chain, run = swapped(tmp_path, phi3, STACKED[kind])
    assert not torch.equal(logits(again), expected)
    peft.load_peft(tmp_path / "peft", again, chain, run.model)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("kind", STACKED)
def test_peft_computes_the_same_logits_with_stacked_layers(phi3, tmp_path, kind):
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, chain, run = stirred(tmp_path, phi3, STACKED[kind])
    expected = logits(model)
    folder = peft.save_peft(model, chain, run, tmp_path / "peft")
    name = library.PeftConfig.from_pretrained(folder).base_model_name_or_path
    plain = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    base = plain(TOKENS).logits.detach()
    found = library.PeftModel.from_pretrained(plain, folder).eval()(TOKENS).logits.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert (found - base).abs().max() > 100 * (found - expected).abs().max()


def test_rows_of_stacked_adapters_are_those_of_the_product(phi3, tmp_path):
    """Without peft: B A of what is written, times its scaling, against each layer's own."""
    model, chain, run = stirred(tmp_path, phi3, LORA)
    own = {fqn: layer.adapter() for fqn, layer in chain.transforms[0].layers(model).items()}
    folder = peft.save_peft(model, chain, run, tmp_path / "peft")
    tensors = load_file(folder / peft.TENSORS)
    described = json.loads((folder / peft.CONFIG).read_text())
    name = "model.layers.1.self_attn.qkv_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    scaling = described["alpha_pattern"][name] / described["rank_pattern"][name]
    assert a.shape == (12, 64)
    adapters = [own[f"layers.1.attn.{part}_proj"] for part in "qkv"]
    expected = torch.cat([adapter.scaling * adapter.b @ adapter.a for adapter in adapters])
    torch.testing.assert_close(scaling * b @ a, expected, rtol=0, atol=1e-6)  # sums of 12 terms, not 4
    assert "model.layers.1.mlp.down_proj" not in described["rank_pattern"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_stacked_adapter_that_peft_wrote_starts_a_run(phi3, tmp_path, use_dora):
    """peft has one A for queries, keys and values; each of ours gets a copy, and its rows of B."""
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32)
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    wanted = library.LoraConfig(r=4, lora_alpha=8, use_dora=use_dora, target_modules=names)
    adapted = library.get_peft_model(plain, wanted).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "theirs")
    model, chain, run = swapped(tmp_path, phi3, LORA | {"use_dora": use_dora})
    peft.load_peft(tmp_path / "theirs", model, chain, run.model)
    theirs = adapted(TOKENS).logits.detach()
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)  # float32 sums
    layer = model.get_submodule("layers.0.attn.q_proj")
    assert torch.equal(layer.lora_a, model.get_submodule("layers.0.attn.k_proj").lora_a)


def test_stacked_adapters_that_do_not_fit_are_refused(phi3, tmp_path):
    model, chain, run = stirred(tmp_path, phi3, LORA)
    folder = peft.save_peft(model, chain, run, tmp_path / "peft")
    fewer, chain, run = swapped(tmp_path, phi3, LORA | {"skip": ["*.k_proj"]})
    with pytest.raises(WeightsError, match=r"qkv_proj: also adapts layers.0.attn.k_proj, .*widen them"):
        peft.load_peft(folder, fewer, chain, run.model)
    model, chain, run = swapped(tmp_path, phi3, LORA)
    described = json.loads((folder / peft.CONFIG).read_text())
    change(folder, rank_pattern={})
    with pytest.raises(WeightsError, match=r"has (8|12) rows, and adapter_config.json says rank 4"):
        peft.load_peft(folder, model, chain, run.model)
    change(folder, **described | {"r": 12, "lora_alpha": 24.0})
    with pytest.raises((ConfigError, WeightsError), match=r"rank 12|another rank"):
        peft.load_peft(folder, model, chain, run.model)


def test_magnitudes_of_a_part_of_a_stacked_layer_are_not_written(phi3, tmp_path):
    model, chain, run = swapped(tmp_path, phi3, LORA | {"use_dora": True, "skip": ["*.k_proj"]})
    with pytest.raises(ExportError, match=r"qkv_proj is .* of which layers.0.attn.k_proj has no adapter"):
        peft.save_peft(model, chain, run, tmp_path / "peft")
