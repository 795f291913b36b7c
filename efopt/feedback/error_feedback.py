"""Error feedback: what compression loses in one step is added to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.feedback.rates import hold, rates
from efopt.feedback.residual import open_residual, placed
from efopt.ground.checks import keyword_only
from efopt.workers.axes import AxisName


class ErrorFeedbackState(NamedTuple):
    """State of :func:`error_feedback`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      residual: What this worker still owes, shaped like the parameters. A
        :class:`efopt.PerWorker` if there is an axis.
      link: The compressor's own state and the owners' residual, an
        :class:`efopt.exchanges.LinkState`.
      last_rate: The last learning rate that was not zero, zero before the first step.
        shape=(), float32. ``()`` if no learning rate was given.
    """

    count: jax.typing.ArrayLike
    residual: Any
    link: Any
    last_rate: Any


class ContractiveErrorFeedbackState(ErrorFeedbackState):
    """An :class:`ErrorFeedbackState` whose residual a ``memory`` stores.

    Attributes:
      residual: What this worker still owes: the payload of each leaf, arrays with the
        block axis first. A :class:`efopt.PerWorker` if there is an axis.
    """

    __slots__ = ()

    def placed(self, mesh: Any, spec_of: Any) -> "ContractiveErrorFeedbackState":
        """The state laid out for a mesh: payloads are those of shards, made anew."""
        return placed(self, mesh, spec_of)


@keyword_only
def error_feedback(
    compressor: Compressor,
    *,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    residual_dtype: jax.typing.DTypeLike | None = None,
    memory: Compressor | None = None,
    damping: float | None = None,
    form: str | None = None,
    start: int = 0,
    delay: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates over workers, compressed, and owes what compression lost.

    .. math::
      p_i = g_i + \frac{\gamma_{t-1}}{\gamma_t} e_i, \quad
      u = \frac{1}{n} \sum_i C(p_i), \quad
      e_i \leftarrow p_i - C(p_i)

    With any contractive compressor this converges like uncompressed SGD. Nothing is
    ever lost: the mean over workers of (updates in + old residual) equals the average
    applied plus the mean of the new residuals, plus the change of the server residual.

    *Where the learning rate stands.* ``chain(scale_by_learning_rate(lr),
    error_feedback(C))`` is the paper's algorithm to the letter: the residual is in
    units of parameters, and parameters minus the mean residual follow SGD exactly. In
    the usual Optax order, ``chain(error_feedback(C), sgd(lr))``, the residual is in
    units of gradients; the two agree for a constant rate and a positively homogeneous
    ``C``: scaled signs, top-k, random coordinates, PowerSGD, sketches, but neither
    ``sign``, ``threshold``, ``natural`` nor what rounds to a grid. Under a schedule
    pass the same schedule as ``learning_rate``: the factor above then keeps parameters
    minus rate times residual on SGD's path. At a rate of zero nothing is sent or owed:
    updates are zero and the residual is held; a rate below 2^-64 of the last is zero.

    *What stands around it.* State in front of it must be each worker's own, for example
    ``per_worker(optax.trace(0.9), axis_name=...)`` for local momentum. Momentum behind
    a coarse compressor such as :func:`efopt.scaled_sign` amplifies the residual's
    delayed bursts and does not train at ordinary rates: put it in front.

    ==================================  ================================================
    for                                 write
    ==================================  ================================================
    other leaves uncompressed           ``optax.partition`` with ``compress(identity(),
                                        axis_name=...)`` for them
    frozen leaves, LoRA                 ``optax.partition`` with
                                        :func:`efopt.feedback.frozen` for them, at no
                                        bytes; ``optax.set_to_zero`` is refused there by
                                        ``jax.shard_map``
    ``optax.selective_transform``       ``chain(selective_transform(tx, freeze_mask=m),
                                        masked(frozen(), m))``, at no bytes
    ``chain(optax.freeze(m), tx)``      works, and sends the zeros
    gradients of several mini-batches   :func:`efopt.accumulate`
    steps that are not finite           :func:`efopt.watch.skip_not_finite` around the
                                        whole chain
    two levels of axes                  one feedback, over the slow axis, behind
                                        ``compress(identity(), axis_name=fast)``
    ``optax.MultiSteps``,               do not: their branch may differ between workers
    ``optax.apply_if_finite``, other
    conditional wrappers
    ``optax.masked(tx, m)``             do not: the other leaves stay un-averaged
    two feedbacks in one chain          do not, if over two axes: the first's residual
                                        would differ along both
    ==================================  ================================================

    *The residual* is kept exact, or compressed by ``memory``: see
    :func:`efopt.contractive_error_feedback`, which is the same transformation by the
    name of its paper. It keeps the dtype that it comes in, also if the state was cast
    or gradients are wider than the parameters.

    *Warm-up.* For ``start`` steps updates are averaged uncompressed and nothing is
    owed: while a network finds its scale, gradients are large and change quickly, and
    what is owed of them is soon wrong. The program then holds both exchanges, each in a
    branch that all workers take together.

    *An exchange that hides.* With ``delay=1`` a step exchanges the payloads of the step
    before, which wait in the state, encoded; what it applies is one step old. The
    exchange then depends on nothing of the step, and a compiler may carry it while the
    gradients are computed: on a slow network a step need not wait for it. The first
    update is zero. Parameters minus rate times the mean of (residual + what is in
    flight) follow SGD as before; with the identity this is SGD on gradients that are
    one step old. For compressors that send one message.

    *Exchanges*, for ``n`` workers and a payload of ``b`` bytes over all leaves, in
    bytes that leave each worker: ``all_reduce`` (linear compressors) ``2 b (n-1)/n``,
    one collective per dtype; ``all_gather`` ``b (n-1)``, one collective; ``two_phase``
    (blocked compressors) ``2 b (n-1)/n``, two collectives, with a residual for the
    second compression that is split over the workers; ``majority_vote`` (signs)
    ``2 b (n-1)/n``, two collectives.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: conservative, as above; converges for any contraction ``delta > 0``; the
    average is bit-identical on all workers; with the identity it is ``pmean``.
    Placement: ``residual`` and the link's ``server`` per worker, all else replicated.
    Place the state with :func:`efopt.distribute` or :func:`efopt.stack_workers`.

    Args:
      compressor: An :class:`efopt.Compressor`.
      axis_name: The mapped axis to average over, or a tuple of axes; ``None`` for the
        single-worker algorithm.
      exchange: An :class:`efopt.exchanges.Exchange` or its name: ``"all_reduce"``,
        ``"all_gather"``, ``"two_phase"``, ``"majority_vote"``; ``None``: all-reduce for
        linear compressors, all-gather for others.
      learning_rate: The rate or schedule that is applied *after* this transformation,
        to keep the residual's units under a schedule. ``None``: never rescale.
      residual_dtype: The dtype that the residual is kept in. ``None``: float32, or the
        leaf's dtype where that is wider. A narrower one loses part of what is owed.
        With ``memory``, the dtype of what that stores unchanged.
      memory: What stores the residual compressed, as in
        :func:`efopt.contractive_error_feedback`; ``None``: nothing does. Never sent.
      damping: As there.
      form: As there.
      start: Steps that are averaged uncompressed first, at least 0. Static.
      delay: Steps that a payload waits before it is exchanged: 0 or 1. Static.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` or ``memory`` is none, ``residual_dtype`` or a leaf
        is not floating-point, or an option is of another type.
      ValueError: If the exchange is unknown or cannot carry the compressor, or the
        memory cannot keep a residual; if ``delay`` is neither 0 nor 1, or meets a
        compressor that speaks in rounds or a ``start``; at trace time, if the axis is
        not bound, updates are already averaged or differ from what ``init`` saw, or the
        state was not placed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.error_feedback(efopt.top_k(k=1))
      >>> state = tx.init(jnp.zeros(3))
      >>> updates, state = tx.update(jnp.array([1.0, -3.0, 2.0]), state)
      >>> print(updates, state.residual)
      [ 0. -3.  0.] [1. 0. 2.]

    References:
      Karimireddy et al, `Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes <https://arxiv.org/abs/1901.09847>`_, 2019 (Algorithms 1 and 2)
      Zheng et al, `Communication-Efficient Distributed Blockwise Momentum SGD with
      Error-Feedback <https://arxiv.org/abs/1905.10936>`_, 2019 (the learning-rate
      ratio)
    """
    return feedback_through(
        "error_feedback",
        compressor,
        axis_name=axis_name,
        exchange=exchange,
        learning_rate=learning_rate,
        residual_dtype=residual_dtype,
        memory=memory,
        damping=damping,
        form=form,
        start=start,
        delay=delay,
    )


