"""Checkpoints of AutoGPTQ and GPTQModel: low-bit layers as others store them -> `QuantLinear`.

Beside a model's plain tensors such a folder holds, for a low-bit layer of K inputs and N outputs in G groups,

    qweight  int32   [K * bits / 32, N]   unsigned levels u, packed along the inputs
    qzeros   int32   [G, N * bits / 32]   zero points z, packed along the outputs; format v1 stores z - 1
    scales   float16 [G, N]               s; the weight is s * (u - z)
    g_idx    int32   [K]                  the group of each input

with the first value in the lowest bits of a 32-bit word; 3-bit values run on from one word into the next, 32
of them in three words. Read as little-endian bytes that is the stream of bits that `quant.packing` uses, so
levels below 8 bits are taken as they are. config.json's `quantization_config`, or quantize_config.json, says
bits, group size and the version of the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qrecipes.errors import WeightsError
from qrecipes.models.build import build
from qrecipes.models.checkpoint_files import Checkpoint, read_config, read_json
from qrecipes.models.families import QUANTIZATION, Config, Family, family_of
from qrecipes.models.sources import pretrained, source_folder, translate
from qrecipes.models.weights import fill
from qrecipes.quant.affine import signed_zeros
from qrecipes.quant.formats import AffineFormat
from qrecipes.quant.linear import QuantLinear
from qrecipes.quant.packing import unpack

if TYPE_CHECKING:
    from qrecipes.config.run import ModelSection

CONFIG, OLD_CONFIG = QUANTIZATION, "quantize_config.json"
WORD = 32
_RAW = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {"gptq": 1, "gptq_v2": 0}
"""What each version of the format took away from a zero point before it was stored."""


@dataclass(frozen=True)
class GPTQFormat:
    """How the low-bit layers of a folder are stored."""

    format: AffineFormat
    zero_offset: int
    """Added to a stored zero point."""
    act_order: bool = False
    """Whether the layers were quantized with act-order, so that their `g_idx` must tell the groups."""

    @classmethod
    def of(cls, described: Mapping[str, Any], where: object) -> GPTQFormat:
        """The format that a `quantization_config` describes.

        Raises:
            WeightsError: naming what of it cannot be read.
        """
        version = described.get("checkpoint_format") or described.get("format") or "gptq"
        if version not in _VERSIONS:
            raise WeightsError(
                f"{where}: checkpoint_format {version!r} cannot be read; use one of {', '.join(_VERSIONS)}, "
                "into which GPTQModel converts"
            )
        if described.get("pack_dtype", "int32") != "int32":
            raise WeightsError(f"{where}: pack_dtype {described['pack_dtype']!r} cannot be read; use 'int32'")
        dynamic = [pattern for pattern in described.get("dynamic") or {} if not pattern.startswith("-")]
        if dynamic:
            raise WeightsError(
                f"{where}: dynamic: {dynamic[0]!r} gives layers settings of their own, which cannot be read; "
                "use a checkpoint of one setting"
            )
        size = described.get("group_size", -1)
        try:
            format = AffineFormat(
                bits=described.get("bits"),  # type: ignore[arg-type]
                group_size=None if size in (-1, None) else size,
                symmetric=bool(described.get("sym", False)),
            )
        except ValueError as error:
            raise WeightsError(f"{where}: {error}") from error
        return cls(format, _VERSIONS[version], bool(described.get("desc_act")))


@dataclass(frozen=True)
class GPTQCheckpoint(Checkpoint):
    """A checkpoint with the payloads of `QuantLinear`, by their names, in place of GPTQ's tensors; converted
    when they are read."""

    raw: Checkpoint
    stored: GPTQFormat

    @classmethod
    def of(cls, raw: Checkpoint, stored: GPTQFormat) -> GPTQCheckpoint:
        """The view of a checkpoint's files.

        Raises:
            WeightsError: if a layer lacks a tensor, or has one of another shape.
        """
        layers = [name.removesuffix(".qweight") for name in raw.files if name.endswith(".qweight")]
        if not layers:
            raise WeightsError(f"{raw.path}: is described as GPTQ's, but no tensor's name ends in .qweight")
        theirs = {f"{layer}.{name}" for layer in layers for name in _RAW}
        files = {name: file for name, file in raw.files.items() if name not in theirs}
        shapes = {name: raw.shapes[name] for name in files}
        found = cls(raw.path, files, shapes, raw, stored)
        for layer in layers:
            out_features, in_features = found.sizes(layer)
            for name, (shape, _) in stored.format.payload_spec(out_features, in_features).items():
                files[f"{layer}.{name}"] = raw.files[f"{layer}.qweight"]
                shapes[f"{layer}.{name}"] = shape
        return found

    def sizes(self, layer: str) -> tuple[int, int]:
        """Output and input features of a layer, whose tensors are checked to have the shapes that follow."""
        bits, shapes = self.stored.format.bits, self.raw.shapes
        rows, out_features = shapes[f"{layer}.qweight"]
        in_features = rows * WORD // bits
        try:
            self.stored.format.check_width(in_features, layer)
        except ValueError as error:
            raise WeightsError(f"{self.path}: {error}") from error
        groups = self.stored.format.num_groups(in_features)
        expected = {"qzeros": (groups, out_features * bits // WORD), "scales": (groups, out_features)}
        for name, shape in expected.items():
            if shapes.get(f"{layer}.{name}") != shape:
                raise WeightsError(
                    f"{self.path}: {layer}.{name}: found {shapes.get(f'{layer}.{name}', 'none')}, expected "
                    f"{shape} for {in_features} inputs and {out_features} outputs"
                )
        return out_features, in_features

    def read(self, parts: Mapping[str, list[tuple[int, int] | None]]) -> Iterator[tuple[str, int, Tensor]]:
        """As `Checkpoint.read`.

        Raises:
            WeightsError: if a layer's groups are not contiguous (act-order), or a symmetric one's zero points
            are not in the middle.
        """
        yield from self.raw.read({name: rows for name, rows in parts.items() if name in self.raw.files})
        for name, ranges in parts.items():
            if name in self.raw.files:
                continue
            layer, _, part = name.rpartition(".")
            whole = {"packed": self._packed, "scale": self._scale, "zero": self._zero}[part](layer)
            for index, rows in enumerate(ranges):
                yield name, index, whole if rows is None else whole[rows[0] : rows[1]]

    def _tensor(self, name: str) -> Tensor:
        ((_, _, tensor),) = self.raw.read({name: [None]})
        return tensor

    def _packed(self, layer: str) -> Tensor:
        self._check_groups(layer)
        if self.stored.format.symmetric:
            self._check_symmetric(layer)
        packed = self._tensor(f"{layer}.qweight").t().contiguous().view(torch.uint8)
        return (
            packed ^ 0x80 if self.stored.format.bits == 8 else packed
        )  # int8, elsewhere the codes are the same

    def _scale(self, layer: str) -> Tensor:
        return self._tensor(f"{layer}.scales").t().float()

    def _zero(self, layer: str) -> Tensor:
        """Signed zero points, int8 [N, G]."""
        bits = self.stored.format.bits
        out_features = self.raw.shapes[f"{layer}.scales"][1]
        qzeros = self._tensor(f"{layer}.qzeros").contiguous().view(torch.uint8)
        codes = unpack(qzeros, bits, out_features, signed=False).to(torch.int16)
        # v1 stores 0 as the greatest level
        return signed_zeros((codes + self.stored.zero_offset) & (2**bits - 1), bits).t()

    def _check_groups(self, layer: str) -> None:
        name = f"{layer}.g_idx"
        if name not in self.raw.files:
            if self.stored.act_order and self.stored.format.group_size is not None:
                raise WeightsError(
                    f"{self.path}: {layer}: was quantized with act-order (desc_act), and lacks the g_idx "
                    "that tells its groups; use a checkpoint made with desc_act = false"
                )
            return
        found = self._tensor(name)
        expected = torch.arange(len(found)) // (self.stored.format.group_size or len(found))
        if not torch.equal(found.long(), expected):
            raise WeightsError(
                f"{self.path}: {layer}: was quantized with act-order, so that inputs of a group do not stand "
                "together (g_idx), which no QuantLinear computes; use a checkpoint made with desc_act = false"
            )

    def _check_symmetric(self, layer: str) -> None:
        zeros = self._zero(layer)
        if zeros.any():
            raise WeightsError(
                f"{self.path}: {layer}: has zero points {int(zeros.min())} to {int(zeros.max())} from the "
                "middle, and its settings say sym; set sym = false there, or the right checkpoint_format"
            )


def described_by(folder: Path, config: Config | None) -> dict[str, Any] | None:
    """The settings of a folder of GPTQ's, from config.json or else quantize_config.json; None of another."""
    told = (config or {}).get(CONFIG)
    if told is None and (folder / OLD_CONFIG).is_file():
        told = read_json(folder / OLD_CONFIG)
    if not isinstance(told, dict) or told.get("quant_method", "gptq") != "gptq" or "bits" not in told:
        return None
    return told


