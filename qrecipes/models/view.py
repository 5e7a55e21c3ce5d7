"""Where a model's parts are: embedding, repeated blocks, head; for what acts on blocks, not on layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qrecipes.errors import ConfigError

Stack = nn.ModuleList | nn.Sequential
"""What holds blocks that run one after the other."""


@dataclass(frozen=True)
class BlockSite:
    """A block, and where it hangs: `setattr(parent, name, other)` puts another module in its place."""

    parent: nn.Module
    name: str
    block: nn.Module


@dataclass(frozen=True)
class ModelView:
    """The parts that a decoder of text and a vision transformer have in common."""

    embeddings: tuple[nn.Module, ...]
    """Modules that turn the input into the first hidden state."""
    blocks: tuple[nn.Module, ...]
    """Repeated blocks, in the order in which they run."""
    norm: nn.Module
    """Applied to the last block's output, before the head."""
    head: Callable[[Tensor], Tensor]
    """Hidden state to logits; no module where torchtune ties it to the embedding."""
    width: int
    """Size of the hidden state."""
    vocab_size: int | None
    """Range of input tokens; None where the input is no text."""
    num_classes: int | None
    """Outputs of a classifier; None for a model of the next token."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelView:
        """The view of a torchtune decoder (that of a fusion model too) or of a timm vision transformer.

        Raises:
            ConfigError: if the model is neither; the message says which parts were looked for.
        """
        for candidate in (model, getattr(model, "decoder", None)):
            if candidate is not None and _has(candidate, "tok_embeddings", "layers", "norm", "output"):
                return cls._of_decoder(candidate)
        if _has(model, "patch_embed", "blocks", "norm", "head"):
            return cls._of_vision_transformer(model)
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        raise ConfigError(
            f"model: {type(model).__name__} has neither tok_embeddings, layers, norm, output (torchtune) "
            f"nor patch_embed, blocks, norm and head (timm); it has: {children}"
        )

    @classmethod
    def _of_decoder(cls, decoder: Any) -> ModelView:
        embedding, head = decoder.tok_embeddings, decoder.output
        outputs = getattr(head, "out_features", None)
        classifies = outputs is not None and outputs < _base_vocabulary(embedding)
        return cls(
            embeddings=(embedding,),
            blocks=tuple(decoder.layers),
            norm=decoder.norm,
            head=head,
            width=_width(embedding),
            vocab_size=embedding.num_embeddings,
            num_classes=outputs if classifies else None,
        )

    @classmethod
    def _of_vision_transformer(cls, model: Any) -> ModelView:
        return cls(
            embeddings=(model.patch_embed,),
            blocks=tuple(model.blocks),
            norm=model.norm,
            head=model.head,
            width=model.embed_dim,
            vocab_size=None,
            num_classes=model.num_classes,
        )


def block_sites(model: nn.Module) -> list[BlockSite]:
    """The blocks of a model, each once, in order: what is compiled, recomputed and sharded as a unit.

    Those are `layers` of torchtune's stacks (decoder, encoder and projection of a fusion model) and `blocks`
    of timm's transformers. In another model they are the modules of the class that fills its largest
    ModuleList or Sequential.

    Raises:
        ConfigError: if nothing in the model is repeated.
    """
    stacks = list(_named_stacks(model)) or _repeated_stacks(model)
    if not stacks:
        raise ConfigError(
            f"model: {type(model).__name__} has no blocks: neither `layers` nor `blocks`, nor any ModuleList "
            "or Sequential of two or more modules of one class; give the model one of these"
        )
    return [BlockSite(stack, name, block) for stack in stacks for name, block in stack.named_children()]


def vocab_size(model: nn.Module) -> int | None:
    """Rows of the token embedding; None for a model that takes no tokens."""
    for candidate in (model, getattr(model, "decoder", None)):
        for name in ("tok_embeddings", "token_embedding"):
            embedding = getattr(candidate, name, None)
            if embedding is not None:
                return embedding.num_embeddings
    return None


def _has(module: Any, *names: str) -> bool:
    return all(getattr(module, name, None) is not None for name in names)


def _width(embedding: Any) -> int:
    """Size of the vectors of an nn.Embedding, or of torchtune's embedding with extra tokens."""
    return embedding.embedding_dim if hasattr(embedding, "embedding_dim") else embedding.dim


def _base_vocabulary(embedding: Any) -> int:
    """Tokens that a decoder can predict; the extra ones of a fusion embedding are inputs only."""
    return getattr(embedding, "embedding", embedding).num_embeddings


def _named_stacks(module: nn.Module) -> Iterator[Stack]:
    """Containers called `layers` or `blocks`, wherever they hang; the inner ones where they are nested."""
    for name, child in module.named_children():
        inner = list(_named_stacks(child))
        if not inner and name in ("layers", "blocks") and isinstance(child, Stack) and len(child):
            inner = [child]
        yield from inner


def _repeated_stacks(model: nn.Module) -> list[Stack]:
    """Outermost containers whose members have the class that fills the largest container."""
    stacks = [module for module in model.modules() if isinstance(module, Stack) and _is_repeated(module)]
    if not stacks:
        return []
    repeated = type(max(stacks, key=_num_parameters)[0])
    chosen: list[Stack] = []
    for stack in stacks:
        inside = any(stack in set(other.modules()) for other in chosen)
        if type(stack[0]) is repeated and not inside:
            chosen.append(stack)
    return chosen


def _is_repeated(stack: Stack) -> bool:
    """Whether a container holds two or more modules, with parameters, of one class."""
    return len(stack) > 1 and len({type(module) for module in stack}) == 1 and _num_parameters(stack) > 0


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
