"""Generation against a decoder that computes everything anew, and choices against float64 written out."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from harness import Trial, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qrecipes.assets import resolve
from qrecipes.config.run import ModelSection
from qrecipes.data.tokenizers import BytesTokenizer, HFTokenizer
from qrecipes.errors import ConfigError, GenerationError
from qrecipes.generation import Generator, Sampling, generate, generate_batch
from qrecipes.generation import cache as cache_module
from qrecipes.generation import generator as generator_module
from qrecipes.generation.generator import READ_COLUMNS
from qrecipes.generation.sampling import NO_TOKEN, choose, uniforms
from qrecipes.generation.text import StopStrings, TextStream
from qrecipes.models.build import build
from qrecipes.models.weights import load_pretrained

SIZES = {
    "vocab_size": 257,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 128,
    "max_seq_len": 128,
}
FAMILIES = {
    "llama3_1": {},
    "qwen2": {},
    "mistral": {},
    "phi3": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window_size": 5},
}
GREEDY = Sampling(max_tokens=20, temperature=0)
PROMPTS = ["Once upon a time, there", "a", "Hello"]


def fresh(family: str, **changes: int) -> nn.Module:
    """A random decoder over bytes; its weights are large, so that the likeliest token leads clearly.

    Not those of the embedding: tied to the head, they would make each token its own successor.
    """
    torch.manual_seed(1)
    args = SIZES | FAMILIES[family] | changes
    section = ModelSection(source=f"torchtune:{family}.{family}", args=args, init_std=0.3)
    model = build(section, dtype=torch.float32).eval()
    model.tok_embeddings.weight.data *= 0.1
    return model


small = cache(fresh)


@cache
def stories() -> tuple[nn.Module, HFTokenizer]:
    section = ModelSection(source="hf:asset:stories260k", dtype="float32")
    model = build(section, dtype=torch.float32)
    load_pretrained(model, section)
    return model.eval(), HFTokenizer(resolve("asset:stories260k/tokenizer.json"))


def endless(tokenizer):
    """A tokenizer after whose tokens its model goes on."""
    tokenizer.end_ids = ()
    return tokenizer


@torch.no_grad()
def recomputed(model: nn.Module, ids: list[int], count: int) -> list[int]:
    """The greedy continuation, the whole text computed anew for each token.

    Fails where a token leads by so little that float32 sums in another order could decide otherwise: they
    move these logits by up to 6e-6 of the largest.
    """
    added: list[int] = []
    for _ in range(count):
        logits = model(torch.tensor([ids + added]))[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > 1e-4 * logits.abs().max(), "too close; choose other weights or prompts"
        added.append(int(logits.argmax()))
    return added


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_no_token(family):
    model, tokenizer = small(family), endless(BytesTokenizer())
    found = generate_batch(model, tokenizer, PROMPTS, GREEDY)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        wanted = recomputed(model, tokenizer.encode(prompt), 20)
        assert len(set(wanted)) > 5  # a text that only repeats itself would hide what attention does
        assert list(generation.token_ids) == wanted


def test_the_cache_changes_no_token_of_a_model_with_quantized_weights():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, tokenizer = fresh("llama3_1"), endless(BytesTokenizer())
    quantize_(model, Int8WeightOnlyConfig())
    for prompt, generation in zip(PROMPTS, generate_batch(model, tokenizer, PROMPTS, GREEDY), strict=True):
        assert list(generation.token_ids) == recomputed(model, tokenizer.encode(prompt), 20)


def test_swapped_layers_generate_and_train_on():
    """Activations rounded to INT8 may round otherwise beside the cache, so texts are not compared."""
    run = tiny_run("llm", "int8_mixed_precision", model__args=SIZES, data__vocab_size=257)
    trial, twin = Trial.of(run), Trial.of(run)
    (found,) = generate_batch(trial.model, endless(BytesTokenizer()), ["Hello"], GREEDY)
    assert len(found.token_ids) == 20
    assert trial.advance(2) == twin.advance(2)


def test_positions_count_from_each_rows_own_beginning():
    """A shift of all positions of a row would change no logits, since rotations are relative: it is watched.

    Padding has positions within the model's length too, and sees something: itself.
    """
    model, tokenizer = fresh("llama3_1"), endless(BytesTokenizer())
    seen: list[dict] = []
    model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    generate_batch(model, tokenizer, ["abcd", "b"], Sampling(max_tokens=3, temperature=0))
    assert [call["input_pos"].tolist() for call in seen] == [
        [[0, 1, 2, 3], [0, 0, 0, 0]],
        [[4], [1]],
        [[5], [2]],
    ]
    assert all(call["mask"].any(-1).all() for call in seen)
    assert [call["mask"].sum(-1).tolist() for call in seen[1:]] == [[[5], [2]], [[6], [3]]]


def test_the_cache_changes_no_token_of_a_trained_model():
    model, tokenizer = stories()
    prompts = ["Once upon a time", "Lily and Tom", "The big dog said"]
    for prompt, generation in zip(prompts, generate_batch(model, tokenizer, prompts, GREEDY), strict=True):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        assert list(generation.token_ids) == recomputed(model, ids, 20)
        assert generation.text == tokenizer.decode([*ids, *generation.token_ids])[len(prompt) :]


@pytest.mark.parametrize("family", ["llama3_1", "gemma2"])
def test_a_prompt_longer_than_one_pass_is_the_same(family, monkeypatch):
    """Passes of 4 tokens over prompts of 23, 1 and 5."""
    model, tokenizer = small(family), endless(BytesTokenizer())
    whole = generate_batch(model, tokenizer, PROMPTS, GREEDY)
    monkeypatch.setattr(cache_module, "PREFILL_CHUNK", 4)
    assert generate_batch(model, tokenizer, PROMPTS, GREEDY) == whole


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_rows_draws_depend_on_no_neighbour(batch_size, order):
    model, tokenizer = stories()
    sampling = Sampling(max_tokens=12, temperature=1.0, top_k=20, seed=3)
    prompts = ["Once upon a time", "Lily", "The big dog said", "One day"]
    alone = [generate_batch(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    together = generate_batch(model, tokenizer, [prompts[i] for i in order], sampling, batch_size=batch_size)
    assert together == [alone[i] for i in order]


def test_seeds_reproduce_and_differ_and_equal_prompts_are_drawn_apart():
    model, tokenizer = stories()

    def draw(seed: int, max_tokens: int = 12):
        sampling = Sampling(max_tokens=max_tokens, temperature=1.0, seed=seed)
        return [g.token_ids for g in generate_batch(model, tokenizer, ["Once", "Once"], sampling)]

    first = draw(0)
    assert draw(0) == first
    assert draw(1) != first
    assert first[0] != first[1]
    assert [ids[:5] for ids in first] == draw(0, max_tokens=5)


def expected(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities of the tokens, written out from the definitions."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: sampling.top_k]
    weights = [math.exp((logits[i] - logits[order[0]]) / sampling.temperature) for i in order]
    total = math.fsum(weights)
    kept, reached = {}, 0.0
    for token, weight in zip(order, weights, strict=True):
        if sampling.top_p is not None and reached >= sampling.top_p:
            break
        kept[token] = weight
        reached += weight / total
    return [kept.get(i, 0.0) / math.fsum(kept.values()) for i in range(len(logits))]


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True),
    temperature=st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.05, 1),
)
def test_draws_follow_temperature_top_k_and_top_p(logits, temperature, top_k, top_p):
    """On a grid of 20,000 numbers in [0, 1) each token comes up as often as its probability says."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    values = [value / 10 for value in logits]
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = choose(torch.tensor(values).expand(count, -1), grid, sampling)
    shares = torch.bincount(drawn, minlength=len(values)) / count
    wanted = expected(torch.tensor(values).tolist(), sampling)
    for share, probability in zip(shares.tolist(), wanted, strict=True):
        # an interval of that length holds its share of the grid, give or take one point at either end
        assert abs(share - probability) <= 2 / count
        # but for a grid point that may hit a token of probability below one grid step
        assert probability > 0 or share == 0


