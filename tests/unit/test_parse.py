"""TOML and overrides into runs: what is read, what is refused, and on which line."""

from __future__ import annotations

import string
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import tomli
import tomli_w
from harness import Inert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrecipes import locate
from qrecipes.config import parse
from qrecipes.config import run as sections
from qrecipes.config.lines import dotted, from_dotted, key_lines, split_key
from qrecipes.config.parse import check, dump, load, resolve_path
from qrecipes.config.run import PositiveInt, Run
from qrecipes.errors import ConfigError
from qrecipes.transforms.base import REGISTRY, TransformConfig, register

BASE = """\
steps = 10

[model]
source = "torchtune:llama3_2.llama3_2"

[data]
source = "synthetic"
sequence_length = 64
"""
NEXT = BASE.count("\n") + 1  # the line of what a test appends


@dataclass(frozen=True, kw_only=True)
class DummyConfig(TransformConfig):
    rank: PositiveInt = 8
    """Columns."""
    bits: Literal[2, 4, 8] = 4
    """Bits of a weight."""
    gap: int
    """Steps between merges."""
    scales: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.rank > 64:
            raise ConfigError(f"rank: {self.rank} is more than 64; lower it")
        if self.rank * self.bits > 256:
            raise ValueError(f"{self.rank} columns of {self.bits} bits are too many; lower one")


class Dummy(Inert):
    Config = DummyConfig

    def check(self, run: Run) -> None:
        if self.config.gap > run.steps:
            raise ConfigError(f"dummy.gap: {self.config.gap} is more than the run's steps; lower it")
        if run.optim.name == "sgd":
            raise ConfigError("optim.name: dummy needs moments; use adamw")
        if run.optim.name == "adamw8bit":
            raise ConfigError("torchao.optim: has no dummy; use adamw")


