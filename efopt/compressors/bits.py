"""Arithmetic on bits that every backend does alike: packing, rounding, hashing.

Everything here is exact and the same under ``jit`` as without it, on CPU, GPU and
TPU. That is not a matter of course: a compiler is free to remove
``x.astype(bfloat16).astype(float32)``, and GPU compilers do, taking with it the very
rounding error that error feedback exists to keep.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs booleans ``(n, size)`` eight to a byte: uint8 ``(n, ceil(size / 8))``.

    Bit ``j`` of byte ``w`` holds coordinate ``j * ceil(size / 8) + w``, so that packing
    reads eight long runs instead of one strided one. Unused bits are zero.
    """
    n, size = bits.shape
    width = -(-size // 8)
    planes = jnp.pad(bits, ((0, 0), (0, 8 * width - size))).reshape(n, 8, width)
    shifted = [planes[:, j].astype(jnp.uint8) << jnp.uint8(j) for j in range(8)]
    return functools.reduce(operator.or_, shifted)


def unpack_bits(packed: jax.Array, size: int) -> jax.Array:
    """Inverse of :func:`pack_bits`: uint8 ``(n, width)`` to bool ``(n, size)``."""
    n, width = packed.shape
    place = jnp.arange(8, dtype=jnp.uint8)[None, :, None]
    planes = (packed[:, None, :] >> place) & jnp.uint8(1)
    return planes.reshape(n, 8 * width)[:, :size].astype(bool)


def materialised(tree: Any, step: jax.Array) -> Any:
    """Keeps a compiler from computing ``tree`` anew wherever an element of it is used.

    Fused into its own decoding, a packed byte would be packed again for each of its
    coordinates. The CPU compiler drops barriers before it fuses, but not a branch; this
    one is never taken.

    Args:
      tree: Arrays of numbers.
      step: uint32, the current step.
    """

    def branch(tree):
        never = step == np.uint32(2**32 - 1)
        negative = functools.partial(jax.tree.map, jnp.negative)
        return lax.cond(never, negative, lambda tree: tree, tree)

    return lax.platform_dependent(tree, cpu=branch, default=lax.optimization_barrier)


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds ``x`` to the nearest value of ``dtype`` and keeps its own dtype.

    The result converts to ``dtype`` exactly, values beyond its range saturate, and no
    compiler removes the rounding. A ``dtype`` at least as wide as that of ``x`` changes
    nothing.
    """
    info, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if info.nmant >= own.nmant and info.nexp >= own.nexp:
        return x
    if float(info.max) < float(own.max):
        largest = jnp.asarray(info.max, x.dtype)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp < own.nexp:
        # reduce_precision flushes subnormals; they lie on one uniform grid instead.
        grid = float(info.smallest_subnormal)
        fine = jnp.round(x * (1 / grid)) * grid
        rounded = jnp.where(jnp.abs(x) < float(info.smallest_normal), fine, rounded)
    return rounded


def cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Converts ``x`` to ``dtype`` with a rounding that ``jit`` cannot remove."""
    return round_to(x, dtype).astype(dtype)


def hash_words(*words: jax.typing.ArrayLike) -> jax.Array:
    """Hashes broadcastable unsigned words into one uint32 array, counter style.

    Murmur3's 32-bit finaliser after each word: a bijection of the last word, cheap on
    every backend, and equal on every worker.
    """
    h = jnp.uint32(0x9E3779B9)
    for word in words:
        h = h ^ jnp.asarray(word).astype(jnp.uint32)
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        h = (h ^ (h >> 16)) + jnp.uint32(0x9E3779B9)
    return h


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample_without_replacement(key: jax.Array, num: int, size: int) -> jax.Array:
    """``num`` distinct pseudo-random indices below ``size`` for each key.

    A Feistel network over the rectangle ``rows x columns >= size`` permutes it; an
    index that lands outside ``size`` walks on until it is inside. Costs ``O(num)`` per
    key, without sorting or permuting ``size`` elements.

    Args:
      key: uint32 ``(n,)``, one key per row of the result.
      num: Indices per key, at most ``size``. Static.
      size: The range of the indices. Static.

    Returns:
      uint32 ``(n, num)``; the first ``num`` places of a permutation of ``range(size)``.
    """
    columns = max(1, round(size**0.5))
    rows = -(-size // columns)

    def permute(i, index):
        row, column = index // np.uint32(columns), index % np.uint32(columns)
        word = np.uint32(2) * i.astype(jnp.uint32)
        row = (row + hash_words(key[:, None], word, column) % rows) % rows
        word = word + np.uint32(1)
        column = (column + hash_words(key[:, None], word, row) % columns) % columns
        return row * np.uint32(columns) + column

    def walk(carry):
        index, outside = carry
        moved = lax.fori_loop(0, 3, permute, index)
        index = jnp.where(outside, moved, index)
        return index, outside & (index >= size)

    start = jnp.arange(num, dtype=jnp.uint32)[None, :] + (key[:, None] & np.uint32(0))
    index, _ = lax.while_loop(lambda c: jnp.any(c[1]), walk, (start, start == start))
    return index
