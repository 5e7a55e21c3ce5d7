"""Text from a language model: in batches, with a key-value cache, drawn or greedy, streamed."""

from qrecipes.generation.generator import (
    Generation,
    Generator,
    Piece,
    Speed,
    generate,
    generate_batch,
)
from qrecipes.generation.sampling import Sampling

__all__ = ["Generation", "Generator", "Piece", "Sampling", "Speed", "generate", "generate_batch"]
