"""EC-LSVRG: error compensation without the noise of minibatches."""

import optax

from efopt.compressors import Compressor
from efopt.convex import diana, lsvrg
from efopt.convex.ec_sgd import error_compensated


def ec_lsvrg(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    probability: float,
    axis_name: str | None = None,
    exchange: str | None = None,
    coin: str = "per_worker",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with error feedback and variance reduction.

    :func:`efopt.ec_sgd` with :func:`efopt.lsvrg` in front, and called like it::

      tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)

    .. math::
      u_i = \nabla f_{ij}(x) - \nabla f_{ij}(w_i) + \nabla f_i(w_i), \qquad
      w_i \leftarrow x \text{ with probability } p

    The noise of minibatches is gone in the end, the difference between the workers is
    not: it stalls unless their data are alike. :func:`efopt.ec_lsvrg_diana` does not.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: conservative; linear to the optimum if workers are identical.
    Placement: the residual, the reference gradient, and the reference point under
    ``coin="per_worker"`` per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule; for the last digits a constant, at most one
        over the smoothness of the largest term.
      probability: Of a reference point to move, in (0, 1]; usually one over the number
        of a worker's minibatches.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None`` for the compressor's own way.
      coin: ``"per_worker"``, as in the paper, or ``"shared"``: all points move at once.
      seed: Of the coins.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one or an option is of another type.
      ValueError: If an option is out of range; from ``init``, if the compressor is not
        contractive for a leaf; at trace time, as :func:`efopt.lsvrg`.

    Examples:
      >>> import efopt
      >>> tx = efopt.ec_lsvrg(efopt.top_k(k=1), 0.1, 1 / 50, axis_name="data")

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-LSVRG)
    """
    estimator = lsvrg(probability, axis_name, coin, seed)
    return error_compensated(
        "ec_lsvrg", compressor, learning_rate, axis_name, exchange, estimator
    )


def ec_lsvrg_diana(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    probability: float,
    shift_compressor: Compressor,
    alpha: float | None = None,
    axis_name: str | None = None,
    exchange: str | None = None,
    coin: str = "per_worker",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback with minibatches that converges to the last digit.

    :func:`efopt.ec_sgd` with :func:`efopt.lsvrg` and :func:`efopt.diana` in front, and
    called like the first::

      tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)

    Both causes of a stall are gone, the noise of minibatches and the difference between
    workers. Where the smoothness is far above the strong convexity,
    :func:`efopt.eclk` needs fewer steps.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``payload_bits`` of both compressors per leaf, worker and step.
    Properties: conservative; linear to the optimum.
    Placement: the residual, the shift, the reference gradient, and the reference point
    under ``coin="per_worker"`` per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule; for the last digits a constant, at most one
        over the smoothness of the largest term.
      probability: Of a reference point to move, in (0, 1]; usually one over the number
        of a worker's minibatches.
      shift_compressor: An unbiased :class:`efopt.Compressor` for the shifts, such as
        ``random_k(k=1, unbiased=True)``. Give it another seed than a random
        ``compressor``.
      alpha: How fast shifts are learned, at most ``1 / (1 + omega)``, which ``None``
        takes.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How gradients meet; ``None`` for the compressor's own way.
      coin: ``"per_worker"``, as in the paper, or ``"shared"``: all points move at once.
      seed: Of the coins.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If a compressor is not one or an option is of another type.
      ValueError: If ``shift_compressor`` is biased or an option out of range; from
        ``init``, if ``compressor`` is not contractive for a leaf or ``alpha`` too
        large; at trace time, as :func:`efopt.lsvrg`.

    Examples:
      >>> import efopt
      >>> shifts = efopt.random_k(k=1, unbiased=True)
      >>> tx = efopt.ec_lsvrg_diana(
      ...     efopt.top_k(k=1), 0.1, 1 / 50, shifts, axis_name="data")

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
        lsvrg(probability, axis_name, coin, seed),
        diana(shift_compressor, alpha, axis_name),
    )
