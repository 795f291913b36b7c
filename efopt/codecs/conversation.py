"""All buckets of a tree in one conversation, in lock-step.

Each round of all of them is one meeting, so the number of collectives is the number of
rounds and not that of the leaves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Batch, Message
from efopt.codecs.layout import Layout
from efopt.ground.barriers import cut_once, kind, once

Meet = Callable[[dict[int, Message]], dict[int, Message]]


def converse(
    layout: Layout,
    xs: Sequence[jax.Array],
    states: Sequence[Any],
    turns: Sequence[Turn],
    meet: Meet,
    valid: Mapping[int, jax.Array] | None = None,
) -> tuple[list[Message], list[jax.Array], list[Any]]:
    """Holds the conversations about all buckets at once.

    Args:
      layout: What the buckets are.
      xs: One array per bucket, ``(n, *block)``, in the compute dtype.
      states: Its codec's state for each bucket.
      turns: The step and the worker of each bucket.
      meet: Maps the messages of one round, by number of the bucket, to messages of the
        means over workers; called once a round.
      valid: As for :meth:`efopt.codecs.layout.Bucket.blocks`.

    Returns:
      For each bucket the average, what this worker's own messages do not say of its
      array, and the new state.
    """
    talks = [
        b.codec.rounds(x, b.blocks(valid), state, turn)
        for b, x, state, turn in zip(layout.buckets, xs, states, turns, strict=True)
    ]
    results: dict[int, Any] = {}
    replies: dict[int, Any] = dict.fromkeys(range(len(talks)))
    while replies:
        asked: dict[int, Message] = {}
        while replies:
            batches: dict[int, Batch] = {}
            for i, reply in replies.items():
                try:
                    said = talks[i].send(reply)
                except StopIteration as end:
                    results[i] = end.value
                    continue
                if isinstance(said, Batch):
                    batches[i] = said
                else:
                    asked[i] = said
            replies = computed(batches)
        replies = meet(dict(sorted(asked.items()))) if asked else {}
    averages, rests, after = [], [], []
    for i in range(len(talks)):
        average, rest, state = results[i]
        averages.append(average)
        rests.append(rest)
        after.append(state)
    return averages, rests, after


def computed(batches: Mapping[int, Batch]) -> dict[int, jax.Array]:
    """The results of batches, those alike in one: a few programs for many leaves.

    Blocks up to twice as high as others are alike: zeros fill the lower ones up.
    """
    alike: dict[Any, list[int]] = {}
    for i, batch in batches.items():
        x, height = batch.x, (batch.x.shape[1] - 1).bit_length()
        key = batch.function, height, x.shape[2:], x.dtype, kind(x)
        alike.setdefault(key, []).append(i)
    out: dict[int, jax.Array] = {}
    shared = []
    for (function, *_), members in alike.items():
        xs = [batches[i].x for i in members]
        top = max(x.shape[1] for x in xs)
        if len(xs) == 1:
            out[members[0]] = function(xs[0])
        else:
            joined = once(jnp.concatenate([_filled_up(x, top) for x in xs]))
            shared.append((members, function(joined)))
    lengths = [[len(batches[i].x) for i in members] for members, _ in shared]
    parts = cut_once([y for _, y in shared], lengths)
    for (members, _), ys in zip(shared, parts, strict=True):
        for i, y in zip(members, ys, strict=True):
            out[i] = y[:, : batches[i].x.shape[1]]
    return out


def _filled_up(x: jax.Array, rows: int) -> jax.Array:
    rest = rows - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, rest), *((0, 0) for _ in x.shape[2:])))


def alone(messages: dict[int, Message]) -> dict[int, Message]:
    """A meeting of one worker: every message comes back."""
    return messages
