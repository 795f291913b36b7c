"""PowerSGD, low-rank compression: matrices as products of two thin factors."""

import dataclasses
import functools
import math
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs import nested
from efopt.codecs.codec import Batch, Codec
from efopt.codecs.compressor import Compressor, make
from efopt.compressors.identity import Identity, plain
from efopt.compressors.shards import Shards
from efopt.ground import checks
from efopt.ground.barriers import LARGE
from efopt.ground.checks import keyword_only
from efopt.ground.dtypes import compute_dtype
from efopt.ground.randomness import hash_words, normal

SMALL = 1 << 13  # coordinates of a matrix that zeros may fill up to a larger one
UNROLLED = 8  # columns that are orthonormalised without a loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerSGD(Codec):
    """One step of the power method, started where the last one ended.

    A block is a matrix ``M``. The workers average ``M Q``, orthonormalise the columns
    to ``P``, and average ``M^T P``, which is the next ``Q``.
    """

    rank: int
    warm_start: bool = True
    min_compression: float = 2
    split: int | None = None
    seed: int = 0
    per_shard: bool = False
    values: Codec = Identity()
    shards: Shards | None = None

    one_message: ClassVar[bool] = False

    def __repr__(self):
        outer = (
            f"power_sgd(rank={self.rank}, warm_start={self.warm_start}, "
            f"min_compression={self.min_compression}, split={self.split}, "
            f"seed={self.seed}, per_shard={self.per_shard})"
        )
        return checks.composed(outer, self.values)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.values.linear

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.warm_start

    @property
    def spans(self) -> bool:  # type: ignore[override]
        return not self.per_shard

    def with_values(self, values):
        return dataclasses.replace(self, values=values)

    def of_shards(self, shape, names, equal):
        split = self._cut(shape)
        own = Shards.of(shape, split, names, equal)
        return dataclasses.replace(self, split=split, shards=own)

    def state_axes(self, names):
        return names if self.shards is None else self.shards.columns

    def for_shape(self, shape):
        """Dense, if the factors would not be ``min_compression`` times smaller."""
        if len(shape) < 2 or math.prod(shape) == 0:
            return Identity()
        _, rows, columns = self.block_shape(shape)
        if (rows + columns) * self.rank * self.min_compression > rows * columns:
            return Identity()
        if self.rank > min(rows, columns):
            raise ValueError(
                f"`power_sgd(rank=...)` must not exceed the smaller side of a matrix, "
                f"got rank={self.rank} for {rows} x {columns} (a leaf of shape "
                f"{shape}). A larger `min_compression` leaves such leaves dense."
            )
        return self

    def block_shape(self, shape):
        cut = self._cut(shape)
        return (1, math.prod(shape[:cut]), math.prod(shape[cut:]))

    def _cut(self, shape):
        """How many axes make the rows."""
        cuts = range(1, len(shape))
        if not cuts:
            return 0
        if self.split is None:
            sides = lambda i: math.prod(shape[:i]) + math.prod(shape[i:])  # noqa: E731
            return min(cuts, key=sides)
        cut = self.split if self.split > 0 else len(shape) + self.split
        return min(max(cut, 1), len(shape) - 1)

    def fills(self, block):
        # Not with values that are blocks themselves, one to a matrix.
        small = math.prod(block) <= SMALL
        return small and self.values.exact and self.shards is None

    def init(self, shape, dtype):
        n, _, columns = self.block_shape(shape)
        if self.shards is not None:  # drawn at the first step, where devices are known
            return jnp.zeros((n, columns, self.rank), compute_dtype(dtype))
        index = jnp.arange(n, dtype=jnp.uint32)
        return normal(self._words(index, columns, jnp.uint32(0)), compute_dtype(dtype))

    def rounds(self, x, blocks, state, turn):
        rows, columns = blocks.shape
        words = self._words(blocks.index, columns, turn.draw)
        q = yield Batch(_normal(x.dtype), words)
        if self.warm_start:
            # A column that has died out, as in a matrix of lower rank, starts anew.
            state = blocks.apart(state.astype(x.dtype), 1)
            alive = jnp.any(state != 0, axis=1, keepdims=True)
            alive = alive if self.shards is None else self.shards.any(alive)
            q = jnp.where(alive, state, q)
        # A power of two that the factors are scaled by, so that no sum overflows; the
        # columns of P have length one, and P forgets it.
        size = rows * columns if self.shards is None else self.shards.size
        scale = 2.0 ** -math.ceil(math.log2(size))
        product = matmul("bnm,bmr->bnr", x, q * scale)  # Algorithm 1, line 3
        ask = functools.partial(self._ask, blocks=blocks, turn=turn)
        p = yield from self._left(product, ask)  # lines 4 and 5
        product = across(p * scale, x)  # line 6
        mean, own = yield from self._right(product, ask)  # line 7
        back = p * (1 / scale)
        average = of_factors(back, mean)  # line 11
        rest = x - of_factors(back, own)
        state = blocks.joined(mean, 1) if self.warm_start else ()
        return plain(average, blocks, turn), rest, state

    def _words(self, index, columns, step):
        """What the start is drawn from, the same on every worker.

        Random words ``(n, columns, rank)``.
        """
        key = hash_words(np.uint32(self.seed), step, index)[:, None, None]
        column = jnp.arange(columns, dtype=jnp.uint32)
        if self.shards is not None:
            column = self.shards.column_numbers()
        rank = np.uint32(self.rank)
        place = column[:, None] * rank + jnp.arange(rank, dtype=jnp.uint32)[None, :]
        return hash_words(key, place[None])

    def _ask(self, product, number, blocks, turn):
        """The mean over workers of factors, and what this worker has said."""
        given, whole = blocks.joined(product, number), blocks.whole()
        given = nested.ask(self.values, given, whole, product.dtype, turn, number)
        return tuple(blocks.apart(x, number) for x in (yield from given))

    def _left(self, product, ask):
        """The mean over workers of ``M Q``, orthonormal: this device's rows."""
        shards = self.shards
        if shards is None:
            mean, _ = yield from ask(product, number=0)
            return (yield Batch(orthonormalise, mean))
        shape = product.shape[1:]
        mean, _ = yield from ask(shards.part(product, shards.columns), number=0)
        mean = shards.all_rows(mean, shards.columns, shape)
        p = yield Batch(orthonormalise, mean)
        return shards.own_rows(p, shape[0])

    def _right(self, product, ask):
        """The mean over workers of ``M^T P``, and this worker's: this device's rows."""
        shards = self.shards
        if shards is None:
            return (yield from ask(product, number=1))
        shape = product.shape[1:]
        mean, own = yield from ask(shards.part(product, shards.rows), number=1)
        return tuple(shards.whole(x, shards.rows, shape) for x in (mean, own))

    def delta(self, shape):
        """Of a random start: rank over the smaller side, in expectation."""
        if self.warm_start or self.values != Identity():
            return None
        _, rows, columns = self.block_shape(shape)
        return self.rank / min(rows, columns)


