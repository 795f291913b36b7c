"""The EC-SGD family: one template of error compensation behind five estimators.

What :func:`ec_sgd` says of the template holds for all of them. They differ in the
estimate ``u_i`` alone, which stands in front of the feedback, and each walks behind
(:func:`efopt.virtual_params`) the path of SGD with the same estimates.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efopt.compressors import Compressor
from efopt.convex.diana import diana
from efopt.convex.lsvrg import lsvrg
from efopt.convex.star import star
from efopt.exchanges.exchange import Exchange
from efopt.feedback import error_feedback
from efopt.ground import checks
from efopt.workers.axes import AxisName


@checks.keyword_only
def ec_sgd(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with error feedback, the first of a family; EC-GD with full gradients.

    .. math::
      p_i = \gamma u_i + e_i, \quad
      x \leftarrow x - \frac{1}{n} \sum_i C(p_i), \quad
      e_i \leftarrow p_i - C(p_i)

    Here ``u_i`` is the worker's gradient as it comes: :func:`efopt.ef_sgd` without its
    options. At a constant rate it stalls above the optimum, also with full gradients:
    workers whose data differ go on owing at the optimum what tells them apart. The
    family differs in ``u_i`` alone. :func:`efopt.convex.ec_gd_star` shows how much of a
    stall comes from that difference, :func:`efopt.convex.ec_sgd_diana` learns it,
    :func:`efopt.convex.ec_lsvrg` removes the noise of minibatches, and
    :func:`efopt.convex.ec_lsvrg_diana` has neither cause left.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: conservative; parameters minus the mean residual
    (:func:`efopt.virtual_params`) walk the path of SGD; with full gradients and
    identical workers linear to the optimum.
    Placement: the residual per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule; for the last digits a constant, at most one
        over the smoothness, of the largest term for minibatches.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None`` for the compressor's own way.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one.
      ValueError: If the exchange is unknown or cannot carry the compressor; from
        ``init``, if the compressor is not contractive for a leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.convex.ec_sgd(efopt.top_k(k=1), 0.1)
      >>> print(tx.update(jnp.array([1.0, -3.0]), tx.init(jnp.zeros(2)))[0])
      [0.  0.3]

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-SGD, EC-GD)
    """
    return error_compensated("ec_sgd", compressor, learning_rate, axis_name, exchange)


@checks.keyword_only
def ec_gd_star(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    reference_grads: Any,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EC-GD without what tells the workers apart at the optimum, for diagnosis.

    :func:`efopt.convex.ec_sgd` with :func:`efopt.convex.star` in front. Nobody knows
    the gradients at the optimum before the problem is solved: it shows what
    :func:`efopt.convex.ec_sgd_diana` can reach.

    .. math::
      u_i = \nabla f_i(x) - \nabla f_i(x^*) + \frac{1}{n} \sum_j \nabla f_j(x^*)

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: conservative; linear to the optimum with full gradients.
    Placement: the residual per worker, all else replicated.

    Args:
      compressor: As of :func:`efopt.convex.ec_sgd`, and so the three below.
      learning_rate: A float or a schedule.
      reference_grads: As of :func:`efopt.convex.star`.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As :func:`efopt.convex.ec_sgd`; at trace time, if there is
        not one reference gradient per worker.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> at_optimum = jnp.array([[1.0, 4.0], [-1.0, -4.0]])  # 2 workers
      >>> tx = efopt.convex.ec_gd_star(
      ...     efopt.top_k(k=1), 0.1, reference_grads=at_optimum, axis_name="data")

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-GD-star)
    """
    estimator = star(reference_grads, axis_name=axis_name)
    return error_compensated(
        "ec_gd_star", compressor, learning_rate, axis_name, exchange, estimator
    )


@checks.keyword_only
def ec_sgd_diana(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    shift_compressor: Compressor,
    alpha: float | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with error feedback for workers whose data differ; EC-GD-DIANA in full.

    :func:`efopt.convex.ec_sgd` with :func:`efopt.convex.diana` in front: a second
    message teaches everybody what each worker's gradient has of its own, so that it
    need not be owed.

    .. math::
      u_i = g_i - h_i + \bar h, \qquad
      h_i \leftarrow h_i + \alpha Q(g_i - h_i), \qquad
      \bar h = \frac{1}{n} \sum_i h_i

    With full gradients it converges to the optimum at a constant rate. With minibatches
    the noise remains: :func:`efopt.convex.ec_lsvrg_diana` removes that too.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``payload_bits`` of both compressors per leaf, worker and step.
    Properties: conservative; linear to the optimum with full gradients.
    Placement: residual and shift per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule.
      shift_compressor: An unbiased :class:`efopt.Compressor` for the shifts, such as
        ``random_k(k=1, unbiased=True)``.
      alpha: How fast shifts are learned, as of :func:`efopt.convex.diana`.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How gradients meet; shifts go their compressor's own way.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As :func:`efopt.convex.ec_sgd` of ``compressor``, and as
        :func:`efopt.convex.diana` of ``shift_compressor`` and ``alpha``.

    Examples:
      >>> import efopt
      >>> shifts = efopt.random_k(k=1, unbiased=True)
      >>> tx = efopt.convex.ec_sgd_diana(
      ...     efopt.top_k(k=1), 0.1, shift_compressor=shifts, axis_name="data")

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-SGD-DIANA, EC-GD-DIANA)
    """
    estimator = diana(shift_compressor, alpha=alpha, axis_name=axis_name)
    return error_compensated(
        "ec_sgd_diana", compressor, learning_rate, axis_name, exchange, estimator
    )