@pytest.fixture(autouse=True, scope="module")
def dummy_method():
    register("dummy")(Dummy)
    yield
    del REGISTRY["dummy"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "my.toml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def problems(text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(write(text), overrides)
    return str(caught.value).splitlines()


# ---------------------------------------------------------------- what is read


def test_absent_keys_have_their_defaults(here):
    run = load(write(BASE))
    expected = Run(
        steps=10,
        model=sections.ModelSection(source="torchtune:llama3_2.llama3_2"),
        data=sections.DataSection(source="synthetic", sequence_length=64),
    )
    assert run == expected


def test_transform_tables_become_their_methods_configuration_in_order(here):
    text = (
        BASE
        + '[[transform]]\nname = "dummy"\ngap = 1\n[[transform]]\nname = "dummy"\ngap = 2\nskip = ["a"]\n'
    )
    assert load(write(text)).transform == (DummyConfig(gap=1), DummyConfig(gap=2, skip=("a",)))


def test_an_integer_is_a_number_but_a_boolean_is_not_an_integer(here):
    assert load(write(BASE + "[optim]\nlr = 1\n")).optim.lr == 1.0
    assert problems(BASE + "[optim]\naccumulate = true\n") == [
        f"my.toml:{NEXT + 1}: optim.accumulate: expected an integer, got true (boolean)"
    ]


def test_builder_arguments_keep_their_types(here):
    args = load(write(BASE + '[model.args]\na = 1\nb = 1.0\nc = true\nd = "1"\ne = [1, 2.5]\n')).model.args
    assert {key: type(value) for key, value in args.items()} == {
        "a": int,
        "b": float,
        "c": bool,
        "d": str,
        "e": list,
    }


# ---------------------------------------------------------------- extends


def test_tables_merge_and_lists_and_scalars_replace(here):
    write(
        BASE + '[log]\nsinks = ["wandb"]\nprogress = false\n[[transform]]\nname = "dummy"\ngap = 1\n',
        "base.toml",
    )
    run = load(write('extends = "base.toml"\nsteps = 20\n[log]\nsinks = []\n[data]\nbatch_size = 2\n'))
    assert (run.steps, run.log.sinks, run.log.progress) == (20, (), False)
    assert (run.data.batch_size, run.data.sequence_length) == (2, 64)
    assert run.transform == (DummyConfig(gap=1),)


def test_extends_looks_beside_the_file_then_among_the_shipped(here, monkeypatch):
    shipped = here / "shipped"
    write(BASE.replace("10", "11"), "shipped/tiny/base.toml")
    monkeypatch.setattr(locate, "shipped", lambda kind: shipped)
    assert load(write('extends = "tiny/base"', "deep/my.toml")).steps == 11
    assert load(write('extends = "tiny/base.toml"', "deep/my.toml")).steps == 11
    write(BASE.replace("10", "12"), "deep/tiny/base.toml")
    assert load("deep/my.toml").steps == 12


def test_extends_has_one_level(here):
    write(BASE, "a.toml")
    write('extends = "a.toml"', "b.toml")
    assert problems('\nextends = "b.toml"') == [
        "my.toml:2: extends: 'b.toml' itself extends 'a.toml', and only one level is read; "
        "extend that one, or copy its keys"
    ]


def test_missing_or_mistyped_base(here):
    write(BASE, "base.toml")
    assert problems('extends = "bse.toml"')[0].startswith(
        "my.toml:1: extends: bse.toml: neither a file nor the name"
    )
    assert problems("extends = 3")[0].startswith("my.toml:1: extends: expected one file's path or name")


def test_a_problem_is_placed_in_the_file_that_set_the_value(here):
    write(BASE + "[optim]\nlr = -1\neps = -1\nclip_norm = -1\n", "base.toml")
    assert problems('extends = "base.toml"\n[optim]\neps = -2\n', ("optim.clip_norm=-3",)) == [
        f"base.toml:{NEXT + 1}: optim.lr: -1 is out of range; must be greater than 0",
        "my.toml:3: optim.eps: -2 is out of range; must be greater than 0",
        "command line: optim.clip_norm=-3: optim.clip_norm: -3 is out of range; must be at least 0",
    ]


def test_a_replaced_list_is_placed_in_the_file_that_replaced_it(here):
    write(BASE + '[[transform]]\nname = "dummy"\nrank = 0\n', "base.toml")
    text = 'extends = "base.toml"\ntransform = [{name = "dummy", gap = 1, rank = -1}]\n'
    assert problems(text) == ["my.toml:2: transform[0].rank: -1 is out of range; must be at least 1"]


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr = 1", 1.0),
        ("data.files=[]", ()),
        ('log.sinks=["wandb", "tensorboard"]', ("wandb", "tensorboard")),
        ("parallel.compile=true", True),
        ("output=runs/mine", "runs/mine"),
        ("output='runs/mine'", "runs/mine"),
        ("output=2024-run", "2024-run"),
        ("output=a=b", "a=b"),
        ("output=a#b", "a#b"),
        ("data.document_separator=''", ""),
        ("model.args.num_layers=3", 3),
        ('model.args."dotted.key"=4', 4),
        ("transform.0.gap=5", 5),
        ("transform.0.skip.1=b", "b"),
    ],
)
def test_overrides_are_toml_literals_or_bare_words(here, override, value):
    text = BASE + '[[transform]]\nname = "dummy"\ngap = 1\nskip = ["a"]\n'
    found: object = load(write(text), [override])
    for part in split_key(override.partition("=")[0]):
        if part.isdigit():
            found = found[int(part)]  # type: ignore[index]
        else:
            found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_add_and_remove_transforms(here):
    path = write(BASE)
    run = load(
        path, ["transform.0.name=dummy", "transform.0.gap=2", "transform.1.name=dummy", "transform.1.gap=3"]
    )
    assert run.transform == (DummyConfig(gap=2), DummyConfig(gap=3))
    assert load(path, ["transform=[{name='dummy', gap=4}]"]).transform == (DummyConfig(gap=4),)
    assert load(path, ["transform.0.name=dummy", "transform=[]"]).transform == ()


def test_an_override_of_a_table_takes_the_place_of_the_keys_in_it(here):
    text = BASE + '[[transform]]\nname = "dummy"\ngap = 1\n'
    assert problems(text, ("transform=[{name='dummy', gap='1'}]",)) == [
        "command line: transform=[{name='dummy', gap='1'}]: transform[0].gap: "
        "expected an integer, got '1' (string); write 1"
    ]


