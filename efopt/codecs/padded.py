"""Blocks of unequal shapes, filled up with zeros, so that a few programs do all.

The other way beside :mod:`efopt.codecs.lanes`: for what works on the sides of a block,
such as a product of matrices, and not on its coordinates.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.blocks import Blocks
from efopt.codecs.runs import UnequalRuns

Shape = tuple[int, ...]

# What zeros may add to the coordinates of all blocks. Matrices of 33 shapes from 4 x 7
# to 52 x 103 become those of 12; with an eighth of 8, and memory grows with them.
SPARE = 1 / 16


def fill_up(x: jax.Array, shape: Shape) -> jax.Array:
    """Zeros behind each axis, up to a shape."""
    more = [(0, most - n, 0) for n, most in zip(x.shape, shape, strict=True)]
    return lax.pad(x, np.zeros((), x.dtype), more)


def cut_back(x: jax.Array, shape: Shape) -> jax.Array:
    """Inverse of :func:`fill_up`."""
    return x[tuple(map(slice, shape))]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Padded(Blocks):
    """Blocks of which each has a shape of its own, and behind it zeros.

    Attributes:
      own: That shape. Static.
    """

    own: tuple[Shape, ...] = dataclasses.field(metadata={"static": True})

    def joined(self, x, axis):
        runs = self._runs(axis)
        first = runs.number([i * x.shape[1] for i in range(len(x))])
        place = (first + runs.place())[0].astype(jnp.int32)
        rows = x.reshape(-1, *x.shape[2:])
        return rows.at[place].get(mode="promise_in_bounds")[None]

    def apart(self, x, axis):
        runs, place = self._runs(axis), np.arange(self.shape[axis])[None]
        length = np.asarray(runs.lengths)[:, None]
        inside = np.asarray(runs.starts)[:, None] + np.minimum(place, length - 1)
        rows = x[0].at[inside.astype(np.int32)].get(mode="promise_in_bounds")
        real = (place < length).reshape(*inside.shape, *(1 for _ in x.shape[2:]))
        return jnp.where(real, rows, jnp.zeros((), x.dtype))

    def whole(self):
        return Blocks(self.index[:1], None, None, self.shape, self.dtype)

    def _runs(self, axis: int) -> UnequalRuns:
        return UnequalRuns(tuple(shape[axis] for shape in self.own))


def classes(numbers: Mapping[Shape, int]) -> list[tuple[Shape, list[Shape]]]:
    """Shapes that share a larger one: as few as :data:`SPARE` allows.

    Neighbours are united, those first that cost the fewest zeros.

    Args:
      numbers: Shapes, and how many blocks have each.

    Returns:
      The larger shapes, and those that are filled up to each.
    """

    def united(a, b):
        return tuple(map(max, a[0], b[0])), a[1] + b[1], a[2] + b[2], a[3] + b[3]

    def zeros(a):
        shape, blocks, coordinates, _ = a
        return math.prod(shape) * blocks - coordinates

    groups = [(s, n, math.prod(s) * n, [s]) for s, n in sorted(numbers.items())]
    left = SPARE * sum(coordinates for _, _, coordinates, _ in groups)
    while len(groups) > 1:
        pairs = [united(a, b) for a, b in zip(groups[:-1], groups[1:], strict=True)]
        costs = [
            zeros(both) - zeros(groups[i]) - zeros(groups[i + 1])
            for i, both in enumerate(pairs)
        ]
        cheapest = int(np.argmin(costs))
        left -= costs[cheapest]
        if left < 0:
            break
        groups[cheapest : cheapest + 2] = [pairs[cheapest]]
    return [(shape, members) for shape, _, _, members in groups]
