"""EC-SGD: error compensation alone, and with the workers' differences known."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from efopt.compressors import Compressor
from efopt.convex import star
from efopt.feedback import error_feedback


def ec_sgd(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    axis_name: str | None = None,
    exchange: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with error feedback, the first of a family; EC-GD with full gradients.

    .. math::
      p_i = \gamma u_i + e_i, \quad
      x \leftarrow x - \frac{1}{n} \sum_i C(p_i), \quad
      e_i \leftarrow p_i - C(p_i)

    Here ``u_i`` is the worker's gradient as it comes: :func:`efopt.ef_sgd` without its
    options. At a constant rate it stalls above the optimum, also with full gradients:
    workers whose data differ go on owing at the optimum what tells them apart. The
    family differs in ``u_i`` alone. :func:`efopt.ec_gd_star` shows how much of a stall
    comes from that difference, :func:`efopt.ec_sgd_diana` learns it,
    :func:`efopt.ec_lsvrg` removes the noise of minibatches, and
    :func:`efopt.ec_lsvrg_diana` has neither cause left.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: conservative; parameters minus the mean residual
    (:func:`efopt.virtual_params`) walk the path of SGD; with full gradients and
    identical workers linear to the optimum.
    Placement: the residual per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule; for the last digits a constant, at most one
        over the smoothness.
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
      >>> tx = efopt.ec_sgd(efopt.top_k(k=1), 0.1)
      >>> print(tx.update(jnp.array([1.0, -3.0]), tx.init(jnp.zeros(2)))[0])
      [0.  0.3]

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-SGD, EC-GD)
    """
    return error_compensated("ec_sgd", compressor, learning_rate, axis_name, exchange)


def ec_gd_star(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    reference_grads: Any,
    axis_name: str | None = None,
    exchange: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EC-GD without what tells the workers apart at the optimum, for diagnosis.

    :func:`efopt.ec_sgd` with :func:`efopt.star` in front: the gradients of the workers
    at the optimum are given. Nobody knows them before the problem is solved. It shows
    what :func:`efopt.ec_sgd_diana` can reach.

    .. math::
      u_i = \nabla f_i(x) - \nabla f_i(x^*) + \frac{1}{n} \sum_j \nabla f_j(x^*)

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: linear to the optimum with full gradients; conservative.
    Placement: the residual per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule; for the last digits a constant, at most one
        over the smoothness.
      reference_grads: Every worker's gradient at the optimum, a tree like the
        parameters with a leading worker axis; without one if ``axis_name`` is ``None``.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None`` for the compressor's own way.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one.
      ValueError: As :func:`efopt.ec_sgd`; at trace time, if there is not one reference
        gradient per worker.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> at_optimum = jnp.array([[1.0, 4.0], [-1.0, -4.0]])  # 2 workers
      >>> tx = efopt.ec_gd_star(efopt.top_k(k=1), 0.1, at_optimum, axis_name="data")

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-GD-star)
    """
    estimator = star(reference_grads, axis_name)
    return error_compensated(
        "ec_gd_star", compressor, learning_rate, axis_name, exchange, estimator
    )


def check_contractive(api: str, compressor: Compressor, params: Any) -> None:
    """Raises if residuals of some leaf would grow."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for codec, (path, x) in zip(compressor.codec.assign(params), leaves, strict=True):
        if jnp.size(x) and codec.delta(jnp.shape(x)) is None:
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
    axis_name: str | None,
    exchange: str | None,
    *estimators: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """EC-SGD's template: what estimators say of the gradient, with error feedback."""
    # A rate of minus one: what follows the feedback adds updates as they are.
    feedback = error_feedback(
        compressor, axis_name=axis_name, exchange=exchange, learning_rate=-1.0
    )

    def init_fn(params: Any) -> Any:
        check_contractive(api, compressor, params)
        return feedback.init(params)

    return optax.chain(
        *estimators,
        optax.scale_by_learning_rate(learning_rate),
        optax.GradientTransformationExtraArgs(init_fn, feedback.update),
    )
