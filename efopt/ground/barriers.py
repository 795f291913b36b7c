"""Walls inside a program, for the sake of its speed and of its compile time.

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


def fence(
    tree: Any, step: jax.Array, offsets: Sequence[int] = ()
) -> tuple[Any, list[jax.Array]]:
    """Keeps the arrays of ``tree`` in one piece, each computed once.

    The CPU compiler drops barriers before it fuses, but not a branch; this one is never
    taken. Because ``offsets`` pass through it, the compiler does not know them either,
    and slices of one size at different offsets share one program.

    Args:
      tree: Arrays of numbers.
      step: The current step, uint32.
      offsets: Numbers that the compiler must not know.
    """

    def barrier(tree):
        return lax.optimization_barrier(tree), [jnp.int32(o) for o in offsets]

    def branch(tree):
        return lax.cond(
            step == np.uint32(2**32 - 1),
            lambda t: (jax.tree.map(jnp.negative, t), [jnp.int32(0) for _ in offsets]),
            lambda t: (t, [jnp.int32(o) for o in offsets]),
            tree,
        )

    return lax.platform_dependent(tree, cpu=branch, default=barrier)


def zeros_after(done: jax.Array, like: jax.Array) -> jax.Array:
    """Zeros shaped like an array, made no sooner than ``done`` has been computed.

    A program has no order but what its values need from one another, and a compiler
    that makes zeros at once needs room for them beside everything else. These can take
    the place of an array that nobody reads once ``done`` is there. They are zero on all
    workers, whatever ``done`` is on each, and are typed so.

    Args:
      done: An array of numbers that comes out of a loop or a fence.
      like: An array of the shape and dtype.
    """
    word = done.reshape(-1)[0]
    if not jnp.issubdtype(word.dtype, jnp.unsignedinteger):
        word = lax.bitcast_convert_type(word, f"uint{8 * word.dtype.itemsize}")
    # Thirty-two bits, shifted out one half at a time: no compiler looks that far.
    never = (word.astype(jnp.uint32) >> np.uint32(16)) >> np.uint32(16) != 0
    one, zero = jnp.ones((), like.dtype), jnp.zeros((), like.dtype)
    return jnp.broadcast_to(lax.cond(never, lambda: one, lambda: zero), like.shape)
