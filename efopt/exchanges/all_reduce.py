"""Linear payloads are averaged by the network itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.layout import BUCKET_SIZE
from efopt.exchanges.exchange import Exchange


@dataclasses.dataclass(frozen=True)
class AllReduce(Exchange):
    """``pmean`` of the payloads: one collective per dtype for the whole tree."""

    name: ClassVar[str] = "all_reduce"

    def refusal(self, codec):
        if not codec.linear:
            return (
                "its payloads may not be summed (it is not linear); use "
                f'exchange="{codec.default_exchange}"'
            )
        return None

    def meet(self, messages, axis_name, server, dense):
        payloads = tuple(m.payload for m in messages)
        if dense:
            payloads = lax.pmean(payloads, axis_name)
        else:
            payloads = _joined_mean(payloads, axis_name)
        pairs = zip(messages, payloads, strict=True)
        return [m.with_payload(payload) for m, payload in pairs], server


def _joined_mean(tree: Any, axis_name: str) -> Any:
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
    means = lax.pmean(joined, axis_name)
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
