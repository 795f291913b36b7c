"""What an exchange is, and the pieces that several of them use."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from efopt.codecs.codec import Codec, Message
from efopt.exchanges import carrier
from efopt.workers import axes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One way for the workers' messages to become one average.

    What must hold: the average is bit-identical on every worker, and no worker ever
    holds the decoded messages of all.

    Attributes:
      name: The name users choose it by.
      splits: Workers own ranges of blocks, so messages must be blocked.
      keeps: Owners keep a server residual.
      pays_average: What a worker has paid is the average, not its own message.
    """

    name: ClassVar[str]
    splits: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    pays_average: ClassVar[bool] = False

    def refusal(self, codec: Codec) -> str | None:
        """Why this exchange cannot carry ``codec``, or ``None``."""
        del codec
        return None

    def meet(
        self, messages: Sequence[Message], axis_name: str, server: Any, dense: bool
    ) -> tuple[list[Message], Any]:
        """A message of the mean over workers of each, and the new server residual.

        Args:
          messages: Those of one round.
          axis_name: The workers' axis.
          server: What this worker, as an owner, still owes: one array per group of
            messages (see :mod:`efopt.exchanges.groups`), or ``()``.
          dense: Whether nothing in the tree is compressed. Then the mean of every leaf
            is that of ``lax.pmean``, to the bit.
        """
        raise TypeError("`Exchange.meet` is for subclasses to implement.")


def all_gather(x: jax.Array, axis_name: str) -> jax.Array:
    """Every worker's ``x`` along a new first axis, typed as equal everywhere."""
    if axes.is_typed(axis_name):
        return lax.all_gather(x, axis_name, to="invarying")
    return lax.all_gather(x, axis_name)


def mean(tree: Any, axis_name: str) -> Any:
    """The mean over workers of every leaf, uncompressed."""
    return lax.pmean(tree, axis_name)


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
    total = lax.fori_loop(0, n, add, [axes.zeros_like(s) for s in start])
    return [t / n for t in total]
