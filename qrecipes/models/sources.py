"""What `hf:` means in a run: a Hugging Face folder, the torchtune builder that its config.json asks for, and
the weights that belong to it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrecipes.errors import ConfigError, WeightsError
from qrecipes.models.checkpoint_files import read_config
from qrecipes.models.families import QUANTIZATION, Config, builder_arguments, complete, family_of
from qrecipes.models.hub import locate

if TYPE_CHECKING:
    from qrecipes.config.run import ModelSection

PREFIX, RANDOM = "hf:", "random"


def pretrained(section: ModelSection) -> str | None:
    """The name of the weights that a model starts from, as `locate` takes it; None where they are random."""
    if section.weights == RANDOM:
        return None
    if section.weights is None and section.source.startswith(PREFIX):
        return section.source.removeprefix(PREFIX)
    return section.weights


def source_folder(section: ModelSection) -> Path | None:
    """The Hugging Face folder that a model comes from, with its config.json and perhaps a tokenizer; None for
    a model that comes from none. A repository of the hub is downloaded, or found cached.

    Raises:
        WeightsError: if the folder that is named does not exist.
    """
    if section.source.startswith(PREFIX):
        name, key = section.source.removeprefix(PREFIX), "model.source"
    elif section.weights not in (None, RANDOM):
        name, key = str(section.weights), "model.weights"
    else:
        return None
    path = locate(name, key)
    folder = path if path.is_dir() else path.parent
    if read_config(folder) is not None:
        return folder
    if key == "model.source":
        raise WeightsError(f"{key}: {name}: has no config.json of a Hugging Face model")
    return None


def resolve(section: ModelSection) -> ModelSection:
    """The section with a `torchtune:` source in place of an `hf:` one, and all of the builder's arguments:
    config.json's, overridden by `section.args`. Any other section as it is.

    Raises:
        WeightsError: if the folder is missing, of an unsupported family, or asks for what torchtune does not
        compute.
        ConfigError: if `args` lifts a limit that keeps the model right.
    """
    if not section.source.startswith(PREFIX):
        return section
    folder = source_folder(section)
    assert folder is not None, section
    config = dict(read_config(folder) or {})
    told = config.get(QUANTIZATION)
    if section.quantized is not None:
        config.pop(QUANTIZATION, None)  # the weights are those, and config.json says only what is built
    elif isinstance(told, dict) and told.get("quant_method", "gptq") == "gptq":
        raise low_bit_source(folder)
    builder, arguments = translate(config, folder, section.args)
    return replace(section, source=f"torchtune:{builder}", args=arguments, weights=pretrained(section))


def low_bit_source(folder: Path) -> WeightsError:
    """The error of a run that would start from a checkpoint of GPTQ's as from plain weights."""
    return WeightsError(
        f"{folder}: is a checkpoint of GPTQ's, whose layers are low-bit; set model.quantized to hf:{folder}, "
        "and give its layers a transform that adapts low-bit ones"
    )


def translate(config: Config, folder: Path, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """torchtune's builder for the config.json of `folder`, and its arguments, overridden by `args`.

    Warns where the length is limited to a sliding window. Raises as `resolve`.
    """
    family = family_of(config, folder)
    builder, arguments, limit = builder_arguments(family, complete(family, config, folder), folder)
    longest = args.get("max_seq_len")
    if limit is not None and isinstance(longest, int) and longest > arguments["max_seq_len"]:
        raise ConfigError(
            f"model.args.max_seq_len: {longest}: {limit}; use at most {arguments['max_seq_len']}"
        )
    if limit is not None and longest is None:
        warnings.warn(f"{folder}: {limit}", stacklevel=2)
    return builder, arguments | args
