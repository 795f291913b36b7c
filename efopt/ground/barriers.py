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

# Coordinates from which a wall is worth the time to compile it.
LARGE = 1 << 16
# Numbers that come out of one branch: each takes room for as long as one is needed.
FEW = 64


def once(tree: Any, by: jax.Array | None = None) -> Any:
    """The arrays of ``tree``, each computed once and kept in one piece.

    Args:
      tree: Arrays of numbers.
      by: An array of numbers on which the wall hangs in place of one of the tree, of
        which it would keep a copy.
    """
    arrays, treedef = jax.tree.flatten(tree)
    arrays, _ = once_with(arrays, [[]] * len(arrays), by)
    return treedef.unflatten(arrays)


def once_with(
    arrays: Sequence[jax.Array],
    numbers: Sequence[Sequence[int]],
    by: jax.Array | None = None,
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    """:func:`once`, and numbers with each array that come out unknown to the compiler.

    Slices of one size at different unknown offsets share one program.
    """
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):  # a wall makes all that it holds of one type
        kinds.setdefault(kind(x), []).append(i)
    out, unknown = list(arrays), [list(map(jnp.int32, n)) for n in numbers]
    for members in kinds.values():
        held = [arrays[i] for i in members], [numbers[i] for i in members]
        whole, told = _walled(*held, by)
        for i, x, n in zip(members, whole, told, strict=True):
            out[i], unknown[i] = x, n
    return out, unknown


def cut_once(
    joined: Sequence[jax.Array],
    sizes: Sequence[Sequence[int]],
    starts: Sequence[Sequence[int]] | None = None,
    axis: int = 0,
) -> list[list[jax.Array]]:
    """Cuts arrays along an axis into parts, each array computed once.

    Parts of one size share one program, wherever they stand.

    Args:
      joined: The arrays.
      sizes: The lengths of the parts of each.
      starts: Where they start; ``None``: each behind the one before it.
      axis: The axis.
    """
    if starts is None:
        starts = [[0, *map(int, np.cumsum(some)[:-1])] for some in sizes]
    whole, unknown = once_with(joined, starts)
    return [
        [
            lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)
            for start, size in zip(offsets, some, strict=True)
        ]
        for x, offsets, some in zip(whole, unknown, sizes, strict=True)
    ]


def kind(x: jax.Array) -> Any:
    """What arrays must have in common to be joined: where their type says they vary."""
    known = getattr(jax.typeof(x), "mat", None)
    return known and known.varying


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


def known_after(done: Any, xs: Sequence[jax.Array]) -> list[jax.Array]:
    """The same floating-point arrays, used no sooner than ``done`` has been computed.

    Args:
      done: A tree of arrays of numbers.
      xs: Arrays that need not wait for them by themselves.
    """
    last = [a for a in jax.tree.leaves(done) if a.size]
    if not last:
        return list(xs)
    words = [lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in xs]
    none = {w.dtype: jnp.zeros((), w.dtype) for w in words}
    none = {dtype: zeros_after(last[-1], zero) for dtype, zero in none.items()}
    return [
        lax.bitcast_convert_type(w | none[w.dtype], x.dtype)
        for w, x in zip(words, xs, strict=True)
    ]


def _walled(arrays: Any, numbers: Any, by: jax.Array | None) -> Any:
    def told(numbers):
        return [[jnp.int32(i) for i in some] for some in numbers]

    def barrier(arrays):
        return lax.optimization_barrier(arrays), told(numbers)

    def branch(arrays):
        # The CPU compiler drops barriers before it fuses, but not a branch.
        never = _never(arrays[-1] if by is None else by)
        unlike = sorted({i for some in numbers for i in some})
        unknown: dict[int, jax.Array] = {}
        for start in range(0, len(unlike), FEW):
            few = unlike[start : start + FEW]
            out = lax.cond(
                never,
                lambda few=few: [jnp.int32(0) for _ in few],
                lambda few=few: [jnp.int32(i) for i in few],
            )
            unknown.update(zip(few, out, strict=True))
        whole = lax.cond(
            never, lambda xs: jax.tree.map(jnp.negative, xs), lambda xs: xs, arrays
        )
        return whole, [[unknown[i] for i in some] for some in numbers]

    return lax.platform_dependent(arrays, cpu=branch, default=barrier)


def _never(x: jax.Array) -> jax.Array:
    """False, computed from an array of numbers: no compiler looks that far."""
    word = x.reshape(-1)[0]
    if not jnp.issubdtype(word.dtype, jnp.unsignedinteger):
        word = lax.bitcast_convert_type(word, f"uint{8 * word.dtype.itemsize}")
    # Thirty-two bits, shifted out one half at a time.
    return (word.astype(jnp.uint32) >> np.uint32(16)) >> np.uint32(16) != 0
