"""All leaves of a tree in one conversation, in lock-step.

Leaves with the same block shape and dtype are joined along the block axis into buckets,
so that the program does not grow with the number of leaves. A bucket is bounded in size:
joining copies, and no copy of the whole tree is ever made.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efopt.compressors.base import Blocks, Codec, Message, Turn, compute_dtype

# Coordinates that may be joined in one bucket; a larger leaf has a bucket of its own.
BUCKET_SIZE = 1 << 22

Meet = Callable[[list[Message]], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Leaves that are encoded together, as ``(sum(num_blocks), *block)``.

    Attributes:
      leaves: Positions in the list of leaves.
      shapes: Their shapes.
      num_blocks: Blocks of each.
      block: The shape of one block.
      dtype: The leaves' dtype.
      start: The number of the first block in the whole tree.
    """

    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_blocks: tuple[int, ...]
    block: tuple[int, ...]
    dtype: np.dtype
    start: int

    def blocks(self) -> Blocks:
        index = jnp.arange(sum(self.num_blocks), dtype=jnp.uint32) + np.uint32(
            self.start
        )
        size = math.prod(self.block)
        if all(
            math.prod(shape) == n * size
            for shape, n in zip(self.shapes, self.num_blocks, strict=True)
        ):
            return Blocks(index, None, self.block, self.dtype)
        count = np.full(sum(self.num_blocks), size, np.int32)
        ends = np.cumsum(self.num_blocks)
        for shape, n, end in zip(self.shapes, self.num_blocks, ends, strict=True):
            count[end - 1] = math.prod(shape) - (n - 1) * size
        return Blocks(index, jnp.asarray(count), self.block, self.dtype)

    def join(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """The leaves of this bucket as blocks ``(n, *block)``, padded with zeros."""
        parts = []
        for i, n in zip(self.leaves, self.num_blocks, strict=True):
            x, padded = arrays[i], n * math.prod(self.block)
            if padded != x.size:
                x = jnp.pad(x.reshape(-1), (0, padded - x.size))
            parts.append(x.reshape(n, *self.block))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def part(self, x: jax.Array) -> list[jax.Array]:
        """Inverse of :meth:`join`."""
        arrays, end = [], 0
        for shape, n in zip(self.shapes, self.num_blocks, strict=True):
            start, end = end, end + n
            piece = x if n == x.shape[0] else x[start:end]
            if piece.size != math.prod(shape):
                piece = piece.reshape(-1)[: math.prod(shape)]
            arrays.append(piece.reshape(shape))
        return arrays


@functools.lru_cache(maxsize=256)
def plan(
    codec: Codec,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[np.dtype, ...],
) -> tuple[Bucket, ...]:
    """Cuts leaves into buckets; buckets of one block shape and dtype are neighbours."""
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
            of = tuple(shapes[i] for i in leaves)
            buckets.append(Bucket(leaves, of, counts, block, dtype, start))
            start += sum(counts)
    return tuple(buckets)


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


def converse(
    codec: Codec,
    arrays: Sequence[jax.Array],
    dtypes: Sequence[np.dtype],
    states: Sequence[Any],
    turn: Turn,
    meet: Meet,
) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
    """Holds the conversation of ``codec`` about all leaves at once.

    Args:
      codec: The codec.
      arrays: One array per leaf, in the compute dtype.
      dtypes: The dtype of each leaf as the user knows it.
      states: The codec's state for each leaf.
      turn: The current step and worker.
      meet: Maps the messages of one round to the mean over workers of each one's
        decoded blocks; called once a round.

    Returns:
      For each leaf the average, this worker's own estimate, and the new state.
    """
    shapes = tuple(tuple(a.shape) for a in arrays)
    buckets = plan(codec, shapes, tuple(dtypes))
    results: list[Any] = [None] * len(buckets)
    talks = []
    for b in buckets:
        memory = jax.tree.map(_concatenate, *(states[i] for i in b.leaves))
        talks.append(codec.rounds(b.join(arrays), b.blocks(), memory, turn))
    replies: dict[int, Any] = dict.fromkeys(range(len(talks)))
    while replies:
        asked = {}
        for i, reply in replies.items():
            try:
                asked[i] = talks[i].send(reply)
            except StopIteration as end:
                results[i] = end.value
        if not asked:
            break
        means = meet(list(asked.values()))
        replies = dict(zip(asked, means, strict=True))

    zero = [jnp.zeros(a.shape, compute_dtype(d)) for a, d in zip(arrays, dtypes)]
    averages, owns, memories = zero, list(zero), list(states)
    for b, (average, own, memory) in zip(buckets, results, strict=True):
        ends = np.cumsum(b.num_blocks)
        parts = zip(b.leaves, b.part(average), b.part(own), ends, b.num_blocks)
        for i, mean, mine, end, n in parts:
            averages[i], owns[i] = mean, mine
            memories[i] = jax.tree.map(lambda m, e=end, n=n: m[e - n : e], memory)
    return averages, owns, memories


def alone(messages: list[Message]) -> list[jax.Array]:
    """A meeting of one worker: every message comes back as it decodes."""
    return [message.decode() for message in messages]


def _concatenate(*parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
