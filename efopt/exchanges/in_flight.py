"""Payloads in flight: those of one step are exchanged in the next.

What is exchanged then depends on nothing of the step, so that a compiler may carry it
while the gradients of the step are computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Message
from efopt.codecs.compressor import Compressor
from efopt.codecs.layout import Layout
from efopt.compressors.identity import plain
from efopt.exchanges import owners
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.meeting import Meeting, settled
from efopt.ground import checks
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


def meet_later(
    api: str,
    layout: Layout,
    ways: Sequence[Exchange],
    axes: Axes | None,
    xs: Sequence[jax.Array],
    flight: InFlight,
    server: Any,
    turn: Turn,
    ratio: jax.Array | None,
    valid: Mapping[int, jax.Array],
) -> tuple[list[Message], list[jax.Array], Any, InFlight]:
    """Averages what was written in the step before, and writes what this step says.

    Args:
      api: The transformation, for errors.
      layout: What the buckets are.
      ways: The exchange that carries each; none for a single worker.
      axes: The workers' axes, or ``None``.
      xs: One array per bucket, ``(n, *block)``, in the compute dtype.
      flight: What was written before.
      server: The owners' residuals, marked.
      turn: The step and this worker.
      ratio: Factor on what is in units of the step before, or ``None``.
      valid: As for :meth:`efopt.codecs.layout.Bucket.blocks`.

    Returns:
      Messages of the averages, what this worker has neither paid nor in flight, the
      owners' new residuals, and what is in flight now.
    """
    buckets, payloads = layout.buckets, node.unwrap(api, flight.payloads)
    blocks = [b.blocks(valid) for b in buckets]
    there = jnp.asarray(flight.made) >= 0
    before, turns = jnp.asarray(flight.made).astype(jnp.uint32), [turn] * len(buckets)
    if axes is not None:
        ways, turns = settled(layout, ways, axes, turn)
        xs = [way.enter(x, axes) for way, x in zip(ways, xs, strict=True)]
    arriving = {
        i: Message(b.codec, payloads[i], blocks[i], turns[i]._replace(step=before))
        for i, b in enumerate(buckets)
    }
    got = arriving
    if axes is not None:
        kept = [b for b, way in zip(buckets, ways, strict=True) if way.keeps]
        owed = owners.opened(api, kept, axes, server, None)
        meet = Meeting(layout, ways, axes, owed)
        got = meet(arriving)
        pairs = zip(meet.owed, owed, strict=True)
        left = [_scaled(jnp.where(there, new, old), ratio) for new, old in pairs]
        server = owners.closed(left, axes, server)
    means, rests, new = [], [], []
    for i, x in enumerate(xs):
        mean = got[i].decode()
        mean = _scaled(jnp.where(there, mean, jnp.zeros_like(mean)), ratio)
        late = axes is not None and ways[i].pays_average
        x = x - mean if late else x
        message = buckets[i].codec.write(x, blocks[i], turns[i])
        # Under a vote what is paid is known a step later: until then all of it is owed.
        rests.append(x if late else message.rest(x))
        means.append(plain(mean, blocks[i], turns[i]))
        new.append(message.payload)
    _require_same(api, payloads, tuple(new))
    step = turn.step.astype(jnp.int32)
    return means, rests, server, InFlight(_wrapped(tuple(new), flight.payloads), step)


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
      valid: As for :func:`meet_later`.
    """
    turn = Turn(jnp.asarray(made).astype(jnp.uint32), jnp.uint32(0))
    out = []
    for b, payload in zip(layout.buckets, payloads, strict=True):
        x = Message(b.codec, payload, b.blocks(valid), turn).decode()
        out.append(jnp.where(jnp.asarray(made) >= 0, x, jnp.zeros_like(x)))
    return out


def _scaled(x: jax.Array, ratio: jax.Array | None) -> jax.Array:
    return x if ratio is None else x * ratio.astype(x.dtype)


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
