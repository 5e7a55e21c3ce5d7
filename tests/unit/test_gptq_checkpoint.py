"""Checkpoints in the layout of AutoGPTQ and GPTQModel, packed here value by value from its description."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qrecipes import assets, load_export
from qrecipes.config.run import ModelSection
from qrecipes.errors import WeightsError
from qrecipes.export.opened import open_model, open_quantized, starting_model
from qrecipes.export.store import save_model
from qrecipes.models.weights import save_huggingface
from qrecipes.quant.linear import QuantLinear
from qrecipes.transforms import QALoRAConfig
from qrecipes.transforms.chain import Chain

TOKENS = torch.arange(40).reshape(2, 20)
WIDTH, MIDDLE = 64, 96


def words(values: np.ndarray, bits: int) -> Tensor:
    """int32 [K * bits / 32, N] of unsigned values [K, N]: bit b of value i of a column is bit i * bits + b of
    the column, counted from the lowest bit of its first word."""
    K, N = values.shape
    found = np.zeros((K * bits // 32, N), dtype=np.uint64)
    for i in range(K):
        for b in range(bits):
            place = i * bits + b
            bit = (values[i].astype(np.uint64) >> np.uint64(b)) & np.uint64(1)
            found[place // 32] |= bit << np.uint64(place % 32)
    return torch.from_numpy(found.astype(np.uint32).view(np.int32).copy())


def packed_layer(generator, N: int, K: int, bits: int, size: int | None, sym: bool, v1: bool):
    """GPTQ's tensors of a random layer, and its weight."""
    G = K // (size or K)
    u = generator.integers(0, 2**bits, (K, N))
    z = np.full((G, N), 2 ** (bits - 1)) if sym else generator.integers(0, 2**bits, (G, N))
    s = (generator.random((G, N)) * 0.02 + 0.01).astype(np.float16)
    group = np.arange(K) // (size or K)
    stored = (z - 1) % 2**bits if v1 else z
    tensors = {
        "qweight": words(u, bits),
        "qzeros": words(stored.T, bits).t().contiguous(),
        "scales": torch.from_numpy(s),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return tensors, torch.from_numpy((s[group].astype(np.float32) * (u - z[group])).T.copy())


def folders(tmp_path: Path, bits=4, size: int | None = 16, sym=False, v1=True, **config) -> tuple[Path, Path]:
    """A checkpoint of GPTQ's of a small Llama, and one of plain tensors with the same weights."""
    source = assets.resolve("asset:stories260k")
    described = json.loads((source / "config.json").read_text()) | {
        "intermediate_size": MIDDLE,
        "num_hidden_layers": 2,
    }
    plain = {
        name: tensor
        for name, tensor in load_file(source / "model.safetensors").items()
        if "layers." not in name or ("norm" in name and int(name.split(".")[2]) < 2)
    }
    theirs = dict(plain)
    generator = np.random.default_rng(0)
    shapes = {
        "self_attn.q": (64, 64),
        "self_attn.k": (32, 64),
        "self_attn.v": (32, 64),
        "self_attn.o": (64, 64),
    }
    shapes |= {"mlp.gate": (MIDDLE, 64), "mlp.up": (MIDDLE, 64), "mlp.down": (64, MIDDLE)}
    for layer in range(2):
        for name, (N, K) in shapes.items():
            tensors, weight = packed_layer(generator, N, K, bits, size, sym, v1)
            place = f"model.layers.{layer}.{name}_proj"
            theirs |= {f"{place}.{part}": tensor for part, tensor in tensors.items()}
            plain[f"{place}.weight"] = weight
    settings = {"bits": bits, "group_size": size or -1, "sym": sym, "desc_act": False, "quant_method": "gptq"}
    settings |= {} if v1 else {"checkpoint_format": "gptq_v2"}
    made = tmp_path / "gptq", tmp_path / "plain"
    for folder, tensors in zip(made, (theirs, plain), strict=True):
        folder.mkdir()
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((source / file).read_bytes())
        (folder / "config.json").write_text(json.dumps(described))
    (made[0] / "quantize_config.json").write_text(json.dumps(settings | config))
    return made


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
def logits(name: str) -> Tensor:
    return open_model(name).model(TOKENS)


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_logits_are_those_of_the_dequantized_checkpoint(tmp_path, bits, sym, v1):
    """Bit for bit: s * (u - z) is computed in float32 here and there, rotary reordering of rows included."""
    theirs, plain = folders(tmp_path, bits=bits, sym=sym, v1=v1)
    model = open_model(f"hf:{theirs}").model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    assert all(layer.format.bits == bits and layer.format.symmetric is sym for layer in layers.values())
    expected = open_model(f"hf:{plain}").model
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), expected.get_submodule(name).weight), name
    assert torch.equal(logits(f"hf:{theirs}"), logits(f"hf:{plain}"))


