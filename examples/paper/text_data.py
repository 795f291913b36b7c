"""The text that examples train on: characters, as numbers."""

import gzip
from pathlib import Path

import jax.numpy as jnp
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
SHAKESPEARE = REPOSITORY.parent / "shared/data/tinyshakespeare/input.txt.gz"


def load(path):
    """Text as numbers, to train on and to test with, and how many numbers there are."""
    if path is None and SHAKESPEARE.is_file():
        path = SHAKESPEARE
    if path is None:
        from pydoc_data import topics

        text = "\n".join(topics.topics.values())
    else:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    known, numbers = np.unique(list(text), return_inverse=True)
    cut = len(numbers) * 9 // 10
    numbers = jnp.asarray(numbers, jnp.int32)
    return numbers[:cut], numbers[cut:], len(known)
