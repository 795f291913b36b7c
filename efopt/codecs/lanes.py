"""Lanes: leaves of many sizes side by side in one batch, so that one program does all.

A leaf of ``size`` coordinates is eight rows of ``ceil(size / 8)``, the last one padded,
and leaves stand side by side: an array of eight rows. Signs are packed from eight rows
to a byte and sums begin with eight terms, both just as they are of a leaf alone.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Blocks
from efopt.codecs.runs import Runs, UnequalRuns, run_sums
from efopt.ground.barriers import once

ROWS = 8


def widths(sizes: Sequence[int]) -> tuple[int, ...]:
    """The columns of leaves of some sizes."""
    return tuple(-(-size // ROWS) for size in sizes)


def fold(x: jax.Array) -> jax.Array:
    """A flat leaf as eight rows."""
    (width,) = widths([x.size])
    return jnp.pad(x, (0, ROWS * width - x.size)).reshape(ROWS, width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes(Blocks):
    """Whole leaves, each a block of its own size, in one row ``(1, size)``.

    ``index``, ``count`` and ``weight`` are one number a leaf, as of equal blocks.

    Attributes:
      sizes: The leaves' coordinates. Static.
    """

    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def members(self):
        return self.sizes

    @property
    def coordinates(self):
        return sum(self.sizes)

    def mask(self, x):
        everywhere, count = self.everywhere(), self.valid().astype(jnp.uint32)
        inside = everywhere.place() < everywhere.of(count)
        return jnp.where(inside, x, jnp.zeros((), x.dtype))

    def runs(self, lengths):
        return UnequalRuns(tuple(lengths))

    def everywhere(self):
        return LaneRuns(widths(self.sizes))

    def at(self, runs, place):
        """Where in ``x`` a coordinate of each run's leaf stands: int32."""
        columns = widths(self.sizes)
        width, start = runs.number(columns), runs.number(UnequalRuns(columns).starts)
        row = sum((place >= width * np.uint32(j)).astype(jnp.uint32) for j in range(1, ROWS))
        place = start + place + row * (np.uint32(sum(columns)) - width)
        return place.astype(jnp.int32)

    def sum(self, x):
        columns = widths(self.sizes)
        parts = list(x.reshape(ROWS, 1, -1))
        while len(parts) > 1:
            parts = [parts[j] + parts[j + 1] for j in range(0, len(parts), 2)]
        return run_sums(once(parts[0]), columns)

    def whole(self):
        return Blocks(self.index[:1], None, None, self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class LaneRuns(UnequalRuns):
    """One number for each element of lanes: ``(1, 8 * sum(lengths))``."""

    def place(self):
        row = jnp.arange(ROWS, dtype=jnp.uint32)[:, None]
        columns = UnequalRuns(self.lengths)
        place = columns.place() + row * columns.number(self.lengths)
        return place.reshape(1, -1)

    def of(self, values):
        once_each = super().of(values)
        return jnp.broadcast_to(once_each, (ROWS, self.length)).reshape(1, -1)
