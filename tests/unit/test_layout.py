"""Decisions about the tree that a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from qrecipes.transforms import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qrecipes"

LEVELS = [
    {"errors", "compat", "assets", "locate"},
    {"models", "quant"},
    {"transforms"},
    {"data", "config", "parallel"},
    {"training", "export", "generation", "evaluation"},
    {"cli"},
]
"""Subpackages and modules from the bottom up: imports point downward, or stay on their level."""

RANK = {name: level for level, names in enumerate(LEVELS) for name in names}


def imported(tree: ast.Module):
    """qrecipes modules that a module imports at run time; what only annotations need is not an import."""
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qrecipes"):
            names = [node.module] if node.module != "qrecipes" else [f"qrecipes.{a.name}" for a in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("qrecipes"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        return
    for module in imported(ast.parse(path.read_text())):
        target = module.split(".")[1] if "." in module else None
        if target in RANK:
            assert RANK[target] <= RANK[parts[0]], f"{path.name} imports {module}, which is above it"


def test_quant_imports_only_torch():
    for path in (PACKAGE / "quant").glob("*.py"):
        for module in imported(ast.parse(path.read_text())):
            assert module.startswith("qrecipes.quant"), f"{path.name} imports {module}"


def test_no_method_is_named_outside_its_file():
    """Nothing may know a method but its own file, configurations, tests, tools, benchmarks and documents."""
    words = [word for name, cls in REGISTRY.items() for word in (name, cls.__name__, cls.Config.__name__)]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b")
    own = {Path(ast_module).resolve() for ast_module in (_file_of(cls) for cls in REGISTRY.values())}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        if path.resolve() in own:
            continue
        code = _without_docstrings(path.read_text())
        assert not pattern.search(code), f"{path}: names {pattern.search(code).group()}"


def _file_of(cls: type) -> str:
    import sys

    return sys.modules[cls.__module__].__file__


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


def test_folders_that_must_not_be_packages():
    """`import recipes` would find torchtune's, or hide it."""
    for folder in ("recipes", "configs", "tools"):
        assert not list((ROOT / folder).rglob("__init__.py"))