def test_later_overrides_win(here):
    assert load(write(BASE), ["steps=1", "steps=2"]).steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=abc", "optim.lr: expected a number, got 'abc' (string)"),
        (
            "parallel.compile=True",
            "parallel.compile: expected true or false, got 'True' (string); write true",
        ),
        ("steps=1e1", "steps: expected an integer, got 10.0 (float); write 10"),
        ("steps=3, seed = 4", "steps: expected an integer, got '3, seed = 4' (string)"),
        ("steps=3 # few", "steps: expected an integer, got '3 # few' (string)"),
        ("output=3", 'output: expected a string, got 3 (integer); write "3"'),
        ("data.files=a.txt", "data.files: expected an array, got 'a.txt' (string); write [\"a.txt\"]"),
        ("optim.lr", "expected KEY=VALUE, such as optim.lr=3e-4"),
        ("=3", "'' is not a key"),
        ("optim..lr=3", "'optim..lr' is not a key"),
        ("output=", "no value; write '' for an empty string, in quotes that the shell leaves alone"),
        ("steps.x=3", "steps is neither a table nor an array, so it has no 'x'"),
        (
            "transform.1.rank=3",
            "transform is an array and '1' is not in it; it has no values yet, 0 adds the first",
        ),
        ("extends=tiny/llm", "only a file can extend another"),
        ("optim.lrr=3", "optim.lrr: unknown key; did you mean 'lr'?"),
    ],
)
def test_wrong_overrides_are_placed_on_the_command_line(here, override, message):
    assert problems(BASE, (override,)) == [f"command line: {override}: {message}"]


