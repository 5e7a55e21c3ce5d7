"""What the wheel and the sdist hold; tools/wheel_smoke.sh installs and uses one."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist, and the wheel that was built from it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def names(built):
    (wheel,) = built.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_owns_one_top_level_name(names):
    """torchtune's wheel owns `recipes`, and torchao's `test`."""
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"qrecipes"}
    assert len(top) == 2


def test_wheel_holds_every_recipe_and_configuration(names):
    for folder, suffix in (("recipes", ".py"), ("configs", ".toml")):
        for path in (ROOT / folder).rglob(f"*{suffix}"):
            assert f"qrecipes/_{folder}/{path.relative_to(ROOT / folder)}" in names


def test_wheel_holds_the_assets_with_their_licences(names):
    for file in ("stories260k/model.safetensors", "stories260k/README.md", "tinyshakespeare/README.md"):
        assert f"qrecipes/assets/{file}" in names


def test_sdist_holds_what_a_wheel_is_built_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "recipes/train.py", "configs/tiny/llm.toml"} <= held