def test_no_draw_reaches_a_token_without_weight():
    """Numbers next to 0 and to 1, with impossible tokens at both ends of the vocabulary."""
    logits = torch.tensor([[-math.inf, 0.0, 0.1, -math.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, ends, Sampling(temperature=0.7)).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1e-310, 1e-3])
def test_a_vanishing_temperature_takes_the_likeliest(temperature):
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -3.0, 4.9]])
    uniform = torch.tensor([0.999, 0.001], dtype=torch.float64)
    assert choose(logits, uniform, Sampling(temperature=temperature)).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_p=0.5), Sampling(top_k=2), Sampling()])
def test_logits_that_are_no_numbers_choose_no_token(bad, sampling):
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0]])
    chosen = choose(logits, torch.tensor([0.5, 0.999], dtype=torch.float64), sampling).tolist()
    assert chosen[0] == NO_TOKEN
    assert chosen[1] in (1, 2)


def test_uniforms_begin_alike_whatever_their_number():
    assert torch.equal(uniforms(0, [1, 2], 0, 100)[:7], uniforms(0, [1, 2], 0, 7))
    different = {float(uniforms(*key, 1)) for key in [(0, [1], 0), (1, [1], 0), (0, [2], 0), (0, [1], 1)]}
    assert len(different) == 4


