"""Lanes: leaves of many sizes side by side in one batch, so that one program does all.

A leaf is a few rows, the last ones padded, and leaves stand side by side. In eight rows
signs are packed to bytes and sums begin with eight terms, both just as they are of a
leaf alone, and what is known of each leaf is looked up once for eight coordinates. In
one row leaves are joined and cut faster.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Blocks
from efopt.codecs.padded import fill_up
from efopt.codecs.runs import UnequalRuns, run_sums
from efopt.ground.barriers import once


def widths(sizes: Sequence[int], rows: int) -> tuple[int, ...]:
    """The columns of leaves of some sizes."""
    return tuple(-(-size // rows) for size in sizes)


def fold(x: jax.Array, rows: int) -> jax.Array:
    """A flat leaf as some rows."""
    (width,) = widths([x.size], rows)
    return fill_up(x, (rows * width,)).reshape(rows, width)


def inside(sizes: Sequence[int], rows: int) -> np.ndarray:
    """What of lanes is no padding: bool ``(rows, sum of widths)``."""
    folded = [
        (np.arange(rows * width) < size).reshape(rows, width)
        for size, width in zip(sizes, widths(sizes, rows), strict=True)
    ]
    return np.concatenate(folded, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes(Blocks):
    """Whole leaves, each a block of its own size, in one row ``(1, size)``.

    ``index``, ``count`` and ``weight`` are one number a leaf, as of equal blocks. The
    padding of a row may hold anything: it is cut off.

    Attributes:
      sizes: The leaves' coordinates. Static.
      rows: Into which each leaf is folded. Static.
      shortened: Whether ``count`` may be less than the sizes. Static.
    """

    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})
    shortened: bool = dataclasses.field(metadata={"static": True})

    @property
    def members(self):
        return self.sizes

    @property
    def columns(self) -> tuple[int, ...]:
        return widths(self.sizes, self.rows)

    @property
    def coordinates(self):
        return sum(self.sizes)

    def mask(self, x):
        if not self.shortened:
            return x
        here, count = self.everywhere(), self.valid().astype(jnp.uint32)
        return jnp.where(here.place() < here.of(count), x, jnp.zeros((), x.dtype))

    def runs(self, lengths):
        return UnequalRuns(tuple(lengths))

    def everywhere(self):
        return FoldedRuns(self.columns, self.rows)

    def at(self, runs, place):
        columns = self.columns
        start = runs.number(UnequalRuns(columns).starts)
        if self.rows == 1:
            return (start + place).astype(jnp.int32)
        width = runs.number(columns)
        inside = [place >= width * np.uint32(j) for j in range(1, self.rows)]
        row = sum(more.astype(jnp.uint32) for more in inside)
        place = start + place + row * (np.uint32(sum(columns)) - width)
        return place.astype(jnp.int32)

    def sum(self, x):
        parts = list(x.reshape(self.rows, 1, -1))
        while len(parts) > 1:
            parts = [parts[j] + parts[j + 1] for j in range(0, len(parts), 2)]
        return run_sums(once(parts[0]), self.columns)

    def whole(self):
        return Blocks(self.index[:1], None, None, self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class FoldedRuns(UnequalRuns):
    """One number for each element of folded leaves: ``(1, rows * sum(lengths))``."""

    rows: int

    def place(self):
        row = jnp.arange(self.rows, dtype=jnp.uint32)[:, None]
        columns = UnequalRuns(self.lengths)
        place = columns.place() + row * columns.number(self.lengths)
        return place.reshape(1, -1)

    def of(self, values):
        once_each = super().of(values)
        return jnp.broadcast_to(once_each, (self.rows, self.length)).reshape(1, -1)