def feedback_through(
    api: str,
    compressor: Compressor,
    *,
    axis_name: Any,
    exchange: Any,
    learning_rate: Any,
    residual_dtype: Any,
    memory: Any,
    damping: Any,
    form: Any,
    start: Any,
    delay: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """:func:`error_feedback`, under the name by which it was called."""
    link = open_link(
        api,
        compressor,
        axis_name=axis_name,
        exchange=exchange,
        start=start,
        delay=delay,
    )
    store = open_residual(api, residual_dtype, memory, damping, form)
    state_of = ErrorFeedbackState if memory is None else ContractiveErrorFeedbackState

    def init_fn(params: Any) -> Any:
        return state_of(
            count=jnp.zeros([], jnp.int32),
            residual=store.marked(link, params),
            link=link.init(params),
            last_rate=() if learning_rate is None else jnp.zeros([], jnp.float32),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        owed, turn = link.unwrap(state.residual), link.turn(state.count)
        updates = store.receive(link, updates, owed)
        rate, last, ratio = rates(learning_rate, state.count, state.last_rate)

        # 1901.09847 Algorithm 2, 1905.10936 Algorithm 2: p = g + (rate' / rate) e,
        p = store.recall(updates, owed, turn, ratio)
        # u = mean of C(p), e <- p - C(p); 2312.08538: e kept as its memory's payload
        got = link.average(
            p,
            state.link,
            state.count,
            like=updates,
            ratio=ratio,
            keep=store.keeper(updates, owed, turn, ratio),
        )
        out, new = got.mean, (got.lost, got.state)
        if rate is not None:
            out, new = hold(rate, out, new, (owed, state.link))
        count = optax.safe_increment(state.count)
        residual, link_state = new
        residual = link.wrap(residual, state.residual)
        return out, state_of(count, residual, link_state, last)

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))