@checks.keyword_only
def ec_lsvrg(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    probability: float,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    coin: str = "shared",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with error feedback and variance reduction.

    :func:`efopt.convex.ec_sgd` with :func:`efopt.convex.lsvrg` in front, and called
    like it::

      tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)

    .. math::
      u_i = \nabla f_{ij}(x) - \nabla f_{ij}(w_i) + \nabla f_i(w_i), \qquad
      w_i \leftarrow x \text{ with probability } p

    The noise of minibatches is gone in the end, the difference between the workers is
    not: it stalls unless their data are alike. :func:`efopt.convex.ec_lsvrg_diana` does
    not.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: conservative; linear to the optimum if workers are identical.
    Placement: the residual, the reference gradient, and the reference point under
    ``coin="per_worker"`` per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule.
      probability: Of a reference point to move, in (0, 1]; usually one over the number
        of a worker's minibatches.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet.
      coin: As of :func:`efopt.convex.lsvrg`; the paper's is ``"per_worker"``.
      seed: Of the coins.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As :func:`efopt.convex.ec_sgd` and
        :func:`efopt.convex.lsvrg`.

    Examples:
      >>> import efopt
      >>> tx = efopt.convex.ec_lsvrg(
      ...     efopt.top_k(k=1), 0.1, probability=1 / 50, axis_name="data")

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-LSVRG)
    """
    estimator = lsvrg(probability, axis_name=axis_name, coin=coin, seed=seed)
    return error_compensated(
        "ec_lsvrg", compressor, learning_rate, axis_name, exchange, estimator
    )


@checks.keyword_only
def ec_lsvrg_diana(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    probability: float,
    shift_compressor: Compressor,
    alpha: float | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    coin: str = "shared",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback with minibatches that converges to the last digit.

    :func:`efopt.convex.ec_sgd` with :func:`efopt.convex.lsvrg` and
    :func:`efopt.convex.diana` in front, and called like the first::

      tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)

    Both causes of a stall are gone, the noise of minibatches and the difference between
    workers. Where the smoothness is far above the strong convexity,
    :func:`efopt.convex.eclk` needs fewer steps.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``payload_bits`` of both compressors per leaf, worker and step.
    Properties: conservative; linear to the optimum.
    Placement: the residual, the shift, the reference gradient, and the reference point
    under ``coin="per_worker"`` per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule.
      probability: As of :func:`efopt.convex.ec_lsvrg`.
      shift_compressor: As of :func:`efopt.convex.ec_sgd_diana`.
      alpha: How fast shifts are learned, as of :func:`efopt.convex.diana`.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How gradients meet; shifts go their compressor's own way.
      coin: As of :func:`efopt.convex.lsvrg`; the paper's is ``"per_worker"``.
      seed: Of the coins.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: As :func:`efopt.convex.ec_lsvrg` and
        :func:`efopt.convex.ec_sgd_diana`.

    Examples:
      >>> import efopt
      >>> tx = efopt.convex.ec_lsvrg_diana(
      ...     efopt.top_k(k=1), 0.1, probability=1 / 50, axis_name="data",
      ...     shift_compressor=efopt.random_k(k=1, unbiased=True))

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-LSVRG-DIANA)
    """
    return error_compensated(
        "ec_lsvrg_diana",
        compressor,
        learning_rate,
        axis_name,
        exchange,
        lsvrg(probability, axis_name=axis_name, coin=coin, seed=seed),
        diana(shift_compressor, alpha=alpha, axis_name=axis_name),
    )


def check_contractive(api: str, compressor: Compressor, params: Any) -> None:
    """Raises if residuals of some leaf would grow."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for codec, (path, x) in zip(compressor.codec.assign(params), leaves, strict=True):
        if math.prod(jnp.shape(x)) and codec.delta(jnp.shape(x)) is None:
            raise ValueError(
                f"`{api}({compressor!r})` needs a contractive compressor, such as "
                "`efopt.top_k(k=1)`; for the shape "
                f"{jnp.shape(x)} of {jax.tree_util.keystr(path) or 'the parameters'} "
                "it is none, and residuals would grow."
            )


def error_compensated(
    api: str,
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    axis_name: AxisName | None,
    exchange: Exchange | str | None,
    *estimators: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The template of 2010.12292 behind what makes ``u_i`` of the gradient."""
    feedback = error_feedback(
        compressor,
        axis_name=axis_name,
        exchange=exchange,
        learning_rate=-1.0,  # what follows adds updates as they are
    )

    def init_fn(params: Any) -> Any:
        check_contractive(api, compressor, params)
        return feedback.init(params)

    return optax.chain(
        *estimators,  # u_i
        optax.scale_by_learning_rate(learning_rate),  # -gamma u_i
        # p_i = gamma u_i + e_i, x = x - mean_i C(p_i), e_i = p_i - C(p_i)
        optax.GradientTransformationExtraArgs(init_fn, feedback.update),
    )
