"""Estimates: what all workers know of each one's gradient, moved by what is sent.

Where a worker sends the compressed change of its estimate, what compression loses goes
to zero as gradients settle, also where they differ from worker to worker.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from efopt.exchanges.all_reduce import mean_in_range
from efopt.exchanges.link import Link
from efopt.ground import bits
from efopt.ground.dtypes import wide


class Estimate(NamedTuple):
    """What is known of this worker's gradient, and the mean of that over workers.

    Attributes:
      own: A tree in the compute dtypes; ``()``: nothing is kept, and all is sent anew.
      mean: The same for the mean, which all workers apply.
    """

    own: Any
    mean: Any


class Told(NamedTuple):
    """What came of :func:`tell`.

    Attributes:
      out: The average that is applied, in the dtypes of the updates.
      estimate: The new estimate.
      lost: What of ``say`` nobody knows yet, a tree in the compute dtypes.
      link: The new state of the link.
    """

    out: Any
    estimate: Estimate
    lost: Any
    link: Any


def tell(
    link: Link,
    say: Any,
    estimate: Estimate,
    state: Any,
    count: jax.Array,
    *,
    like: Any,
    start: int = 0,
) -> Told:
    """Tells the others what has changed since the estimate, compressed.

    Args:
      link: The link.
      say: What this worker's estimate should become, in the compute dtypes.
      estimate: The estimate so far.
      state: The state of the link.
      count: The step, equal on all workers.
      like: The updates, in whose dtypes payloads travel.
      start: Steps in which everything is told uncompressed, in the compute dtypes, so
        that the mean of the estimates is exactly that of what was said.
    """
    add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
    sub = lambda a, b: jax.tree.map(jnp.subtract, a, b)  # noqa: E731
    kept = not (isinstance(estimate.own, tuple) and estimate.own == ())

    def keep(own: Any, mean: Any) -> Estimate:
        return Estimate(*bits.cast_like((own, mean), tuple(estimate)))

    def compressed(say: Any, estimate: Estimate, state: Any) -> Any:
        # 2106.05203 Algorithm 2: c_i = C(g_i - h_i), h_i <- h_i + c_i, h <- h + mean c
        change = sub(say, estimate.own) if kept else say
        got = link.average(change, state, count, like=like, wide=True)
        # What is empty varies over no axis, where what is said does.
        lost = jax.tree.map(lambda x, s: x if x.size else s, got.lost, say)
        if not kept:
            return got.mean, estimate, lost, got.state
        mean = add(estimate.mean, got.mean)
        return mean, keep(sub(say, lost), mean), lost, got.state

    def dense(say: Any, estimate: Estimate, state: Any) -> Any:
        mean = say if link.axes is None else mean_in_range(say, link.axes)
        new = keep(say, mean) if kept else estimate
        return mean, new, jax.tree.map(jnp.zeros_like, say), state

    if start:
        args = say, estimate, state
        mean, *rest = lax.cond(count < start, dense, compressed, *args)
    else:
        mean, *rest = compressed(say, estimate, state)
    return Told(bits.cast_like(mean, like), *rest)


def recalled(updates: Any, ema: Any, beta: float, first: jax.Array | None) -> Any:
    """The running mean of updates, in the compute dtypes; at ``first`` they alone."""
    # 2305.15155 Algorithm 1: v_i <- (1 - eta) v_i + eta g_i

    def one(g, v):
        mean = beta * v + (1 - beta) * g
        return mean if first is None else jnp.where(first, g, mean)

    return bits.cast_like(jax.tree.map(one, jax.tree.map(wide, updates), ema), ema)
