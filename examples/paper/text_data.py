"""The text that examples train on: characters, as numbers."""

import gzip
from pathlib import Path

import jax.numpy as jnp
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
SHAKESPEARE = REPOSITORY.parent / "shared/data/tinyshakespeare/input.txt.gz"


def programs(folder, limit=1 << 24):
    """The Python files below a folder, joined, at most ``limit`` characters."""
    parts, size = [], 0
    for path in sorted(folder.rglob("*.py")):
        if size < limit and "site-packages" not in path.parts:
            parts.append(path.read_text("ascii", errors="ignore"))
            size += len(parts[-1])
    return "".join(parts)[:limit]


def load(path):
    """Text as numbers, to train on and to test with, and how many numbers there are.

    Of a folder, the programs in it.
    """
    if path is None and SHAKESPEARE.is_file():
        path = SHAKESPEARE
    if path is None:
        from pydoc_data import topics

        text = "\n".join(topics.topics.values())
    elif path.is_dir():
        text = programs(path)
    else:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, numbers = np.unique(points, return_inverse=True)
    cut = len(numbers) * 9 // 10
    numbers = jnp.asarray(numbers, jnp.int32)
    return numbers[:cut], numbers[cut:], len(known)
