"""A meeting: the conversations about all buckets, each by the exchange of its codec."""

import dataclasses
from collections.abc import Sequence

import jax

from efopt.codecs.codec import Message
from efopt.codecs.conversation import alone, converse
from efopt.exchanges import owners
from efopt.exchanges.trip import Back, Kept, Trip
from efopt.workers.axes import Axes


@dataclasses.dataclass
class Meeting:
    """Carries the messages of one round, each by its exchange.

    Attributes:
      trip: What is said, and by which way.
      axes: The workers' axes.
      owed: What this worker owes as an owner; changes as messages are carried.
    """

    trip: Trip
    axes: Axes
    owed: Sequence[jax.Array]

    def __call__(self, messages: dict[int, Message]) -> dict[int, Message]:
        """Messages of the means over workers, by number of the bucket."""
        means: dict[int, Message] = {}
        pairs = zip(self.trip.ways, self.trip.layout.buckets, strict=True)
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


def round_trip(trip: Trip, before: Kept) -> Back:
    """What a single worker hears of what it says."""
    means, rests, states = converse(
        trip.layout, trip.xs, before.states, trip.turns(), alone, trip.valid
    )
    return Back(means, rests, before._replace(states=states))


def meet(trip: Trip, before: Kept) -> Back:
    """The averages over the workers of what each says."""
    trip, axes, server = trip.entered(), trip.axes, before.server
    assert axes is not None
    owed = owners.opened(trip.api, trip.kept(), axes, server)
    meeting = Meeting(trip, axes, tuple(map(trip.scaled, owed)))
    means, rests, states = converse(
        trip.layout, trip.xs, before.states, trip.turns(), meeting, trip.valid
    )
    rests = [
        x - mean.decode() if way.pays_average else rest
        for way, x, mean, rest in zip(trip.ways, trip.xs, means, rests, strict=True)
    ]
    server = owners.closed(meeting.owed, axes, server)
    return Back(means, rests, before._replace(states=states, server=server))