def test_an_override_that_opens_like_a_literal_must_be_one(here):
    (problem,) = problems(BASE, ('data.files=["a"',))
    assert problem.startswith('command line: data.files=["a": \'["a"\' opens like a TOML value and is none: ')


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[optim]\nlrr = 1", "2: optim.lrr: unknown key; did you mean 'lr'?"),
        ("[optmi]\nlr = 1", "1: optmi: unknown key; did you mean 'optim'?"),
        (
            '[[transform]]\nname = "dummy"\ngap = 1\nrnk = 8',
            "4: transform[0].rnk: unknown key; did you mean 'rank'?",
        ),
        (
            "[export]\nzzz = 1",
            "2: export.zzz: unknown key; the keys here are at_end, huggingface, peft, check_merge",
        ),
        ("[optim]\nlr = -1", "2: optim.lr: -1 is out of range; must be greater than 0"),
        ("[optim]\nlr = inf", "2: optim.lr: inf is out of range; must be finite"),
        ("[optim]\nbetas = [0.9, 1]", "2: optim.betas[1]: 1 is out of range; must be less than 1"),
        ("[optim]\nbetas = [\n  0.9\n]", "2: optim.betas: expected 2 values, got 1"),
        ("[optim]\nbetas = [0.9, 0.9, 0.9]", "2: optim.betas: expected 2 values, got 3"),
        ("[schedule]\nfinal_ratio = 2", "2: schedule.final_ratio: 2 is out of range; must be at most 1"),
        (
            '[optim]\nname = "adam"',
            "2: optim.name: 'adam' is not one of "
            "adamw, stochastic_adamw, schedule_free_adamw, adamw8bit, adamw4bit, adamw_fp8, sgd; "
            "did you mean 'adamw'?",
        ),
        ('[optim]\nfused = "yes"', "2: optim.fused: expected true or false, got 'yes' (string)"),
        ('[optim]\nlr = "3e-4"', "2: optim.lr: expected a number, got '3e-4' (string); write 3e-4"),
        (
            '[log]\nsinks = ["wand"]',
            "2: log.sinks[0]: 'wand' is not one of tensorboard, wandb; did you mean 'wandb'?",
        ),
        (
            "[optim]\nlr = 2024-01-01",
            "2: optim.lr: 2024-01-01 is a date or a time, which no key takes; put it in quotes",
        ),
        (
            "[model.args]\nx = {a = 1}",
            "2: model.args.x: expected true or false, an integer, a number, a string or an array, "
            "got a table",
        ),
        (
            "[model.args]\nx = [1, {a = 1}]",
            "2: model.args.x[1]: expected true or false, an integer, a number or a string, got a table",
        ),
        (
            "[tokenizer]\nkind = 3",
            "2: tokenizer.kind: 3 is not one of auto, hf, tiktoken, sentencepiece, bytes",
        ),
        (
            "[tokenizer]",
            "1: tokenizer.path: missing, and 'auto' reads one; name a file, or set kind = \"bytes\"",
        ),
        (
            '[tokenizer]\nkind = "bytes"\npath = "x"',
            "3: tokenizer.path: 'x' has no use, bytes need no file; remove it, or change the kind",
        ),
        (
            '[schedule]\nkind = "wsd"',
            "1: schedule.decay_steps: 0 leaves wsd without its fall; set it to at least 1",
        ),
        (
            "[schedule]\n\ndecay_steps = 3",
            "3: schedule.decay_steps: 3 has no use with kind 'cosine'; set it to 0, or kind to \"wsd\"",
        ),
        (
            "[schedule]\nwarmup_steps = 11",
            "2: schedule.warmup_steps: 11 are more than the 10 steps of the run; "
            "shorten the schedule, or raise steps",
        ),
        (
            '[schedule]\nkind = "wsd"\nwarmup_steps = 5\ndecay_steps = 6',
            "3: schedule.warmup_steps: 5 and 6 of decay_steps are more than the 10 steps of the run; "
            "shorten the schedule, or raise steps",
        ),
        (
            "[model.args]\nmax_seq_len = 32",
            "0: data.sequence_length: 64 is more than the model's max_seq_len, 32; "
            "lower it, or raise model.args.max_seq_len",
        ),
        (
            '[checkpoint]\nresume = "atuo"',
            "2: checkpoint.resume: 'atuo' is neither auto, never nor a checkpoint that exists; "
            "did you mean 'auto'?",
        ),
        (
            '[[transform]]\nname = "dumy"',
            "2: transform[0].name: unknown transform 'dumy'; registered: REGISTERED; did you mean 'dummy'?",
        ),
        ("[[transform]]\nrank = 1", "1: transform[0].name: missing; required: one of REGISTERED"),
        ("[[transform]]\nname = [1]", "2: transform[0].name: unknown transform [1]; registered: REGISTERED"),
        ('[transform]\nname = "dummy"', "1: transform: expected an array of tables; write [[transform]]"),
        ('[[transform]]\nname = "dummy"', "1: transform[0].gap: missing; required: Steps between merges"),
        (
            '[[transform]]\nname = "dummy"\ngap = 1\nbits = 3',
            "4: transform[0].bits: 3 is not one of 2, 4 or 8",
        ),
        (
            '[[transform]]\nname = "dummy"\ngap = 1\nrank = 65',
            "4: transform[0].rank: 65 is more than 64; lower it",
        ),
        (
            '[[transform]]\nname = "dummy"\ngap = 1\n\n'
            '[[transform]]\nname = "dummy"\ngap = 1\nrank = 64\nbits = 8',
            "5: transform[1]: 64 columns of 8 bits are too many; lower one",
        ),
        (
            '[[transform]]\nname = "dummy"\ngap = 11',
            "3: transform[0].gap: 11 is more than the run's steps; lower it",
        ),
        (
            '[optim]\nname = "adamw8bit"\n[[transform]]\nname = "dummy"\ngap = 1',
            "3: transform[0]: torchao.optim: has no dummy; use adamw",
        ),
        (
            '[optim]\nname = "sgd"\n[[transform]]\nname = "dummy"\ngap = 1',
            "2: optim.name: dummy needs moments; use adamw",
        ),
    ],
)
def test_each_wrong_value_says_file_line_key_rule_and_remedy(here, text, expected):
    line, _, message = expected.partition(": ")
    message = message.replace("REGISTERED", ", ".join(sorted(REGISTRY)))
    assert problems(f"{BASE}{text}\n") == [f"my.toml:{NEXT + int(line) - 1}: {message}"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("10", '"10k"', "1: steps: expected an integer, got '10k' (string)"),
        ("10", '"10"', "1: steps: expected an integer, got '10' (string); write 10"),
        ("steps = 10", "\nseed = 1", "1: steps: missing; required: Optimizer steps"),
        ("10", "10\nlr = 1", "2: lr: unknown key; did you mean 'optim.lr'?"),
        ("10", '10\noutput = ""', "2: output: '' is no folder; name one, such as runs/mine"),
        (
            "10",
            '10\noutput = "my.toml/x"',
            "2: output: 'my.toml/x' cannot be a folder: my.toml is a file; choose another",
        ),
        (
            "10",
            '10\noutput = "~/x"',
            "2: output: '~/x' would be a folder called '~'; write the path in full",
        ),
        (
            'source = "synthetic"\n',
            "",
            "6: data.source: missing; "
            "required: one of text, tokens, dataset, conversations, images, synthetic",
        ),
        (
            "torchtune:",
            "torchtun:",
            "4: model.source: 'torchtun:llama3_2.llama3_2' does not say where the model comes from; "
            "write hf:FOLDER, torchtune:BUILDER or timm:NAME",
        ),
        (
            "torchtune:",
            "timm:",
            "4: model.source: 'timm:llama3_2.llama3_2' classifies images, and task.kind is "
            "'language_modeling'; "
            'set task.kind = "classification", or take a torchtune model',
        ),
        (
            '"synthetic"',
            '"images"\nfiles = ["a"]',
            "7: data.source: 'images' has no text for task.kind 'language_modeling' to learn; "
            'set task.kind = "classification", or choose another source',
        ),
        (
            '"synthetic"',
            '"text"\nfiles = ["a"]',
            "7: data.source: 'text' is text, and there is no tokenizer; "
            'add [tokenizer], such as kind = "bytes"',
        ),
        (
            '"synthetic"',
            '"text"',
            "6: data.files: missing, and source 'text' reads them; name at least one",
        ),
        (
            '"synthetic"',
            '"synthetic"\nfiles = ["a"]',
            "8: data.files: synthetic data reads no files; set files = [], or choose another source",
        ),
        (
            '"synthetic"',
            '"images"\nfiles = ["a", "b"]',
            "8: data.files: 2 values; source 'images' takes one folder",
        ),
        (
            '"synthetic"',
            '"synthetic"\nstreaming = true',
            "8: data.streaming: only source 'dataset' has it, not 'synthetic'; remove it",
        ),
        (
            '"synthetic"',
            '"dataset"\nfiles = ["a"]\nstreaming = true\nvalidation_fraction = 0.1',
            "10: data.validation_fraction: a stream has no known end; name a validation_split instead",
        ),
        ("10", "", "1: not TOML: Invalid value, at column 9"),
        ("64", "", "8: not TOML: Invalid value, at column 19"),
    ],
)
def test_each_wrong_file_says_file_line_key_rule_and_remedy(here, old, new, expected):
    assert problems(BASE.replace(old, new)) == [f"my.toml:{expected}"]


