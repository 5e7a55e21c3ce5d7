"""Text from a language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from qrecipes.config.run import Run
from qrecipes.data.tokenizers import Tokenizer
from qrecipes.errors import ConfigError
from qrecipes.export.store import MANIFEST, load_export_and_run, load_run


def load_model(folder: str | Path, *, device: str | torch.device = "cpu") -> tuple[nn.Module, Run]:
    """The model of an export, or of a run's newest checkpoint, with the run it came from.

    Raises:
        ConfigError: if the folder is neither.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return load_export_and_run(folder, device=device)
    return load_run(folder, device=device)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """The prompt's continuation, without the prompt, at most `max_tokens` tokens or until the end of text.

    A temperature of 0 takes the likeliest token each time. The whole text is computed anew for each token.

    Raises:
        ConfigError: if a number is out of range, the model is no torchtune decoder, or the text would exceed
            its length.
    """
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("temperature", temperature, 0),
        ("top_k", top_k, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}: {value} is out of range; must be at least {least}")
    limit = getattr(model, "max_seq_len", None)
    if limit is None:
        raise ConfigError(f"{type(model).__name__} generates no text; generate needs a torchtune decoder")
    from torchtune.generation import generate as torchtune_generate

    beginning = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = beginning + tokenizer.encode(prompt)
    if not ids:
        raise ConfigError(
            "prompt: is empty, and the tokenizer has no beginning-of-text token; give some text"
        )
    if len(ids) + max_tokens > limit:
        raise ConfigError(
            f"max_tokens: the prompt's {len(ids)} tokens and {max_tokens} more exceed the model's {limit}; "
            f"use at most {max(limit - len(ids), 0)}"
        )
    device = next(model.parameters()).device
    stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    tokens, _ = torchtune_generate(
        model,
        torch.tensor(ids, device=device),
        max_generated_tokens=max_tokens,
        pad_id=-1,  # one prompt needs no padding, and any real token would be masked where the prompt has it
        temperature=temperature or 1.0,
        top_k=top_k if temperature else 1,
        stop_tokens=stop or None,
        rng=torch.Generator(device=device).manual_seed(seed),
    )
    new = tokens[0].tolist()[len(ids) :]
    if stop and stop[0] in new:
        new = new[: new.index(stop[0])]
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]
