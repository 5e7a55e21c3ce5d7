"""Model folders by name: a path, an asset that ships, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from qrecipes import assets
from qrecipes.errors import WeightsError

FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "README.md",
)
"""What a repository's weights, tokenizer and papers are called; pickled weights are left where they are."""
COPIES = ("original/*", "consolidated*", "onnx/*")
"""The same weights in their authors' formats, beside Hugging Face's."""
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def locate(name: str, key: str = "model.weights") -> Path:
    """The local folder or file that `name` means; a repository `OWNER/NAME` is downloaded, or found cached.

    `key` is the setting that errors name.

    Raises:
        WeightsError: if there is nothing of that name.
        ConfigError: if `name` is that of an asset that does not exist.
    """
    path = assets.resolve(name).expanduser()
    if path.exists():
        return path
    if not is_repository(name):
        raise WeightsError(f"{key}: {name}: no such file or folder")
    try:
        return download(name)
    except WeightsError as error:
        raise WeightsError(f"{key}: {name}: no such folder here; {error}") from error


def is_repository(name: str) -> bool:
    """Whether `name` could be a repository of the hub, OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def download(
    repository: str, *, output: Path | None = None, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch a repository's safetensors, configuration and tokenizer, into `output` or the hub's own cache.

    What is there already is not fetched again. `token` is that of a Hugging Face account; without it, the one
    that `hf auth login` stored.

    Raises:
        WeightsError: saying whether the network, the name, the revision or a permission is missing.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            local_dir=output,
            token=token,
            allow_patterns=list(FILES),
            ignore_patterns=list(COPIES),
        )
    except Exception as error:  # the hub's own, and those of an HTTP library that changed with its versions
        raise WeightsError(f"{repository}: {_explanation(error, revision)}") from error
    return Path(folder)


def _explanation(error: Exception, revision: str | None) -> str:
    """What a failure of the hub means, and what to do."""
    from huggingface_hub import errors

    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, errors.GatedRepoError):
        return (
            "is gated: its owner gives access to those who ask on its page at the hub; once you have it, run "
            "`hf auth login`, or give --token"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "the hub has no such repository, or it is private; correct OWNER/NAME, or give the --token of an "
            "account that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; give --revision the name of a branch or tag, or a commit"
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"only a part of it is here, and the hub cannot be reached ({reason}); fetch it again"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)):
        return (
            f"is not here, and the hub cannot be reached ({reason}); without a network, use a folder that "
            "another machine downloaded"
        )
    return f"cannot be fetched ({type(error).__name__}: {reason})"
