"""PowerSGD, low-rank compression: matrices as products of two thin factors."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs import nested
from efopt.codecs.codec import Batch, Codec
from efopt.codecs.compressor import Compressor, make
from efopt.compressors.identity import Identity, plain
from efopt.ground import checks
from efopt.ground.checks import keyword_only
from efopt.ground.dtypes import compute_dtype
from efopt.ground.randomness import hash_words, normals

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
    values: Codec = Identity()

    one_message: ClassVar[bool] = False

    def __repr__(self):
        outer = (
            f"power_sgd(rank={self.rank}, warm_start={self.warm_start}, "
            f"min_compression={self.min_compression}, split={self.split}, "
            f"seed={self.seed})"
        )
        return checks.composed(outer, self.values)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.values.linear

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return self.warm_start

    def with_values(self, values):
        return dataclasses.replace(self, values=values)

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
        cuts = [
            (math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))
        ]
        if not cuts:
            return (1, 1, math.prod(shape))
        if self.split is None:
            return (1, *min(cuts, key=sum))
        last = len(cuts) - 1
        cut = self.split - 1 if self.split > 0 else len(shape) + self.split - 1
        return (1, *cuts[min(max(cut, 0), last)])

    def init(self, shape, dtype):
        n, _, columns = self.block_shape(shape)
        index = jnp.arange(n, dtype=jnp.uint32)
        return self._start(index, columns, jnp.uint32(0), compute_dtype(dtype))

    def rounds(self, x, blocks, state, turn):
        rows, columns = blocks.shape
        q = self._start(blocks.index, columns, turn.draw, x.dtype)
        if self.warm_start:
            # A column that has died out, as in a matrix of lower rank, starts anew.
            state = state.astype(x.dtype)
            q = jnp.where(jnp.any(state != 0, axis=1, keepdims=True), state, q)
        # A power of two that the factors are scaled by, so that no sum overflows; the
        # columns of P have length one, and P forgets it.
        scale = 2.0 ** -math.ceil(math.log2(rows * columns))
        product = matmul("bnm,bmr->bnr", x, q * scale)  # Algorithm 1, line 3
        ask = functools.partial(nested.ask, self.values, blocks=blocks, turn=turn)
        p, _ = yield from ask(product, dtype=x.dtype, number=0)  # line 4
        p = yield Batch(orthonormalise, p)  # line 5
        # Rows of thin factors, and not columns: six times faster on a CPU.
        product = matmul("bnr,bnm->brm", p * scale, x).swapaxes(1, 2)  # line 6
        mean, own = yield from ask(product, dtype=x.dtype, number=1)  # line 7
        back = p * (1 / scale)
        average = matmul("bnr,bmr->bnm", back, mean)  # line 11
        rest = x - matmul("bnr,bmr->bnm", back, own)
        return plain(average, blocks, turn), rest, mean if self.warm_start else ()

    def _start(self, index, columns, step, dtype):
        """Normal numbers ``(n, columns, rank)``, the same on every worker."""
        key = hash_words(np.uint32(self.seed), step, index)
        return normals(key, columns * self.rank, dtype).reshape(-1, columns, self.rank)

    def delta(self, shape):
        """Of a random start: rank over the smaller side, in expectation."""
        if self.warm_start or self.values != Identity():
            return None
        _, rows, columns = self.block_shape(shape)
        return self.rank / min(rows, columns)


def matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A batch of products in full precision, also where the default is lower."""
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


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
    matrix, equal on all workers.

    Args:
      rank: Columns of a factor, at least 1. Static.
      warm_start: Whether to start from the last ``Q``, or from random numbers. Static.
      min_compression: How many times smaller the factors must be than the matrix, at
        least 0; else the leaf goes dense. Static.
      split: How many leading axes make the rows; negative: counted from the end;
        ``None``: nearest to square. Leaves with fewer axes are cut where they can be.
        Static.
      seed: Selects the starts, in [0, 2**32); the same on every worker. Static.

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
        )
    )