def test_classes_need_images_or_synthetic_data(here):
    text = BASE.replace("10", '10\ntask.kind = "classification"').replace(
        '"synthetic"', '"tokens"\nfiles = ["a.bin"]'
    )
    assert problems(text) == [
        "my.toml:8: data.source: 'tokens' has no classes for task.kind 'classification' to learn; "
        "use 'images' or 'synthetic'"
    ]


def test_a_number_for_a_table(here):
    text = BASE.replace("10", "10\ndata = 3").replace("[data]", "[dta]")
    assert problems(text) == [
        "my.toml:7: dta: unknown key; did you mean 'data'?",
        "my.toml:2: data: expected a table, got 3 (integer)",
    ]


def test_images_of_the_wrong_size_or_too_many_classes(here):
    text = """\
steps = 1
task.kind = "classification"
[model]
source = "timm:vit_tiny_patch16_224"
args = {img_size = 32, num_classes = 5}
[data]
source = "synthetic"
num_classes = 6
image_size = 64
"""
    assert problems(text) == [
        "my.toml:8: data.num_classes: 6 is more than the model's num_classes, 5; "
        "lower it, or raise model.args.num_classes",
        "my.toml:9: data.image_size: 64 is not the model's img_size, 32; make them equal",
    ]


def test_all_problems_come_out_together(here):
    assert (
        len(problems(BASE.replace("10", "-1") + "[optim]\nlr = -1\nepps = 1\n[[transform]]\nname = 'x'\n"))
        == 4
    )


