"""A matrix of which every device behind a worker holds a part, and sums over them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.workers.axes import Axes, vary
from efopt.workers.ranges import range_size


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a matrix lies on the devices behind a worker.

    Attributes:
      rows: The mesh axes over which its rows are sharded.
      columns: Those over which its columns are.
      equal: Those along which it is equal.
      size: Its coordinates, those of all devices.
      places: Of each array axis that its columns are made of: its length, and the mesh
        axes over which it is sharded.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    equal: tuple[str, ...]
    size: int
    places: tuple[tuple[int, tuple[str, ...]], ...]

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        split: int,
        names: tuple[tuple[str, ...], ...],
        equal: tuple[str, ...],
    ) -> "Shards":
        """Those of an array whose first ``split`` axes make the rows.

        Args:
          shape: Its shape, whole.
          split: How many axes make the rows.
          names: The mesh axes over which each array axis is sharded.
          equal: The mesh axes along which the array is equal.
        """
        joined = lambda part: tuple(n for entry in part for n in entry)  # noqa: E731
        places = tuple(zip(shape[split:], names[split:], strict=True))
        size = math.prod(shape)
        return cls(joined(names[:split]), joined(names[split:]), equal, size, places)

    def column_numbers(self) -> jax.Array:
        """The numbers, in the whole matrix, of this device's columns. uint32."""
        number = jnp.zeros((1,), jnp.uint32)
        for size, names in self.places:
            own, first = size, jnp.uint32(0)
            if names:
                axes = Axes(names)
                own = size // axes.size()
                first = axes.index().astype(jnp.uint32) * np.uint32(own)
            place = first + jnp.arange(own, dtype=jnp.uint32)
            number = (number[:, None] * np.uint32(size) + place[None, :]).reshape(-1)
        return number

    def any(self, x: jax.Array) -> jax.Array:
        """Whether something holds on any shard of the columns."""
        return Axes(self.columns).any(x) if self.columns else x

    def part(self, factor: jax.Array, summed: tuple[str, ...]) -> jax.Array:
        """This device's part ``(n, length)`` of a factor ``(n, k, rank)``.

        Args:
          factor: What this device adds to the sum over ``summed``.
          summed: The mesh axes over which it is one.
        """
        names, n = (*self.equal, *summed), factor.shape[0]
        if not names:
            return factor.reshape(n, -1)
        number, flat = Axes(names).size(), factor.reshape(n, -1)
        length = range_size(flat.shape[1], number)
        flat = jnp.pad(flat, ((0, 0), (0, length * number - flat.shape[1])))
        rows = jnp.moveaxis(flat.reshape(n, number, length), 1, 0)
        if self.equal:
            share = number // Axes(self.equal).size()
            start = Axes(self.equal).index() * share
            rows = lax.dynamic_slice_in_dim(rows, start, share)
        if summed:
            rows = Axes(summed).sum_scatter(vary(rows, *summed))
        return rows[0]

    def whole(
        self, part: jax.Array, summed: tuple[str, ...], shape: tuple[int, ...]
    ) -> jax.Array:
        """Inverse of :meth:`part`: the factor ``(n, *shape)`` of this device."""
        return self._joined(part, (), summed, shape)[:, 0]

    def all_rows(
        self, part: jax.Array, summed: tuple[str, ...], shape: tuple[int, ...]
    ) -> jax.Array:
        """The factor of all devices along the rows, ``(n, devices * k, rank)``."""
        whole = self._joined(part, self.rows, summed, shape)
        return whole.reshape(whole.shape[0], -1, shape[1])

    def own_rows(self, x: jax.Array, number: int) -> jax.Array:
        """Of all rows those ``number`` that this device holds."""
        if not self.rows:
            return x
        return lax.dynamic_slice_in_dim(x, Axes(self.rows).index() * number, number, 1)

    def _joined(self, part, along, summed, shape):
        names, n = (*along, *self.equal, *summed), part.shape[0]
        if not names:
            return part.reshape(n, 1, *shape)
        devices = Axes(along).size() if along else 1
        # Words: of floats a TPU's compiler may make the sum of zero-padded buffers.
        words = lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}")
        parts = lax.bitcast_convert_type(Axes(names).all_gather(words), part.dtype)
        parts = parts.reshape(devices, -1, *part.shape)
        flat = jnp.moveaxis(parts, 2, 0).reshape(n, devices, -1)
        return flat[:, :, : math.prod(shape)].reshape(n, devices, *shape)
