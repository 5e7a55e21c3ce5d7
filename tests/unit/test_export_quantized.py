"""Exports of models whose layers end as QuantLinear: equal after reloading, and described."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from harness import Trial, tiny_run
from torch import nn

from qrecipes import assets, load_export
from qrecipes.config.run import ModelSection, TokenizerSection
from qrecipes.errors import ExportError
from qrecipes.export import store
from qrecipes.export.opened import open_model
from qrecipes.quant.affine import with_offset
from qrecipes.quant.formats import AffineFormat, NF4Format, format_from_json
from qrecipes.quant.linear import QuantLinear
from qrecipes.training import checkpoint
from qrecipes.training.output import write_identity
from qrecipes.transforms import REGISTRY, Bounds
from qrecipes.transforms.base import LinearTransform, ParamGroup, TransformConfig, register


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(TransformConfig):
    kind: str = "affine"
    scale_dtype: str = "float32"
    grouped: bool = True

    def format(self):
        if self.kind == "nf4":
            return NF4Format()
        return AffineFormat(
            bits=3, group_size=16 if self.grouped else None, symmetric=False, scale_dtype=self.scale_dtype
        )


class ShiftLinear(nn.Module):
    """A low-bit weight and a trained shift of each group, which merges into offsets; of NF4, of each row."""

    def __init__(self, base: QuantLinear) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        groups = base.format.num_groups(base.in_features)
        zeros = torch.zeros(
            base.out_features, groups, dtype=base.compute_dtype, device=base.payload[0].device
        )
        self.shift = nn.Parameter(zeros)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: ShiftConfig) -> ShiftLinear:
        return cls(QuantLinear.from_linear(linear, config.format()))

    def forward(self, x):
        pooled = x.unflatten(-1, (self.shift.shape[1], -1)).sum(-1)
        return self.base(x) + nn.functional.linear(pooled, self.shift)

    def merged(self) -> nn.Module:
        if isinstance(self.base.format, NF4Format):
            return self.base
        grid = with_offset(self.base.grid)
        format = replace(self.base.format, zero_point="float")
        return self.base.with_grid(grid._replace(offset=grid.offset + self.shift.detach()), format)


class Shift(LinearTransform[ShiftConfig]):
    Config = ShiftConfig
    Layer = ShiftLinear
    sqnr_floor_db = 5.0

    def bounds(self) -> Bounds:
        return Bounds(None, None, None)

    def param_groups(self, model: nn.Module) -> list[ParamGroup]:
        return [ParamGroup("shift", [layer.shift for layer in self.layers(model).values()])]


@pytest.fixture(autouse=True)
def _registered():
    register("shift")(Shift)
    yield
    del REGISTRY["shift"]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(48).reshape(2, 24))


def trained(tmp_path: Path, config: ShiftConfig, dtype: torch.dtype = torch.float32, **changes: object):
    """A run of one step and its checkpoint."""
    run = tiny_run("llm", None, output=str(tmp_path / "run"), transform=(config,), **changes)
    trial = Trial.of(run, dtype=dtype)
    trial.advance(1)
    checkpoint.save(run, 1, trial.model, trial.optimizer, trial.data.state_dict(), trial.process)
    write_identity(run, trial.chain.receipt, {})
    return run, trial


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["affine", "nf4"])
def test_export_reloads_bit_for_bit(tmp_path, kind, scale_dtype, dtype):
    """Also where scales have another type than the model: each keeps its own."""
    run, _ = trained(tmp_path, ShiftConfig(kind=kind, scale_dtype=scale_dtype), dtype)
    (folder,) = store.export_run(run.output)
    model, _ = store.load_run(run.output)
    loaded = load_export(folder)
    layers = [m for m in loaded.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers} == {dtype}
    expected = logits(model)
    assert torch.equal(logits(loaded), expected)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype is tensor.dtype


def test_finalizing_keeps_what_the_shift_learnt(tmp_path):
    """Folding into offsets is exact but for roundings of float32."""
    _, trial = trained(tmp_path, ShiftConfig(), optim__lr=1e-2)
    before = logits(trial.model.eval())
    assert any(
        layer.shift.abs().max() > 0 for layer in trial.model.modules() if isinstance(layer, ShiftLinear)
    )
    torch.testing.assert_close(logits(trial.chain.finalize(trial.model)), before, rtol=1e-4, atol=1e-4)


def test_manifest_describes_low_bit_layers(tmp_path):
    run, _ = trained(tmp_path, ShiftConfig(scale_dtype="bfloat16"))
    (folder,) = store.export_run(run.output)
    manifest = json.loads((folder / store.MANIFEST).read_text())
    assert manifest["linear_layers"] == {"QuantLinear": 14}
    assert manifest["parameter_dtype"] == "float32"
    (described,) = manifest["quantized_layers"]
    assert len(described["layers"]) == 14
    model = load_export(folder)
    for name in described["layers"]:
        assert model.get_submodule(name).format == format_from_json(described["format"])


def test_an_export_whose_run_makes_other_formats_is_refused(tmp_path):
    run, _ = trained(tmp_path, ShiftConfig())
    (folder,) = store.export_run(run.output)
    text = (folder / "run.toml").read_text()
    assert 'scale_dtype = "float32"' in text
    (folder / "run.toml").write_text(text.replace('scale_dtype = "float32"', 'scale_dtype = "bfloat16"'))
    with pytest.raises(
        ExportError, match=r"holds low-bit layers \(14 x .*'float32'.*other than its run.toml"
    ):
        load_export(folder)


def test_the_hugging_face_folder_holds_dequantized_weights(tmp_path):
    stories = Path(shutil.copytree(assets.resolve("asset:stories260k"), tmp_path / "stories"))
    section = ModelSection(source=f"hf:{stories}", weights="random")
    tokenizer = TokenizerSection(path=str(stories))
    run, _ = trained(tmp_path, ShiftConfig(grouped=False), model=section, tokenizer=tokenizer)
    exported, folder = store.export_run(run.output)
    assert torch.equal(logits(open_model(f"hf:{folder}").model), logits(load_export(exported)))
