"""Payload trees in one carrier: rows of uint32 words.

A compiler may widen a narrow collective (bfloat16 travels as float32 on a CPU, int4 as
int8) but leaves unsigned words alone, and on TPU it keeps rows of uint32 best. So every
gathered or scattered payload travels as those, whatever it holds.
"""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def pack(tree: Any, rows: int) -> jax.Array:
    """Packs arrays ``(n, ...)`` with ``n`` divisible by ``rows`` to ``(rows, words)``.

    Row ``r`` holds the ``r``-th part of the first axis of every array, each padded to
    whole words: narrower elements stand side by side in a word, the first part of the
    row in its low bits.
    """
    parts = [_to_words(a, rows) for a in jax.tree.leaves(tree)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def unpack(carrier: jax.Array, like: Any, rows: int) -> Any:
    """Inverse of :func:`pack` for some of its rows.

    Args:
      carrier: uint32 ``(m, words)``, any ``m`` rows.
      like: The packed tree, arrays or structs ``(n, ...)``.
      rows: As given to :func:`pack`.

    Returns:
      The tree with arrays ``(m * n / rows, ...)``.
    """
    arrays, end = [], 0
    for a in jax.tree.leaves(like):
        start, end = end, end + _words(a, rows)
        words = carrier if end - start == carrier.shape[1] else carrier[:, start:end]
        arrays.append(_from_words(words, a, rows))
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _unsigned(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")


def _words(a: Any, rows: int) -> int:
    return -(-(math.prod(a.shape) // rows) * a.dtype.itemsize // 4)


def _to_words(a: jax.Array, rows: int) -> jax.Array:
    unsigned = _unsigned(a.dtype)
    x = a if a.dtype == unsigned else lax.bitcast_convert_type(a, unsigned)
    x = x.reshape(rows, -1)
    per = 4 // unsigned.itemsize
    if per == 1:
        return x
    width = -(-x.shape[1] // per)
    x = jnp.pad(x, ((0, 0), (0, per * width - x.shape[1]))).reshape(rows, per, width)
    shifts = [np.uint32(8 * unsigned.itemsize * j) for j in range(per)]
    lanes = [x[:, j].astype(jnp.uint32) << s for j, s in enumerate(shifts)]
    return functools.reduce(operator.or_, lanes)


def _from_words(words: jax.Array, a: Any, rows: int) -> jax.Array:
    unsigned, shape = _unsigned(a.dtype), (-1, *a.shape[1:])
    size = math.prod(a.shape) // rows
    per = 4 // unsigned.itemsize
    if per > 1:
        shift = jnp.arange(per, dtype=jnp.uint32) * np.uint32(8 * unsigned.itemsize)
        lanes = words[:, None, :] >> shift[None, :, None]
        x = lanes.astype(unsigned).reshape(words.shape[0], -1)[:, :size]
    else:
        x = words
    if a.dtype.itemsize > 4:
        shape = (*shape, a.dtype.itemsize // 4)
    x = x.reshape(shape)
    return x if a.dtype == unsigned else lax.bitcast_convert_type(x, a.dtype)
