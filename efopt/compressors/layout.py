"""All leaves of a tree as a few batches of blocks.

Leaves with the same block shape and dtype are joined along the block axis into buckets,
so that neither the program nor its compile time grows with the number of leaves. A
bucket is bounded in size: joining copies, and no copy of the whole tree is ever made.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.compressors.base import Blocks, Codec, compute_dtype

# Coordinates that may be joined in one bucket; a larger leaf has a bucket of its own.
BUCKET_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Leaves that are encoded together, as ``(sum(num_blocks), *block)``.

    Attributes:
      leaves: Positions in the list of leaves.
      sizes: Their numbers of coordinates.
      num_blocks: Blocks of each.
      block: The shape of one block.
      dtype: The leaves' dtype.
      start: The number of the first block in the whole tree.
    """

    leaves: tuple[int, ...]
    sizes: tuple[int, ...]
    num_blocks: tuple[int, ...]
    block: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.num_blocks), *self.block)

    def blocks(self) -> Blocks:
        """What codecs may know of the blocks."""
        index = np.arange(self.shape[0], dtype=np.uint32) + np.uint32(self.start)
        size = math.prod(self.block)
        count = np.full(self.shape[0], size, np.int32)
        ends = np.cumsum(self.num_blocks)
        for coordinates, n, end in zip(self.sizes, self.num_blocks, ends, strict=True):
            count[end - 1] = coordinates - (n - 1) * size
        if (count == size).all():
            return Blocks(jnp.asarray(index), None, None, self.block, self.dtype)
        weight = jnp.asarray(1 / count, compute_dtype(self.dtype))
        return Blocks(
            jnp.asarray(index), jnp.asarray(count), weight, self.block, self.dtype
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a list of leaves is cut into buckets.

    Attributes:
      shapes: The leaves' shapes.
      buckets: The buckets; those of one block shape and dtype are neighbours. Empty
        leaves are in none.
    """

    shapes: tuple[tuple[int, ...], ...]
    buckets: tuple[Bucket, ...]

    def join(self, arrays: Sequence[jax.Array], step: jax.Array) -> list[jax.Array]:
        """One array per leaf to one per bucket, blocks ``(n, *block)``, zero-padded."""
        return self._fence([_join(b, arrays) for b in self.buckets], step)

    def part(
        self, xs: Sequence[jax.Array], step: jax.Array, like: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Inverse of :meth:`join`; empty leaves take their dtype from ``like``."""
        arrays = [jnp.zeros(a.shape, a.dtype) if a.size == 0 else a for a in like]
        for b, x in zip(self.buckets, self._fence(xs, step), strict=True):
            flat, end = x.reshape(-1), 0
            for i, n, size in zip(b.leaves, b.num_blocks, b.sizes, strict=True):
                start, end = end, end + n * math.prod(b.block)
                arrays[i] = flat[start : start + size].reshape(self.shapes[i])
        return arrays

    def join_memory(self, memory: Sequence[Any]) -> list[Any]:
        """The codec's state per leaf to one per bucket, along the block axis."""
        return [
            jax.tree.map(_concatenate, *(memory[i] for i in b.leaves))
            for b in self.buckets
        ]

    def part_memory(self, joined: Sequence[Any], memory: Sequence[Any]) -> list[Any]:
        """Inverse of :meth:`join_memory`; leaves in no bucket keep their state."""
        out = list(memory)
        for b, state in zip(self.buckets, joined, strict=True):
            end = 0
            for i, n in zip(b.leaves, b.num_blocks, strict=True):
                start, end = end, end + n
                out[i] = jax.tree.map(lambda m, s=start, e=end: m[s:e], state)
        return out

    def _fence(self, xs: Sequence[jax.Array], step: jax.Array) -> list[jax.Array]:
        """Keeps every bucket of several leaves in one piece.

        Fused into each of its leaves, the arithmetic on a bucket would be compiled once
        a leaf. The CPU compiler drops barriers before it fuses, but not a branch; this
        one is never taken.
        """
        shared = [i for i, b in enumerate(self.buckets) if len(b.leaves) > 1]
        if not shared:
            return list(xs)

        def branch(xs):
            never = step == np.uint32(2**32 - 1)
            return lax.cond(never, lambda xs: [-x for x in xs], lambda xs: xs, xs)

        whole = lax.platform_dependent(
            [xs[i] for i in shared], cpu=branch, default=lax.optimization_barrier
        )
        fenced = dict(zip(shared, whole, strict=True))
        return [fenced.get(i, x) for i, x in enumerate(xs)]


def _join(b: Bucket, arrays: Sequence[jax.Array]) -> jax.Array:
    parts = []
    for i, n, size in zip(b.leaves, b.num_blocks, b.sizes, strict=True):
        parts.append(arrays[i].reshape(-1))
        padding = n * math.prod(b.block) - size
        if padding:
            parts.append(jnp.zeros(padding, arrays[i].dtype))
    return _concatenate(*parts).reshape(b.shape)


@functools.lru_cache(maxsize=256)
def plan(
    codec: Codec,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[np.dtype, ...],
) -> Layout:
    """Cuts leaves of these shapes and dtypes into buckets."""
    groups: dict[Any, list[tuple[int, int]]] = {}
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        if math.prod(shape) == 0:
            continue
        n, *block = codec.block_shape(shape)
        groups.setdefault((tuple(block), dtype), []).append((i, n))
    buckets, start = [], 0
    for (block, dtype), members in groups.items():
        for run in _runs(members, math.prod(block), codec.stacks):
            leaves, counts = zip(*run, strict=True)
            sizes = tuple(math.prod(shapes[i]) for i in leaves)
            buckets.append(Bucket(leaves, sizes, counts, block, dtype, start))
            start += sum(counts)
    return Layout(shapes, tuple(buckets))


def _runs(members, block_size, stacks):
    """Splits ``(leaf, num_blocks)`` pairs into runs of at most ``BUCKET_SIZE``."""
    run, filled = [], 0
    for member in members:
        size = member[1] * block_size
        if run and (not stacks or filled + size > BUCKET_SIZE):
            yield run
            run, filled = [], 0
        run.append(member)
        filled += size
    yield run


def _concatenate(*parts: jax.Array) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
