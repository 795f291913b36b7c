"""A scheme written by a third party: one file on public names, one row in SCHEMES.

It is `efopt.feedback.ef21` at its shortest, and must agree with it. Instead of what was
lost, each worker keeps an estimate of its own gradient, and sends, compressed, the step
from there to the gradient of today.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import efopt
from efopt.exchanges import open_link


class ChangesState(NamedTuple):
    """State of :func:`changes`.

    Attributes:
      count: Number of steps so far.
      own: What all know of this worker's gradient: an :class:`efopt.PerWorker`, or a
        tree like the updates if there is one worker.
      mean: The mean of that over workers, which all of them apply.
      link: State of the compressor and the exchange.
    """

    count: jax.typing.ArrayLike
    own: Any
    mean: Any
    link: Any


def changes(
    compressor: efopt.Compressor,
    *,
    axis_name: Any = None,
    exchange: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates over workers by the compressed changes of their estimates.

    .. math::
        c_i = C(g_i - h_i), \quad h_i \leftarrow h_i + c_i, \quad
        h \leftarrow h + \tfrac{1}{n} \sum_i c_i

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      axis_name: The mapped axis, or axes, of the workers; ``None`` for one worker.
      exchange: As in :func:`efopt.error_feedback`.

    References:
      Richtarik et al, `EF21: A New, Simpler, Theoretically Better, and Practically
      Faster Error Feedback <https://arxiv.org/abs/2106.05203>`_, 2021 (Algorithm 2)
    """
    link = open_link("changes", compressor, axis_name=axis_name, exchange=exchange)

    def init_fn(params):
        zeros = link.zeros(params)
        count = jnp.zeros([], jnp.int32)
        own = link.wrap(zeros, rule="mean")
        return ChangesState(count, own, zeros, link.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        own = link.unwrap(state.own)
        grads = link.receive(updates, like=own)
        # Algorithm 2, lines 5 to 7: c_i = C(g_i - h_i)
        change = optax.tree.sub(grads, own)
        got = link.average(change, state.link, state.count)
        # Lines 6 and 8: h_i + c_i is g_i less what the message did not say.
        own = optax.tree.sub(optax.tree.add(own, change), got.lost)
        mean = optax.tree.add(state.mean, got.mean)
        count = optax.safe_increment(state.count)
        own = link.wrap(own, state.own)
        new = ChangesState(count, own, mean, got.state)
        return jax.tree.map(lambda m, g: m.astype(g.dtype), mean, grads), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
