"""EC-LSVRG of Qian et al: a learned shift that is added behind the feedback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.compressors import Compressor
from efopt.convex import lsvrg
from efopt.convex.ec_sgd import check_contractive
from efopt.exchanges.link import open_link
from efopt.feedback import error_feedback
from efopt.ground.dtypes import compute_dtype
from efopt.workers.node import unwrap, wrap


class EcLsvrgShiftedState(NamedTuple):
    """State of :func:`ec_lsvrg_shifted`.

    Attributes:
      estimator: The state of :func:`efopt.lsvrg`.
      shift: What this worker has told of its gradient at the reference point, shaped
        like the parameters, at least float32. A :class:`efopt.PerWorker` if there is an
        axis.
      mean: The mean of the workers' shifts. Equal on all workers.
      memory: The shift compressor's own state for each leaf, ``()`` if it has none.
      rate: The state of the learning rate.
      feedback: The state of the error feedback: an :class:`efopt.ErrorFeedbackState`.
    """

    estimator: Any
    shift: Any
    mean: Any
    memory: Any
    rate: Any
    feedback: Any


def ec_lsvrg_shifted(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    probability: float,
    shift_compressor: Compressor | None = None,
    axis_name: str | None = None,
    exchange: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback with minibatches and a learned shift, both compressed coarsely.

    .. math::
      p_i &= \gamma (\nabla f_{ij}(x) - \nabla f_{ij}(w) + \nabla f_i(w) - h_i) + e_i,
      \quad e_i \leftarrow p_i - C(p_i) \\
      x &\leftarrow x - \frac{1}{n} \sum_i C(p_i) - \gamma \bar h, \quad
      h_i \leftarrow h_i + C_1(\nabla f_i(w) - h_i), \quad
      \bar h = \frac{1}{n} \sum_i h_i

    Published as EC-LSVRG, and unlike :func:`efopt.ec_lsvrg` free of a stall. Compared
    with :func:`efopt.ec_lsvrg_diana` the shift follows the gradient at the reference
    point, which stands still most of the time: a biased compressor such as
    :func:`efopt.top_k` will do for it, at full speed. The workers' mean shift is known
    to all and does not go through the compressor. It is called as :func:`efopt.lsvrg`
    is::

      tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``payload_bits`` of both compressors per leaf, worker and step.
    Properties: linear to the optimum; parameters minus the mean residual
    (:func:`efopt.virtual_params`) walk the path of L-SVRG.
    Placement: the residual, the shift and the reference gradient per worker, all else
    replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule; for the last digits a constant, at most one
        over the smoothness of the largest term.
      probability: Of the reference point to move, in (0, 1]; usually one over the
        number of a worker's minibatches.
      shift_compressor: A contractive :class:`efopt.Compressor` for the shifts;
        ``None``: ``compressor``.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How gradients meet; ``None`` for the compressor's own way.
      seed: Of the coin, which all workers share.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If a compressor is not one or an option is of another type.
      ValueError: If an option is out of range; from ``init``, if a compressor is not
        contractive for a leaf; at trace time, as :func:`efopt.lsvrg`.

    Examples:
      >>> import efopt
      >>> tx = efopt.ec_lsvrg_shifted(efopt.top_k(k=1), 0.1, 1 / 50, axis_name="data")

    References:
      Qian et al, `Error Compensated Loopless SVRG, Quartz, and SDCA for Distributed
      Optimization <https://arxiv.org/abs/2109.10049>`_, 2021 (EC-LSVRG)
    """
    api = "ec_lsvrg_shifted"
    shifts = compressor if shift_compressor is None else shift_compressor
    estimator = lsvrg(probability, axis_name, "shared", seed)
    channel = open_link(api, shifts, axis_name, None)
    rate = optax.scale_by_learning_rate(learning_rate)
    feedback = error_feedback(
        compressor, axis_name=axis_name, exchange=exchange, learning_rate=-1.0
    )

    def init_fn(params: Any) -> Any:
        check_contractive(api, compressor, params)
        check_contractive(api, shifts, params)
        zeros = jax.tree.map(
            lambda p: jnp.zeros(jnp.shape(p), compute_dtype(jnp.result_type(p))), params
        )
        return EcLsvrgShiftedState(
            estimator=estimator.init(params),
            shift=wrap(zeros, axis_name),
            mean=zeros,
            memory=channel.init(params)[0],
            rate=rate.init(params),
            feedback=feedback.init(params),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        inner: Any
        estimate, inner = estimator.update(
            updates, state.estimator, params, **extra_args
        )
        shift = unwrap(f"`{api}`", state.shift)
        fresh = jax.tree.map(lambda g, h: g - h.astype(g.dtype), estimate, shift)
        scaled: Any
        scaled, rate_state = rate.update((fresh, state.mean), state.rate)
        steps, drift = scaled
        average, owed = feedback.update(steps, state.feedback)
        out = jax.tree.map(lambda q, h: q + h.astype(q.dtype), average, drift)

        # The shifts follow the gradients at the reference point, as of this step.
        target = unwrap(f"`{api}`", inner.gradient)
        inbound = channel.receive(target, state.estimator.count, shift)
        new = jax.tree.map(lambda f, h: f.astype(h.dtype) - h, target, shift)
        told = inbound.join(jax.tree.leaves(new))
        means, rests, memory, _ = channel.average(inbound, told, state.memory, ())
        averages = [mean.decode() for mean in means]
        sent = [x - rest for x, rest in zip(told, rests, strict=True)]
        like = jax.tree.leaves(shift)

        def learn(h, heard):
            return jax.tree.map(jnp.add, h, inbound.part(heard, like))

        return out, EcLsvrgShiftedState(
            estimator=inner,
            shift=wrap(learn(shift, sent), axis_name),
            mean=learn(state.mean, averages),
            memory=memory,
            rate=rate_state,
            feedback=owed,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
