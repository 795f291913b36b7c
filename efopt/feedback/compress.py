"""Compressed averaging without feedback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.ground.checks import keyword_only
from efopt.workers.axes import AxisName


class CompressState(NamedTuple):
    """State of :func:`compress`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      link: The compressor's own state and the owners' residual, an
        :class:`efopt.exchanges.LinkState`.
    """

    count: jax.typing.ArrayLike
    link: Any


@keyword_only
def compress(
    compressor: Compressor,
    *,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    start: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates over workers, compressed, and forgets what compression lost.

    .. math::  u = \frac{1}{n} \sum_i C(g_i)

    Right for the identity and for unbiased compressors, and for signSGD as published;
    with a biased compressor prefer :func:`efopt.error_feedback`. Chained after
    per-worker state only (:func:`efopt.per_worker`); what follows it in the chain sees
    the same average on every worker.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step; see
    :func:`efopt.error_feedback` for what each exchange makes of it.
    Properties: unbiased if the compressor is; the average is bit-identical on all
    workers; nothing is owed, so what is lost is lost.
    Placement: replicated, but for the server residual under ``exchange="two_phase"``.

    Args:
      compressor: An :class:`efopt.Compressor`.
      axis_name: As for :func:`efopt.error_feedback`.
      exchange: As there.
      start: As there.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, a leaf is not floating-point, or an
        option is of another type.
      ValueError: If the exchange is unknown or cannot carry the compressor; at trace
        time, if the axis is not bound or updates are already averaged.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.compress(efopt.sign(), axis_name="data", exchange="majority_vote")
      >>> grads = jnp.array([[1.0, -2.0], [3.0, 1.0], [-1.0, -1.0]])  # 3 workers
      >>> state = efopt.stack_workers(tx.init(jnp.zeros(2)), 3)
      >>> step = jax.jit(jax.vmap(tx.update, axis_name="data"))
      >>> print(step(grads, state)[0][0])
      [ 1. -1.]

    References:
      Bernstein et al, `signSGD with Majority Vote is Communication Efficient And Fault
      Tolerant <https://arxiv.org/abs/1810.05291>`_, 2018 (Algorithm 1)
    """
    link = open_link(
        "compress", compressor, axis_name=axis_name, exchange=exchange, start=start
    )

    def init_fn(params: Any) -> Any:
        return CompressState(jnp.zeros([], jnp.int32), link.init(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        got = link.average(link.receive(updates), state.link, state.count)
        return got.mean, CompressState(optax.safe_increment(state.count), got.state)

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))
