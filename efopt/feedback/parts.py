"""What several of the schemes are made of."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efopt.codecs.codec import Message
from efopt.codecs.compressor import FLOATS
from efopt.exchanges.link import Inbound
from efopt.ground import bits


def check_float_dtype(api: str, name: str, dtype: Any) -> None:
    """Raises unless ``dtype`` is ``None`` or a floating-point dtype."""
    try:
        usable = dtype is None or jnp.dtype(dtype).name in FLOATS
    except TypeError:
        usable = False
    if not usable:
        raise TypeError(
            f"`{api}({name}=...)` must be a floating-point dtype "
            f"({', '.join(FLOATS)}), got {dtype!r}."
        )


def rates(learning_rate: Any, state: Any) -> tuple[Any, Any, Any]:
    """This step's rate, the last one that was not zero, and the residual's factor."""
    if learning_rate is None:
        return None, (), None
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    rate = jnp.asarray(rate).astype(jnp.float32)
    previous = state.learning_rate
    usable = (rate != 0) & (previous != 0)
    ratio = jnp.where(usable, previous / jnp.where(usable, rate, 1), 1)
    return rate, jnp.where(rate == 0, previous, rate), ratio


def unpaid(
    inbound: Inbound, means: Sequence[Message], rests: Sequence[jax.Array]
) -> list[jax.Array]:
    """What is not yet paid, and the rounding of the average, one array per bucket.

    The average is applied in the leaf's dtype; every worker owes the rounding.
    """
    out = []
    for b, mean, x in zip(inbound.layout.buckets, means, rests, strict=True):
        if b.dtype != x.dtype:
            average = mean.decode()
            x = x + (average - bits.round_to(average, b.dtype))
        out.append(x)
    return out


def applied(inbound: Inbound, averages: Sequence[jax.Array]) -> Any:
    """The averages, one array per bucket, as updates."""
    pairs = zip(averages, inbound.layout.buckets, strict=True)
    return inbound.part([bits.cast(a, b.dtype) for a, b in pairs], inbound.arrays)


def hold(rate: jax.Array, out: Any, new: Any, old: Any) -> tuple[Any, Any]:
    """At a rate of zero: updates of zero, and the old state in place of the new."""
    held = rate == 0
    out = jax.tree.map(lambda u: jnp.where(held, jnp.zeros_like(u), u), out)
    return out, jax.tree.map(lambda n, o: jnp.where(held, o, n), new, old)
