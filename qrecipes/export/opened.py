"""Any model that a command can name: a run, an export, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrecipes.config.run import ModelSection, Run
from qrecipes.data.tokenizers import Tokenizer, load_own_tokenizer, tokenizer_of
from qrecipes.errors import ConfigError, WeightsError
from qrecipes.export.store import MANIFEST, Origin, load_export_and_origin, load_run, load_swapped
from qrecipes.models.activation_quantizers import quantize_activations
from qrecipes.models.build import build, resolve_dtype
from qrecipes.models.gptq_checkpoint import is_gptq, load_gptq
from qrecipes.models.sources import resolve
from qrecipes.models.weights import load_pretrained
from qrecipes.quant.linear import QuantLinear
from qrecipes.training.output import RUN_FILE


@dataclass(frozen=True)
class OpenedModel:
    """A model in evaluation mode, and what is needed to give it text."""

    name: str
    """What the user called it."""
    model: nn.Module
    tokenizer: Tokenizer | None
    run: Run | None
    """The run that it came from; None for a Hugging Face model, and for one converted from it."""
    section: ModelSection | None = None
    """The model, as a run describes it."""

    @property
    def origin(self) -> Origin:
        """Where the model came from, for another export."""
        assert self.section is not None, self.name
        return Origin(model=self.section, run=self.run, tokenizer=self.tokenizer)

    @property
    def max_length(self) -> int | None:
        """Most tokens that the model takes, None where it says nothing."""
        return getattr(self.model, "max_seq_len", None)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.model.parameters()).device

    @property
    def chat_template(self) -> str:
        """The template that it was trained in, as in `data.conversation`; "auto" where none is known."""
        if self.run is None or self.run.data.source != "conversations":
            return "auto"
        return self.run.data.conversation.template

    @property
    def system(self) -> str | None:
        """The system message that it was trained with."""
        return None if self.run is None else self.run.data.conversation.system

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ConfigError: if the model has none.
        """
        if self.tokenizer is None:
            raise ConfigError(f"{self.name}: has no tokenizer, so it takes no text")
        return self.tokenizer


def open_model(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    as_trained: bool = False,
    activations: str | Mapping[str, int] | None = None,
) -> OpenedModel:
    """The model that `name` means: the folder of a run (its newest checkpoint) or of an export, or
    `hf:FOLDER_OR_REPOSITORY`.

    A Hugging Face folder may be a checkpoint of AutoGPTQ or GPTQModel, whose layers stay low-bit. A run and
    an export keep the type they were stored in; `dtype` ("auto", "float32" or "bfloat16") is that of a
    Hugging Face model, where "auto" is bfloat16 on a GPU and float32 on a CPU.

    `as_trained` leaves a run's model as its transforms made it, instead of finalizing it; `activations` is a
    preset or pattern that the model's activations are then quantized to.

    Raises:
        ConfigError: if `name` is none of these, or no run with `as_trained`, or `activations` cannot be
            quantized.
        WeightsError: if a Hugging Face folder is incomplete, of a family that is not supported, or has a
        tokenizer of more tokens than the model has embeddings.
        ExportError, CheckpointError: if what is there is damaged.
    """
    opened = _open(name, device, dtype, as_trained)
    if activations is not None:
        quantize_activations(opened.model, activations)
    return opened


def _open(name: str, device: str | torch.device, dtype: str, as_trained: bool) -> OpenedModel:
    if as_trained and (name.startswith("hf:") or not Path(name, RUN_FILE).is_file() or _is_export(name)):
        raise ConfigError(
            f"{name}: is no run, and only a run's checkpoint holds the model as it trained; give the run's "
            "folder, or leave --as-trained out"
        )
    if name.startswith("hf:"):
        section = ModelSection(source=name, dtype=dtype)  # type: ignore[arg-type]
        compute = resolve_dtype(section, device)
        if is_gptq(section):
            model, folder, section = load_gptq(section, dtype=compute, device=device)
        else:
            model = build(section, dtype=compute, device=device)
            folder = load_pretrained(model, section)
        tokenizer = load_own_tokenizer(folder)
        _check_vocabulary(name, model, tokenizer)
        return OpenedModel(name, model.eval(), tokenizer, None, section)
    folder = Path(name)
    if _is_export(name):
        model, origin = load_export_and_origin(folder, device=device)
        return OpenedModel(name, model, origin.tokenizer, origin.run, origin.model)
    if (folder / RUN_FILE).is_file():
        if as_trained:
            model, _, run = load_swapped(folder, device=device)
        else:
            model, run = load_run(folder, device=device)
        return OpenedModel(name, model, tokenizer_of(run), run, run.model)
    if (folder / "config.json").is_file():
        raise ConfigError(f"{name}: is a Hugging Face folder; write hf:{name}")
    raise ConfigError(
        f"{name}: is neither a run nor an export; give the folder of one, or hf:FOLDER for a model of "
        "Hugging Face"
    )


def _is_export(name: str) -> bool:
    return Path(name, MANIFEST).is_file()


def open_quantized(section: ModelSection, *, device: str | torch.device = "cpu") -> nn.Module:
    """The low-bit model that `section.quantized` names, in training mode.

    Raises:
        ConfigError: if it is another model than the section's, or has no low-bit layer; and as `open_model`.
    """
    name = str(section.quantized)
    opened = open_model(name, device=device, dtype=section.dtype)
    assert opened.section is not None, name
    mine, theirs = (
        {"source": found.source} | dict(found.args) for found in (resolve(section), resolve(opened.section))
    )
    differing = [
        f"{key} is {theirs.get(key)!r} there, {mine.get(key)!r} here"
        for key in {**mine, **theirs}
        if key != "max_seq_len" and mine.get(key) != theirs.get(key)
    ]
    if differing:
        raise ConfigError(
            f"model.quantized: {name} is another model than model.source {section.source}: "
            f"{'; '.join(differing)}; set both to the same"
        )
    if not any(isinstance(module, QuantLinear) for module in opened.model.modules()):
        raise ConfigError(
            f"model.quantized: {name} has no low-bit layer; use model.weights for it, or quantize it with "
            "`qrecipes quantize`"
        )
    return opened.model.train()


def require_bases(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise ConfigError where one of a quantized model's `layers` is still itself after the transforms: a run
    is rebuilt from its configuration, which tells nothing of it."""
    left = [fqn for fqn in layers if isinstance(model.get_submodule(fqn), QuantLinear)]
    if left:
        raise ConfigError(
            f"model.quantized: no transform takes {', '.join(left[:3])}{', ...' if len(left) > 3 else ''} as "
            "the base of an adapter; widen the transform's targets, or quantize the model without them"
        )


def _check_vocabulary(name: str, model: Any, tokenizer: Tokenizer | None) -> None:
    """Raise WeightsError where the tokenizer may give a number that the model has no embedding for."""
    rows = model.tok_embeddings.num_embeddings
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise WeightsError(
            f"{name}: its tokenizer has {tokenizer.vocab_size:,} tokens, and the model embeds {rows:,}; the "
            "tokenizer is another model's, or tokens were added to it and not to the model"
        )
