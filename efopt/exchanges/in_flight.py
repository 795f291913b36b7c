"""Payloads in flight: those of one step are exchanged in the next.

What is exchanged then depends on nothing of the step, so that a compiler may carry it
while the gradients of the step are computed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Message
from efopt.codecs.compressor import Compressor
from efopt.codecs.layout import Layout
from efopt.compressors.identity import plain
from efopt.exchanges import owners
from efopt.exchanges.meeting import Meeting
from efopt.exchanges.trip import Back, Kept, Trip
from efopt.ground import checks
from efopt.ground.barriers import known_after
from efopt.workers import node
from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker


class InFlight(NamedTuple):
    """Payloads that are to be exchanged in the next step.

    Attributes:
      payloads: One for each bucket of leaves; a :class:`efopt.PerWorker` if there is an
        axis.
      made: The step in which they were written; -1: there are none yet. shape=(),
        int32.
    """

    payloads: Any
    made: jax.typing.ArrayLike


def check_delay(api: str, delay: Any, compressor: Compressor, start: int) -> int:
    """Checks the option ``delay`` of a scheme."""
    checks.static_int(api, "delay", delay, least=0, below=2)
    if not delay:
        return 0
    for member in compressor.codec.members():
        if not member.one_message or member.stateful:
            raise ValueError(
                f"`{api}({member!r}, delay=1)` cannot work: a payload in flight is one "
                "message, and this compressor speaks in rounds, each of which needs "
                "the answer to the last. Use one that sends a single message, such as "
                "`efopt.scaled_sign(1024)`, or `delay=0`."
            )
    if start:
        raise ValueError(
            f"`{api}(delay=1, start={start})` would hide nothing: the branch that "
            "averages the first steps uncompressed waits for the gradients, and both "
            "branches are taken together. Leave out one of the two."
        )
    return 1


def fresh(layout: Layout, axes: Axes | None, shards: tuple[str, ...] = ()) -> InFlight:
    """Nothing in flight, in arrays for what will be.

    Args:
      layout: What the buckets of one device are.
      axes: The workers' axes.
      shards: The mesh axes behind each worker, if every shard has its own.
    """
    turn = Turn(jnp.uint32(0), jnp.uint32(0))
    payloads = []
    for b in layout.buckets:
        x = jax.ShapeDtypeStruct(b.shape, b.blocks().compute_dtype)
        like = jax.eval_shape(lambda x, b=b: b.codec.encode(x, b.blocks(), turn), x)
        payloads.append(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like))
    made = jnp.full([], -1, jnp.int32)
    if axes is None:
        return InFlight(tuple(payloads), made)
    marked = PerWorker.wrap(tuple(payloads), axes, None, shards, rule="equal")
    return InFlight(marked, made)


def meet_later(trip: Trip, before: Kept) -> Back:
    """Averages what was written in the step before, and writes what this step says.

    Under an exchange that pays the average a worker learns a step late what it has
    paid, and owes all of it until then.
    """
    trip, flight, server = trip.entered(), before.flight, before.server
    payloads, made = node.unwrap(trip.api, flight.payloads), jnp.asarray(flight.made)
    there, step = made >= 0, made.astype(jnp.uint32)
    buckets, turns = trip.layout.buckets, trip.turns()
    blocks = [b.blocks(trip.valid) for b in buckets]
    got = {
        i: Message(b.codec, payloads[i], blocks[i], turns[i]._replace(step=step))
        for i, b in enumerate(buckets)
    }
    if trip.axes is not None:
        owed = owners.opened(trip.api, trip.kept(), trip.axes, server)
        meeting = Meeting(trip, trip.axes, owed)
        got = meeting(got)
        pairs = zip(meeting.owed, owed, strict=True)
        left = [trip.scaled(jnp.where(there, new, old)) for new, old in pairs]
        server = owners.closed(left, trip.axes, server)
    means, rests, written = [], [], []
    for i, x in enumerate(trip.xs):
        mean = got[i].decode()
        mean = trip.scaled(jnp.where(there, mean, jnp.zeros_like(mean)))
        late = trip.axes is not None and trip.ways[i].pays_average
        x = x - mean if late else x
        message = buckets[i].codec.write(x, blocks[i], turns[i])
        rests.append(x if late else message.rest(x))
        means.append(mean)
        written.append(message.payload)
    # Else what a new parameter is made of joins what the forward pass makes of the old
    # one, in one kernel that reads it once, and the step waits for the exchange.
    means = known_after(written, means)
    means = [plain(x, blocks[i], turns[i]) for i, x in enumerate(means)]
    _require_same(trip.api, payloads, tuple(written))
    marked = _wrapped(tuple(written), flight.payloads)
    flight = InFlight(marked, trip.turn.step.astype(jnp.int32))
    return Back(means, rests, before._replace(server=server, flight=flight))


def decoded(
    layout: Layout,
    payloads: Any,
    made: Any,
    valid: Mapping[int, jax.Array] | None = None,
) -> list[jax.Array]:
    """What one worker's payloads in flight stand for, an array a bucket.

    Args:
      layout: What the buckets are.
      payloads: One for each.
      made: The step in which they were written.
      valid: As for :meth:`efopt.codecs.layout.Bucket.blocks`.
    """
    turn = Turn(jnp.asarray(made).astype(jnp.uint32), jnp.uint32(0))
    out = []
    for b, payload in zip(layout.buckets, payloads, strict=True):
        x = Message(b.codec, payload, b.blocks(valid), turn).decode()
        out.append(jnp.where(jnp.asarray(made) >= 0, x, jnp.zeros_like(x)))
    return out


def _wrapped(payloads: Any, like: Any) -> Any:
    if not node.is_node(like):
        return payloads
    return PerWorker.wrap(
        payloads, Axes.of("link", like.axis_name), None, like.shards, rule=like.rule
    )


def _require_same(api: str, before: Any, new: Any) -> None:
    def kinds(tree):
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    if kinds(before) != kinds(new):
        raise ValueError(
            f"{api} got updates whose payload is another than that of the parameters "
            "given to `init`, and cannot take its place in the state. Updates of "
            "another dtype than the parameters may be the cause: cast them."
        )
