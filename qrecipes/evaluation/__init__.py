"""How good a language model is: perplexity of a text, and scores on standard tasks."""

from __future__ import annotations

from qrecipes.evaluation.harness import TaskScores, evaluate_tasks
from qrecipes.evaluation.perplexity import Perplexity, perplexity
from qrecipes.evaluation.reading import read_text

__all__ = ["Perplexity", "TaskScores", "evaluate_tasks", "perplexity", "read_text"]