def test_not_utf8_and_no_file(here):
    Path("my.toml").write_bytes(BASE.encode() + b'output = "\xff"\n')
    with pytest.raises(ConfigError, match=rf"^my\.toml:{NEXT}: not UTF-8, which TOML is"):
        load("my.toml")
    with pytest.raises(ConfigError, match=r"^my: neither a file nor .*did you mean 'my\.toml'"):
        load("my")


def test_unknown_names_get_close_matches_and_names_need_no_suffix(here, monkeypatch):
    write(BASE, "shipped/tiny/llm.toml")
    monkeypatch.setattr(locate, "shipped", lambda kind: here / "shipped")
    assert resolve_path("tiny/llm") == resolve_path("tiny/llm.toml") == here / "shipped/tiny/llm.toml"
    with pytest.raises(ConfigError, match=r"^tiny/lm: neither a file .* did you mean 'tiny/llm'"):
        resolve_path("tiny/lm")


def test_check_needs_no_file():
    run = Run(
        steps=3,
        model=sections.ModelSection(source="torchtune:llama3_2_1b"),
        data=sections.DataSection(source="synthetic"),
        transform=(DummyConfig(gap=2), DummyConfig(gap=4)),
    )
    with pytest.raises(ConfigError, match=r"^transform\[1\]\.gap: 4 is more than the run's steps; lower it$"):
        check(run)
    check(replace(run, steps=4))


# ---------------------------------------------------------------- lines


def test_every_key_is_found_on_its_line():
    """Key names are unique in the text, so that plain search is the oracle."""
    text = '''\
k01 = 1  # it's [k99
k02.k03 = """
k98 = [
\\""" k97 = 1
""\"""
k04 = [  # k96
  "]", 'k95 = 1', [1, 2],
]
"k05 = #" = \'\'\'
[k94]
\'\'\'
k06 = {k93 = "}", k92 = [1]}

[ k07 . "k08]" ]
k09 = 1979-05-27T07:32:00Z
[[k10]]
k11 = "\\"#["
[k10.k12]
k13 = -1.5e3
[[k10]]
k14 = '"'
[[k10.k15]]
[[k10.k15]]
k16 = 0
[k02.k17]
'k18.x' = true
'''
    tomli.loads(text)
    lines = key_lines(text)
    assert {key for path in lines for key in path if isinstance(key, str)} == {
        *(f"k{n:02}" for n in range(1, 19) if n not in (5, 8, 18)),
        "k05 = #",
        "k08]",
        "k18.x",
    }
    for path, line in lines.items():
        if isinstance(path[-1], str) and path[-1] not in ("k02", "k10", "k15"):
            assert line == 1 + next(i for i, content in enumerate(text.split("\n")) if path[-1] in content), (
                path
            )
    assert lines["k10", 1, "k14"] - lines["k10", 0] == 5
    assert lines["k10", 1, "k15", 1, "k16"] - lines["k10", 1, "k15", 0] == 2


keys = st.text(string.printable.replace("\r", "") + "äß", min_size=1, max_size=5)
scalars = st.booleans() | st.integers(-9, 9) | st.text(string.printable, max_size=20) | st.just([1, "]", "#"])
tables = st.recursive(
    st.dictionaries(keys, scalars, max_size=3),
    lambda inner: st.dictionaries(keys, inner | scalars, max_size=3),
)


