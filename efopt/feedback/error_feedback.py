"""Error feedback: what compression loses in one step is added to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.codec import compute_dtype
from efopt.codecs.compressor import Compressor
from efopt.exchanges.link import open_channel
from efopt.feedback.parts import applied, check_float_dtype, hold, rates, unpaid
from efopt.ground import bits
from efopt.workers.node import unwrap, wrap


class ErrorFeedbackState(NamedTuple):
    """State of :func:`error_feedback`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      residual: What this worker still owes, shaped like the parameters. A
        :class:`efopt.PerWorker` if there is an axis.
      memory: The compressor's own state for each leaf, ``()`` if it has none. Equal on
        all workers.
      server: What the owners of ranges still owe, under ``exchange="two_phase"``: one
        :class:`efopt.PerWorker` per group of blocks, at least float32. Else ``()``.
      learning_rate: The last learning rate that was not zero, zero before the first
        step. shape=(), float32. ``()`` if no learning rate was given.
    """

    count: jax.typing.ArrayLike
    residual: Any
    memory: Any
    server: Any
    learning_rate: Any


def error_feedback(
    compressor: Compressor,
    axis_name: str | None = None,
    exchange: str | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    residual_dtype: jax.typing.DTypeLike | None = None,
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
    ``C``, such as all of efopt's but :func:`efopt.sign`. Under a schedule pass the same
    schedule as
    ``learning_rate``: the factor above then keeps parameters minus rate times residual
    on SGD's path. At a rate of zero nothing is sent or owed: updates are zero and the
    residual is held.

    *What stands around it.* State in front of it must be each worker's own, for example
    ``per_worker(optax.trace(0.9), axis_name)`` for local momentum. Momentum behind a
    coarse compressor such as :func:`efopt.scaled_sign` amplifies the residual's delayed
    bursts and does not train at ordinary rates: put it in front. Do not wrap the
    exchange in ``optax.MultiSteps`` (use :func:`efopt.accumulate`),
    ``optax.apply_if_finite`` or other conditional wrappers, whose branch may differ
    between workers, nor in
    ``optax.masked``, which leaves the other leaves un-averaged: use ``optax.partition``
    with ``compress(identity(), axis_name)`` for them.

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
    Placement: ``residual`` and ``server`` per worker, all else replicated. Place the
    state with :func:`efopt.distribute` or :func:`efopt.stack_workers`.

    Args:
      compressor: An :class:`efopt.Compressor`.
      axis_name: The mapped axis to average over; ``None`` for the single-worker
        algorithm.
      exchange: ``"all_reduce"``, ``"all_gather"``, ``"two_phase"`` or
        ``"majority_vote"``; ``None`` for the compressor's own.
      learning_rate: The rate or schedule that is applied *after* this transformation,
        to keep the residual's units under a schedule. ``None``: never rescale.
      residual_dtype: The dtype that the residual is kept in. ``None``: float32, or the
        leaf's dtype where that is wider. A narrower one loses part of what is owed.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, ``residual_dtype`` or a leaf is not
        floating-point.
      ValueError: If the exchange is unknown or cannot carry the compressor; at trace
        time, if the axis is not bound, updates are already averaged or differ from what
        ``init`` saw, or the state was not placed.

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
    channel = open_channel("error_feedback", compressor, axis_name, exchange)
    check_float_dtype("error_feedback", "residual_dtype", residual_dtype)

    def init_fn(params: Any) -> Any:
        memory, server = channel.init(params)

        def zeros(p):
            dtype = residual_dtype or compute_dtype(jnp.result_type(p))
            return jnp.zeros(jnp.shape(p), dtype)

        return ErrorFeedbackState(
            count=jnp.zeros([], jnp.int32),
            residual=wrap(jax.tree.map(zeros, params), axis_name),
            memory=memory,
            server=server,
            learning_rate=() if learning_rate is None else jnp.zeros([], jnp.float32),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        residual = unwrap(channel.api, state.residual)
        inbound = channel.receive(updates, state.count, residual)
        old = jax.tree.leaves(residual)
        rate, last, ratio = rates(learning_rate, state)

        # p = g + (rate of last step / rate of this step) e, 1905.10936 Algorithm 2
        full = inbound.join(
            [_owed(g, e, ratio) for g, e in zip(inbound.arrays, old, strict=True)]
        )
        means, rests, memory, server = channel.average(
            inbound, full, state.memory, state.server, ratio
        )
        new = unpaid(inbound, means, rests)
        out = applied(inbound, [mean.decode() for mean in means])
        if residual_dtype is not None:
            new = [bits.cast(e, residual_dtype) for e in new]
        new = inbound.part(new, old)
        if rate is not None:
            out, (new, memory, server) = hold(
                rate,
                out,
                (new, memory, server),
                (residual, state.memory, state.server),
            )
        return out, ErrorFeedbackState(
            count=optax.safe_increment(state.count),
            residual=wrap(new, axis_name),
            memory=memory,
            server=server,
            learning_rate=last,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _owed(g: jax.Array, e: jax.Array, ratio: Any) -> jax.Array:
    """A leaf of the updates and what is owed of it, rescaled, in the compute dtype."""
    wide = compute_dtype(g.dtype)
    e = e if ratio is None else e * ratio.astype(e.dtype)
    return g.astype(wide) + e.astype(wide)
