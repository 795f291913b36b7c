"""EF21: each worker sends the compressed change of what is known of its gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.feedback.estimate import Estimate, recalled, tell
from efopt.ground import checks
from efopt.ground.dtypes import wide
from efopt.workers import node
from efopt.workers.axes import AxisName


class EF21State(NamedTuple):
    """State of :func:`ef21`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      ema: The running mean of this worker's updates, shaped like the parameters. A
        :class:`efopt.PerWorker` if there is an axis; ``()`` without ``beta``.
      own: What all know of this worker's updates, shaped like the parameters, at least
        float32. A :class:`efopt.PerWorker` if there is an axis.
      mean: The mean of that over workers, which is what comes out. Equal on all.
      link: The compressor's own state and the owners' residual, an
        :class:`efopt.exchanges.LinkState`.
    """

    count: jax.typing.ArrayLike
    ema: Any
    own: Any
    mean: Any
    link: Any


@checks.keyword_only
def ef21(
    compressor: Compressor,
    *,
    beta: float | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    start: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates over workers by the compressed changes of their estimates.

    .. math::
      v_i \leftarrow \beta v_i + (1 - \beta) g_i, \quad
      c_i = C(v_i - h_i), \quad
      h_i \leftarrow h_i + c_i, \quad
      h \leftarrow h + \frac{1}{n} \sum_i c_i, \quad u = h

    where ``v_i = g_i`` without ``beta``. Error feedback owes what was lost and pays it
    in bursts; at a constant rate it stops at a distance from the optimum that grows
    with the differences between workers. Here every worker has an estimate ``h_i`` that
    all know of, and sends what is new. As gradients settle changes go to zero, and what
    compression loses with them: with exact gradients it converges to the optimum at a
    constant rate, whatever the workers' differences. What comes out is as smooth as a
    gradient: a schedule needs no rescaling, and Adam or Muon may stand behind it.

    *Noise.* With small batches the estimate follows the noise of single steps and never
    gets hold of the gradient; in the published counter-example, top-1 of two
    coordinates, it does not converge with any batch size. ``beta=0.9`` is EF21-SGDM,
    which does: the estimate follows a running mean. That is momentum already; a second
    one behind it (``optax.sgd(lr, momentum=0.9)``, Adam's first) averages twice, and
    calls for less of both.

    *The start.* By default estimates begin at zero, and the first steps fill them in;
    ``start=1`` is that of the papers' experiments: the first updates are sent whole,
    at least in float32, and are the first running means and estimates.

    *Both ways.* With ``exchange="two_phase"`` the owners of ranges of blocks send the
    compressed change of the mean, and keep what it has lost in their server residual:
    that is EF21-BC. :func:`efopt.error_feedback` with one owes old updates; here what
    is owed is the distance to the mean of all estimates as they are now.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step, as
    :func:`efopt.error_feedback`; ``n`` workers keep one estimate each, and its mean.
    Properties: not conservative; with the identity it is ``pmean`` up to rounding, or
    the running mean of it; the mean of all ``h_i`` is ``h`` and the server residual, up
    to the rounding of sums; the average is bit-identical on all workers. Estimates are
    kept exact: the mean was moved by all that was sent, and an estimate that forgot a
    part of it would part from the mean for good. So do sums that are rounded on their
    way: give linear compressors updates in float32.
    Placement: ``ema``, ``own`` and the link's ``server`` per worker, all else
    replicated: one tree like the parameters per worker, two with ``beta``, and one
    that is equal on all.

    Args:
      compressor: An :class:`efopt.Compressor`, contractive.
      beta: Decay of the running mean in front, in [0, 1); ``None``: none. The paper's
        eta is one minus it, 0.1 in its authors' code. Static.
      axis_name: As for :func:`efopt.error_feedback`.
      exchange: As there.
      start: Steps that are averaged uncompressed first, at least 0; the estimates learn
        from them. Static.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is none, ``beta`` no Python number, or a leaf not
        floating-point.
      ValueError: If ``beta`` is out of range, or the exchange unknown or unable to
        carry the compressor; at trace time, if the axis is not bound, updates are
        already averaged or differ from what ``init`` saw, or the state was not placed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.feedback.ef21(efopt.top_k(k=1))
      >>> grads = jnp.array([1.0, -3.0])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, tx.update(grads, state)[0])  # known after two steps
      [ 0. -3.] [ 1. -3.]

    References:
      Richtarik et al, `EF21: A New, Simpler, Theoretically Better, and Practically
      Faster Error Feedback <https://arxiv.org/abs/2106.05203>`_, 2021 (Algorithm 2)
      Fatkhullin et al, `Momentum Provably Improves Error Feedback!
      <https://arxiv.org/abs/2305.15155>`_, 2023 (EF21-SGDM)
      Fatkhullin et al, `EF21 with Bells & Whistles <https://arxiv.org/abs/2110.03294>`_,
      2021 (EF21-BC, compression both ways)
    """
    if beta is not None and checks.static_float("ef21", "beta", beta) >= 1:
        raise ValueError(f"`ef21(beta=...)` must be in [0, 1), got {beta}.")
    checks.static_int("ef21", "start", start, least=0)
    link = open_link("ef21", compressor, axis_name=axis_name, exchange=exchange)

    def init_fn(params: Any) -> Any:
        zeros = link.zeros(params)
        return EF21State(
            count=jnp.zeros([], jnp.int32),
            ema=() if beta is None else link.wrap(zeros, rule="mean"),
            own=link.wrap(zeros, rule="mean"),
            mean=zeros,
            link=link.init(params),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        state = node.laid_out(state) if start else state
        own = link.unwrap(state.own)
        updates = link.receive(updates, own)
        say, ema = jax.tree.map(wide, updates), ()
        if beta is not None:
            first = state.count == 0 if start else None
            say = recalled(updates, link.unwrap(state.ema), beta, first)
            ema = link.wrap(say, state.ema)
        known = Estimate(own, state.mean)
        told = tell(
            link, say, known, state.link, state.count, like=updates, start=start
        )
        own = link.wrap(told.estimate.own, state.own)
        count = optax.safe_increment(state.count)
        return told.out, EF21State(count, ema, own, told.estimate.mean, told.link)

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))
