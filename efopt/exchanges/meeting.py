"""A meeting: the conversations about all buckets, each by the exchange of its codec."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Message
from efopt.codecs.conversation import converse
from efopt.codecs.layout import Layout
from efopt.exchanges import owners
from efopt.exchanges.exchange import Exchange
from efopt.workers.axes import Axes


@dataclasses.dataclass
class Meeting:
    """Carries the messages of one round, each by its exchange.

    Attributes:
      layout: What the buckets are.
      ways: The exchange that carries each, settled.
      axes: The workers' axes.
      owed: What this worker owes as an owner; changes as messages are carried.
    """

    layout: Layout
    ways: Sequence[Exchange]
    axes: Axes
    owed: Sequence[jax.Array]

    def __call__(self, messages: dict[int, Message]) -> dict[int, Message]:
        """Messages of the means over workers, by number of the bucket."""
        means: dict[int, Message] = {}
        pairs = zip(self.ways, self.layout.buckets, strict=True)
        kinds = [(way, b.kind) for way, b in pairs]
        for way, kind in dict.fromkeys(kinds):
            # Leaves that differ along different axes do not travel together.
            numbers = [i for i in messages if kinds[i] == (way, kind)]
            if not numbers:
                continue
            asked = [messages[i] for i in numbers]
            given = self.owed if way.keeps else ()
            got, left = way.meet(asked, way.level(self.axes), given)
            means.update(zip(numbers, got, strict=True))
            self.owed = left if way.keeps else self.owed
        return means


def settled(
    layout: Layout, ways: Sequence[Exchange], axes: Axes, turn: Turn
) -> tuple[list[Exchange], list[Turn]]:
    """The exchanges of a tree's buckets as they are there, and the turn of each."""
    ways = [way.settled([b.codec for b in layout.buckets]) for way in ways]
    # Where messages are equal, so must be what they draw.
    return ways, [_at(turn, way.level(axes), axes) for way in ways]


def meet_all(
    api: str,
    layout: Layout,
    ways: Sequence[Exchange],
    axes: Axes,
    xs: Sequence[jax.Array],
    states: Sequence[Any],
    server: Any,
    turn: Turn,
    ratio: jax.Array | None,
    valid: Mapping[int, jax.Array],
) -> tuple[list[Message], list[jax.Array], list[Any], Any]:
    """Averages one array per bucket over the workers.

    Args:
      api: The transformation, for errors.
      layout: What the buckets are.
      ways: The exchange that carries each.
      axes: The workers' axes.
      xs: One array per bucket, ``(n, *block)``, in the compute dtype.
      states: Its codec's state for each.
      server: The owners' residuals, marked.
      turn: The step and this worker.
      ratio: Factor on the owners' residuals, or ``None``.
      valid: As for :meth:`efopt.codecs.layout.Bucket.blocks`.

    Returns:
      Messages of the averages, what this worker has not yet paid of its arrays, and the
      new states and residuals.
    """
    ways, turns = settled(layout, ways, axes, turn)
    xs = [way.enter(x, axes) for way, x in zip(ways, xs, strict=True)]
    kept = [b for b, way in zip(layout.buckets, ways, strict=True) if way.keeps]
    owed = owners.opened(api, kept, axes, server, ratio)
    meet = Meeting(layout, ways, axes, owed)
    means, rests, states = converse(layout, xs, states, turns, meet, valid)
    rests = [
        x - mean.decode() if way.pays_average else rest
        for way, x, mean, rest in zip(ways, xs, means, rests, strict=True)
    ]
    return means, rests, states, owners.closed(meet.owed, axes, server)


def _at(turn: Turn, level: Axes, axes: Axes) -> Turn:
    """The turn of a worker as its exchange counts them."""
    if level == axes:
        return turn
    return turn._replace(worker=level.index().astype(jnp.uint32))
