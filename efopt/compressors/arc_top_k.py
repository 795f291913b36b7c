"""ARC-Top-K: rows that are large on average over workers, agreed on by a sketch."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs import nested
from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.compressors.identity import Identity, plain
from efopt.compressors.power_sgd import matmul
from efopt.ground import checks
from efopt.ground.checks import keyword_only
from efopt.ground.randomness import hash_words, normals


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArcTopK(Codec):
    """The rows whose mean over workers has the largest sketch.

    A block is a matrix ``G``, a leaf cut in rows. The workers average ``G V`` for a
    random ``V`` that all know, and then the rows of ``G`` that are largest in it.
    """

    fraction: float | None = None
    k: int | None = None
    rank: int
    width: int | None
    seed: int = 0
    values: Codec = Identity()

    one_message: ClassVar[bool] = False

    def __repr__(self):
        size = f"fraction={self.fraction}" if self.k is None else f"k={self.k}"
        outer = (
            f"arc_top_k({size}, rank={self.rank}, width={self.width}, seed={self.seed})"
        )
        return checks.composed(outer, self.values)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.values.linear

    def with_values(self, values):
        return dataclasses.replace(self, values=values)

    def for_shape(self, shape):
        """Dense, if sketch and rows would be no smaller than the leaf."""
        size = math.prod(shape)
        if size == 0:
            return Identity()
        _, rows, columns = self.block_shape(shape)
        checks.numbered(repr(self), shape, rows)
        if self.rank * rows + self.kept(rows) * columns >= size:
            return Identity()
        return self

    def kept(self, rows: int) -> int:
        """Rows that are sent of a matrix."""
        return checks.kept(self.fraction, self.k, rows)

    def block_shape(self, shape):
        size = math.prod(shape)
        columns = self.width
        if columns is None:  # a power of two: about as many rows as columns
            columns = 2 ** round(math.log2(size) / 2)
        columns = min(columns, size)
        return (1, -(-size // columns), columns)

    def rounds(self, x, blocks, state, turn):
        _, rows, columns = x.shape
        key = hash_words(np.uint32(self.seed), turn.draw, blocks.index)
        v = normals(key, columns * self.rank, x.dtype).reshape(-1, columns, self.rank)
        # A power of two, so that no sum overflows: normal numbers stay below six.
        scale = 2.0 ** -math.ceil(math.log2(8 * columns))
        # 2510.26709 Algorithm 1: P_i = G_i V, P = mean P_i; exact, whoever writes rows
        ask = functools.partial(nested.ask, blocks=blocks, turn=turn)
        sketch = matmul("bnm,bmr->bnr", x, v * scale)
        sketch, _ = yield from ask(Identity(), sketch, dtype=x.dtype, number=0)
        most = jnp.max(jnp.abs(sketch), axis=(1, 2), keepdims=True)
        sketch = sketch / jnp.where(most > 0, most, 1)
        # the rows that are largest in diag(P P^T), the same on every worker,
        _, index = lax.top_k(jnp.sum(sketch * sketch, axis=2), self.kept(rows))
        values = jnp.take_along_axis(x, index[:, :, None], axis=1)
        # and their mean
        mean, own = yield from ask(self.values, values, dtype=blocks.dtype, number=1)
        at = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None], index

        def fill(x, rows):
            return x.at[at].add(rows, unique_indices=True, mode="promise_in_bounds")

        average = fill(jnp.zeros_like(mean, shape=x.shape), mean)
        return plain(average, blocks, turn), fill(x, -own), state

    def delta(self, shape):
        """Of the mean, in expectation over sketches, times what the values keep."""
        _, rows, columns = self.block_shape(shape)
        values = self.values.delta((self.kept(rows), columns))
        if values is None:
            return None
        return values * _contraction(self.kept(rows) / rows, self.rank)


@functools.lru_cache(maxsize=4096)
def _contraction(share: float, rank: int) -> float:
    """What of a matrix's square is kept at least, if a share of its rows is.

    Sketched squares of a row are its own times a chi-squared number over its degrees of
    freedom, ``z`` with mean one, dependent from row to row in any way. The rows that
    are chosen have at least their share of the sketched squares, and at most ``c`` of
    their own but for what ``z > c`` adds, which is the chance of a chi-squared number
    of two degrees more: so they keep ``(share - P(z' > c)) / c`` of the whole.
    """
    if share == 1:
        return 1.0
    bounds = (1 + 0.05 * i for i in range(2000))
    return max((share - _tail(rank + 2, rank * c)) / c for c in bounds)


def _tail(degrees: int, x: float) -> float:
    """The chance that a chi-squared number exceeds ``x``."""
    half, odd = x / 2, degrees % 2
    if half > 700:  # below any float
        return 0.0
    total = math.erfc(math.sqrt(half)) if odd else 0.0
    power = 0.5 if odd else 0.0
    while power < degrees / 2 - 0.25:
        log = power * math.log(half) - half - math.lgamma(power + 1) if half else 0.0
        total += math.exp(log)
        power += 1
    return total


@keyword_only
def arc_top_k(
    *,
    fraction: float | None = None,
    k: int | None = None,
    rank: int = 4,
    width: int | None = None,
    seed: int = 0,
) -> Compressor:
    r"""Sends the rows that are largest on average over workers, by two all-reduces.

    Top-k that adds up: workers agree on what to send by a small sketch, whose mean they
    form first. No index is sent, and bytes do not grow with the number of workers.

    .. math::
      P = \frac{1}{n} \sum_i G_i V, \quad
      S = \mathrm{top}_k(\|P_1\|, \|P_2\|, \dots), \quad
      C(G_i)_j = G_{i,j} \, 1[j \in S]

    ``G_i`` is the leaf of worker ``i``, cut in rows ``G_{i,j}`` of ``width``
    neighbours, and ``V`` a ``width x rank`` matrix of normal numbers, drawn anew each
    step, the same on every worker. Rows chosen together need structure in the leaf:
    narrow rows choose better, and cost ``rank`` numbers each.

    *With which feedback.* What is chosen suits the mean, and no worker's own leaf:
    where workers differ by much, what they owe may grow without bound while its mean
    stays small, as it does for whatever cancels in the mean and is therefore never
    sent. :func:`efopt.feedback.ef21` owes nothing, its differences stay bounded, and
    the paper pairs the two. :func:`efopt.error_feedback` is right where workers are
    alike.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: the sketch, ``rank`` numbers a row, at least float32; and ``k`` rows of
    ``width`` values in the leaf's dtype. A leaf for which that is no less than itself
    is sent whole, in the first round.
    Cost: ``32 * rank * rows + bits(dtype) * k * width`` bits per leaf of ``rows *
    width`` coordinates, in two all-reduces for the whole tree.
    Properties: biased; linear; a contraction of the mean: of ``x = mean G_i``, in
    expectation over random sketches, at least ``delta(shape)`` is kept. That is less
    than the share ``k / rows`` which the largest rows hold: a sketch of few columns
    mistakes rows for one another, and rows that point one way are mistaken together.
    With one worker a contraction as well; of one among several, none.
    Placement: stateless; the step counter of the transformation draws the sketch.

    Args:
      fraction: Share of each leaf's rows to send, in (0, 1], rounded up. Static.
      k: Rows to send of each leaf, at least 1. Static. Give exactly one of the two.
      rank: Columns of the sketch, at least 1; the paper's experiments take 4. Static.
      width: Coordinates in a row, at least 1; ``None``: the power of two nearest to the
        square root of the leaf's size, as in the authors' code. Static.
      seed: Selects the sketches, in [0, 2**32); the same on every worker. Static. Two
        in one chain draw alike unless each has its own.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If not exactly one of ``fraction`` and ``k`` is given, or one is out
        of range.

    Examples:
      >>> import efopt
      >>> tx = efopt.compressors.arc_top_k(fraction=0.01)
      >>> tx.payload_bits((1024, 1024)) // 32  # 4 x 1024 of the sketch, 11 rows
      15360

    References:
      Chen et al, `An All-Reduce Compatible Top-K Compressor for
      Communication-Efficient Distributed Learning <https://arxiv.org/abs/2510.26709>`_,
      2025 (Algorithm 1)
    """
    checks.sparsity("arc_top_k", fraction, k, None)
    return make(
        ArcTopK(
            fraction=fraction,
            k=k,
            rank=checks.static_int("arc_top_k", "rank", rank),
            width=None
            if width is None
            else checks.static_int("arc_top_k", "width", width),
            seed=checks.seed("arc_top_k", seed),
        )
    )
