"""Long arrays a piece at a time, in the place where they are.

What is computed of a whole array at once may need several more of its length. Here only
what belongs to one piece is there at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PIECES = 32  # at most; on an accelerator each costs the start of a few kernels
LEAST = 1 << 14  # coordinates of a piece, at least


def length_of(size: int, grain: int = 1) -> int:
    """Coordinates of a piece of an array of ``size``, a multiple of ``grain``."""
    length = max(-(-size // PIECES), min(LEAST, size))
    return -(-length // grain) * grain


def update(x: jax.Array, change: Callable[[Any, jax.Array], jax.Array]) -> jax.Array:
    """Maps ``x`` piece by piece along its last axis.

    Args:
      x: An array ``(..., size)``.
      change: Maps the start of a piece and the piece to the new one. Every coordinate
        is changed once, although the last piece may start within the one before.
    """
    size = x.shape[-1]
    length = length_of(size)

    def body(i, x):
        start = jnp.minimum(i * length, size - length)
        old = lax.dynamic_slice_in_dim(x, start, length, x.ndim - 1)
        again = start + jnp.arange(length, dtype=jnp.int32) < i * length
        again = again.reshape(*(1 for _ in x.shape[1:]), length)
        new = jnp.where(again, old, change(start, old))
        return lax.dynamic_update_slice_in_dim(x, new, start, x.ndim - 1)

    return lax.fori_loop(0, -(-size // length), body, x)
