"""Optimization barriers: walls inside a program, for its speed and compile time.

A compiler fuses what it computes into everything that uses it. For a bucket of many
leaves that means one program a leaf; for a packed byte, that it is packed again for
each of its coordinates.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def once(tree: Any) -> Any:
    """The arrays of ``tree``, each computed once and kept in one piece."""
    return _walled(tree, ())[0]


def once_with(tree: Any, numbers: Sequence[int]) -> tuple[Any, list[jax.Array]]:
    """:func:`once`, and numbers that come out unknown to the compiler.

    Slices of one size at different unknown offsets share one program.
    """
    return _walled(tree, numbers)


def zeros_after(done: jax.Array, like: jax.Array) -> jax.Array:
    """Zeros shaped like an array, made no sooner than ``done`` has been computed.

    A program has no order but what its values need from one another, and a compiler
    that makes zeros at once needs room for them beside everything else. These can take
    the place of an array that nobody reads once ``done`` is there. They are zero on all
    workers, whatever ``done`` is on each, and are typed so.

    Args:
      done: An array of numbers that comes out of a loop or a barrier.
      like: An array of the shape and dtype.
    """
    one, zero = jnp.ones((), like.dtype), jnp.zeros((), like.dtype)
    return jnp.broadcast_to(
        lax.cond(_never(done), lambda: one, lambda: zero), like.shape
    )


def _walled(tree: Any, numbers: Sequence[int]) -> tuple[Any, list[jax.Array]]:
    def barrier(tree):
        return lax.optimization_barrier(tree), [jnp.int32(i) for i in numbers]

    def branch(tree):
        # The CPU compiler drops barriers before it fuses, but not a branch.
        return lax.cond(
            _never(jax.tree.leaves(tree)[-1]),
            lambda t: (jax.tree.map(jnp.negative, t), [jnp.int32(0) for _ in numbers]),
            lambda t: (t, [jnp.int32(i) for i in numbers]),
            tree,
        )

    return lax.platform_dependent(tree, cpu=branch, default=barrier)


def _never(x: jax.Array) -> jax.Array:
    """False, computed from an array of numbers: no compiler looks that far."""
    word = x.reshape(-1)[0]
    if not jnp.issubdtype(word.dtype, jnp.unsignedinteger):
        word = lax.bitcast_convert_type(word, f"uint{8 * word.dtype.itemsize}")
    # Thirty-two bits, shifted out one half at a time.
    return (word.astype(jnp.uint32) >> np.uint32(16)) >> np.uint32(16) != 0