@settings(deadline=None)
@given(text=st.text("aé語😀\0 b", max_size=12), start=st.integers(0, 12))
def test_streamed_bytes_are_whole_characters_and_make_the_text(text, start):
    """A token a byte; the prompt may end within a character, which then is the first to come."""
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, ids[:start])
    pieces = [stream.feed(token) for token in ids[start:]]
    given_whole = bytes(ids[:start]).decode("utf-8", errors="ignore")
    if start < len(ids):
        assert given_whole + "".join(pieces) == text
    assert stream.end() == ""


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=12), cut=st.integers(0, 12))
def test_streamed_bytes_that_are_no_text_make_the_whole_decoding(ids, cut):
    tokenizer = BytesTokenizer()
    known, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    stream = TextStream(tokenizer, ids[:cut])
    pieces = [stream.feed(token) for token in ids[cut:]] + [stream.end()]
    if whole.startswith(known):
        assert known + "".join(pieces) == whole


@settings(deadline=None, max_examples=150)
@given(data=st.data(), cut=st.integers(1, 8))
def test_streamed_pieces_of_any_tokens_make_the_whole_decoding(data, cut):
    """Special tokens, words with and without a space, characters of several byte tokens.

    Bytes that are no UTF-8 are left out: `tokenizers` judges a run of bytes as a whole, so a bad one would
    take back those before it.
    """
    _, tokenizer = stories()
    first_byte, first_word = 3, 259
    token = st.sampled_from([0, 1, 2]) | st.integers(first_word, 511)
    spelled = st.text("a\0é語😀", min_size=1).map(lambda text: [first_byte + b for b in text.encode()])
    units = data.draw(st.lists(token.map(lambda i: [i]) | spelled, min_size=1, max_size=12))
    ids = [token for unit in units for token in unit]
    known, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    stream = TextStream(tokenizer, ids[:cut])
    pieces = [stream.feed(token) for token in ids[cut:]] + [stream.end()]
    if whole.startswith(known):
        assert known + "".join(pieces) == whole


