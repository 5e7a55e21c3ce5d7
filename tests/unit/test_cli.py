"""The verbs of the command line: what they print, what they refuse, and that they start at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli

from qrecipes import __version__, locate
from qrecipes.cli import launch
from qrecipes.cli.main import main
from qrecipes.config.parse import load

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

LLM = """\
# run: qrecipes run train --config tiny/llm
# A small language model.
# More about it.
steps = 10
[model]
source = "torchtune:llama3_2_1b"
[data]
source = "synthetic"
"""
SHORT = """\
# run: qrecipes run train --config tiny/short
# The same, shorter.
extends = "tiny/llm"  # base
steps = 5
"""
BESIDE = '# run: qrecipes run train --config tiny/beside\nextends = "llm.toml"  # base\nsteps = 6\n'


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    """Recipes and configurations in place of the shipped, and an empty working directory."""
    files = {
        "configs/tiny/llm.toml": LLM,
        "configs/tiny/short.toml": SHORT,
        "configs/tiny/beside.toml": BESIDE,
        "recipes/train.py": '"""Train a model.\n\nMore."""\nraise SystemExit(7)\n',
        "recipes/export.py": '"""Write files."""\nimport sys\nprint(sys.argv[1:])\n',
        "recipes/generate.py": "import sys\nprint('generated', sys.argv[1:])\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(locate, "shipped", lambda kind: tmp_path / kind)
    return tmp_path


def test_ls_lists_what_ships_with_descriptions(capsys):
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "RECIPES",
        "  export    Write files.",
        "  generate  ",
        "  train     Train a model.",
        "CONFIGS",
        "  tiny/beside  ",
        "  tiny/llm     A small language model.",
        "  tiny/short   The same, shorter.",
    ]
    assert [config.command for config in locate.list_configs()][1] == "qrecipes run train --config tiny/llm"


def test_cat_prints_the_run_as_it_resolves(capsys):
    assert main(["cat", "tiny/short", "optim.lr=0.5"]) == 0
    table = tomli.loads(capsys.readouterr().out)
    assert (table["steps"], table["optim"]["lr"], table["model"]["source"]) == (
        5,
        0.5,
        "torchtune:llama3_2_1b",
    )
    assert "extends" not in table


def test_cat_raw_and_recipes_print_the_file(capsys):
    assert main(["cat", "--raw", "tiny/short"]) == 0
    assert capsys.readouterr().out == SHORT
    assert main(["cat", "train"]) == 0
    assert capsys.readouterr().out.startswith('"""Train a model.')
    assert main(["cat", "--raw", "tiny/short", "steps=3"]) == 2
    assert "overrides apply to a resolved configuration" in capsys.readouterr().err
    assert main(["cat", "tiny/shrt"]) == 2
    assert "did you mean 'tiny/short'" in capsys.readouterr().err


def test_cp_copies_makes_folders_and_does_not_overwrite(capsys):
    assert main(["cp", "tiny/llm", "a/b/my"]) == 0
    assert Path("a/b/my.toml").read_text() == LLM
    assert capsys.readouterr().out == "copied tiny/llm to a/b/my.toml\n"
    Path("a/b/my.toml").write_text("mine")
    assert main(["cp", "tiny/llm", "a/b/my.toml"]) == 2
    assert capsys.readouterr().err == (
        "error: a/b/my.toml: exists; name another destination, or overwrite it with --force\n"
    )
    assert Path("a/b/my.toml").read_text() == "mine"
    assert main(["cp", "-f", "tiny/llm", "a/b/my.toml"]) == 0
    assert Path("a/b/my.toml").read_text() == LLM
    assert main(["cp", "train", "a"]) == 0
    assert Path("a/train.py").read_text().startswith('"""Train')


def test_cp_does_not_copy_a_file_onto_itself(shipped, capsys):
    assert main(["cp", "--force", "tiny/llm", str(shipped / "configs/tiny/llm.toml")]) == 2
    assert "is tiny/llm itself" in capsys.readouterr().err
    assert (shipped / "configs/tiny/llm.toml").read_text() == LLM


