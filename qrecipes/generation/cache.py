"""A key-value cache for torchtune's decoders, and the forward pass over it.

torchtune's own cache has a fixed size and type, waits for the device at each layer and token, and takes no
rows that begin at different columns. This one takes the place of it (`attention.kv_cache`), in each layer.

Prompts of a batch end at the same column, so shorter ones begin later: columns are counted over the batch,
positions from each row's own beginning.

B rows, H heads, S tokens of this pass, C columns of the cache, D features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qrecipes.errors import ConfigError
from qrecipes.generation.cursor import Cursor
from qrecipes.generation.quantized_cache import CachePlan, KVBits, QuantizedKVCache

PREFILL_CHUNK = 2048
"""Most tokens of a prompt in one pass, which bounds the mask at [B, PREFILL_CHUNK, C]."""


class KVCache(nn.Module):
    """Keys and values of one attention layer, [B, H, C, D] each.

    They are allocated at the first update, with the number of heads and the type that the layer has.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, cursor: Cursor) -> None:
        super().__init__()
        self.cursor = cursor
        self.register_buffer("keys", None, persistent=False)
        self.register_buffer("values", None, persistent=False)

    def update(self, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, S, D]; all up to the cursor's end, [B, H, end, D]."""
        if self.keys is None or self.values is None:
            batch, heads, _, width = k_BHSD.shape
            # zeros: a column that is masked weighs 0, and 0 x NaN would still be NaN
            self.keys = k_BHSD.new_zeros(batch, heads, self.cursor.capacity, width)
            self.values = v_BHSD.new_zeros(batch, heads, self.cursor.capacity, width)
        self.keys.index_copy_(2, self.cursor.columns, k_BHSD)
        self.values.index_copy_(2, self.cursor.columns, v_BHSD)
        return self.keys[:, :, : self.cursor.end], self.values[:, :, : self.cursor.end]


class CachedDecoder:
    """A torchtune decoder with caches, inside `with decoder.installed(rows, capacity)`.

    Afterwards the model is as it was, to the mode of every module, and holds no cache. `kv_bits` of None
    stores keys and values in the type that they have.

    Raises:
        ConfigError: if the model is no torchtune decoder of text, or `kv_bits` contradicts what it computes.
    """

    def __init__(self, model: nn.Module, kv_bits: KVBits | None = None) -> None:
        self.model: Any = model
        self.kv_bits = kv_bits
        self._attentions: list[Any] = [m for m in model.modules() if hasattr(m, "kv_cache")]
        if (
            getattr(model, "max_seq_len", None) is None
            or not self._attentions
            or not hasattr(model, "unembed")
        ):
            raise ConfigError(f"{type(model).__name__} generates no text; generate needs a torchtune decoder")
        self._plans = list(self._cache_plans())
        self.cursor = Cursor()
        self._caches: list[KVCache | QuantizedKVCache] = []
        self._shape: tuple[int, int] | None = None
        self._windows = {
            attention: partial(_look_back, self.cursor, attention.sliding_window_size)
            for attention in self._attentions
            if getattr(attention, "sliding_window_size", None) is not None
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextmanager
    def installed(self, rows: int, capacity: int, *, keep: bool = False) -> Iterator[None]:
        """Within, the model computes over `rows` rows of at most `capacity` columns.

        `keep` holds on to the memory for the next time, which then has the same addresses.
        """
        if self._shape != (rows, capacity):
            self._caches = list(self._new_caches())
            self._shape = (rows, capacity)
        self.cursor.capacity = capacity
        with ExitStack() as after:
            for module in self.model.modules():
                after.callback(setattr, module, "training", module.training)
            for attention, cache in zip(self._attentions, self._caches, strict=True):
                _set(after, attention, "kv_cache", cache)
                _set(after, attention, "cache_enabled", True)
                if isinstance(cache, QuantizedKVCache):
                    after.enter_context(cache.attached())
            for attention, look_back in self._windows.items():
                # torchtune's own window counts rows of the mask, which are not columns of the cache
                _set(after, attention, "sliding_window_size", None)
                after.callback(attention.register_forward_pre_hook(look_back, with_kwargs=True).remove)
            _set(after, self.model, "num_output_chunks", 0)
            self.model.eval()
            try:
                yield
            finally:
                if not keep:
                    self._caches, self._shape = [], None

    def _cache_plans(self) -> Iterator[CachePlan | None]:
        names = {module: fqn for fqn, module in self.model.named_modules()}
        for attention in self._attentions:
            yield None if self.kv_bits is None else CachePlan.of(attention, names[attention], self.kv_bits)

    def _new_caches(self) -> Iterator[KVCache | QuantizedKVCache]:
        for attention, plan in zip(self._attentions, self._plans, strict=True):
            yield KVCache(self.cursor) if plan is None else QuantizedKVCache(self.cursor, attention, plan)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all layers' caches now."""
        buffers = (buffer for cache in self._caches for buffer in cache.buffers())
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def prefill(self, tokens_BS: Tensor, padding_B: Tensor) -> Tensor:
        """Logits [B, V] after the last token of each row, with all tokens in the cache from column 0 on.

        Rows begin with `padding_B` tokens that are not theirs. Only the last token's logits are computed.
        """
        logits_BV = torch.empty(0)
        self.cursor.padding = padding_B
        unembed = self.model.unembed
        with ExitStack() as after:
            _set(after, self.model, "unembed", lambda hidden_BSE: unembed(hidden_BSE[:, -1:]))
            for start in range(0, tokens_BS.shape[1], PREFILL_CHUNK):
                part_BS = tokens_BS[:, start : start + PREFILL_CHUNK]
                end = start + part_BS.shape[1]
                self.cursor.columns = torch.arange(start, end, device=part_BS.device)
                self.cursor.end = end
                logits_BV = forward(self.model, self.cursor, part_BS, padding_B)
        return logits_BV


def forward(model: Callable[..., Tensor], cursor: Cursor, tokens_BS: Tensor, padding_B: Tensor) -> Tensor:
    """Logits [B, V] of the last of `tokens_BS`, which go where the cursor says."""
    position_BS = (cursor.columns - padding_B[:, None]).clamp(min=0)
    column_C = torch.arange(cursor.end, device=tokens_BS.device)
    past_SC = column_C <= cursor.columns[:, None]
    # Padding sees itself: some kernels answer NaN where nothing is seen, and no mask hides a NaN later.
    itself_SC = column_C == cursor.columns[:, None]
    visible_BSC = past_SC & ((column_C >= padding_B[:, None])[:, None, :] | itself_SC)
    return model(tokens_BS, mask=visible_BSC, input_pos=position_BS)[:, -1]


def _look_back(
    cursor: Cursor, window: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before an attention layer: let its mask reach back `window` columns, the token's own among them."""
    mask_BSC = kwargs["mask"]
    column_C = torch.arange(mask_BSC.shape[-1], device=mask_BSC.device)
    near_SC = column_C > cursor.columns[:, None] - window
    return args, kwargs | {"mask": mask_BSC & near_SC}


def _set(after: ExitStack, target: Any, name: str, value: Any) -> None:
    """Set an attribute until `after` closes; one that its class gives is uncovered again."""
    own = name in vars(target) or name in getattr(target, "_modules", {})
    before = getattr(target, name, None)

    def restore() -> None:
        delattr(target, name)  # first, or None would stay among the modules
        if own:
            setattr(target, name, before)

    setattr(target, name, value)
    after.callback(restore)
