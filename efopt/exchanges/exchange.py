"""The contract of an exchange: how the workers' payloads become one average."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from efopt.codecs.codec import Codec, Message
from efopt.exchanges import carrier
from efopt.ground.barriers import LARGE
from efopt.workers.axes import Axes, zeros_like

# Payloads that are read in one pass. Of 268 M coordinates in signs an H100 averaged two
# in 0.6 ms instead of 2.6, eight in 1.2 instead of 7.3.
AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Exchange(abc.ABC):
    """One way for the workers' messages to become one average.

    A subclass is a frozen dataclass that implements :meth:`meet`; pass an instance as
    ``exchange=`` of any scheme. What must hold: the average is bit-identical on every
    worker; no worker ever holds the decoded messages of all; all workers call the same
    collectives of ``axes`` in the same order.

    Attributes:
      name: What it is called in plans and errors.
      keeps: Owners of ranges of blocks keep a server residual, which :meth:`meet` is
        given and returns: one array for each group of equal blocks.
      pays_average: What a worker has paid is the average, not its own message.
      fast_axes: Axes among the workers' over which updates are averaged as they are,
        before all else; each worker then speaks of its part of the coordinates alone.
    """

    name: ClassVar[str]
    keeps: ClassVar[bool] = False
    pays_average: ClassVar[bool] = False
    fast_axes: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        return f"{self.name}()"

    def refusal(self, codec: Codec) -> str | None:
        """Why this exchange cannot carry ``codec``, in words, or ``None``."""
        del codec
        return None

    def settled(self, codecs: Sequence[Codec]) -> "Exchange":
        """This exchange, where these codecs write all the buckets of a tree."""
        del codecs
        return self

    def level(self, axes: Axes) -> Axes:
        """The axes along which messages differ; along all others they are equal."""
        return axes

    def enter(self, x: jax.Array, axes: Axes) -> jax.Array:
        """What is made of a bucket before anything is encoded, equal off the level.

        An exchange of two levels averages here over the fast axes.

        Args:
          x: This worker's blocks ``(n, *block)``, in the compute dtype.
          axes: All axes of the workers.
        """
        del axes
        return x

    @abc.abstractmethod
    def meet(
        self, messages: Sequence[Message], axes: Axes, server: Any
    ) -> tuple[list[Message], Any]:
        """A message of the mean over workers of each, and the new server residual.

        Args:
          messages: Those of one round, in the order of the buckets.
          axes: The axes of :meth:`level`.
          server: What this worker, as an owner, still owes: one array per group of
            messages, ``(blocks, *block)`` in the compute dtype; ``()`` unless
            :attr:`keeps`.
        """


def decode_mean(carriers: jax.Array, messages: Sequence[Message]) -> list[jax.Array]:
    """The mean of what the workers' carriers decode to.

    Large messages whose coordinates are read one by one are read of several workers in
    one pass; all others of one worker at a time, lest several stand decoded beside each
    other.

    Args:
      carriers: uint32 ``(n, words)``, one row a worker.
      messages: What each row packs: their payloads, arrays or structs, say its types.

    Returns:
      The means, summed in the order of the workers.
    """
    n, like = carriers.shape[0], [m.payload for m in messages]

    def share(i, numbers, wall):
        row = lax.dynamic_index_in_dim(carriers, i, keepdims=True)
        payloads = carrier.unpack(row, like, 1)
        told = [messages[j].with_payload(payloads[j]) for j in numbers]
        return [(m.once() if wall else m).decode() for m in told]

    if n == 1:
        return share(0, range(len(messages)), True)
    out: dict[int, jax.Array] = {}
    passes: dict[int, list[int]] = {}
    for j, m in enumerate(messages):
        large = m.blocks.coordinates >= LARGE
        passes.setdefault(AT_ONCE if large and m.codec.pointwise else 1, []).append(j)
    for width, numbers in passes.items():
        width = min(width, n)

        def add(k, total, width=width, numbers=numbers):
            for i in range(width):
                more = share(k * width + i, numbers, width == 1)
                total = [t + s for t, s in zip(total, more, strict=True)]
            return total

        # The types of the start must be those of the sum, over every mapped axis.
        first = functools.partial(share, numbers=numbers, wall=True)
        start = jax.eval_shape(first, jnp.int32(0))
        total = [zeros_like(s) for s in start]
        rounds = n // width
        total = add(0, total) if rounds == 1 else lax.fori_loop(0, rounds, add, total)
        for i in range(rounds * width, n):
            more = share(i, numbers, False)
            total = [t + s for t, s in zip(total, more, strict=True)]
        out.update(zip(numbers, [t / n for t in total], strict=True))
    return [out[j] for j in range(len(messages))]