@given(tables, st.booleans())
@settings(max_examples=150, deadline=None, database=None)
def test_the_text_before_a_keys_line_does_not_set_it(table, multiline):
    """tomli is the oracle: the key appears once its line is read, and with the text before it does not."""
    text = tomli_w.dumps(table, multiline_strings=multiline)
    content = text.split("\n")
    for path, line in key_lines(text).items():
        if isinstance(value_at(table, path), dict):
            continue
        assert value_at(tomli.loads("\n".join(content[: line - 1])), path) is None
        assert value_at(tomli.loads(text), path) is not None
    assert {path for path in paths(table) if path} <= set(key_lines(text))


def value_at(table, path):
    for part in path:
        if part not in table:
            return None
        table = table[part]
    return table


def paths(table, path=()):
    yield path
    if isinstance(table, dict):
        for key, value in table.items():
            yield from paths(value, (*path, key))


def test_dotted_paths_are_read_back():
    path = ("transform", 0, "skip", 11)
    assert dotted(path) == "transform[0].skip[11]"
    assert from_dotted(dotted(path)) == path


# ---------------------------------------------------------------- dump

words = st.text(st.characters(codec="utf-8"), max_size=12)
fractions = st.floats(0, 1, exclude_max=True)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
arguments = st.booleans() | st.integers() | st.floats(allow_nan=False) | words


def section(cls, **strategies):
    """Runs through some fields of a section and leaves the others at their defaults."""
    assert strategies.keys() <= {field.name for field in fields(cls)}
    return st.builds(cls, **strategies)


runs = st.builds(
    Run,
    steps=st.integers(100, 10**12),
    seed=st.integers(0, 2**70),
    output=words.map(lambda word: f"runs/{word}"),
    model=section(
        sections.ModelSection,
        source=st.just("torchtune:llama3_2.llama3_2"),
        args=st.dictionaries(
            words.map(lambda word: f"_{word}"), arguments | st.lists(arguments, max_size=3), max_size=3
        ),
        weights=st.none() | words,
        init_std=positive,
    ),
    task=section(sections.TaskSection, label_smoothing=fractions),
    tokenizer=st.none() | section(sections.TokenizerSection, path=words.filter(bool)),
    data=section(
        sections.DataSection,
        source=st.just("tokens"),
        files=st.lists(words, min_size=1, max_size=3).map(tuple),
        document_separator=st.none() | words,
        shuffle=st.booleans(),
        validation_fraction=fractions,
    ),
    optim=section(sections.OptimSection, lr=positive, betas=st.tuples(fractions, fractions), eps=positive),
    schedule=section(
        sections.ScheduleSection,
        kind=st.just("wsd"),
        warmup_steps=st.integers(0, 50),
        decay_steps=st.integers(1, 50),
    ),
    log=section(sections.LogSection, peak_tflops=st.none() | positive),
    transform=st.lists(
        st.builds(
            DummyConfig,
            rank=st.integers(1, 32),
            bits=st.sampled_from([2, 4, 8]),
            gap=st.integers(-5, 100),
            skip=st.lists(words, max_size=2).map(tuple),
            scales=st.none() | st.dictionaries(words, st.floats(allow_nan=False), max_size=2),
        ),
        max_size=3,
    ).map(tuple),
)


@given(runs)
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_loading_a_dump_gives_the_same_run(tmp_path_factory, run):
    path = tmp_path_factory.getbasetemp() / "dump.toml"
    path.write_text(dump(run), encoding="utf-8")
    loaded = load(str(path))
    assert loaded == run
    assert repr(loaded) == repr(run)  # 1, 1.0 and True are equal, and must not become one another


def test_a_second_load_builds_no_decoder_again(monkeypatch):
    """Building one reads the source of its class: 50 ms a load in all, and a suite loads thousands."""
    first = load("tiny/llm_lora")
    monkeypatch.setattr(parse, "TypeAdapter", None)
    assert load("tiny/llm_lora") == first


def test_dump_leaves_out_none_and_opens_each_transform_with_its_name(here):
    run = load(write(BASE + '[[transform]]\nname = "dummy"\ngap = 1\nscales = {a = 1.0}\n'))
    text = dump(run)
    assert "weights" not in text
    assert '\n[[transform]]\nname = "dummy"\n' in text
    assert "\n[transform.scales]\na = 1.0\n" in text
