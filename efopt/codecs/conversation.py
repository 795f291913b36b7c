"""All buckets of a tree in one conversation, in lock-step.

Each round of all of them is one meeting, so the number of collectives is the number of
rounds and not that of the leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from efopt.codecs.codec import Message, Turn
from efopt.codecs.layout import Layout

Meet = Callable[[dict[int, Message]], dict[int, Message]]


def converse(
    layout: Layout,
    xs: Sequence[jax.Array],
    states: Sequence[Any],
    turn: Turn,
    meet: Meet,
) -> tuple[list[Message], list[jax.Array], list[Any]]:
    """Holds the conversations about all buckets at once.

    Args:
      layout: What the buckets are.
      xs: One array per bucket, ``(n, *block)``, in the compute dtype.
      states: Its codec's state for each bucket.
      turn: The current step and worker.
      meet: Maps the messages of one round, by number of the bucket, to messages of the
        means over workers; called once a round.

    Returns:
      For each bucket the average, what this worker's own messages do not say of its
      array, and the new state.
    """
    talks = [
        b.codec.rounds(x, b.blocks(), state, turn)
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
        replies = meet(asked) if asked else {}
    averages, rests, memories = [], [], []
    for i in range(len(talks)):
        average, rest, memory = results[i]
        averages.append(average)
        rests.append(rest)
        memories.append(memory)
    return averages, rests, memories


def alone(messages: dict[int, Message]) -> dict[int, Message]:
    """A meeting of one worker: every message comes back."""
    return messages
