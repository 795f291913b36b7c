"""All leaves of a tree as a few batches of blocks.

Leaves with the same codec, block shape and dtype are joined along the block axis into
buckets, so that neither the program nor its compile time grows with the number of
leaves. A bucket is bounded in size: joining copies, and no copy of the whole tree is
ever made.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs import lanes, padded
from efopt.codecs.blocks import Blocks
from efopt.codecs.codec import Codec
from efopt.ground.barriers import cut_once, once
from efopt.ground.dtypes import compute_dtype

# Coordinates that may be joined in one bucket; a larger leaf has a bucket of its own.
BUCKET_SIZE = 1 << 20
# Leaves of equal blocks that may be: XLA's GPU compiler joins these in one kernel, but
# not hundreds. Of unlike shapes any number: each program more has to be compiled.
FEW = 32


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Leaves that are encoded together, as ``(sum(num_blocks), *block)``.

    Attributes:
      codec: Writes them.
      leaves: Positions in the list of leaves.
      sizes: Their numbers of coordinates.
      num_blocks: Blocks of each.
      block: The shape of one block.
      dtype: The leaves' dtype.
      kind: What else they have in common.
      numbers: The number of each leaf's first block in the whole tree.
      rows: Into which leaves of unequal sizes are folded, side by side; 0: blocks are
        equal.
      own: The shape of each leaf as a block, which zeros fill up to ``block``; empty:
        blocks are equal.
    """

    codec: Codec
    leaves: tuple[int, ...]
    sizes: tuple[int, ...]
    num_blocks: tuple[int, ...]
    block: tuple[int, ...]
    dtype: np.dtype
    kind: Hashable
    numbers: tuple[int, ...]
    rows: int = 0
    own: tuple[tuple[int, ...], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (1 if self.rows else sum(self.num_blocks), *self.block)

    def parted(self, x: jax.Array) -> jax.Array:
        """The bucket as an array whose last axis is cut into leaves."""
        return x.reshape(self.rows, -1) if self.rows > 1 else x.reshape(-1)

    def lengths(self) -> tuple[int, ...]:
        """How much of that axis each leaf takes: more than belongs to it, if padded."""
        if self.rows:
            return lanes.widths(self.sizes, self.rows)
        return tuple(n * math.prod(self.block) for n in self.num_blocks)

    def starts(self) -> list[int]:
        """Where each leaf starts in that axis."""
        return [0, *map(int, np.cumsum(self.lengths())[:-1])]

    def flat(self, j: int, part: jax.Array) -> jax.Array:
        """The leaf in place ``j``, of what it takes of that axis, as it is cut."""
        if self.own:
            return padded.cut_back(part.reshape(self.block), self.own[j])
        return part.reshape(-1)[: self.sizes[j]]

    def blocks(self, valid: Mapping[int, jax.Array] | None = None) -> Blocks:
        """What codecs may know of the blocks.

        Args:
          valid: Of leaves whose end is padding on some devices, by position: how many
            of their coordinates are none here. int32, shape=().
        """
        valid = {} if valid is None else valid
        if self.own:
            index = jnp.asarray(np.asarray(self.numbers, np.uint32))
            known = (None, None, self.block, self.dtype, self.own)
            return padded.Padded(index, *known)
        if self.shape[0] > BUCKET_SIZE and self.leaves[0] not in valid:
            return self._blocks_of_one()
        index, counts, dynamic = [], [], False
        for i, coordinates, n, number in zip(
            self.leaves, self.sizes, self.num_blocks, self.numbers, strict=True
        ):
            size = coordinates if self.rows else math.prod(self.block)
            index.append(np.arange(n, dtype=np.uint32) + np.uint32(number))
            if i in valid:
                dynamic, before = True, np.arange(n) * size
                counts.append(jnp.clip(valid[i] - before.astype(np.int32), 0, size))
                continue
            count = np.full(n, size, np.int64)  # a block may be a whole leaf
            count[-1] = coordinates - (n - 1) * size
            counts.append(count)
        index = np.concatenate(index)
        if not dynamic:
            count = np.concatenate(counts)
            if not self.rows and (count == math.prod(self.block)).all():
                return Blocks(jnp.asarray(index), None, None, self.block, self.dtype)
            weight, count = 1 / count, count.astype(np.int32)
        else:
            count = jnp.concatenate([jnp.asarray(c, jnp.int32) for c in counts])
            weight = jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0)
        weight = jnp.asarray(weight, compute_dtype(self.dtype))
        known = (jnp.asarray(index), jnp.asarray(count), weight, self.block, self.dtype)
        if not self.rows:
            return Blocks(*known, total=None if dynamic else self._total())
        return lanes.Lanes(*known, self.sizes, self.rows, dynamic)

    def _total(self) -> int | None:
        """What codecs that write into a leaf are told of it, if it is alone.

        They leave out its padding. A leaf that they write padded is copied to cut that
        off: on one core a third to three quarters of the time of a sparse update.
        """
        return self.sizes[0] if self.codec.chooses and len(self.leaves) == 1 else None

    def _blocks_of_one(self) -> Blocks:
        """The blocks of one very large leaf, counted where they are used."""
        n, size = self.shape[0], math.prod(self.block)
        place = lax.iota(jnp.uint32, n)
        index, last = place + np.uint32(self.numbers[0]), self.sizes[0] - (n - 1) * size
        if last == size:
            return Blocks(index, None, None, self.block, self.dtype)
        ends, wide = place == np.uint32(n - 1), compute_dtype(self.dtype)
        count = jnp.where(ends, np.int32(last), np.int32(size))
        full, rest = jnp.asarray(1 / size, wide), jnp.asarray(1 / last, wide)
        weight = jnp.where(ends, rest, full)
        known = (index, count, weight, self.block, self.dtype)
        return Blocks(*known, total=self._total())


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a list of leaves is cut into buckets.

    Attributes:
      shapes: The leaves' shapes.
      buckets: The buckets; those of one codec, block shape and dtype are neighbours.
        Empty leaves are in none.
    """

    shapes: tuple[tuple[int, ...], ...]
    buckets: tuple[Bucket, ...]

    def join(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """One array per leaf to one per bucket, blocks ``(n, *block)``, zero-padded.

        In the compute dtype.
        """
        xs = [_join(b, arrays) for b in self.buckets]
        shared = [i for i, b in enumerate(self.buckets) if len(b.leaves) > 1]
        if shared:
            whole = once([xs[i] for i in shared])
            for i, x in zip(shared, whole, strict=True):
                xs[i] = x
        pairs = zip(xs, self.buckets, strict=True)
        return [x.astype(compute_dtype(b.dtype)) for x, b in pairs]

    def part(self, xs: Sequence[jax.Array], like: Sequence[Any]) -> list[jax.Array]:
        """Inverse of :meth:`join`; empty leaves take their dtype from ``like``."""
        arrays = [jnp.zeros(a.shape, a.dtype) if a.size == 0 else a for a in like]
        shared = []
        for b, x in zip(self.buckets, xs, strict=True):
            if len(b.leaves) > 1:
                shared.append((b, x))
            else:
                for i in b.leaves:
                    arrays[i] = b.codec.unflatten(b.flat(0, x), self.shapes[i])
        if not shared:
            return arrays
        pieces = cut_once(
            [b.parted(x) for b, x in shared],
            [b.lengths() if b.rows or b.own else b.sizes for b, _ in shared],
            [b.starts() for b, _ in shared],
            axis=-1,
        )
        for (b, _), parts in zip(shared, pieces, strict=True):
            for j, (i, part) in enumerate(zip(b.leaves, parts, strict=True)):
                arrays[i] = b.codec.unflatten(b.flat(j, part), self.shapes[i])
        return arrays

    def join_blocked(self, trees: Sequence[Any]) -> list[Any]:
        """Trees of arrays with the block axis first: one a leaf to one a bucket.

        Those of blocks of unequal shapes along the second axis: ``(1, places, ...)``.
        """
        return [
            jax.tree.map(
                functools.partial(_concatenate, axis=1 if b.own else 0),
                *(trees[i] for i in b.leaves),
            )
            for b in self.buckets
        ]

    def part_blocked(self, joined: Sequence[Any], before: Sequence[Any]) -> list[Any]:
        """Inverse of :meth:`join_blocked`; leaves in no bucket keep what was before."""
        out = list(before)
        flat = [jax.tree.flatten(tree) for tree in joined]
        shared = [
            (b, arrays)
            for b, (arrays, _) in zip(self.buckets, flat, strict=True)
            if len(b.leaves) > 1
        ]
        lengths = []
        for b, arrays in shared:
            old = [jax.tree.leaves(before[i]) for i in b.leaves]
            for j, _ in enumerate(arrays):
                lengths.append([x[j].shape[1] for x in old] if b.own else b.num_blocks)
        whole = [x[0] if b.own else x for b, arrays in shared for x in arrays]
        pieces = iter(cut_once(whole, lengths))
        for b, (arrays, treedef) in zip(self.buckets, flat, strict=True):
            if len(b.leaves) == 1:
                out[b.leaves[0]] = treedef.unflatten(arrays)
                continue
            parts = [next(pieces) for _ in arrays]
            for j, i in enumerate(b.leaves):
                old = jax.tree.leaves(before[i])
                own = [p[j].reshape(x.shape) for p, x in zip(parts, old, strict=True)]
                out[i] = treedef.unflatten(own)
        return out


def _join(b: Bucket, arrays: Sequence[jax.Array]) -> jax.Array:
    if b.rows:
        folded = [lanes.fold(b.codec.flatten(arrays[i]), b.rows) for i in b.leaves]
        return jnp.concatenate(folded, axis=1).reshape(b.shape)
    if b.own:
        pairs = zip(b.leaves, b.own, strict=True)
        whole = [arrays[i].reshape(1, *own) for i, own in pairs]
        return jnp.concatenate([padded.fill_up(x, (1, *b.block)) for x in whole])
    parts = []
    for i, n in zip(b.leaves, b.num_blocks, strict=True):
        # Not a concatenation with zeros, which would be one more copy.
        whole = (n * math.prod(b.block),)
        parts.append(padded.fill_up(b.codec.flatten(arrays[i]), whole))
    return _concatenate(*parts).reshape(b.shape)


def lay_out(
    codecs: Sequence[Codec],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[np.dtype],
    kinds: Sequence[Hashable] | None = None,
    side_by_side: bool = True,
) -> Layout:
    """Cuts leaves of these shapes and dtypes into buckets, each with its codec.

    Args:
      codecs: The codec of each leaf.
      shapes: Its shape.
      dtypes: Its dtype.
      kinds: Leaves of different ones are never joined.
      side_by_side: Whether whole leaves of unequal sizes may share a bucket, where
        their codec reads lanes: no array of their payload is then a leaf's.
    """
    kinds = [None] * len(shapes) if kinds is None else kinds
    groups: dict[Any, list[tuple[int, int]]] = {}
    for i, (codec, shape, dtype) in enumerate(zip(codecs, shapes, dtypes, strict=True)):
        if math.prod(shape) == 0:
            continue
        n, *block = codec.block_shape(shape)
        groups.setdefault((codec, tuple(block), dtype, kinds[i]), []).append((i, n))
    buckets, start = [], 0
    for (codec, block, dtype, kind), members in groups.items():
        first = {}  # the number of a leaf's first block: in the order of the leaves
        for i, n in members:
            first[i], start = start, start + n
        most = 1 if codec.exact else FEW
        for run in _runs(members, math.prod(block), most):
            leaves, counts = zip(*run, strict=True)
            sizes = tuple(math.prod(shapes[i]) for i in leaves)
            numbers = tuple(first[i] for i in leaves)
            alike = (leaves, sizes, counts, block, dtype, kind, numbers)
            buckets.append(Bucket(codec, *alike))
    if side_by_side:
        buckets = _filled_up(_side_by_side(buckets))
    return Layout(tuple(shapes), tuple(buckets))


def _side_by_side(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Buckets of whole leaves as lanes, where a codec wants it and sizes differ."""
    groups: dict[Any, list[Bucket]] = {}
    for i, b in enumerate(buckets):
        lane = b.codec.lane(b.sizes[0])
        alike = (0, i) if lane is None else (lane[0], lane, b.codec, b.dtype, b.kind)
        groups.setdefault(alike, []).append(b)
    out = []
    for (rows, *_), same in groups.items():
        first, leaves = same[0], []
        if len({b.block for b in same}) == 1:
            out.extend(same)
            continue
        for b in same:
            leaves.extend(zip(b.leaves, b.sizes, b.numbers, strict=True))
        for run in _runs([(leaf, leaf[1]) for leaf in leaves], 1, most=len(leaves)):
            chosen, sizes, numbers = zip(*(leaf for leaf, _ in run), strict=True)
            block, ones = (rows * sum(lanes.widths(sizes, rows)),), (1,) * len(sizes)
            alike = (chosen, sizes, ones, block, first.dtype, first.kind, numbers)
            out.append(Bucket(first.codec, *alike, rows))
    return out


