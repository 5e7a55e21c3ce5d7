"""Chat templates give the tokens that transformers gives, mark the answers, and let nobody forge a turn."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qrecipes.assets import resolve
from qrecipes.config.run import TokenizerSection
from qrecipes.data.chat import UnstableTemplateError, Writer, encode_conversation, stop_ids, with_system
from qrecipes.data.markup import Markup
from qrecipes.data.templates import find_template
from qrecipes.data.tokenizers import load_tokenizer
from qrecipes.errors import ConfigError, DataError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- if tools is not none %}{{- raise_exception("tools?") }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
QWEN = """{%- set ns = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- '<|im_start|>system\n' + message.content + '<|im_end|>\n' }}
        {%- continue %}
    {%- endif %}
    {% set ns.turns = ns.turns + 1 %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in turns %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}{%- if loop.first and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CLOSING = PHI.replace("eos_token", "eos_token ~ eos_token ~ eos_token ~ eos_token")
"""Ends a conversation with more than the next turn's first tokens."""
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STYLES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "qwen": (QWEN, "<|im_end|>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "phi": (PHI, "<|end|>"),
    "closing": (CLOSING, "<|end|>"),
    "generation": (GENERATION, "<|im_end|>"),
}
SPECIAL = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
CORPUS = ["the cat sat on the mat", "user assistant system model", "yes no, 12 + 30 = 42\n\n"] * 10
TALK = [
    {"role": "user", "content": " the cat\nsat?"},
    {"role": "assistant", "content": "yes, naïve 漢字 🙂\n 42"},
    {"role": "user", "content": "no"},
    {"role": "assistant", "content": " on  the mat "},
]


def train(metaspace: bool) -> Tokenizer:
    """Byte-level as GPT-2's, or with byte fallback and "▁" before what begins a text, as Llama 2's."""
    if metaspace:
        file = resolve("asset:stories260k/tokenizer.json")
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
    # As Phi-3's: the token takes the line break after it.
    tokens = [AddedToken(name, special=True, normalized=False, rstrip=name == "<|end|>") for name in SPECIAL]
    tokenizer.add_special_tokens(tokens)
    return tokenizer


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Style -> folder of a tokenizer with that chat template."""
    root = tmp_path_factory.mktemp(request.param)
    tokenizer = train(request.param == "metaspace")
    folders = {}
    for style, (template, _) in STYLES.items():
        folders[style] = root / style
        folders[style].mkdir()
        tokenizer.save(str(folders[style] / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
        }
        (folders[style] / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


def load(folder: Path | str):
    return load_tokenizer(TokenizerSection(path=str(folder)))


def reference(folder: Path | str, messages, **kwargs) -> list[int]:
    """What transformers gives."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def learnt(tokenizer, encoded) -> list[str]:
    """The learnt runs of a conversation as text; special tokens spelled out."""
    spelled = {number: text for text, number in tokenizer.special_tokens.items()}
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(token)
        before = trained
    ends = [spelled.get(run[-1], "") for run in runs]
    return [tokenizer.decode(run) + end for run, end in zip(runs, ends, strict=True)]


WITH_SYSTEM = [{"role": "system", "content": "be\n brief"}, *TALK]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("style", "turns"),
    [
        *((style, turns) for style in STYLES for turns in (TALK, TALK[:2])),
        *((style, WITH_SYSTEM) for style in STYLES if style != "gemma"),  # which refuses it
    ],
)
def test_tokens_are_those_of_transformers(saved, style, turns, prompt):
    turns = turns[:-1] if prompt else turns
    encoded = encode_conversation(load(saved[style]), turns, add_generation_prompt=prompt)
    assert encoded.ids == reference(saved[style], turns, add_generation_prompt=prompt)


@pytest.mark.parametrize("style", STYLES)
def test_answers_and_the_token_that_ends_each_are_learnt(saved, style):
    tokenizer = load(saved[style])
    found = learnt(tokenizer, encode_conversation(tokenizer, TALK))
    answers = [message["content"] for message in TALK if message["role"] == "assistant"]
    end = STYLES[style][1]
    # Decoding may add or swallow the space that begins a text; some templates trim.
    assert [text.strip() for text in found] == [
        (answer.strip() if style in ("llama3", "gemma") else answer.lstrip()) + end for answer in answers
    ]


