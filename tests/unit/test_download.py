"""`qrecipes download` and `hf:OWNER/NAME`: what the hub refuses is said in words that help."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

import huggingface_hub
import pytest
from harness import command_line
from huggingface_hub import errors

from qrecipes import assets
from qrecipes.config.run import ModelSection
from qrecipes.errors import WeightsError
from qrecipes.models import hub
from qrecipes.models.sources import source_folder

STORIES = assets.resolve("asset:stories260k")


class Hub:
    """Stands in for the hub: gives a folder, or raises, and remembers what it was asked."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer, self.asked = answer, {}

    def __call__(self, repository: str, **arguments) -> str:
        self.asked = {"repository": repository} | arguments
        if isinstance(self.answer, Exception):
            raise self.answer
        if arguments["local_dir"] is not None:
            shutil.copytree(self.answer, arguments["local_dir"], dirs_exist_ok=True)
            return str(arguments["local_dir"])
        return str(self.answer)


@pytest.fixture
def answer(monkeypatch):
    def install(value: Path | Exception) -> Hub:
        stand_in = Hub(value)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
        return stand_in

    return install


def http(kind: type[Exception], status: int) -> Exception:
    """One of the hub's errors, with the response of whichever HTTP library it uses."""
    library = import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    request = library.Request("GET", "http://localhost")
    return kind(f"{status} Client Error.\nmore lines", response=library.Response(status, request=request))


REFUSALS = {
    "gated": (lambda: http(errors.GatedRepoError, 403), ["is gated", "hf auth login", "--token"]),
    "missing": (lambda: http(errors.RepositoryNotFoundError, 404), ["no such repository, or it is private"]),
    "revision": (lambda: http(errors.RevisionNotFoundError, 404), ["has no revision 'v9'", "--revision"]),
    "offline": (
        lambda: errors.OfflineModeIsEnabled("offline mode"),
        ["cannot be reached", "another machine"],
    ),
    "not cached": (lambda: errors.LocalEntryNotFoundError("nothing cached"), ["cannot be reached"]),
    "no route": (lambda: ConnectionError("no route to host"), ["cannot be reached (no route to host)"]),
    "incomplete": (
        lambda: errors.IncompleteSnapshotError("2 files are missing", snapshot_path="here"),
        ["only a part of it is here"],
    ),
    "server": (lambda: http(errors.HfHubHTTPError, 500), ["cannot be fetched (HfHubHTTPError: 500"]),
    "disk": (lambda: OSError("No space left on device"), ["cannot be fetched (OSError: No space left"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_told_apart(case, answer, capsys):
    raised, words = REFUSALS[case]
    answer(raised())
    with pytest.raises(WeightsError) as error:
        hub.download("OWNER/NAME", revision="v9")
    assert str(error.value).startswith("OWNER/NAME: ")
    assert "more lines" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert command_line("download", "OWNER/NAME", "--revision", "v9") == 1
    assert words[0] in capsys.readouterr().err


def test_download_says_what_came_and_what_is_next(answer, capsys):
    stand_in = answer(STORIES)
    assert command_line("download", "OWNER/NAME") == 0
    out = capsys.readouterr().out
    assert str(STORIES) in out
    assert (
        "LlamaForCausalLM, torchtune:llama3_2.llama3_2, 260,032 parameters, 0.00 GB, up to 512 tokens" in out
    )
    assert "qrecipes generate hf:OWNER/NAME --prompt" in out
    assert stand_in.asked["repository"] == "OWNER/NAME"
    patterns = stand_in.asked["allow_patterns"]
    assert all(any(Path(name).match(p) for p in patterns) for name in ("a.safetensors", "tokenizer.model"))
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in patterns)
    twice = stand_in.asked["ignore_patterns"]  # Mistral's own copy of the same weights
    assert any(Path("consolidated.safetensors").match(pattern) for pattern in twice)
    assert not any(Path("model-00001-of-00002.safetensors").match(pattern) for pattern in twice)


def test_download_into_a_folder(answer, capsys, tmp_path):
    stand_in = answer(STORIES)
    folder = tmp_path / "models" / "stories"
    arguments = ["--output", str(folder), "--revision", "v1", "--token", "secret"]
    assert command_line("download", "OWNER/NAME", *arguments) == 0
    assert (folder / "model.safetensors").is_file()
    out = capsys.readouterr().out
    assert f"qrecipes generate hf:{folder} --prompt" in out
    assert "secret" not in out
    assert stand_in.asked | {"revision": "v1", "token": "secret", "local_dir": folder} == stand_in.asked


def test_what_cannot_be_used_is_said_at_once(answer, capsys, tmp_path):
    folder = Path(shutil.copytree(STORIES, tmp_path / "model"))
    answer(folder)
    (folder / "model.safetensors").unlink()
    assert command_line("download", "OWNER/NAME") == 1
    assert "no model.safetensors" in capsys.readouterr().err
    shutil.copyfile(STORIES / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    assert command_line("download", "OWNER/NAME") == 1
    assert "MambaForCausalLM is not supported; supported: LlamaForCausalLM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_owner"], "write OWNER/NAME"),
        (["a/b/c"], "write OWNER/NAME"),
        (["OWNER/NAME", "--output", "{file}"], "is a file"),
    ],
)
def test_wrong_requests_exit_with_2(arguments, words, capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert command_line("download", *(argument.format(file=file) for argument in arguments)) == 2
    assert words in capsys.readouterr().err


def test_a_source_on_the_hub_is_fetched_by_the_same_function(answer):
    stand_in = answer(STORIES)
    assert source_folder(ModelSection(source="hf:OWNER/NAME")) == STORIES
    assert stand_in.asked["repository"] == "OWNER/NAME"
    answer(http(errors.GatedRepoError, 403))
    with pytest.raises(WeightsError, match=r"model\.source: OWNER/NAME: no such folder here.*is gated"):
        source_folder(ModelSection(source="hf:OWNER/NAME"))