def first_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, looked for after each character."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(st.text("ab.", max_size=4), max_size=8),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_ends_the_text_wherever_the_pieces_are_cut(pieces, stops):
    text = "".join(pieces)
    wanted = first_stop(text, stops)
    watch = StopStrings(stops)
    given_out = ""
    for piece in pieces:
        given_out += watch.feed(piece)
        assert wanted.startswith(given_out)  # nothing of a stop string was ever given out
    assert given_out + watch.end() == wanted
    assert (watch.found is not None) == (wanted != text or any(text.endswith(s) for s in stops if s in text))


def test_stop_strings_across_tokens_end_a_generation():
    model, tokenizer = stories()
    whole = generate_batch(model, tokenizer, ["Once upon a time"], Sampling(max_tokens=40, temperature=0))[0]
    stop = whole.text[12:19]  # from within one word to within another
    assert all(stop not in tokenizer.decode([token]) for token in whole.token_ids)
    pieces: list[str] = []
    found = Generator(model, tokenizer).generate(
        ["Once upon a time"],
        Sampling(max_tokens=40, temperature=0),
        stop=["no such text", stop],
        on_text=lambda index, piece: pieces.append(piece),
    )[0]
    assert found.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert found.finish_reason == "stop_string"
    assert len(found.token_ids) < len(whole.token_ids)
    assert whole.token_ids[: len(found.token_ids)] == found.token_ids


def test_stop_tokens_end_a_generation_and_are_not_part_of_it():
    model, tokenizer = stories()
    sampling = Sampling(max_tokens=30, temperature=0)
    whole = Generator(model, tokenizer).generate(["Lily"], sampling)[0]
    last = whole.token_ids[7]
    place = whole.token_ids.index(last)
    found = Generator(model, tokenizer).generate(["Lily", "Once"], sampling, stop_tokens=[last])[0]
    assert found.token_ids == whole.token_ids[:place]
    assert (whole.finish_reason, found.finish_reason) == ("length", "stop_token")


def test_streamed_text_is_the_text_and_comes_before_the_end():
    model, tokenizer = small("llama3_1"), endless(BytesTokenizer())
    generator = Generator(model, tokenizer, batch_size=2)
    sampling = Sampling(max_tokens=40, temperature=1.5, seed=1)
    whole = generator.generate(PROMPTS, sampling)
    texts = [""] * len(PROMPTS)
    pieces = list(generator.stream(PROMPTS, sampling))
    for piece in pieces:
        texts[piece.index] += piece.text
    assert texts == [generation.text for generation in whole]
    assert [piece.generation for piece in pieces if piece.index == 0][-1] == whole[0]
    assert sum(piece.index == 0 for piece in pieces) > 3


class Watched(nn.Linear):
    """A head that keeps how many rows it was given at a time."""

    most = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.most = max(self.most, x.numel() // x.shape[-1])
        return super().forward(x)


def test_logits_of_one_token_a_row_are_computed():
    """A vocabulary of 128K times a long prompt must never exist."""
    section = ModelSection(source="torchtune:llama3_1.llama3_1", args=SIZES)
    model = build(section, dtype=torch.float32).eval()
    head = Watched(64, 257, bias=False)
    model.output = head
    generate_batch(model, endless(BytesTokenizer()), PROMPTS, GREEDY)
    assert head.most == len(PROMPTS)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("abandoned", [False, True])
def test_the_model_is_as_it_was_and_trains_on(compiled, abandoned, monkeypatch):
    interpreted(monkeypatch)
    model, tokenizer = fresh("gemma2"), endless(BytesTokenizer())
    tokens = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(tokens).logsumexp(-1).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    attributes = attributes_of(model)
    before, random_state = gradients(), torch.get_rng_state()
    stream = Generator(model, tokenizer, compile=compiled).stream(PROMPTS, Sampling(max_tokens=6))
    next(stream)
    if abandoned:
        stream.close()
    else:
        list(stream)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert not model.caches_are_setup()
    assert not model.caches_are_enabled()
    assert [name for name, _ in model.named_modules()] == names
    assert attributes_of(model) == attributes
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert torch.is_grad_enabled()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, before[name]), name


