"""Learning rates that stand behind the feedback: residuals keep their units."""

from typing import Any

import jax
import jax.numpy as jnp


def rates(learning_rate: Any, count: Any, previous: Any) -> tuple[Any, Any, Any]:
    """This step's rate, the last one that was not zero, and the residual's factor.

    Args:
      learning_rate: A rate, a schedule, or ``None``.
      count: The step.
      previous: The last rate that was not zero, zero before the first step.
    """
    if learning_rate is None:
        return None, (), None
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    rate = jnp.asarray(rate).astype(jnp.float32)
    usable = (rate != 0) & (previous != 0)
    ratio = jnp.where(usable, previous / jnp.where(usable, rate, 1), 1)
    return rate, jnp.where(rate == 0, previous, rate), ratio


def hold(rate: jax.Array, out: Any, new: Any, old: Any) -> tuple[Any, Any]:
    """At a rate of zero: updates of zero, and the old state in place of the new."""
    held = rate == 0
    out = jax.tree.map(lambda u: jnp.where(held, jnp.zeros_like(u), u), out)
    return out, jax.tree.map(lambda n, o: jnp.where(held, o, n), new, old)
