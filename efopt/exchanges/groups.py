"""Groups of equal blocks, cut into ranges, one range a worker.

Messages with the same codec, block shape and dtype form a group: their payloads are
joined along the block axis, and the group is padded once to a multiple of the workers.
Worker ``i`` owns the ``i``-th range of every group.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Message
from efopt.codecs.layout import Bucket
from efopt.ground.dtypes import compute_dtype
from efopt.workers.ranges import range_size


@dataclasses.dataclass(frozen=True)
class Group:
    """Joined messages ``(n * rows, *block)``; each worker owns ``rows`` blocks.

    Attributes:
      messages: The messages, in order.
      places: Their places among all messages.
      rows: Blocks that one worker owns.
      whole: The joined message, padded.
    """

    messages: tuple[Message, ...]
    places: tuple[int, ...]
    rows: int
    whole: Message

    def owned(self, my: jax.Array) -> Blocks:
        """The blocks that worker ``my`` owns."""

        def cut(x):
            return lax.dynamic_slice_in_dim(x, my * self.rows, self.rows)

        return jax.tree.map(cut, self.whole.blocks)

    def part(self, payload: Any) -> list[Message]:
        """Cuts a payload of the whole group back into messages."""
        out, end = [], 0
        for m in self.messages:
            start, end = end, end + m.blocks.index.shape[0]
            piece = jax.tree.map(lambda x, s=start, e=end: x[s:e], payload)
            out.append(m.with_payload(piece))
        return out


def group(messages: Sequence[Message], num_workers: int) -> list[Group]:
    """Joins messages of one codec, block shape and dtype; pads them to whole ranges."""
    members: dict[Any, list[int]] = {}
    for i, m in enumerate(messages):
        members.setdefault((m.codec, m.blocks.shape, m.blocks.dtype), []).append(i)
    groups = []
    for places in members.values():
        same = [messages[i] for i in places]
        total = sum(m.blocks.index.shape[0] for m in same)
        rows = range_size(total, num_workers)
        extra = rows * num_workers - total
        blocks = [m.blocks for m in same]
        first = blocks[0]
        index, count, weight = _join([b.index for b in blocks], extra), None, None
        if extra or any(b.count is not None for b in blocks):
            count = _join([b.valid() for b in blocks], extra)
            weight = _join([b.mean_weight() for b in blocks], extra)
        joined = Blocks(index, count, weight, first.shape, first.dtype)
        payload = jax.tree.map(
            lambda *xs, extra=extra: _join(xs, extra), *(m.payload for m in same)
        )
        whole = Message(same[0].codec, payload, joined, same[0].turn)
        groups.append(Group(tuple(same), tuple(places), rows, whole))
    return groups


def group_key(bucket: Bucket) -> tuple[Any, tuple[int, ...], np.dtype]:
    """What the buckets of one group, and of one server residual, have in common."""
    return bucket.codec, bucket.block, bucket.dtype


def server_shapes(buckets: Iterable[Bucket]) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape ``(num_blocks, *block)`` and compute dtype of each group's residual."""
    sizes: dict[Any, int] = {}
    for b in buckets:
        key = group_key(b)
        sizes[key] = sizes.get(key, 0) + b.shape[0]
    return [((n, *block), compute_dtype(d)) for (_, block, d), n in sizes.items()]


def owner_turn(turn: Turn, num_workers: int) -> Turn:
    """The turn of a worker as an owner: private randomness of its own."""
    return turn._replace(worker=turn.worker + np.uint32(num_workers))


def _join(xs: Sequence[jax.Array], extra: int) -> jax.Array:
    x = xs[0] if len(xs) == 1 else jnp.concatenate(xs)
    if not extra:
        return x
    return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
