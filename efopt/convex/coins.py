"""Coins that decide when a reference point moves: hashes, the same for whoever asks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efopt.ground import checks
from efopt.ground.randomness import hash_words

# The worker whose coin all workers toss. Compressors hash (seed, step, ...) with steps
# that never come near this number: with equal seeds coins and compressors draw
# different numbers.
NOBODY = np.uint32(2**32 - 1)


def probability(api: str, value: Any) -> float:
    """A probability of a coin: a Python number in (0, 1]."""
    value = checks.static_float(api, "probability", value)
    if not 0 < value <= 1:
        raise ValueError(f"`{api}(probability=...)` must lie in (0, 1], got {value}.")
    return value


def coin(probability: float, seed: int, step: Any, worker: Any = NOBODY) -> jax.Array:
    """Whether the coin of this step, and of this worker, fell: bool, shape=().

    A hash of its arguments, so that whoever knows them need not be told. The default
    ``worker`` is nobody: a coin that all workers see alike.
    """
    if probability == 1:
        return jnp.ones_like(step, bool)
    threshold = max(1, int(probability * 2**32))
    return hash_words(np.uint32(seed), worker, step) < jnp.uint32(threshold)
