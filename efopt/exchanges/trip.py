"""A trip: what is said in one step of a link, and what is kept until the next."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Message
from efopt.codecs.layout import Bucket, Layout
from efopt.exchanges.exchange import Exchange
from efopt.workers.axes import Axes


@dataclasses.dataclass(frozen=True)
class Trip:
    """What this worker says in one step, one array a bucket.

    Attributes:
      api: The transformation, for errors.
      axes: The workers' axes; ``None`` for a single one.
      layout: What the buckets are.
      ways: The exchange that carries each.
      xs: What is said: arrays ``(n, *block)`` in the compute dtype.
      turn: The step and this worker.
      ratio: Factor on what is in units of the step before, or ``None``.
      valid: As for :meth:`efopt.codecs.layout.Bucket.blocks`.
    """

    api: str
    axes: Axes | None
    layout: Layout
    ways: Sequence[Exchange]
    xs: Sequence[jax.Array]
    turn: Turn
    ratio: jax.Array | None
    valid: Mapping[int, jax.Array]

    def entered(self) -> "Trip":
        """The same as it is inside its exchanges, once they have seen all of it."""
        if self.axes is None:
            return self
        codecs = [b.codec for b in self.layout.buckets]
        ways = [way.settled(codecs) for way in self.ways]
        pairs = zip(ways, self.xs, strict=True)
        xs = [way.enter(x, self.axes) for way, x in pairs]
        return dataclasses.replace(self, ways=ways, xs=xs)

    def turns(self) -> list[Turn]:
        """The turn of each bucket: where messages are equal, so is what they draw."""
        return [self._turn(way) for way in self.ways]

    def _turn(self, way: Exchange) -> Turn:
        """The turn of this worker as an exchange counts them."""
        level = None if self.axes is None else way.level(self.axes)
        if level is None or level == self.axes:
            return self.turn
        return self.turn._replace(worker=level.index().astype(jnp.uint32))

    def kept(self) -> list[Bucket]:
        """The buckets whose owners keep a server residual."""
        pairs = zip(self.layout.buckets, self.ways, strict=True)
        return [b for b, way in pairs if way.keeps]

    def scaled(self, x: jax.Array) -> jax.Array:
        """What is in units of the step before, in those of this one."""
        return x if self.ratio is None else x * self.ratio.astype(x.dtype)


class Kept(NamedTuple):
    """What is kept from trip to trip.

    Attributes:
      states: The codec's state of each bucket.
      server: The owners' residuals, marked; ``()`` if there are none.
      flight: What is in flight, an :class:`InFlight`; ``()`` without a delay.
    """

    states: Sequence[Any]
    server: Any
    flight: Any


class Back(NamedTuple):
    """What a trip brings back.

    Attributes:
      means: Messages of the averages, one a bucket.
      rests: What this worker has neither paid of its arrays nor in flight.
      kept: What is kept for the next trip.
    """

    means: Sequence[Message]
    rests: Sequence[jax.Array]
    kept: Kept
