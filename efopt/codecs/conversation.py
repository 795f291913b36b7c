"""All buckets of a tree in one conversation, in lock-step.

Each round of all of them is one meeting, so the number of collectives is the number of
rounds and not that of the leaves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Batch, Message
from efopt.codecs.layout import Layout

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
            replies = _computed(layout, batches)
        replies = meet(dict(sorted(asked.items()))) if asked else {}
    averages, rests, after = [], [], []
    for i in range(len(talks)):
        average, rest, state = results[i]
        averages.append(average)
        rests.append(rest)
        after.append(state)
    return averages, rests, after


def _computed(layout: Layout, batches: Mapping[int, Batch]) -> dict[int, jax.Array]:
    """The results of batches, those alike in one: a few programs for many leaves."""
    alike: dict[Any, list[int]] = {}
    for i, batch in batches.items():
        x, kind = batch.x, layout.buckets[i].kind
        alike.setdefault((batch.function, x.shape[1:], x.dtype, kind), []).append(i)
    out: dict[int, jax.Array] = {}
    for (function, *_), members in alike.items():
        xs = [batches[i].x for i in members]
        joined = xs[0] if len(xs) == 1 else jnp.concatenate(xs)
        ends = np.cumsum([len(x) for x in xs])
        parts = jnp.split(function(joined), ends[:-1])
        out.update(zip(members, parts, strict=True))
    return out


def alone(messages: dict[int, Message]) -> dict[int, Message]:
    """A meeting of one worker: every message comes back."""
    return messages