def test_one_group_a_row_and_settings_in_config_json(tmp_path):
    theirs, plain = folders(tmp_path, size=None)
    config = json.loads((theirs / "config.json").read_text())
    config["quantization_config"] = json.loads((theirs / "quantize_config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "quantize_config.json").unlink()
    assert torch.equal(logits(f"hf:{theirs}"), logits(f"hf:{plain}"))


def test_file_named_after_its_settings_is_found(tmp_path):
    theirs, plain = folders(tmp_path)
    (theirs / "model.safetensors").rename(theirs / "gptq_model-4bit-16g.safetensors")
    assert torch.equal(logits(f"hf:{theirs}"), logits(f"hf:{plain}"))


def test_biases_of_zeros_are_left_out_and_others_refused(tmp_path):
    theirs, plain = folders(tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(theirs, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert torch.equal(logits(f"hf:{theirs}"), logits(f"hf:{plain}"))
    rewrite(theirs, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(WeightsError, match=r"1 unexpected: model\.layers\.0\.self_attn\.q_proj\.bias"):
        open_model(f"hf:{theirs}")


def test_export_of_a_checkpoint_reloads_bit_for_bit(tmp_path):
    theirs, _ = folders(tmp_path, bits=3)
    opened = open_model(f"hf:{theirs}")
    save_model(opened.model, opened.origin, tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(load_export(tmp_path / "export")(TOKENS), opened.model(TOKENS))
    again = open_model(str(tmp_path / "export"))
    assert again.require_tokenizer().encode("Once upon") == opened.require_tokenizer().encode("Once upon")


def test_act_order_is_refused_by_name(tmp_path):
    theirs, _ = folders(tmp_path)
    layer = "model.layers.1.mlp.up_proj"
    rewrite(theirs, lambda tensors: tensors.update({f"{layer}.g_idx": tensors[f"{layer}.g_idx"].flip(0)}))
    with pytest.raises(WeightsError, match=rf"{layer}: was quantized with act-order.*desc_act = false"):
        open_model(f"hf:{theirs}")


def test_act_order_without_the_groups_is_refused(tmp_path):
    """Taken as they stand, the groups would give a model that is merely wrong."""
    theirs, _ = folders(tmp_path, desc_act=True)
    open_model(f"hf:{theirs}")  # act-order of static groups: g_idx says that they stand together
    rewrite(theirs, lambda tensors: [tensors.pop(name) for name in list(tensors) if "g_idx" in name])
    with pytest.raises(WeightsError, match=r"_proj: was quantized with act-order .*, and lacks the g_idx"):
        open_model(f"hf:{theirs}")


def in_config(folder: Path) -> None:
    """Move the settings of a checkpoint to where GPTQModel and transformers keep them."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = json.loads((folder / "quantize_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()


@pytest.mark.parametrize("move", [lambda folder: None, in_config], ids=["quantize_config", "config"])
def test_a_run_needs_no_other_folder_than_the_checkpoint(tmp_path, move):
    """It says what is built, too; and the dequantized folder that is written is described as one."""
    theirs, plain = folders(tmp_path)
    move(theirs)
    section = ModelSection(source=f"hf:{theirs}", quantized=f"hf:{theirs}", dtype="float32")
    model = open_quantized(section).eval()
    with torch.no_grad():
        # the scales of both are the same float32 numbers
        torch.testing.assert_close(model(TOKENS), logits(f"hf:{plain}"), rtol=1e-5, atol=1e-5)
    written = tmp_path / "written"
    save_huggingface(model, theirs, written)
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    torch.testing.assert_close(logits(f"hf:{written}"), logits(f"hf:{plain}"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("move", [lambda folder: None, in_config], ids=["quantize_config", "config"])
def test_a_run_that_takes_a_checkpoint_for_plain_weights_is_told_how_to_take_it(tmp_path, move):
    theirs, _ = folders(tmp_path)
    move(theirs)
    section = ModelSection(source=f"hf:{theirs}", dtype="float32")
    with pytest.raises(WeightsError, match=r"whose layers are low-bit; set model.quantized to hf:"):
        starting_model(section, dtype=torch.float32)


def test_wrong_version_of_a_symmetric_checkpoint_is_noticed(tmp_path):
    """Zero points read as v1 that were stored as v2 are one off, which would shift every weight by a step."""
    theirs, _ = folders(tmp_path, sym=True, v1=False, checkpoint_format="gptq")
    with pytest.raises(
        WeightsError, match=r"has zero points 1 to 1 from the middle.*right checkpoint_format"
    ):
        open_model(f"hf:{theirs}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            r"checkpoint_format 'marlin' cannot be read; use one of gptq, gptq_v2",
        ),
        ({"pack_dtype": "int16"}, r"pack_dtype 'int16' cannot be read"),
        ({"dynamic": {"+:.*up.*": {"bits": 8}}}, r"dynamic: '\+:.*' gives layers settings of their own"),
        ({"bits": 5}, r"bits: 5; use one of 2, 3, 4, 8"),
        ({"group_size": 12}, r"group_size: 12 is no multiple of 8"),
        ({"group_size": 40}, r"group_size 40 does not divide 96 input features"),
        (
            {"group_size": 32},
            r"down_proj\.qzeros: found \(6, 8\), expected \(3, 8\) for 96 inputs and 64 outputs",
        ),
    ],
)
def test_settings_that_cannot_be_read_are_refused_by_name(tmp_path, config, message):
    theirs, _ = folders(tmp_path)
    path = theirs / "quantize_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(WeightsError, match=message):
        open_model(f"hf:{theirs}")


def test_missing_tensors_are_refused_by_name(tmp_path):
    theirs, _ = folders(tmp_path)
    rewrite(theirs, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.scales"))
    with pytest.raises(WeightsError, match=r"down_proj\.scales: found none, expected \(6, 64\)"):
        open_model(f"hf:{theirs}")
    rewrite(theirs, lambda tensors: [tensors.pop(n) for n in list(tensors) if "qweight" in n])
    with pytest.raises(WeightsError, match=r"no tensor's name ends in \.qweight"):
        open_model(f"hf:{theirs}")


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_group_pooled_adapters_over_a_checkpoint_start_at_it_and_merge_into_it(tmp_path, bits, v1):
    """A run whose plain model is one folder and whose base is GPTQ's: the integers and scales stay, packed
    zeros become offsets, and what the adapter adds is in them."""
    theirs, plain = folders(tmp_path, bits=bits, v1=v1)
    section = ModelSection(source=f"hf:{plain}", quantized=f"hf:{theirs}", dtype="float32")
    base = open_model(f"hf:{theirs}").model
    chain = Chain.from_configs([QALoRAConfig(bits=bits, group_size=16, rank=4, quantizer="gptq")])
    model = chain.swap(open_quantized(section)).eval()
    with torch.no_grad():
        # -s z is rounded to float32 once
        torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=1e-4, atol=1e-4)
        for layer in chain.transforms[0].layers(model).values():
            layer.lora_b.normal_(0, 0.02)
        trained = model(TOKENS)
        merged = chain.finalize(model)
        found = merged(TOKENS)
    assert (found - trained).abs().max() <= 1e-5 * trained.abs().max()  # float32, the bound of exports
    assert (found - base(TOKENS)).abs().max() > 1e-2 * trained.abs().max()
    for name, layer in base.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(merged.get_submodule(name).packed, layer.packed), name
            assert torch.equal(merged.get_submodule(name).scale, layer.scale), name