def test_cp_says_why_it_cannot_write(capsys):
    Path("file").write_text("")
    assert main(["cp", "tiny/llm", "file/my.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: file/my.toml: cannot be written: ")


def test_a_copy_that_extends_still_resolves(shipped):
    assert main(["cp", "tiny/short", "my.toml"]) == 0
    assert Path("my.toml").read_text() == SHORT  # a shipped name leads there from everywhere
    assert main(["cp", "tiny/beside", "beside.toml"]) == 0
    assert load("beside.toml").steps == 6
    assert load("beside.toml").model.source == "torchtune:llama3_2_1b"
    assert Path("beside.toml").read_text().count("\n") == BESIDE.count("\n")
    Path("llm.toml").write_text(LLM.replace("torchtune:", "torchtune:other."))  # another file of that name
    assert main(["cp", "-f", "tiny/beside", "beside.toml"]) == 0
    assert load("beside.toml").model.source == "torchtune:llama3_2_1b"


@pytest.mark.parametrize("verb", ["check", "validate"])
def test_check_is_one_line_for_each_file_that_is_right(capsys, verb):
    assert main([verb, "tiny/llm", "tiny/short", "optim.lr=1e-3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"{name}: ok: torchtune:llama3_2_1b, synthetic data, {steps} steps, no transform"
        for name, steps in (("tiny/llm", 10), ("tiny/short", 5))
    ]
    assert captured.err == ""


def test_check_goes_on_after_a_wrong_file_and_exits_2(capsys):
    Path("my.toml").write_text('extends = "tiny/llm"\n[optim]\nlrr = 1\nlr = -1\n')
    assert main(["check", "my.toml", "tiny/llm"]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "my.toml:4: optim.lr: -1 is out of range; must be greater than 0",
        "my.toml:3: optim.lrr: unknown key; did you mean 'lr'?",
    ]
    assert captured.out.startswith("tiny/llm: ok: ")
    assert main(["check", "steps=3"]) == 2
    assert capsys.readouterr().err.startswith("error: check: no file; ")


def test_check_reads_a_file_whose_name_has_an_equals_sign(capsys):
    Path("lr=1.toml").write_text(LLM)
    assert main(["check", "lr=1.toml"]) == 0


def test_schema_is_printed_or_written(capsys):
    assert main(["schema"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["properties"]["steps"]["minimum"] == 0
    assert main(["schema", "--output", "new/run.schema.json"]) == 0
    assert json.loads(Path("new/run.schema.json").read_text()) == document
    assert main(["schema", "--output", "new"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_run_and_scripts_hand_their_arguments_on(capsys, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        main(["run", "train", "--config", "tiny/llm"])
    assert caught.value.code == 7
    assert main(["export", "--help", "runs/x", "a=b"]) == 0
    assert main(["generate", "-x"]) == 0
    assert capsys.readouterr().out == "['--help', 'runs/x', 'a=b']\ngenerated ['-x']\n"
    calls = []
    monkeypatch.setattr(launch, "run_distributed", lambda argv: calls.append(argv) or 3)
    assert main(["run", "--nproc-per-node", "2", "train", "--config", "tiny/llm"]) == 3
    assert calls == [["--nproc-per-node", "2", "train", "--config", "tiny/llm"]]


def test_run_without_a_recipe(capsys):
    assert main(["run"]) == 2
    assert capsys.readouterr().err.startswith("error: run: no recipe; name one")
    assert main(["run", "trin"]) == 2
    assert capsys.readouterr().err == (
        "error: trin: neither a file nor the name of a shipped recipe; did you mean 'train'?\n"
    )


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["run", "-h"], ["check", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert "qrecipes" in capsys.readouterr().out


def test_version_and_an_unknown_verb(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"qrecipes {__version__}\n"
    with pytest.raises(SystemExit) as caught:
        main(["lss"])
    assert caught.value.code == 2


@pytest.mark.parametrize("argv", [["ls"], ["--help"], ["run", "--help"]])
def test_help_and_ls_import_neither_torch_nor_pydantic(argv):
    script = f"""
import sys
from qrecipes.cli.main import main
try:
    main({argv})
except SystemExit:
    pass
assert not {{"torch", "pydantic", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True, capture_output=True)


def test_ls_answers_in_half_a_second():
    def seconds() -> float:
        started = time.perf_counter()
        command = [sys.executable, "-m", "qrecipes.cli.main", "ls"]
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.5
