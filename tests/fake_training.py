"""Training replaced by a script that takes no time, for tools that start runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


def train_by(script: str, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Have `tool` run `script`, with the run's overrides and `count=FILE` as arguments, in place of training;
    the empty file that is called so."""
    program, marks = folder / "fake.py", folder / "marks"
    program.write_text(script)
    marks.touch()
    real = tool.train_command

    def train_command(config: str, overrides: list[str], folder: Path | None = None) -> list[str]:
        command = real(config, overrides, folder)
        return command if folder is None else [sys.executable, str(program), *command[4:], f"count={marks}"]

    monkeypatch.setattr(tool, "train_command", train_command)
    return marks