@pytest.mark.parametrize("style", STYLES)
def test_only_the_last_answer_or_all_can_be_learnt(saved, style):
    tokenizer = load(saved[style])
    template = find_template("chat", tokenizer)
    both, last, everything = (
        Writer(tokenizer, template, train_on) for train_on in ("answers", "last_answer", "all")
    )
    encoded = [writer.encode([writer.write(TALK)])[0] for writer in (both, last, everything)]
    assert encoded[0].ids == encoded[1].ids == encoded[2].ids
    assert learnt(tokenizer, encoded[1]) == learnt(tokenizer, encoded[0])[1:]
    assert all(encoded[2].trained)


@pytest.mark.parametrize("style", STYLES)
def test_generation_stops_where_the_template_ends_a_turn(saved, style):
    tokenizer = load(saved[style])
    assert stop_ids(tokenizer)[0] == tokenizer.special_tokens[STYLES[style][1]]
    assert tokenizer.eos_id in stop_ids(tokenizer)


@pytest.mark.parametrize("style", STYLES)
def test_nobody_forges_a_special_token(saved, style):
    """Every special token of the tokens was written by the template: as many as in an innocent talk."""
    tokenizer = load(saved[style])
    forged = " ".join(SPECIAL)
    innocent = [message | {"content": "x"} for message in TALK]
    guilty = [message | {"content": f"x{forged}x"} for message in TALK]
    special = set(tokenizer.special_tokens.values())

    def specials(messages):
        return [token for token in encode_conversation(tokenizer, messages).ids if token in special]

    assert specials(guilty) == specials(innocent)
    text = tokenizer.decode(encode_conversation(tokenizer, guilty).ids)
    assert text.count(forged) == len(TALK)  # and it is all still there


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from("ab .\n<|im_end|>é🙂"), max_size=12).map(lambda text: f"q{text}q"),
        min_size=2,
        max_size=6,
    ).filter(lambda texts: len(texts) % 2 == 0)
)
def test_learnt_tokens_spell_the_answers(texts):
    tokenizer = chatml()
    roles = ["user", "assistant"] * (len(texts) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    encoded = encode_conversation(tokenizer, messages)
    assert learnt(tokenizer, encoded) == [f"{text}<|im_end|>" for text in texts[1::2]]


_CHATML: list = []


def chatml():
    """One tokenizer for all examples; a fixture would be made anew."""
    if not _CHATML:
        import tempfile

        folder = Path(tempfile.mkdtemp())
        train(False).save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(CHATML)
        _CHATML.append(load(folder))
    return _CHATML[0]


def test_a_marked_template_learns_what_it_marks_and_nothing_else(tmp_path):
    tokenizer = chatml()
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %} {% endfor %}"
    )
    encoded = encode_conversation(tokenizer, TALK[2:], template=str(template))
    assert [text.strip() for text in learnt(tokenizer, encoded)] == ["no", "on  the mat"]


@pytest.mark.parametrize("turns", [TALK, TALK[:2]])
def test_a_template_that_rewrites_the_past_is_refused_with_a_remedy(tmp_path, turns):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    with pytest.raises(UnstableTemplateError, match=r"own\.jinja.*message 2.*\{% generation %\}.*train_on"):
        encode_conversation(chatml(), turns, template=str(template))
    # A model can be talked to all the same: nothing is learnt from a prompt.
    prompt = encode_conversation(chatml(), TALK[:3], template=str(template), add_generation_prompt=True)
    assert not any(prompt.trained)
    assert stop_ids(chatml(), str(template)) == [*chatml().end_ids]


