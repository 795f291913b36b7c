"""Damped error feedback: what is owed is paid in part and forgotten in part."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.feedback.residual import open_residual, placed
from efopt.ground import checks
from efopt.ground.dtypes import wide, wide_zeros
from efopt.workers.axes import AxisName


class DampedErrorFeedbackState(NamedTuple):
    """State of :func:`damped_error_feedback`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      residual: The decayed sum of what compression lost of this worker's updates,
        shaped like the parameters, at least float32; with a ``memory`` the payload of
        each leaf. A :class:`efopt.PerWorker` if there is an axis.
      link: The compressor's own state and the owners' residual, an
        :class:`efopt.exchanges.LinkState`.
    """

    count: jax.typing.ArrayLike
    residual: Any
    link: Any

    def placed(self, mesh: Any, spec_of: Any) -> "DampedErrorFeedbackState":
        """The state laid out for a mesh: payloads are those of shards, made anew."""
        return placed(self, mesh, spec_of)


@checks.keyword_only
def damped_error_feedback(
    compressor: Compressor,
    *,
    alpha: float,
    beta: float,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    memory: Compressor | None = None,
    start: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates over workers, compressed, and owes a part of what was lost.

    .. math::
      q_i = Q(g_i + \alpha h_i), \quad
      u = \frac{1}{n} \sum_i q_i, \quad
      h_i \leftarrow \beta h_i + g_i - q_i

    The feedback of ECQ-SGD, for unbiased quantisers: they lose nothing in the mean, so
    that what feedback gains is variance, and damping keeps that of the feedback itself
    small. For biased compressors take :func:`efopt.error_feedback`, which this is, bit
    for bit, at ``alpha = beta = 1``.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: not conservative unless both factors are 1; the average is bit-identical
    on all workers.
    Placement: ``residual`` and the link's ``server`` per worker, all else replicated.

    Args:
      compressor: An :class:`efopt.Compressor`.
      alpha: The part of the error that is paid, in [0, 1].
      beta: The part of the error that is remembered, in [0, 1].
      axis_name: As for :func:`efopt.error_feedback`.
      exchange: As there.
      memory: What stores the residual compressed, as in
        :func:`efopt.contractive_error_feedback`; ``None``: nothing does. Never sent.
      start: As there.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` or ``memory`` is none, a factor is no number, or a
        leaf is not floating-point.
      ValueError: If a factor is out of range, or the memory cannot keep a residual; at
        trace time, if the axis is not bound, updates are already averaged or differ
        from what ``init`` saw, or the state was not placed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.feedback.damped_error_feedback(
      ...     efopt.top_k(k=1), alpha=0.5, beta=1.0)
      >>> grads = jnp.array([1.0, -3.0])
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(state.residual)
      [1. 0.]
      >>> print(tx.update(jnp.zeros(2), state)[0])  # half of what was lost
      [0.5 0. ]

    References:
      Wu et al, `Error Compensated Quantized SGD and its Applications to Large-scale
      Distributed Optimization <https://arxiv.org/abs/1806.08054>`_, 2018
    """
    api = "damped_error_feedback"
    for name, factor in (("alpha", alpha), ("beta", beta)):
        checks.share(api, name, factor)
    link = open_link(
        api, compressor, axis_name=axis_name, exchange=exchange, start=start
    )
    store = open_residual(api, None, memory, None, None)

    def init_fn(params: Any) -> Any:
        residual = store.marked(link, params)
        count = jnp.zeros([], jnp.int32)
        return DampedErrorFeedbackState(count, residual, link.init(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        owed, turn = link.unwrap(state.residual), link.turn(state.count)
        updates = store.receive(link, updates, owed)
        # 1806.08054 eq. (6): q = Q(g + alpha h),
        h = store.recall(wide_zeros(updates), owed, turn, None)
        p = jax.tree.map(lambda g, h: wide(g) + alpha * h, updates, h)
        got = link.average(p, state.link, state.count, like=updates)
        # and eq. (5): h <- beta h + g - q, of which g + alpha h - q is what is lost
        h = jax.tree.map(lambda lost, h: lost + (beta - alpha) * h, got.lost, h)
        keep = store.keeper(updates, owed, turn, None) or (lambda h: h)
        residual = link.wrap(keep(h), state.residual)
        count = optax.safe_increment(state.count)
        return got.mean, DampedErrorFeedbackState(count, residual, got.state)

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))