def attributes_of(model: nn.Module) -> dict[str, tuple[list[str], list[str]]]:
    """What every module has, attributes apart from modules and the places for them."""
    return {name: (sorted(vars(m)), list(m._modules)) for name, m in model.named_modules()}


def interpreted(monkeypatch) -> list[int]:
    """Compile without generating code; the list gets an entry for every graph that is compiled."""
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(
        generator_module.torch,
        "compile",
        lambda function, *, dynamic, mode: compile(function, dynamic=dynamic, backend=backend),
    )
    return graphs


@pytest.mark.parametrize("family", ["llama3_1", "gemma2"])
def test_one_graph_serves_all_tokens_and_calls(family, monkeypatch):
    """Batches that are full and not, prompts of any length up to the model's, with and without draws."""
    graphs = interpreted(monkeypatch)
    model, tokenizer = fresh(family, max_seq_len=256), endless(BytesTokenizer())
    generator = Generator(model, tokenizer, batch_size=2, compile=True)
    plain = Generator(model, tokenizer)
    long = "a" * (2 * READ_COLUMNS - 20)
    for prompts, sampling in [(PROMPTS, GREEDY), ([long], GREEDY), (PROMPTS, Sampling(max_tokens=9))]:
        assert generator.generate(prompts, sampling) == plain.generate(prompts, sampling)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_tokens_are_the_eager_ones():
    """With generated code, which sums in another order: `recomputed` shows that no token is close."""
    model, tokenizer = stories()
    prompts = ["Once upon a time", "Lily and Tom", "The big dog said"]
    generator = Generator(model, tokenizer, batch_size=2, compile=True)
    found = generator.generate(prompts, GREEDY)
    for prompt, generation in zip(prompts, found, strict=True):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        assert list(generation.token_ids) == recomputed(model, ids, 20)
    assert generator.speed.compile_s > generator.speed.decode_s


def test_a_model_whose_weights_are_broken_says_so():
    section = ModelSection(source="torchtune:llama3_1.llama3_1", args=SIZES)
    model = build(section, dtype=torch.float32).eval()
    model.norm.scale.data[0] = math.nan
    with pytest.raises(GenerationError, match=r"prompt 1: the model's logits after 1 tokens are NaN"):
        generate(model, BytesTokenizer(), "a", max_tokens=3)
    assert not model.caches_are_setup()


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([""], {}, r"prompt: is empty, and the tokenizer has no beginning"),
        (["a", []], {}, r"prompt 2: is empty"),
        (["a" * 128], {}, r"prompt: has 128 tokens and the model takes 128"),
        (["a" * 120, "b"], {}, r"prompt 1: its 120 tokens and max_tokens = 20 exceed the model's 128; .* 8$"),
        ([[3, 257]], {}, r"prompt: has token 257, but the model's go from 0 to 256"),
        ([[3, -1]], {}, r"prompt: has token -1"),
        (["a" * 40], {"max_length": 50}, r"exceed the model's 50; use at most 10"),
        (["a"], {"batch_size": 0}, r"batch_size: 0 is out of range; must be at least 1"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompts, changes, message):
    with pytest.raises(ConfigError, match=message):
        Generator(small("llama3_1"), BytesTokenizer(), **changes).generate(prompts, GREEDY)


def test_a_text_may_fill_the_model_to_its_last_token():
    model, tokenizer = small("llama3_1"), endless(BytesTokenizer())
    (full,) = generate_batch(model, tokenizer, ["a" * 108], GREEDY)
    assert list(full.token_ids) == recomputed(model, tokenizer.encode("a" * 108), 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_sampling_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))}: .* is out of range; must be"):
        Sampling(**wrong)


def test_a_model_without_text_is_refused():
    with pytest.raises(ConfigError, match="Linear generates no text; generate needs a torchtune decoder"):
        Generator(nn.Linear(2, 2), BytesTokenizer())
