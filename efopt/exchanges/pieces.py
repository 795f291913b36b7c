"""Pieces: what is equal on the devices of a worker is sent by each of them in part.

Inside a fully manual region with parameters sharded behind each worker, the types say
over which of the other mesh axes a leaf differs. Along those it is a shard, compressed
on its own. Along the rest, as for a bias, all devices would send the same bytes: each
takes a piece instead, and the pieces of the average are gathered on the fast axes.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from efopt.workers.axes import Axes, manual_axes, varying
from efopt.workers.ranges import range_size


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a leaf is cut in pieces.

    Attributes:
      shape: The leaf's shape on this device.
      names: The axes along which it is equal; none: it is not cut.
      number: The number of pieces.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    number: int

    @property
    def length(self) -> int:
        """Coordinates of a piece, the padding of the last ones included."""
        return range_size(math.prod(self.shape), self.number)

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape of what this device compresses."""
        return (self.length,) if self.names else self.shape

    def take(self, x: jax.Array) -> jax.Array:
        """This device's piece of a leaf."""
        if not self.names:
            return x
        flat = jnp.pad(x.reshape(-1), (0, self.length * self.number - x.size))
        start = Axes(self.names).index() * self.length
        return lax.dynamic_slice(flat, (start,), self.piece)

    def valid(self) -> jax.Array | None:
        """How many coordinates of this device's piece are no padding."""
        size = math.prod(self.shape)
        if self.length * self.number == size:
            return None
        start = Axes(self.names).index() * self.length
        return jnp.clip(size - start, 0, self.length)


def spare_axes(x: jax.Array, workers: Axes) -> tuple[str, ...]:
    """The mesh axes, other than the workers', along which a leaf is equal."""
    if not workers.typed():
        return ()
    known = {*workers.names, *varying(x)}
    return tuple(name for name in manual_axes() if name not in known)


def gather(cuts: Sequence[Cut], pieces: Sequence[jax.Array]) -> list[jax.Array]:
    """Leaves from their pieces, in one collective for each dtype and kind of cut."""
    out = list(pieces)
    groups: dict[object, list[int]] = {}
    for i, (cut, piece) in enumerate(zip(cuts, pieces, strict=True)):
        if cut.names:
            key = cut.names, piece.dtype, varying(piece)
            groups.setdefault(key, []).append(i)
    for members in groups.values():
        joined = jnp.concatenate([pieces[i] for i in members])
        rows, end = Axes(cuts[members[0]].names).all_gather(joined), 0
        for i in members:
            start, end = end, end + cuts[i].length
            size = math.prod(cuts[i].shape)
            out[i] = rows[:, start:end].reshape(-1)[:size].reshape(cuts[i].shape)
    return out
