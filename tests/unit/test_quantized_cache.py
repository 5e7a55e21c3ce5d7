"""A cache of integers against the same model's fake-quantized forward pass without any cache, in float64."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from qrecipes.config.run import ModelSection
from qrecipes.data.tokenizers import BytesTokenizer
from qrecipes.errors import ConfigError
from qrecipes.generation import Generator, Sampling, generate_batch, quantized_cache
from qrecipes.generation import cache as cache_module
from qrecipes.generation.cache import CachedDecoder, forward
from qrecipes.models.activation_quantizers import activation_quantizers, quantize_activations
from qrecipes.models.build import build

ARGS = {
    "vocab_size": 257,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 128,
    "max_seq_len": 64,
}
FAMILIES = {"llama3_1": {}, "qwen2": {}, "gemma2": {"head_dim": 16, "sliding_window_size": 5}}
CASES = {
    "keys before rotation": ({"k": 4, "v": 4}, {}),
    "keys after rotation": ({"ke": 4, "v": 4}, {}),
    "both, as a8kv4": ("a8kv4", {}),
    "one grid over all heads": ({"k": 3, "v": 4}, {"per_head": ()}),
    "symmetric, and bits that are not packed": ({"k": 5, "v": 8}, {"symmetric": True}),
}


def decoder(family: str = "llama3_1", **changes: int) -> nn.Module:
    """A random decoder in float64, in which no sum is so wrong that a value goes to another level."""
    torch.manual_seed(1)
    args = ARGS | FAMILIES[family] | changes
    section = ModelSection(source=f"torchtune:{family}.{family}", args=args, init_std=0.3)
    model = build(section, dtype=torch.float32).double().eval()
    model.tok_embeddings.weight.data *= 0.1
    return model


@torch.no_grad()
def over_cache(
    model: nn.Module, rows: list[list[int]], steps: int, kv_bits: int | str | None
) -> torch.Tensor:
    """Logits [B, steps, V] of the last `steps` tokens of rows that end together, one token at a time."""
    width = max(map(len, rows))
    padding = torch.tensor([width - len(row) for row in rows])
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    cached = CachedDecoder(model, kv_bits)
    with cached.installed(len(rows), ARGS["max_seq_len"]):
        found = [cached.prefill(tokens[:, : width - steps + 1], padding)]
        for column in range(width - steps + 1, width):
            cached.cursor.columns = torch.tensor([column])
            cached.cursor.end = column + 1 + (column % 2)  # a column that nothing was written to may be read
            mask_end = cached.cursor.end
            assert mask_end <= ARGS["max_seq_len"]
            found.append(forward(model, cached.cursor, tokens[:, column : column + 1], padding))
    return torch.stack(found, dim=1)


ROWS = [list(range(5, 30)), list(range(90, 106))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_over_the_cache_computes_what_the_model_does_without_one(family, case):
    pattern, options = CASES[case]
    if family == "gemma2" and ("ke" in pattern or isinstance(pattern, str)):
        pytest.skip("gemma2's attention has no hook for ke")
    model = quantize_activations(decoder(family), pattern, **options)
    found = over_cache(model, ROWS, 6, "model")
    for row, ids in enumerate(ROWS):
        with torch.no_grad():
            wanted = model(torch.tensor([ids]))[0, -6:]
        # float32 inside norms and rotations, then float64; a level of 4 bits would be off by 1e-2 or more
        torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    plain = over_cache(decoder(family), ROWS, 6, None)
    assert (plain - found).abs().max() > 1e-3 * plain.abs().max()  # the quantizers matter


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_plain_model_over_low_bits_is_one_that_quantizes_rotated_keys_and_values(bits):
    model = decoder()
    found = over_cache(model, ROWS, 6, bits)
    twin = quantize_activations(copy.deepcopy(model), {"ke": bits, "v": bits})
    for row, ids in enumerate(ROWS):
        with torch.no_grad():
            wanted = twin(torch.tensor([ids]))[0, -6:]
        # float32 inside norms and rotations
        torch.testing.assert_close(found[row], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_heads_that_attention_hands_over_repeated_are_stored_once():
    """Gemma 2's; another head's keys would change everything, 8 bits change little."""
    plain, found = (over_cache(decoder("gemma2"), ROWS, 6, bits) for bits in (None, 8))
    # 8 bits: less than 1% a key and value, over two layers
    assert 0 < (found - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("pattern", [{"k": 4, "v": 4}, {"ke": 4, "v": 4}], ids=str)
def test_keys_that_are_normed_after_rotation(pattern):
    model = decoder()
    for layer in model.layers:
        for name in ("q_norm", "k_norm"):
            norm = nn.RMSNorm(16, dtype=torch.float64)
            norm.weight.data.uniform_(0.5, 2)
            setattr(layer.attn, name, norm)
    found = over_cache(quantize_activations(model, pattern), ROWS, 6, "model")
    with torch.no_grad():
        wanted = model(torch.tensor([ROWS[1]]))[0, -6:]
    # float32 inside norms and rotations
    torch.testing.assert_close(found[1], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("block", [3, 2048])
def test_long_prompts_and_small_blocks_change_nothing(block, monkeypatch):
    model = quantize_activations(decoder(), "a8kv4")
    whole = over_cache(model, ROWS, 6, "model")
    monkeypatch.setattr(quantized_cache, "READ_BLOCK", block)
    monkeypatch.setattr(cache_module, "PREFILL_CHUNK", 7)
    torch.testing.assert_close(
        over_cache(model, ROWS, 6, "model"), whole, rtol=0, atol=1e-4
    )  # sums in float64


@pytest.mark.parametrize(("bits", "most"), [(4, 0.3), (8, 0.55)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_memory_of_the_cache_against_bfloat16(bits, most, head_dim):
    """A head of 64: 32 bytes, a scale of 4 and a zero point of 1 for 128 bytes; of 8 bits, 69."""
    model = decoder(num_heads=2, num_kv_heads=1, embed_dim=2 * head_dim).bfloat16()
    size = {}
    for kv_bits in (None, bits):
        cached = CachedDecoder(model, kv_bits)
        with torch.no_grad(), cached.installed(3, 64):
            cached.prefill(torch.ones(3, 9, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
            size[kv_bits] = cached.cache_bytes
    assert size[None] == 2 * 2 * 3 * 64 * head_dim * 2  # layers, keys and values, rows, columns, bfloat16
    assert size[bits] == 2 * 2 * 3 * 64 * (head_dim * bits // 8 + 5)
    assert size[bits] < most * size[None]


@pytest.mark.parametrize("pattern", [None, "a8kv4"])
def test_the_model_is_left_as_it_was(pattern):
    model = decoder() if pattern is None else quantize_activations(decoder(), pattern)
    ids = torch.tensor([ROWS[0]])
    before, modules = model(ids), {name: type(module) for name, module in model.named_modules()}
    generate_batch(model, BytesTokenizer(), ["Hello"], Sampling(max_tokens=4, temperature=0), kv_bits=4)
    assert torch.equal(model(ids), before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert all(quantizer.enabled for quantizer in activation_quantizers(model).values())
    assert not any(
        hook.__name__ == "_see" for module in model.modules() for hook in module._forward_hooks.values()
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_generate_the_same_text(backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.utils.counters.clear()
    prompts, sampling = ["Once", "Hello there"], Sampling(max_tokens=12, temperature=0)
    tokenizer = BytesTokenizer()
    tokenizer.end_ids = ()
    texts = []
    for compiled in (False, True):
        model = quantize_activations(decoder(), {"k": 4, "v": 4})
        generator = Generator(model, tokenizer, batch_size=2, compile=compiled, kv_bits="model")
        texts.append([found.token_ids for found in generator.generate(prompts, sampling)])
    assert texts[0] == texts[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(set(texts[0][0])) > 3  # a text that only repeats itself would hide much


@pytest.mark.parametrize(
    ("pattern", "options", "bits", "says"),
    [
        (None, {}, "model", r"layers.0.attn does not quantize its keys; give 8 or 4"),
        ({"k": 4}, {}, "model", r"layers.0.attn does not quantize its values"),
        ({"k": 4, "v": 4}, {}, 8, r"8, but layers.0.attn computes with keys of 4 bits; use 'model'"),
        ({"k": 4, "v": 4}, {"zero_point": "float"}, 4, r"float zero points.*use zero_point = 'integer'"),
        (None, {}, 1, r"1 is out of range; use 2 to 8"),
    ],
)
def test_bits_that_contradict_the_model_are_refused(pattern, options, bits, says):
    model = decoder() if pattern is None else quantize_activations(decoder(), pattern, **options)
    with pytest.raises(ConfigError, match=says):
        Generator(model, BytesTokenizer(), kv_bits=bits)