def is_gptq(section: ModelSection) -> bool:
    """Whether an `hf:` model's folder is a checkpoint of GPTQ's."""
    folder = source_folder(section)
    return folder is not None and described_by(folder, read_config(folder)) is not None


def load_gptq(
    section: ModelSection, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Path, ModelSection]:
    """The decoder of an `hf:` folder of GPTQ's, with a `QuantLinear` for each low-bit layer; the folder; and
    the section that builds the decoder with plain layers.

    Raises:
        WeightsError: if a setting, a layer or the architecture cannot be read.
    """
    folder = source_folder(section)
    assert folder is not None, section
    config = dict(read_config(folder) or {})
    described = described_by(folder, config)
    assert described is not None, folder
    config.pop(CONFIG, None)
    stored = GPTQFormat.of(described, folder)
    builder, args = translate(config, folder, section.args)
    plain = replace(section, source=f"torchtune:{builder}", args=args, weights="random")
    model = build(plain, dtype=dtype, device=device, initialize=False)
    family = family_of(config, folder)
    checkpoint = _without_empty_biases(
        GPTQCheckpoint.of(Checkpoint.open(_files(section, folder)), stored), family
    )
    _place(model, checkpoint, family)
    fill(model, checkpoint, _with_payloads(family, stored.format), config, folder)
    return model.eval(), folder, plain


