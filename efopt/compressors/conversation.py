"""All buckets of a tree in one conversation, in lock-step.

Each round of all of them is one meeting, so the number of collectives is the number of
rounds and not that of the leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from efopt.compressors.base import Codec, Message, Turn
from efopt.compressors.layout import Layout

Meet = Callable[[list[Message]], list[jax.Array]]


def converse(
    codec: Codec,
    layout: Layout,
    xs: Sequence[jax.Array],
    states: Sequence[Any],
    turn: Turn,
    meet: Meet,
) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
    """Holds the conversation of ``codec`` about all buckets at once.

    Args:
      codec: The codec.
      layout: What the buckets are.
      xs: One array per bucket, ``(n, *block)``, in the compute dtype.
      states: The codec's state for each bucket.
      turn: The current step and worker.
      meet: Maps the messages of one round to the mean over workers of each one's
        decoded blocks; called once a round.

    Returns:
      For each bucket the average, this worker's own estimate, and the new state.
    """
    talks = [
        codec.rounds(x, b.blocks(), state, turn)
        for b, x, state in zip(layout.buckets, xs, states, strict=True)
    ]
    results: dict[int, Any] = {}
    replies: dict[int, Any] = dict.fromkeys(range(len(talks)))
    while replies:
        asked = {}
        for i, reply in replies.items():
            try:
                asked[i] = talks[i].send(reply)
            except StopIteration as end:
                results[i] = end.value
        means = meet(list(asked.values())) if asked else []
        replies = dict(zip(asked, means, strict=True))
    averages, owns, memories = [], [], []
    for i in range(len(talks)):
        average, own, memory = results[i]
        averages.append(average)
        owns.append(own)
        memories.append(memory)
    return averages, owns, memories


def alone(messages: list[Message]) -> list[jax.Array]:
    """A meeting of one worker: every message comes back as it decodes."""
    return [message.decode() for message in messages]
