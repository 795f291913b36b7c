"""Counter-based random numbers: hashes of seed, step, worker and place.

Everything here is exact and the same under ``jit`` as without it, on CPU, GPU and TPU.
Nothing is kept from step to step, and who knows the words knows the numbers. Without
the worker among the words, numbers are shared by all: no index need be sent.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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


def stratified_sample(key: jax.Array, num: int, size: int) -> jax.Array:
    """``num`` distinct pseudo-random indices below ``size`` for each key.

    The range is cut into ``num`` strata, rotated by a random offset, and one index is
    drawn from each. Every index is in the sample with probability ``num / size``; two
    neighbours are together in it less often than in a sample without strata. One pass
    over ``num`` numbers: nothing is sorted, permuted or repeated.

    Args:
      key: uint32 ``(n,)``, one key per row of the result.
      num: Indices per key, at least 1 and at most ``size``. Static.
      size: The range of the indices. Static.

    Returns:
      int32 ``(n, num)``, ascending but for one wrap around ``size``.
    """
    short, longer = divmod(size, num)
    stratum = jnp.arange(num, dtype=jnp.uint32)[None]
    offset = rotation(key, np.uint32(size))[:, None]
    sizes = (np.uint32(n) for n in (short, longer, size))
    index = one_of_each_stratum(key[:, None], stratum, offset, *sizes)
    return index.astype(jnp.int32)


def rotation(key: jax.Array, size: jax.typing.ArrayLike) -> jax.Array:
    """By how much the strata of each key are rotated: uint32."""
    return hash_words(~key) % size


def one_of_each_stratum(
    key: jax.Array,
    stratum: jax.Array,
    offset: jax.Array,
    short: jax.typing.ArrayLike,
    longer: jax.typing.ArrayLike,
    size: jax.typing.ArrayLike,
) -> jax.Array:
    """The index that is drawn from a stratum; arrays of uint32 that broadcast.

    Args:
      key: That of the sample.
      stratum: The number of the stratum.
      offset: The :func:`rotation` of the sample.
      short: How many indices a stratum holds.
      longer: The first strata, so many, hold one more.
      size: How many indices all strata hold.
    """
    start = stratum * short + jnp.minimum(stratum, longer)
    length = short + (stratum < longer).astype(jnp.uint32)
    index = start + hash_words(key, stratum) % length + offset
    return jnp.where(index < size, index, index - size)


def normals(
    key: jax.Array, number: int | jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """``number`` normal numbers for each key: ``(n, number)``.

    Args:
      key: uint32 ``(n,)``.
      number: Numbers per key, static; or which of the endless row they are, uint32.
      dtype: Theirs, at least float32.
    """
    place = jnp.arange(number, dtype=jnp.uint32) if isinstance(number, int) else number
    return normal(hash_words(key[:, None], place[None, :]), dtype)


def normal(word: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The normal number that belongs to each random word, uint32."""
    uniform = (2 * (word >> np.uint32(8)) + 1).astype(jnp.int32) - np.int32(2**24)
    return lax.erf_inv(uniform.astype(dtype) * 2.0**-24) * math.sqrt(2)


def private_bits(seed: int, blocks: Any, turn: Any, number: int) -> jax.Array:
    """``number`` random bits for every coordinate, other ones on every worker.

    A counter is hashed: several times cheaper than a cryptographic generator.

    Args:
      seed: Selects the sequence, below 2**32.
      blocks: Their numbers ``index``, uint32 ``(n,)``, and the ``size`` of one.
      turn: The ``step`` and this ``worker``, uint32.
      number: At most 32. Static.

    Returns:
      int32 ``(n, size)`` in ``[0, 2**number)``.
    """
    key = hash_words(np.uint32(seed), turn.draw, turn.worker, blocks.index)
    place = jnp.arange(blocks.size, dtype=jnp.uint32)[None, :]
    word = hash_words(key[:, None], place)
    return (word >> np.uint32(32 - number)).astype(jnp.int32)
