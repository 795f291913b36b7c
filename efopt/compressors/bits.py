"""Arithmetic on bits that every backend does alike: packing, rounding, hashing.

Everything here is exact and the same under ``jit`` as without it, on CPU, GPU and
TPU. That is not a matter of course: a compiler is free to remove
``x.astype(bfloat16).astype(float32)``, and GPU compilers do, taking with it the very
rounding error that error feedback exists to keep.
"""

import functools
import operator

import jax
import jax.numpy as jnp
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
    """Inverse of :func:`pack_bits`: uint8 ``(n, ceil(size / 8))`` to bool ``(n, size)``."""
    n, width = packed.shape
    place = jnp.arange(8, dtype=jnp.uint8)[None, :, None]
    planes = (packed[:, None, :] >> place) & jnp.uint8(1)
    return planes.reshape(n, 8 * width)[:, :size].astype(bool)


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds finite ``x`` to the nearest value of ``dtype`` and keeps the dtype of ``x``.

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


def hash_words(*words: jax.Array | int) -> jax.Array:
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


def sample_without_replacement(
    key: jax.Array, num: int, size: int, *, rounds: int = 6
) -> jax.Array:
    """``num`` distinct pseudo-random indices below ``size`` for each key.

    A Feistel network over the rectangle ``rows x columns >= size`` permutes it; an index
    that lands outside ``size`` walks on until it is inside. Costs ``O(num)`` per key,
    without sorting or permuting ``size`` elements.

    Args:
      key: uint32 ``(n,)``, one key per row of the result.
      num: Indices per key, at most ``size``. Static.
      size: The range of the indices. Static.
      rounds: Feistel rounds. Static.

    Returns:
      uint32 ``(n, num)``; the first ``num`` places of a permutation of ``range(size)``.
    """
    columns = max(1, round(size**0.5))
    rows = -(-size // columns)

    def permute(index):
        row, column = index // jnp.uint32(columns), index % jnp.uint32(columns)
        for i in range(0, rounds, 2):
            row = (row + hash_words(key[:, None], i, column) % rows) % rows
            column = (column + hash_words(key[:, None], i + 1, row) % columns) % columns
        return row * jnp.uint32(columns) + column

    start = jnp.broadcast_to(jnp.arange(num, dtype=jnp.uint32), (key.shape[0], num))
    if rows * columns == size:
        return permute(start)
    return lax.while_loop(
        lambda index: jnp.any(index >= size),
        lambda index: jnp.where(index >= size, permute(index), index),
        permute(start),
    )