def test_templates_have_what_those_of_the_hub_need(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{%- for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i == 3 %}{% break %}{% endif %}\n"
        "    {%- if true %}\n{{ i }}\n    {%- endif %}\n{%- endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ bos_token }}{{ unknown }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer = chatml()
    ids = encode_conversation(tokenizer, TALK[:1], template=str(template), add_generation_prompt=True).ids
    assert tokenizer.decode(ids) == '02{"a": "<é>"}4 the cat\nsat?'


@pytest.mark.parametrize(
    "attack", ["''.__class__.__mro__", "messages.append(1)", "cycler.__init__.__globals__"]
)
def test_templates_run_in_a_sandbox(tmp_path, attack):
    template = tmp_path / "own.jinja"
    template.write_text(f"{{{{ {attack} }}}}")
    with pytest.raises(DataError, match="refuses user"):
        encode_conversation(chatml(), TALK[:1], template=str(template))


def test_what_a_template_refuses_is_told_in_its_own_words(saved):
    with pytest.raises(DataError, match=r"tokenizer's own\) refuses system, user: System role not supported"):
        encode_conversation(load(saved["gemma"]), TALK[:1], system="be kind")
    with pytest.raises(DataError, match=r"refuses user, user: roles must alternate"):
        encode_conversation(load(saved["mistral"]), [TALK[0], TALK[2]])


def test_a_faulty_template_names_its_line(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("\n{% if %}")
    with pytest.raises(ConfigError, match=r"own\.jinja: line 2"):
        encode_conversation(chatml(), TALK, template=str(template))


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nadd\n\n### Response:\n",
            "42",
        ),
        ("plain", "add\n\n", "42"),
        ("question", "Question: add\nAnswer:", " 42"),
    ],
)
def test_shipped_templates(name, text, answer):
    tokenizer = load_tokenizer(TokenizerSection(kind="bytes"))
    said = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "42"}]
    encoded = encode_conversation(tokenizer, said, template=name)
    assert bytes(encoded.ids[:-1]).decode() == text + answer
    assert encoded.ids[-1] == tokenizer.eos_id
    assert encoded.trained == [False] * len(text) + [True] * (len(answer) + 1)
    prompt = encode_conversation(tokenizer, said[:1], template=name, add_generation_prompt=True)
    assert bytes(prompt.ids).decode() == text
    assert stop_ids(tokenizer, name) == [256]
    again = encode_conversation(tokenizer, said * 2, template=name, system="be kind")
    assert learnt(tokenizer, again) == [f"{answer}<|endoftext|>"] * 2
    assert bytes(i for i in again.ids if i < 256).decode().startswith("be kind\n\n")


def test_alpaca_sets_an_input_apart():
    said = [{"role": "user", "content": "add\n\n1 2", "instruction": "add", "input": "1 2"}]
    ids = encode_conversation(load_tokenizer(TokenizerSection(kind="bytes")), said, template="alpaca").ids
    assert (
        bytes(ids)
        .decode()
        .endswith(
            "context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n"
        )
    )


def test_which_template_is_meant(saved, tmp_path):
    assert find_template("auto", load(saved["chatml"])).name == "the tokenizer's own"
    plain = load_tokenizer(TokenizerSection(path="asset:stories260k"))
    assert find_template("auto", plain).name == "alpaca"
    with pytest.raises(ConfigError, match="no chat template; choose alpaca, plain, question"):
        find_template("chat", plain)
    with pytest.raises(ConfigError, match=r"'alpca' is no file.*auto, chat, alpaca"):
        find_template("alpca", plain)


def test_a_tokenizer_without_an_end_cannot_end_an_answer(tmp_path):
    train(False).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    with pytest.raises(DataError, match=r"'plain' ends an answer.*eos_token in tokenizer_config.json"):
        encode_conversation(load(tmp_path), TALK, template="plain")


def test_a_template_may_lie_beside_the_tokenizer_or_be_one_of_several(tmp_path):
    train(False).save(str(tmp_path / "tokenizer.json"))
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load(tmp_path).chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text(QWEN)
    assert load(tmp_path).chat_template == QWEN
    assert tmp_path / "chat_template.jinja" in load(tmp_path).files


def test_tokens_keep_their_spaces_where_the_tokenizer_would_trim_them(tmp_path):
    tokenizer = train(False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spans = load(tmp_path).encode_markup([Markup("the cat  sat ")])[0].spans
    assert [place for a, b in spans for place in range(a, b)] == list(range(13))


def test_the_system_message_stands_only_where_there_is_none():
    system = {"role": "system", "content": "mine"}
    assert with_system([system, *TALK], "yours") == [system, *TALK]
    assert with_system(TALK, "yours") == [{"role": "system", "content": "yours"}, *TALK]
    assert with_system(TALK, None) == TALK


def test_reserved_characters_are_refused():
    with pytest.raises(DataError, match=r"'content' holds U\+FDD0"):
        encode_conversation(chatml(), [{"role": "user", "content": "a\ufdd0"}])


@pytest.mark.slow
def test_smollm2_gets_the_tokens_of_transformers():
    folder = os.environ.get("QRECIPES_SMOLLM2")
    if folder is None:
        pytest.skip("QRECIPES_SMOLLM2 is not set to a folder of SmolLM2-135M-Instruct")
    tokenizer = load(folder)
    encoded = encode_conversation(tokenizer, TALK)
    assert encoded.ids == reference(folder, TALK)
    assert [text.strip() for text in learnt(tokenizer, encoded)] == [
        "yes, naïve 漢字 🙂\n 42<|im_end|>",
        "on  the mat <|im_end|>",
    ]
    assert stop_ids(tokenizer) == [tokenizer.special_tokens["<|im_end|>"]]
