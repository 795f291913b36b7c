"""Orthonormal columns of tall matrices, also where their rows are sharded.

Randomised Cholesky QR: a random sketch of the rows is small enough for a QR of its own,
whose triangle nearly orthonormalises the matrix itself, and one Cholesky QR does the
rest. Of shards nothing meets but sums of small matrices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.compressors.power_sgd import matmul
from efopt.ground.randomness import hash_words
from efopt.workers.axes import Axes

# Rows of a sketch for each column, and of what their number is a multiple.
OVERSAMPLE, MULTIPLE = 1.25, 128
# In units of the dtype's precision: what is left of a dependent column.
DEPENDENT = 100


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a matrix, of which a device may hold a part.

    Attributes:
      size: Its whole length.
      names: The mesh axes over which it is sharded, the slowest first.
    """

    size: int
    names: tuple[str, ...] = ()

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over the shards of this side."""
        return Axes(self.names).sum(x) if self.names else x

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest over the shards of this side."""
        return Axes(self.names).max(x) if self.names else x

    def places(self, length: int) -> jax.Array:
        """The numbers of the rows that this device holds: uint32 ``(length,)``."""
        place = jnp.arange(length, dtype=jnp.uint32)
        if not self.names:
            return place
        return place + (Axes(self.names).index() * length).astype(jnp.uint32)


def unit(p: jax.Array, side: Side) -> jax.Array:
    """Columns of length one, of ``(n, rows, rank)``; what is zero stays zero."""
    most = side.largest(jnp.max(jnp.abs(p), axis=1, keepdims=True))
    p = p / jnp.where(most > 0, most, 1)
    length = jnp.sqrt(side.total(jnp.sum(p * p, axis=1, keepdims=True)))
    return p / jnp.where(length > 0, length, 1)


def orthonormalise(p: jax.Array, side: Side, *words: jax.typing.ArrayLike) -> jax.Array:
    """Gram-Schmidt's columns, of ``(n, rows, rank)``.

    A column that depends on those before it adds nothing to the span: it becomes zero,
    and the others are what they would be without it.

    Args:
      p: The matrices, or this device's shard of their rows.
      side: Their rows.
      words: What the random sketch is hashed from, equal on all devices.
    """
    rank = p.shape[2]
    p = unit(jnp.where(jnp.isfinite(p), p, 0), side)
    height = -(-int(np.ceil(OVERSAMPLE * rank)) // MULTIPLE) * MULTIPLE
    sketched = p
    if side.names or height < side.size:
        sketched = side.total(_sketch(p, side, height, words))
    triangle = jnp.linalg.qr(sketched, mode="r")
    length = jnp.abs(_diagonal(triangle))
    good = length > DEPENDENT * float(jnp.finfo(p.dtype).eps)
    # The dependent ones behind all others, where they take nothing from them.
    order = jnp.argsort(~good, axis=1, stable=True)
    triangle = jnp.linalg.qr(_columns(triangle, order), mode="r")
    triangle = triangle * jnp.where(_diagonal(triangle) < 0, -1, 1)[..., None]
    keep = jnp.arange(rank)[None] < jnp.sum(good, axis=1, keepdims=True)
    both = keep[:, :, None] & keep[:, None, :]
    triangle = jnp.where(both, triangle, jnp.eye(rank, dtype=p.dtype)[None])
    p = jnp.where(keep[:, None, :], _columns(p, order), 0)
    p = lax.linalg.triangular_solve(triangle, p, left_side=False)
    # Nearly orthonormal: the Gram matrix is well-conditioned, and Cholesky QR exact.
    gram = side.total(matmul("bnr,bns->brs", p, p))
    gram = jnp.where(both, gram, jnp.eye(rank, dtype=p.dtype)[None])
    lower = lax.linalg.cholesky(gram)
    p = lax.linalg.triangular_solve(
        lower, p, left_side=False, lower=True, transpose_a=True
    )
    return _columns(p, jnp.argsort(order, axis=1))


def _sketch(p, side, height, words):
    """Random signs times the rows: ``(n, height, rank)``, of this device's rows."""
    places = side.places(p.shape[1])
    row = jnp.arange(height, dtype=jnp.uint32)
    word = hash_words(*words, row[:, None], places[None, :])
    signs = jnp.where(word >> np.uint32(31), 1, -1).astype(p.dtype)
    return matmul("kn,bnr->bkr", signs, p) / np.sqrt(height).astype(p.dtype)


def _diagonal(x):
    return jnp.diagonal(x, axis1=1, axis2=2)


def _columns(x, order):
    return jnp.take_along_axis(x, order[:, None, :], axis=2)
