"""Learning rates that stand behind the feedback: residuals keep their units.

A rate that is subnormal, or nothing beside the last one, counts as zero. A residual in
units of such a rate would be infinite, and nothing of it would be left in units of the
next; what a step moves is nothing either way.
"""

from typing import Any

import jax
import jax.numpy as jnp

NOTHING = 2.0**-64  # beside one, for a learning rate


def rates(learning_rate: Any, count: Any, previous: Any) -> tuple[Any, Any, Any]:
    """This step's rate, the last one that was not zero, and the residual's factor.

    The second has the dtype of ``previous``.

    Args:
      learning_rate: A rate, a schedule, or ``None``.
      count: The step.
      previous: The last rate that was not zero, zero before the first step.
    """
    if learning_rate is None:
        return None, (), None
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    rate = jnp.asarray(rate).astype(jnp.float32)
    last = jnp.asarray(previous).astype(rate.dtype)
    least = jnp.maximum(jnp.abs(last) * NOTHING, jnp.finfo(rate.dtype).tiny)
    rate = jnp.where(jnp.abs(rate) < least, 0, rate)
    usable = (rate != 0) & (last != 0)
    ratio = jnp.where(usable, last / jnp.where(usable, rate, 1), 1)
    last = jnp.where(rate == 0, last, rate)
    return rate, last.astype(jnp.result_type(previous)), ratio


def hold(rate: jax.Array, out: Any, new: Any, old: Any) -> tuple[Any, Any]:
    """At a rate of zero: updates of zero, and the old state in place of the new."""
    held = rate == 0
    out = jax.tree.map(lambda u: jnp.where(held, jnp.zeros_like(u), u), out)
    return out, jax.tree.map(lambda n, o: jnp.where(held, o, n), new, old)