def _filled_up(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Blocks of unequal shapes in a few buckets, where a codec lets zeros fill them."""
    groups: dict[Any, list[Bucket]] = {}
    for i, b in enumerate(buckets):
        alike = (b.codec, b.dtype, b.kind) if b.codec.fills(b.block) else i
        groups.setdefault(alike, []).append(b)
    out = []
    for same in groups.values():
        number: dict[tuple[int, ...], int] = {}
        for b in same:
            number[b.block] = number.get(b.block, 0) + len(b.leaves)
        for block, members in padded.classes(number):
            few = [b for b in same if b.block in members]
            if len(members) == 1:
                out.extend(few)
                continue
            leaves = [
                ((*leaf, b.block), 1)
                for b in few
                for leaf in zip(b.leaves, b.sizes, b.numbers, strict=True)
            ]
            for run in _runs(leaves, math.prod(block), most=len(leaves)):
                each, ones = zip(*run, strict=True)
                chosen, sizes, numbers, own = zip(*each, strict=True)
                alike = (chosen, sizes, ones, block, few[0].dtype, few[0].kind)
                out.append(Bucket(few[0].codec, *alike, numbers, own=own))
    return out


def _runs(members, block_size, most):
    """Splits ``(leaf, num_blocks)`` pairs into runs of at most so many, to be joined.

    A large leaf between small ones does not part them: it is a run by itself.
    """
    run, filled = [], 0
    for member in members:
        size = member[1] * block_size
        if size > BUCKET_SIZE // 2:
            yield [member]
            continue
        if run and (len(run) >= most or filled + size > BUCKET_SIZE):
            yield run
            run, filled = [], 0
        run.append(member)
        filled += size
    if run:
        yield run


def _concatenate(*parts: jax.Array, axis: int = 0) -> jax.Array:
    # A state that was restored may hold NumPy arrays.
    return jnp.asarray(parts[0]) if len(parts) == 1 else jnp.concatenate(parts, axis)
