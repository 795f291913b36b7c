"""Pieces: what is equal on the devices of a worker is sent by each of them in part.

Inside a fully manual region with parameters sharded behind each worker, the types say
over which of the other mesh axes a leaf differs. Along those it is a shard, compressed
on its own. Along the rest, as for a bias, all devices would send the same bytes: each
takes a piece instead, and the pieces of the average are gathered on the fast axes.

Where updates still differ along a fast axis, their mean over it is scattered: each
device receives its piece of that.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from efopt.codecs.layout import BUCKET_SIZE
from efopt.exchanges import carrier
from efopt.exchanges.all_reduce import mean_in_range
from efopt.workers.axes import Axes, manual_axes, varying
from efopt.workers.ranges import range_size


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a leaf is cut in pieces.

    Attributes:
      shape: The leaf's shape on this device.
      names: The axes along which it is equal; none: it is not cut.
      number: The number of pieces.
      axis: The array axis that is cut; ``None``: the coordinates, padded, in their
        order.
      kept: Whether the state has it in pieces: it arrives as one, and what is lost of
        it stays one.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...] = ()
    number: int = 1
    axis: int | None = None
    kept: bool = False

    @property
    def length(self) -> int:
        """Coordinates of a piece, the padding of the last ones included."""
        return range_size(math.prod(self.shape), self.number)

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape of what this device compresses."""
        if not self.names:
            return self.shape
        if self.axis is None:
            return (self.length,)
        shape = list(self.shape)
        shape[self.axis] //= self.number
        return tuple(shape)

    def take(self, x: jax.Array) -> jax.Array:
        """This device's piece of a leaf."""
        if not self.names or self.kept:
            return x
        flat = jnp.pad(x.reshape(-1), (0, self.length * self.number - x.size))
        start = Axes(self.names).index() * self.length
        return lax.dynamic_slice(flat, (start,), self.piece)

    def rows(self, x: jax.Array) -> jax.Array:
        """A leaf as one row for each piece, in their order."""
        assert self.axis is not None
        shape = (
            *self.shape[: self.axis],
            self.number,
            -1,
            *self.shape[self.axis + 1 :],
        )
        return jnp.moveaxis(x.reshape(shape), self.axis, 0).reshape(self.number, -1)

    def whole(self, rows: jax.Array) -> jax.Array:
        """A leaf from its pieces, one a row."""
        if self.axis is None:
            return rows.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)
        pieces = rows.reshape(self.number, *self.piece)
        return jnp.moveaxis(pieces, 0, self.axis).reshape(self.shape)

    def valid(self) -> jax.Array | None:
        """How many coordinates of this device's piece are no padding."""
        size = math.prod(self.shape)
        if self.axis is not None or self.length * self.number == size:
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
    """Leaves from their pieces: small ones of one kind of cut travel together.

    Words travel, as in an exchange: of floats a TPU's compiler may make the sum of
    zero-padded buffers, and a CPU's may widen them.
    """
    out = list(pieces)
    groups: dict[object, list[int]] = {}
    for i, (cut, piece) in enumerate(zip(cuts, pieces, strict=True)):
        if cut.names:
            alone = i if piece.size > BUCKET_SIZE else None  # what is joined is copied
            groups.setdefault((cut.names, varying(piece), alone), []).append(i)
    for members in groups.values():
        own = [pieces[i].reshape(1, -1) for i in members]
        words = Axes(cuts[members[0]].names).all_gather(carrier.pack(own, 1)[0])
        rows = carrier.unpack(words, own, 1)
        for i, x in zip(members, rows, strict=True):
            out[i] = cuts[i].whole(x)
    return out


def scatter(
    cuts: Sequence[Cut], leaves: Sequence[jax.Array], fast: tuple[str, ...]
) -> list[jax.Array]:
    """This device's pieces of the mean over the fast axes of leaves that differ there.

    What is not cut is averaged whole. Small leaves of one kind travel together.
    """
    out, axes = list(leaves), Axes(fast)
    groups: dict[object, list[int]] = {}
    for i, (cut, x) in enumerate(zip(cuts, leaves, strict=True)):
        if cut.kept:
            alone = i if x.size > BUCKET_SIZE else None  # what is joined is copied
            groups.setdefault((cut.names, x.dtype, varying(x), alone), []).append(i)
    for members in groups.values():
        rows = [_ours(cuts[i], leaves[i], fast) for i in members]
        mean = axes.mean_scatter(jnp.concatenate(rows, axis=1)).reshape(-1)
        end = 0
        for i in members:
            start, end = end, end + cuts[i].length
            out[i] = mean[start:end].reshape(cuts[i].piece)
    rest = [i for i, cut in enumerate(cuts) if not cut.kept and leaves[i].size]
    means = mean_in_range([leaves[i] for i in rest], axes)
    for i, x in zip(rest, means, strict=True):
        out[i] = x
    return out


def _ours(cut: Cut, x: jax.Array, fast: tuple[str, ...]) -> jax.Array:
    """The rows of a leaf among which those along the fast axes, the last, choose."""
    rows = cut.rows(x)
    equal = tuple(name for name in cut.names if name not in fast)
    if not equal:
        return rows
    number = cut.number // Axes(fast).size()
    return lax.dynamic_slice_in_dim(rows, Axes(equal).index() * number, number)
