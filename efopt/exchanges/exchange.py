"""The contract of an exchange: how the workers' payloads become one average."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from efopt.codecs.codec import Codec, Message
from efopt.exchanges import carrier
from efopt.workers.axes import Axes, zeros_like


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


def decode_mean(
    carriers: jax.Array,
    like: Any,
    decode: Callable[[Any], list[jax.Array]],
) -> list[jax.Array]:
    """The mean of what ``n`` carriers decode to, one carrier at a time.

    Args:
      carriers: uint32 ``(n, words)``, one row a worker.
      like: The tree that each row packs.
      decode: Maps such a tree to blocks.

    Returns:
      The means, summed in the order of the workers.
    """
    n = carriers.shape[0]

    def share(i):
        row = lax.dynamic_index_in_dim(carriers, i, keepdims=True)
        return decode(carrier.unpack(row, like, 1))

    def add(i, total):
        return [t + s for t, s in zip(total, share(i), strict=True)]

    if n == 1:
        return share(0)
    # The types of the start must be those of the sum, over every mapped axis.
    start = jax.eval_shape(share, jnp.int32(0))
    total = lax.fori_loop(0, n, add, [zeros_like(s) for s in start])
    return [t / n for t in total]
