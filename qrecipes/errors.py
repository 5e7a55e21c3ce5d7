"""Errors that a user's request can cause, importable from anywhere."""

from __future__ import annotations


class QRecipesError(Exception):
    """Base of every error whose message is meant for the user: the command line prints it without a
    traceback."""


class ConfigError(QRecipesError):
    """A wrong request: the message gives the place, the value, the rule and the remedy, in that order."""


class DataError(QRecipesError):
    """Data that cannot be read or used: the message gives the file, and the row or line where there is
    one."""


class WeightsError(QRecipesError):
    """Pretrained weights that are missing or do not fit the model."""


class CheckpointError(QRecipesError):
    """A checkpoint that cannot be written, is damaged, or belongs to another run."""


class ExportError(QRecipesError):
    """An export that cannot be written or read back."""


class ProbeError(QRecipesError):
    """A swapped layer that changed nothing, or strays further from the original than its method allows."""


class TrainingError(QRecipesError):
    """Training that cannot go on, such as a loss that became NaN."""


class GenerationError(QRecipesError):
    """Text that cannot be generated, such as by a model whose logits are NaN."""
