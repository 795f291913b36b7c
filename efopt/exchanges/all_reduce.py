"""All-reduce: linear payloads are averaged by the network itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.layout import BUCKET_SIZE
from efopt.exchanges.exchange import Exchange
from efopt.workers.axes import Axes


@dataclasses.dataclass(frozen=True, repr=False)
class AllReduce(Exchange):
    """``pmean`` of the payloads: one collective per dtype for the whole tree.

    Attributes:
      joined: Whether small payloads of a dtype travel as one array. If nothing in the
        tree is compressed they do not: the mean of every leaf is then that of
        ``lax.pmean``, to the bit.
    """

    joined: bool = True

    name: ClassVar[str] = "all_reduce"

    def refusal(self, codec):
        if codec.linear:
            return None
        return (
            "its payloads may not be summed (it is not linear); use "
            'exchange="all_gather"'
        )

    def settled(self, codecs):
        return AllReduce(joined=not all(codec.exact for codec in codecs))

    def meet(self, messages, axes, server):
        payloads = tuple(m.payload for m in messages)
        mean = _joined_mean if self.joined else _mean
        pairs = zip(messages, mean(payloads, axes), strict=True)
        return [m.with_payload(payload) for m, payload in pairs], server


def all_reduce() -> Exchange:
    """All-reduce of payloads that may be summed, those of linear compressors.

    ``b`` bytes of payload are ``2 (n - 1) / n b`` link bytes a worker. The default of
    linear compressors.

    Examples:
      >>> import efopt
      >>> tx = efopt.error_feedback(
      ...     efopt.power_sgd(4), axis_name="data",
      ...     exchange=efopt.exchanges.all_reduce())
    """
    return AllReduce()


def _mean(tree: Any, axes: Axes) -> Any:
    return axes.pmean(tree)


def _joined_mean(tree: Any, axes: Axes) -> Any:
    """The mean of every array, where all but large ones of a dtype travel as one.

    Compilers combine all-reduces in the order in which they find them, and find that of
    one leaf's second round before that of another's first: apart, two rounds over many
    matrices would be a collective for each of them. And gloo takes a combined one
    array by array, each at a latency of its own.
    """
    arrays, treedef = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        alone = x.size > BUCKET_SIZE  # what is joined is copied
        groups.setdefault((x.dtype, i if alone else None), []).append(i)
    joined = [_concatenate([arrays[i] for i in members]) for members in groups.values()]
    means = axes.pmean(joined)
    for mean, members in zip(means, groups.values(), strict=True):
        for i, part in zip(
            members, _cut(mean, [arrays[i] for i in members]), strict=True
        ):
            arrays[i] = part
    return treedef.unflatten(arrays)


def _concatenate(xs: Sequence[jax.Array]) -> jax.Array:
    return xs[0] if len(xs) == 1 else jnp.concatenate([x.reshape(-1) for x in xs])


def _cut(joined: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Inverse of :func:`_concatenate`."""
    if len(like) == 1:
        return [joined]
    ends = np.cumsum([x.size for x in like])
    parts = jnp.split(joined, ends[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, like, strict=True)]
