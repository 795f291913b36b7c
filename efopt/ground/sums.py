"""Sums that are the same with and without ``jit``."""

import jax
import jax.numpy as jnp


def block_sum(x: jax.Array) -> jax.Array:
    """Sums ``(n, size)`` over the last axis: ``(n,)``.

    A tree of explicit additions, eight terms at a time: the order is the same with and
    without ``jit``, which a reduction's is not, and the error grows with the depth
    instead of the length (a running float32 sum of ten million terms loses the third
    digit).
    """
    while x.shape[1] > 1:
        n, size = x.shape
        terms = min(8, size)
        width = -(-size // terms)
        x = jnp.pad(x, ((0, 0), (0, terms * width - size))).reshape(n, terms, width)
        parts = [x[:, j] for j in range(terms)]
        while len(parts) > 1:
            parts = [
                parts[j] + parts[j + 1] if j + 1 < len(parts) else parts[j]
                for j in range(0, len(parts), 2)
            ]
        x = parts[0]
    return x[:, 0]
