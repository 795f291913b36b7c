"""Blocks: the unit that is compressed on its own, and when and where that happens."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.runs import Runs
from efopt.ground.dtypes import compute_dtype
from efopt.ground.randomness import hash_words
from efopt.ground.sums import block_sum

MOST = 2**31 - 1  # coordinates whose places are numbered


class Turn(NamedTuple):
    """When and where a message is made, for codecs that draw random numbers.

    ``step`` is equal on all workers (shared randomness: which coordinates to send).
    ``worker`` differs (private randomness: which way to round).
    """

    step: jax.Array  # shape=(), uint32
    worker: jax.Array  # shape=(), uint32
    stream: int = 0  # tells the roles of one chain apart; static

    @property
    def draw(self) -> jax.Array:
        """The word that shared random numbers of this step are hashed from."""
        if not self.stream:
            return self.step
        return hash_words(np.uint32(self.stream), self.step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """What is known of a batch of ``n`` blocks without looking at their values.

    Attributes:
      index: uint32 ``(n,)``, the block's number in the whole tree; the same on every
        worker, so that shared randomness needs no communication.
      count: int32 ``(n,)``, valid coordinates of each block, which come first; the rest
        is padding. ``None``: every block is full.
      weight: ``1 / count``, float ``(n,)``, zero for a block of padding. Ready made,
        because a division by a constant is not the same under ``jit``. ``None`` as well
        if every block is full.
      shape: The shape of one block. Static.
      dtype: The dtype of the leaf that the blocks were cut from. Static.
      total: Valid coordinates of a single leaf, if the codec would rather scatter into
        those alone (:attr:`end`); ``None``: unknown. Static.
    """

    index: jax.Array
    count: jax.Array | None
    weight: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    total: int | None = dataclasses.field(
        default=None, kw_only=True, metadata={"static": True}
    )

    @property
    def end(self) -> int | None:
        """Where padding starts in the flat blocks, if it is known and they are all."""
        n, total = self.index.size, self.total
        if total is None or -(-total // self.size) != n or n * self.size > MOST:
            return None
        return total

    @property
    def compute_dtype(self) -> np.dtype:
        return compute_dtype(self.dtype)

    @property
    def size(self) -> int:
        """Coordinates of one block, padding included."""
        return math.prod(self.shape)

    @property
    def coordinates(self) -> int:
        """Coordinates of all blocks."""
        return self.index.size * self.size

    @property
    def members(self) -> tuple[int, ...]:
        """The sizes that a row of the batch is made of: of every row the same."""
        return (self.size,)

    def runs(self, lengths: Sequence[int]) -> Runs:
        """Numbers that belong to the blocks, so many to each of :attr:`members`."""
        (length,) = lengths
        return Runs(length)

    def everywhere(self) -> Runs:
        """One number for each coordinate, laid out as the blocks are."""
        return Runs(self.size)

    def at(self, runs: Runs, place: jax.Array) -> jax.Array:
        """Where in a row a coordinate of the block of each number stands: int32."""
        del runs
        return place.astype(jnp.int32)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of each block of ``x``, none of it negative: ``(n,)``."""
        return block_sum(x)

    def whole(self) -> "Blocks":
        """The blocks as those count them who write one payload a row."""
        return self

    def joined(self, x: jax.Array, axis: int) -> jax.Array:
        """What belongs to the places of one axis of each block, as one writes it.

        Args:
          x: ``(n, shape[axis], ...)``.
          axis: The axis of a block.

        Returns:
          The same; of blocks that zeros fill up, what belongs to their own places, one
          behind the other: ``(1, places, ...)``, a row for :meth:`whole`.
        """
        del axis
        return x

    def apart(self, x: jax.Array, axis: int) -> jax.Array:
        """Inverse of :meth:`joined`, with zeros for what is filled up."""
        del axis
        return x

    def valid(self) -> jax.Array:
        """Valid coordinates of each block, int32 ``(n,)``."""
        if self.count is None:
            return jnp.full(self.index.shape, self.size, jnp.int32)
        return self.count

    def mean_weight(self) -> jax.Array:
        """What makes a block's sum its mean: the factor, compute dtype ``(n,)``."""
        if self.weight is None:
            return jnp.full(self.index.shape, 1 / self.size, self.compute_dtype)
        return self.weight.astype(self.compute_dtype)

    def mask(self, x: jax.Array) -> jax.Array:
        """Sets the padding of ``x``, shape ``(n, *shape)``, to zero."""
        if self.count is None:
            return x
        if self.end is not None:
            return self.padded(x.reshape(-1)[: self.end])
        place = jnp.arange(self.size, dtype=jnp.int32).reshape(1, *self.shape)
        count = self.count.reshape(-1, *(1 for _ in self.shape))
        return jnp.where(place < count, x, jnp.zeros((), x.dtype))

    def padded(self, x: jax.Array) -> jax.Array:
        """The :attr:`end` coordinates of a leaf as blocks."""
        n = self.index.size
        return jnp.pad(x, (0, n * self.size - x.size)).reshape(n, *self.shape)


def rows(tree: Any, start: Any, number: int) -> Any:
    """Some blocks of a tree of arrays with the block axis first."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, number), tree)
