"""The JSON Schema of a run's file accepts what `load` accepts, and completes it in an editor."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from pathlib import Path

import jsonschema
import pytest
import tomli
from harness import Inert

from qrecipes import locate
from qrecipes.config.parse import dump, load, schema
from qrecipes.config.run import PositiveInt, Run
from qrecipes.config.schema import meanings
from qrecipes.transforms.base import REGISTRY, TransformConfig, register

WHOLE = {
    "steps": 10,
    "model": {"source": "torchtune:llama3_2_1b"},
    "data": {"source": "synthetic"},
    "transform": [{"name": "editor_method", "rank": 4}],
}


@dataclass(frozen=True, kw_only=True)
class EditorMethodConfig(TransformConfig):
    rank: PositiveInt
    """Columns of the
    factor."""
    title: str = ""


class EditorMethod(Inert):
    """A method known to this file only."""

    Config = EditorMethodConfig


@pytest.fixture(autouse=True, scope="module")
def editor_method():
    register("editor_method")(EditorMethod)
    yield
    del REGISTRY["editor_method"]


@pytest.fixture(scope="module")
def validator(editor_method):
    document = schema()
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


def changed(path: str, value: object) -> dict:
    """`WHOLE` with one value set, or removed where it is None."""
    table: dict = copy.deepcopy(WHOLE)
    *parents, last = path.split(".")
    node = table
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return table


@pytest.mark.parametrize(
    "path", sorted(locate.shipped("configs").rglob("*.toml")), ids=lambda path: path.stem
)
def test_every_shipped_configuration_is_valid_and_loads(validator, path):
    validator.validate(tomli.loads(path.read_text(encoding="utf-8")))
    validator.validate(tomli.loads(dump(load(str(path)))))


def test_a_whole_file_is_valid(validator):
    validator.validate(WHOLE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stepps", 3),
        ("steps", "10k"),
        ("steps", -1),
        ("steps", None),
        ("data", None),
        ("model.source", None),
        ("optim.lr", 0),
        ("optim.name", "adam"),
        ("optim.betas", [0.9]),
        ("optim.lrr", 1),
        ("data.files", "a.txt"),
        ("log.sinks", ["print"]),
        ("transform", {"name": "editor_method"}),
        ("transform.0.name", None),
        ("transform.0.name", "editor"),
        ("transform.0.rank", None),
        ("transform.0.rank", 0),
        ("transform.0.rnk", 4),
        ("extends", 3),
    ],
)
def test_what_load_refuses_is_invalid(validator, tmp_path, path, value):
    assert not validator.is_valid(changed(path, value))


def test_a_file_that_extends_may_leave_out_what_its_base_has(validator):
    validator.validate({"extends": "tiny/llm"})
    validator.validate(
        {"extends": "tiny/llm", "model": {"args": {"num_layers": 1}}, "data": {"batch_size": 1}}
    )
    assert not validator.is_valid({"extends": "tiny/llm", "optim": {"lr": 0}})
    assert not validator.is_valid({"extends": "tiny/llm", "transform": [{"rank": 1}]})  # lists replace whole


def test_every_key_is_there_with_its_documentation():
    document = schema()
    assert document["properties"].keys() == {"extends", *(field.name for field in fields(Run))}
    for name in [*document["$defs"]]:
        for key, node in document["$defs"][name]["properties"].items():
            described = (
                "description" in node or (name, key) in {("editor_method", "title")} or "const" in node
            )
            assert described, f"{name}.{key} has no documentation"
            assert "\n" not in node.get("description", "")
    method = document["$defs"]["editor_method"]
    assert method["properties"].keys() == {"name", "rank", "title", "targets", "skip"}
    assert method["properties"]["rank"]["description"] == "Columns of the factor."


def test_there_is_no_null_since_toml_has_none():
    assert '"null"' not in str(schema()).replace("'", '"')
    assert "None" not in str(schema())


def test_meanings_are_choices_or_the_first_sentence():
    assert meanings(EditorMethodConfig)["rank"] == "Columns of the factor"
    assert meanings(Run)["device"] == "one of auto, cpu, cuda"


def test_shipped_configurations_open_with_the_command_that_runs_them_and_a_description():
    for config in locate.list_configs():
        assert config.command, config.name
        before, _, after = config.command.partition(" --config ")
        assert before.startswith("qrecipes run ")
        assert after.split()[0] == config.name
        assert config.description, config.name
        assert Path(config.path).is_file()
