"""Recipes run in this process, or in several under torchrun, and their exit codes come through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from qrecipes.cli import launch, report
from qrecipes.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, gives its path."""

    def write(body: str) -> str:
        path = tmp_path / "recipe.py"
        path.write_text(f"import os, sys\n{body}\n", encoding="utf-8")
        return str(path)

    return write


def qrecipes(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return subprocess.run(
        [sys.executable, "-m", "qrecipes.cli.main", *argv],
        env={**inherited, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_recipe_sees_its_own_arguments_as_main(recipe, capsys):
    script = recipe("print(__name__, sys.argv)")
    before = sys.argv
    assert launch.launch([script, "--config", "x", "optim.lr=1"]) == 0
    assert capsys.readouterr().out == f"__main__ {[script, '--config', 'x', 'optim.lr=1']}\n"
    assert sys.argv is before


@pytest.mark.parametrize("code", [0, 2, 130, 143])
def test_exit_codes_pass_through_this_process(recipe, code):
    before = sys.argv
    with pytest.raises(SystemExit) as caught:
        launch.launch([recipe(f"sys.exit({code})")])
    assert caught.value.code == code
    assert sys.argv is before
    assert qrecipes("run", recipe(f"sys.exit({code})")).returncode == code


def test_torchrun_flags_start_processes(recipe, tmp_path):
    body = "open(f'{sys.argv[2]}/' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])"
    assert qrecipes("run", "--nproc-per-node", "2", recipe(body), "--folder", str(tmp_path)).returncode == 0
    assert {rank: (tmp_path / rank).read_text() for rank in "01"} == {"0": "2", "1": "2"}


def test_the_first_code_of_a_failing_process_comes_through_torchrun(recipe):
    done = qrecipes("run", "--nproc-per-node=2", recipe("if os.environ['RANK'] == '1': sys.exit(143)"))
    assert done.returncode == 143
    assert "error: rank 1 ended with exit code 143" in done.stderr


def test_a_process_ended_by_a_signal_counts_as_in_a_shell(recipe):
    assert qrecipes("run", "--nproc_per_node=1", recipe("os.kill(os.getpid(), 9)")).returncode == 137


@pytest.mark.parametrize(
    ("flags", "alone"),
    [
        ([], True),
        (["--nnodes", "1", "--nproc-per-node", "2"], True),
        (["--nnodes", "2"], False),
        (["--rdzv-endpoint", "host:1"], False),
        (["--rdzv-id", "7"], False),
        (["--master-port", "29501"], False),
    ],
)
def test_a_free_port_is_taken_unless_a_meeting_point_was_given(recipe, monkeypatch, flags, alone):
    seen = []
    monkeypatch.setattr(torchrun, "run", seen.append)
    assert launch.run_distributed([*flags, "--max-restarts", "0", recipe(""), "--nnodes", "2"]) == 0
    assert seen[0].standalone is alone
    assert seen[0].training_script_args == ["--nnodes", "2"]
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "host:2")
    launch.run_distributed([*flags, "--max-restarts", "0", recipe("")])
    assert seen[1].standalone is False


def test_a_recipe_that_does_not_exist_or_is_no_script(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^trian: neither a file nor the name of a shipped recipe; did you mean 'train'"
    ):
        launch.launch(["trian"])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"a recipe is a \.py file"):
        launch.launch([str(tmp_path / "notes.txt")])
    with pytest.raises(ConfigError, match="no recipe"):
        launch.launch([])


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("my.toml:1: x"), 2), (DataError("a.txt: empty"), 1)]
)
def test_errors_for_the_user_are_one_message_without_a_traceback(capsys, monkeypatch, error, code):
    def main(argv: list[str]) -> None:
        raise error

    monkeypatch.delenv("QRECIPES_TRACEBACK", raising=False)
    assert report.exit_code(main, []) == code
    assert capsys.readouterr().err == f"error: {error}\n"
    monkeypatch.setenv("QRECIPES_TRACEBACK", "1")
    assert report.exit_code(main, []) == code
    stderr = capsys.readouterr().err
    assert stderr.startswith("Traceback")
    assert stderr.endswith(f"error: {error}\n")


def test_other_errors_keep_their_traceback():
    def main(argv: list[str]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        report.exit_code(main, [])


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_run_main_exits_with_what_main_returns(monkeypatch, result, code):
    monkeypatch.setattr(sys, "argv", ["script", "a"])
    seen = []
    with pytest.raises(SystemExit) as caught:
        report.run_main(lambda argv: seen.append(argv) or result)
    assert caught.value.code == code
    assert seen == [["a"]]