def _files(section: ModelSection, folder: Path) -> Path:
    """The folder, or the one safetensors file in it, which AutoGPTQ named after the settings."""
    if pretrained(section) != section.source.partition(":")[2]:
        return Path(str(pretrained(section)))
    alone = sorted(folder.glob("*.safetensors"))
    return alone[0] if len(alone) == 1 else folder


def _without_empty_biases(checkpoint: GPTQCheckpoint, family: Family) -> GPTQCheckpoint:
    """Less the biases of zeros that AutoGPTQ once gave every layer, where the architecture has none."""
    kept = dict(checkpoint.files)
    for name in checkpoint.files:
        layer, _, part = name.rpartition(".")
        known = _pattern(name) in family.names
        if part == "bias" and f"{layer}.packed" in kept and not known and not checkpoint._tensor(name).any():
            del kept[name]
    return replace(checkpoint, files=kept)


def _place(model: nn.Module, checkpoint: GPTQCheckpoint, family: Family) -> None:
    """Put an empty `QuantLinear` in place of each layer that the checkpoint has low-bit."""
    for name in [name for name in checkpoint.files if name.endswith(".packed")]:
        weight = f"{name.removesuffix('packed')}weight"
        number = next((part for part in weight.split(".") if part.isdigit()), "")
        places = family.names.get(_pattern(weight))
        if places is None:
            raise WeightsError(f"{checkpoint.path}: {weight} has no place in a {family.architecture}")
        for place in places:
            fqn = place.format(number).removesuffix(".weight")
            linear = model.get_submodule(fqn)
            if not isinstance(linear, nn.Linear):
                raise WeightsError(f"{checkpoint.path}: {weight} is low-bit, and {fqn} is no linear layer")
            stored = checkpoint.stored.format
            empty = QuantLinear(
                linear.in_features,
                linear.out_features,
                stored,
                bias=False,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            empty.bias = linear.bias
            model.set_submodule(fqn, empty)


def _with_payloads(family: Family, format: AffineFormat) -> Family:
    """The family, which also knows where a layer's payload goes."""
    names = dict(family.names)
    for theirs, ours in family.names.items():
        if theirs.endswith(".weight"):
            for part in format.payload_spec(1, format.group_size or 1):
                names[f"{theirs.removesuffix('weight')}{part}"] = tuple(
                    f"{name.removesuffix('weight')}{part}" for name in ours
                )
    return replace(family, names=names)


def _pattern(name: str) -> str:
    """The name with its layer's number taken out."""
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))
