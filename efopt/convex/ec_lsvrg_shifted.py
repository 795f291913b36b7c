"""EC-LSVRG of Qian et al: a learned shift that is added behind the feedback."""

from typing import Any, NamedTuple

import jax
import optax

from efopt.compressors import Compressor
from efopt.convex.ec_sgd import check_contractive
from efopt.convex.lsvrg import lsvrg
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.feedback import error_feedback
from efopt.ground import checks
from efopt.workers.axes import AxisName


class EcLsvrgShiftedState(NamedTuple):
    """State of :func:`ec_lsvrg_shifted`.

    Attributes:
      estimator: The state of :func:`efopt.convex.lsvrg`.
      shift: What this worker has told of its gradient at the reference point, shaped
        like the parameters, at least float32. A :class:`efopt.PerWorker` if there is an
        axis.
      mean: The mean of the workers' shifts. Equal on all workers.
      link: The state of the shift compressor.
      schedule: The state of the learning rate.
      feedback: The state of the error feedback: an
        :class:`efopt.feedback.ErrorFeedbackState`.
    """

    estimator: Any
    shift: Any
    mean: Any
    link: Any
    schedule: Any
    feedback: Any


@checks.keyword_only
def ec_lsvrg_shifted(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    probability: float,
    shift_compressor: Compressor | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback with minibatches and a learned shift, both compressed coarsely.

    .. math::
      p_i &= \gamma (\nabla f_{ij}(x) - \nabla f_{ij}(w) + \nabla f_i(w) - h_i) + e_i,
      \quad e_i \leftarrow p_i - C(p_i) \\
      x &\leftarrow x - \frac{1}{n} \sum_i C(p_i) - \gamma \bar h, \quad
      h_i \leftarrow h_i + C_1(\nabla f_i(w) - h_i), \quad
      \bar h = \frac{1}{n} \sum_i h_i

    Published as EC-LSVRG, and unlike :func:`efopt.convex.ec_lsvrg` free of a stall.
    Compared with :func:`efopt.convex.ec_lsvrg_diana` the shift follows the gradient at
    the reference point, which stands still most of the time: a biased compressor such
    as :func:`efopt.top_k` will do for it, at full speed. The workers' mean shift is
    known to all and does not go through the compressor. It is called as
    :func:`efopt.convex.lsvrg` is::

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
        contractive for a leaf; at trace time, as :func:`efopt.convex.lsvrg`.

    Examples:
      >>> import efopt
      >>> tx = efopt.convex.ec_lsvrg_shifted(
      ...     efopt.top_k(k=1), 0.1, probability=1 / 50, axis_name="data")

    References:
      Qian et al, `Error Compensated Loopless SVRG, Quartz, and SDCA for Distributed
      Optimization <https://arxiv.org/abs/2109.10049>`_, 2021 (EC-LSVRG)
    """
    api = "ec_lsvrg_shifted"
    shifts = compressor if shift_compressor is None else shift_compressor
    estimator = lsvrg(probability, axis_name=axis_name, coin="shared", seed=seed)
    link = open_link(api, shifts, axis_name=axis_name, role="shifts")
    minus_gamma = optax.scale_by_learning_rate(learning_rate)
    feedback = error_feedback(
        compressor, axis_name=axis_name, exchange=exchange, learning_rate=-1.0
    )

    def init_fn(params: Any) -> Any:
        check_contractive(api, compressor, params)
        check_contractive(api, shifts, params)
        zeros = link.zeros(params)
        return EcLsvrgShiftedState(
            estimator=estimator.init(params),
            shift=link.wrap(zeros, rule="mean"),
            mean=zeros,
            link=link.init(params),
            schedule=minus_gamma.init(params),
            feedback=feedback.init(params),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        shift = link.unwrap(state.shift)
        # 2109.10049, EC-LSVRG: g_i = grad f_ij(x) - grad f_ij(w) + grad f_i(w) - h_i
        point: Any
        estimate, point = estimator.update(
            updates, state.estimator, params, **extra_args
        )
        estimate = jax.tree.map(lambda g, h: g - h.astype(g.dtype), estimate, shift)
        # -gamma g_i and -gamma mean_i h_i, by the shifts in front of this step
        scaled: Any
        scaled, schedule = minus_gamma.update((estimate, state.mean), state.schedule)
        step, drift = scaled
        # x = x - mean C(p_i) - gamma mean h_i, where p_i = gamma g_i + e_i
        average, residual = feedback.update(step, state.feedback)
        out = jax.tree.map(lambda q, h: q + h.astype(q.dtype), average, drift)

        # h_i = h_i + C_1(grad f_i(w) - h_i), and so their mean
        target = link.receive(link.unwrap(point.gradient), like=shift)
        new = jax.tree.map(lambda f, h: f.astype(h.dtype) - h, target, shift)
        count = state.estimator.count
        got = link.average(new, state.link, count, like=target, wide=True)
        sent = optax.tree.sub(new, got.lost)
        return out, EcLsvrgShiftedState(
            estimator=point,
            shift=link.wrap(optax.tree.add(shift, sent), state.shift),
            mean=optax.tree.add(state.mean, got.mean),
            link=got.state,
            schedule=schedule,
            feedback=residual,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
