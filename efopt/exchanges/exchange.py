"""The contract of an exchange: how the workers' payloads become one average."""

import abc
import dataclasses
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
# Coordinates up to which all of these are cut out of their carriers at once: three
# programs a message, not two a worker; beyond it would take more memory.
TOGETHER = 1 << 26


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

    def told(start, numbers, workers, wall=False):
        """Some messages of a few workers, decoded: a list for each of these."""
        rows = lax.dynamic_slice_in_dim(carriers, start, workers)
        payloads = carrier.unpack(rows, like, 1)
        for i in range(workers):
            own = lambda a, i=i: a.reshape(workers, -1, *a.shape[1:])[i]  # noqa: E731
            mine = [
                messages[j].with_payload(jax.tree.map(own, payloads[j]))
                for j in numbers
            ]
            yield [(m.once() if wall else m).decode() for m in mine]

    if n == 1:
        return next(told(0, range(len(messages)), 1, True))
    out: dict[int, jax.Array] = {}
    passes: dict[tuple[int, int], list[int]] = {}
    for j, m in enumerate(messages):
        large = m.blocks.coordinates >= LARGE and m.codec.pointwise
        width = min(n, AT_ONCE) if large else 1
        together = width if m.blocks.coordinates <= TOGETHER else 1
        passes.setdefault((width, together), []).append(j)
    for (width, together), numbers in passes.items():

        def several(start, end, total, numbers=numbers, together=together, wall=False):
            for i in range(0, end, together):
                workers = min(together, end - i)
                for more in told(start + i, numbers, workers, wall):
                    total = [t + s for t, s in zip(total, more, strict=True)]
            return total

        def add(k, total, width=width, several=several):
            return several(k * width, width, total, wall=width == 1)

        # The types of the start must be those of the sum, over every mapped axis.
        first = lambda i, numbers=numbers: next(told(i, numbers, 1, True))  # noqa: E731
        total = [zeros_like(s) for s in jax.eval_shape(first, jnp.int32(0))]
        rounds = n // width
        total = add(0, total) if rounds == 1 else lax.fori_loop(0, rounds, add, total)
        total = several(rounds * width, n - rounds * width, total)
        out.update(zip(numbers, [t / n for t in total], strict=True))
    return [out[j] for j in range(len(messages))]
