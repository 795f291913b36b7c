"""What Dion says of a matrix: two thin factors, averaged one after the other."""

import dataclasses
import math
from collections.abc import Generator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Codec, Message
from efopt.compressors.identity import plain
from efopt.compressors.power_sgd import matmul
from efopt.exchanges.pieces import Cut, gather
from efopt.feedback.orthonormal import Side, orthonormalise, unit
from efopt.ground.dtypes import compute_dtype
from efopt.ground.randomness import hash_words
from efopt.workers.axes import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Codec):
    """The orthonormal direction of a matrix, and what of the matrix it stands for.

    A block is a matrix, or what a device holds of it. The average is the direction, the
    rest is the part of rank ``rank`` that all workers have found in their mean.

    Attributes:
      rank: Columns of a factor.
      short: The side whose factor is orthonormal.
      long: The side whose factor has columns of length one.
      turned: Whether the short side is the columns.
      scale: Factor on the direction.
      seed: Selects random starts and sketches.
      lead: The mesh axes over which the batch of matrices is sharded.
      equal: The mesh axes behind a worker along which the factor of the short side is
        equal, and that of the long side: there each device sends a piece.
    """

    rank: int
    short: Side
    long: Side
    turned: bool
    scale: float
    seed: int
    lead: tuple[str, ...] = ()
    equal: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    linear: ClassVar[bool] = True
    stateful: ClassVar[bool] = True
    one_message: ClassVar[bool] = False
    spans: ClassVar[bool] = True

    def of_shards(self, shape, names, equal):
        *batch, rows, columns = names
        short, long = (columns, rows) if self.turned else (rows, columns)
        return dataclasses.replace(
            self,
            short=Side(self.short.size, short),
            long=Side(self.long.size, long),
            lead=tuple(name for entry in batch for name in entry),
            equal=((*equal, *long), (*equal, *short)),
        )

    def state_axes(self, names):
        """Those along which ``Q`` differs: not those that shard the other side."""
        return tuple(n for n in names if n in {*self.long.names, *self.lead})

    @property
    def dense(self) -> bool:
        """Whether the matrix itself is smaller than its factors, and is sent.

        Not where ``Q`` is sharded, and is laid out as if it differed between workers:
        only averages of factors say that it does not.
        """
        rows, columns = self.short.size, self.long.size
        own = self.long.names or self.lead
        return not own and self.rank * (rows + columns) > rows * columns

    def block_shape(self, shape):
        return (math.prod(shape[:-2]), *shape[-2:])

    def init(self, shape, dtype):
        """Zeros: columns without a past are drawn where they are needed."""
        n, *block = self.block_shape(shape)
        long = block[0] if self.turned else block[1]
        return jnp.zeros((n, long, self.rank), compute_dtype(dtype))

    def rounds(self, x, blocks, state, turn):
        matrix = x.swapaxes(1, 2) if self.turned else x
        if self.dense:
            both = tuple(name for name in self.equal[0] if name in self.equal[1])
            matrix = yield from self._mean(matrix, both, blocks, turn)
        q = self._start(state.astype(x.dtype), turn)
        # A power of two that factors are scaled by, so that no sum overflows.
        down = 2.0 ** -math.ceil(math.log2(self.short.size * self.long.size))
        # 2504.05295 Algorithm 1: P = mean of M Q, orthonormalised
        p = self.long.total(matmul("bnm,bmr->bnr", matrix, q * down))
        if not self.dense:
            p = yield from self._mean(p, self.equal[0], blocks, turn)
        p = orthonormalise(p, self.short, np.uint32(self.seed), turn.draw)
        # R = mean of M^T P
        r = self.short.total(matmul("bnm,bnr->bmr", matrix, p * down))
        if not self.dense:
            r = yield from self._mean(r, self.equal[1], blocks, turn)
        # Q: the columns of R at length one; the direction P Q^T, the part P R^T
        q = unit(jnp.where(jnp.isfinite(r), r, 0), self.long)
        direction = matmul("bnr,bmr->bnm", p * self.scale, q)
        part = matmul("bnr,bmr->bnm", p * (1 / down), r)
        if self.turned:
            direction, part = direction.swapaxes(1, 2), part.swapaxes(1, 2)
        return plain(direction, blocks, turn), part, q

    def _start(self, q: jax.Array, turn: Turn) -> jax.Array:
        """The last ``Q``; a column that has died out, or has not lived, starts anew."""
        alive = jnp.any(q != 0, axis=1, keepdims=True)
        alive = self.long.largest(alive.astype(q.dtype)) > 0
        row, column = (
            self.long.places(q.shape[1]),
            np.arange(self.rank, dtype=np.uint32),
        )
        key = hash_words(np.uint32(self.seed), turn.draw)
        word = hash_words(key, row[:, None], column[None, :]) >> np.uint32(8)
        uniform = (2 * word + 1).astype(jnp.int32) - np.int32(2**24)
        normal = lax.erf_inv(uniform.astype(q.dtype) * 2.0**-24)
        return jnp.where(alive, q, normal[None])

    def _mean(
        self, x: jax.Array, names: tuple[str, ...], blocks: Blocks, turn: Turn
    ) -> Generator[Message, Message, jax.Array]:
        """The mean of a factor; what is equal on several devices is sent in parts."""
        cut = Cut(x.shape, names, Axes(names).size() if names else 1)
        piece = cut.take(x)[None]
        one = Blocks(blocks.index[:1], None, None, piece.shape[1:], piece.dtype)
        mean = yield plain(piece, one, turn)
        (whole,) = gather([cut], [mean.decode()[0]])
        return whole


@dataclasses.dataclass(frozen=True)
class PerLeaf(Codec):
    """A codec for each leaf of one tree, in order; no other tree is asked of it."""

    leaves: tuple[Codec, ...]
    said: str

    linear: ClassVar[bool] = True
    stateful: ClassVar[bool] = True
    one_message: ClassVar[bool] = False

    def __repr__(self):
        return self.said

    def assign(self, tree: Any) -> list[Codec]:
        del tree
        return list(self.leaves)

    def members(self):
        return tuple(dict.fromkeys(self.leaves))
