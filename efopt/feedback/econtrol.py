"""EControl: estimates that are moved, and errors that are paid back with a gain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.feedback.estimate import Estimate, tell
from efopt.feedback.rates import hold, rates
from efopt.feedback.residual import open_residual, placed
from efopt.ground import checks
from efopt.ground.dtypes import wide, wide_zeros
from efopt.workers import node
from efopt.workers.axes import AxisName


class EControlState(NamedTuple):
    """State of :func:`econtrol`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      own: What all know of this worker's updates, shaped like the parameters, at least
        float32. A :class:`efopt.PerWorker` if there is an axis; ``()`` without
        ``estimate``.
      mean: The mean of that over workers, which is what comes out; ``()`` as well.
      residual: What this worker still owes, shaped like the parameters. A
        :class:`efopt.PerWorker` if there is an axis.
      link: The compressor's own state and the owners' residual, an
        :class:`efopt.exchanges.LinkState`.
      last_rate: The last learning rate that was not zero, zero before the first step.
        shape=(), float32. ``()`` if no learning rate was given.
    """

    count: jax.typing.ArrayLike
    own: Any
    mean: Any
    residual: Any
    link: Any
    last_rate: Any


class ContractiveEControlState(EControlState):
    """An :class:`EControlState` whose residual a ``memory`` stores.

    Attributes:
      residual: What this worker still owes: the payload of each leaf, arrays with the
        block axis first. A :class:`efopt.PerWorker` if there is an axis.
    """

    __slots__ = ()

    def placed(self, mesh: Any, spec_of: Any) -> "ContractiveEControlState":
        """The state laid out for a mesh: payloads are those of shards, made anew."""
        return placed(self, mesh, spec_of)


@checks.keyword_only
def econtrol(
    compressor: Compressor,
    *,
    gain: float = 0.1,
    estimate: bool = True,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    residual_dtype: jax.typing.DTypeLike | None = None,
    memory: Compressor | None = None,
    start: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates by the changes of estimates, and pays errors with a gain.

    .. math::
      c_i = C(g_i + \eta e_i - h_i), \quad
      h_i \leftarrow h_i + c_i, \quad
      h \leftarrow h + \frac{1}{n} \sum_i c_i, \quad
      e_i \leftarrow e_i + g_i - h_i, \quad u = h

    with the gain ``eta`` and the new ``h_i`` in the last of them. The estimate makes
    workers with different gradients no burden, as in :func:`efopt.feedback.ef21`; the
    error keeps account of all that the estimates were late with, so that nothing of a
    stochastic gradient is lost: parameters minus learning rate times the mean of the
    ``e_i`` (:func:`efopt.virtual_params`) follow SGD exactly, with small batches and
    without momentum.

    ==========================  ========================================================
    ``gain=1, estimate=False``  classic error feedback, :func:`efopt.error_feedback`
    ``gain=0``                  EF21 with an error that nobody reads: take
                                :func:`efopt.feedback.ef21`
    ``gain < 1`` in between     EControl; with ``estimate=False`` what is owed is paid
                                in part
    ==========================  ========================================================

    *The gain.* Theory wants it near the compressor's ``delta``; the authors ran 0.1. A
    gain of one with estimates pays everything at once and on top of what is estimated:
    for coarse compressors it oscillates, and may diverge.

    *Where the learning rate stands.* As for :func:`efopt.error_feedback`: under a
    schedule pass it as ``learning_rate``, and errors keep their units. At a rate of
    zero everything is held.

    *Both ways.* With ``exchange="two_phase"`` the mean is sent compressed as well, and
    what it lacks is no part of any worker's error: the law then holds only up to the
    server residuals of all steps.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step, as
    :func:`efopt.error_feedback`.
    Properties: conservative: the mean of (updates in + old errors) is what is applied
    and the mean of the new ones, but for ``two_phase``; with the identity it is
    ``pmean`` up to rounding; the average is bit-identical on all workers.
    Placement: ``own``, ``residual`` and the link's ``server`` per worker, all else
    replicated: two trees like the parameters per worker, and one that is equal on all.

    Args:
      compressor: An :class:`efopt.Compressor`, contractive.
      gain: The share of the error that is said at a step, in (0, 1]. Static.
      estimate: Whether what is sent is the change of an estimate. Static.
      axis_name: As for :func:`efopt.error_feedback`.
      exchange: As there.
      learning_rate: As there.
      residual_dtype: As there.
      memory: What stores the error compressed, as in
        :func:`efopt.contractive_error_feedback`; ``None``: nothing does. Never sent.
        Estimates are kept exact: the mean was moved by all that was sent.
      start: Steps that are averaged uncompressed first, at least 0; the estimates learn
        from them. ``1`` is the start of the paper's experiments. Static.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` or ``memory`` is none, ``gain`` no Python number,
        ``estimate`` no bool, or ``residual_dtype`` or a leaf not floating-point.
      ValueError: If the gain is out of range, or as :func:`efopt.error_feedback`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.feedback.econtrol(efopt.top_k(k=1), gain=0.5)
      >>> grads = jnp.array([1.0, -3.0])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, state.residual)
      [ 0. -3.] [1. 0.]
      >>> updates, state = tx.update(grads, state)  # 1, and half of what is owed
      >>> print(updates, state.residual)
      [ 1.5 -3. ] [0.5 0. ]

    References:
      Gao et al, `EControl: Fast Distributed Optimization with Compression and Error
      Control <https://arxiv.org/abs/2311.05645>`_, 2023 (Algorithm 2)
    """
    api = "econtrol"
    if not 0 < checks.static_float(api, "gain", gain) <= 1:
        cure = "" if gain else "; without one take `efopt.feedback.ef21`"
        raise ValueError(f"`{api}(gain=...)` must be in (0, 1], got {gain}{cure}.")
    checks.static_bool(api, "estimate", estimate)
    checks.static_int(api, "start", start, least=0)
    link = open_link(api, compressor, axis_name=axis_name, exchange=exchange)
    store = open_residual(api, residual_dtype, memory, None, None)
    state_of = EControlState if memory is None else ContractiveEControlState

    def init_fn(params: Any) -> Any:
        zeros = link.zeros(params)
        return state_of(
            count=jnp.zeros([], jnp.int32),
            own=link.wrap(zeros, rule="mean") if estimate else (),
            mean=zeros if estimate else (),
            residual=store.marked(link, params),
            link=link.init(params),
            last_rate=() if learning_rate is None else jnp.zeros([], jnp.float32),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        state = node.laid_out(state) if start else state
        own, owed = link.unwrap(state.own), link.unwrap(state.residual)
        turn = link.turn(state.count)
        updates = store.receive(link, updates, owed)
        rate, last, ratio = rates(learning_rate, state.count, state.last_rate)
        # 2311.05645 Algorithm 2: c = C(eta e + g - h), h <- h + c,
        e = store.recall(wide_zeros(updates), owed, turn, ratio)
        say = jax.tree.map(lambda g, e: wide(g) + gain * e, updates, e)
        known = Estimate(own, state.mean)
        told = tell(
            link, say, known, state.link, state.count, like=updates, start=start
        )
        # e <- e + g - h, of which g + eta e - h is what is lost
        lost = jax.tree.map(lambda x, e: x + (1 - gain) * e, told.lost, e)
        keep = store.keeper(updates, owed, turn, ratio) or (lambda lost: lost)
        residual = keep(lost)
        out, new = told.out, (*told.estimate, residual, told.link)
        if rate is not None:
            out, new = hold(rate, out, new, (*known, owed, state.link))
        own, mean, residual, link_state = new
        own, residual = link.wrap(own, state.own), link.wrap(residual, state.residual)
        count = optax.safe_increment(state.count)
        return out, state_of(count, own, mean, residual, link_state, last)

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))