@functools.cache
def _normal(dtype):  # one function, so that all leaves draw in one batch
    return functools.partial(normal, dtype=dtype)


def matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A batch of products in full precision, also where the default is lower."""
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


def across(p: jax.Array, x: jax.Array) -> jax.Array:
    """The products ``x^T p``, ``(n, columns, rank)``."""

    def whole(p, x):  # rows of thin factors, not columns: six times faster on a CPU
        return matmul("bnr,bnm->brm", p, x).swapaxes(1, 2)

    def in_parts(p, x):
        n, height, _ = x.shape
        cut = lambda a: a.reshape(n * parts, height // parts, -1)  # noqa: E731
        y = matmul("bnr,bnm->brm", cut(p), cut(x))
        return jnp.sum(y.reshape(n, parts, *y.shape[1:]), axis=1).swapaxes(1, 2)

    # A GPU's compiler splits a long sum in powers of two, and pads rows that are no
    # multiple of them, with a copy of the matrix.
    parts = max(i for i in range(1, 65) if x.shape[1] % i == 0)
    if parts in (1, 64) or x.size < LARGE:
        return whole(p, x)
    return lax.platform_dependent(p, x, cuda=in_parts, rocm=in_parts, default=whole)


def of_factors(p: jax.Array, q: jax.Array) -> jax.Array:
    """The matrices ``p q^T`` of thin factors.

    On a GPU term by term, in the pass that reads them: a product of its own would write
    them first, a third of all that this codec moves.
    """

    def product(p, q):
        return matmul("bnr,bmr->bnm", p, q)

    def terms(p, q):
        parts = [p[:, :, None, j] * q[:, None, :, j] for j in range(p.shape[2])]
        return functools.reduce(operator.add, parts)

    if p.shape[2] > UNROLLED:
        return product(p, q)
    return lax.platform_dependent(p, q, cuda=terms, rocm=terms, default=product)


def orthonormalise(p: jax.Array) -> jax.Array:
    """Columns of length one with the span of those of ``p``, ``(n, rows, rank)``.

    Gram-Schmidt, each column twice, which is as orthogonal as the dtype allows. A
    column that depends on those before it adds nothing to the span: it becomes zero.
    """
    rank = p.shape[2]
    dependent = 64 * float(jnp.finfo(p.dtype).eps)

    def unit(v):
        most = jnp.max(jnp.abs(v), axis=1, keepdims=True)
        v = v / jnp.where(most > 0, most, 1)
        length = jnp.sqrt(jnp.sum(v * v, axis=1, keepdims=True))
        return v / jnp.where(length > 0, length, 1)

    def column(j, p):
        v = unit(lax.dynamic_index_in_dim(p, j, 2, keepdims=False))
        before = jnp.where(jnp.arange(rank) < j, p, 0)
        for _ in range(2):
            share = matmul("bnr,bn->br", before, v)
            v = v - matmul("bnr,br->bn", before, share)
        left = jnp.sqrt(jnp.sum(v * v, axis=1, keepdims=True))
        v = jnp.where(left > dependent, unit(v), 0)
        return lax.dynamic_update_index_in_dim(p, v, j, 2)

    if rank > UNROLLED:
        return lax.fori_loop(0, rank, column, p)
    for j in range(rank):
        p = column(j, p)
    return p


@keyword_only
def power_sgd(
    rank: int = 4,
    *,
    warm_start: bool = True,
    min_compression: float = 2,
    split: int | None = None,
    seed: int = 0,
    per_shard: bool = False,
) -> Compressor:
    r"""Sends matrices as products of two thin factors, found by the power method.

    The compressor for all-reduce: payloads add up, and the wire shrinks by orders of
    magnitude on large layers. Each step is one iteration; with a warm start the factors
    follow the gradient's slowly turning dominant subspace. Use it with error feedback.

    .. math::
      P = \operatorname{orth}\Big(\frac{1}{n} \sum_i M_i Q\Big), \quad
      Q \leftarrow \frac{1}{n} \sum_i M_i^T P, \quad u = P Q^T, \quad
      C(M_i) = P (M_i^T P)^T

    A leaf of two or more axes is a matrix: its first ``split`` axes by the rest, or the
    cut that is nearest to square, which finds the useful one in a convolution of any
    layout. Vectors, and matrices whose factors would not be ``min_compression`` times
    smaller, go dense in the first of the two rounds. A column of ``Q`` that dies out,
    as it does where the rank is lower, is drawn anew.

    A matrix that is sharded behind its worker is one matrix still, as published: each
    device multiplies the shard that it holds, and the factors, which are thin, are
    summed and gathered over the mesh axes behind the worker, three collectives in all.
    Each of ``m`` devices sends ``1 / m`` of both factors to the other workers. With
    ``per_shard=True`` every shard is a matrix of its own instead: nothing moves behind
    a worker, the wire carries the factors of all shards, and the approximation is the
    finer one, of rank ``rank`` on each.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``P (rows, rank)`` and ``Q (columns, rank)``, at least float32, one a
    round; dense leaves in their own dtype.
    Cost: ``32 * rank * (rows + columns)`` bits per matrix, in two all-reduces for the
    whole tree; ``bits(dtype) * d`` per dense leaf of ``d`` coordinates.
    Properties: biased; a projection, so that no error is longer than the input, but
    with a warm start no fixed contraction factor; without, ``delta = rank / min(rows,
    columns)`` in expectation over the start; linear; random start shared by all
    workers.
    Placement: with a warm start ``Q`` is in the state, ``(1, columns, rank)`` for each
    matrix, equal on all workers; of a sharded one the columns that a device holds, and
    zeros before the first step, which draws them.

    Args:
      rank: Columns of a factor, at least 1. Static.
      warm_start: Whether to start from the last ``Q``, or from random numbers. Static.
      min_compression: How many times smaller the factors must be than the matrix, at
        least 0; else the leaf goes dense. Static.
      split: How many leading axes make the rows; negative: counted from the end;
        ``None``: nearest to square. Leaves with fewer axes are cut where they can be.
        Static.
      seed: Selects the starts, in [0, 2**32); the same on every worker. Static. Two in
        one chain draw alike unless each has its own.
      per_shard: Whether each shard of a sharded matrix is factorised by itself. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If an option is out of range; from ``init``, if ``rank`` exceeds the
        smaller side of a matrix that ``min_compression`` does not leave dense.

    Examples:
      >>> import efopt
      >>> tx = efopt.power_sgd(rank=4)
      >>> tx.payload_bits((512, 256)), tx.payload_bits((256,))  # the vector is dense
      (98304, 8192)

    References:
      Vogels et al, `PowerSGD: Practical Low-Rank Gradient Compression for Distributed
      Optimization <https://arxiv.org/abs/1905.13727>`_, 2019 (Algorithm 1)
    """
    checks.static_bool("power_sgd", "warm_start", warm_start)
    if split is not None:
        checks.static_int("power_sgd", "split", split, least=-64)
        if split == 0:
            raise ValueError("`power_sgd(split=...)` must not be 0: rows need an axis.")
    return make(
        PowerSGD(
            rank=checks.static_int("power_sgd", "rank", rank),
            warm_start=warm_start,
            min_compression=checks.static_float(
                "power_sgd", "min_compression", min_compression
            ),
            split=split,
            seed=checks.seed("power_sgd", seed),
            per_shard=checks.static_bool("power_sgd", "per_shard", per_shard),
        )
    )
