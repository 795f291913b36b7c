"""All-reduce: linear payloads are averaged by the network itself."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.layout import BUCKET_SIZE
from efopt.exchanges.exchange import Exchange
from efopt.ground import bits
from efopt.ground.barriers import cut_once
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
        mean = _joined_mean if self.joined else mean_in_range
        pairs = zip(messages, mean(payloads, axes), strict=True)
        return [m.with_payload(payload) for m, payload in pairs], server


def all_reduce() -> Exchange:
    """All-reduce of payloads that may be summed, those of linear compressors.

    ``b`` bytes of payload are ``2 (n - 1) / n b`` link bytes a worker. The default of
    linear compressors.

    The network sums in the payload's dtype, and a sum of float16 may be infinite where
    its mean is not: 30000 on four workers. What is not finite is then summed once more,
    scaled down; that sum stands in a branch of the program which no other step takes,
    so that a report of the program's bytes counts float16 payloads twice. Sums that are
    finite are those of ``lax.pmean``, to the bit.

    Returns:
      An :class:`efopt.exchanges.Exchange`.

    Examples:
      >>> import efopt
      >>> tx = efopt.error_feedback(
      ...     efopt.power_sgd(4), axis_name="data",
      ...     exchange=efopt.exchanges.all_reduce())
    """
    return AllReduce()


def mean_in_range(tree: Any, axes: Axes) -> Any:
    """``pmean`` of every array, finite if all of them are, in float16 too.

    Dividing first would lose what becomes subnormal, and a wider sum is more bytes: so
    only what has overflowed is summed again, in a branch that all workers take together
    because they all see the same means.
    """
    arrays, treedef = jax.tree.flatten(tree)
    means = axes.pmean(arrays)
    short = [i for i, x in enumerate(arrays) if x.dtype == jnp.float16 and x.size]
    if not short:
        return treedef.unflatten(means)
    down = 2.0 ** -math.ceil(math.log2(axes.size()))
    given, got = [arrays[i] for i in short], [means[i] for i in short]

    def again(given, got):
        sums = axes.pmean([x * np.float16(down) for x in given])
        wide = [x.astype(jnp.float32) * (1 / down) for x in sums]
        pairs = zip(got, wide, strict=True)
        return [jnp.where(jnp.isfinite(m), m, bits.cast(w, m.dtype)) for m, w in pairs]

    def enough(given, got):
        del given
        return got

    finite = [jnp.isfinite(m).all() for m in got]
    overflown = ~jnp.stack(finite).all()
    for i, mean in zip(
        short, lax.cond(overflown, again, enough, given, got), strict=True
    ):
        means[i] = mean
    return treedef.unflatten(means)


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
    means = mean_in_range(joined, axes)
    shared = []
    for mean, members in zip(means, groups.values(), strict=True):
        if len(members) == 1:
            arrays[members[0]] = mean
        else:
            shared.append((members, mean))
    sizes = [[arrays[i].size for i in members] for members, _ in shared]
    parts = cut_once([mean for _, mean in shared], sizes)
    for (members, _), own in zip(shared, parts, strict=True):
        for i, part in zip(members, own, strict=True):
            arrays[i] = part.reshape(arrays[i].shape)
    return treedef.unflatten(arrays)


def _concatenate(xs: Sequence[jax.Array]) -> jax.Array:
    return xs[0] if len(xs) == 1 else jnp.concatenate([x.reshape(-1) for x in xs])
