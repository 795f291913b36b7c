"""EC-SGD-DIANA: error compensation that learns how the workers differ."""

import optax

from efopt.compressors import Compressor
from efopt.convex import diana
from efopt.convex.ec_sgd import error_compensated


def ec_sgd_diana(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    shift_compressor: Compressor,
    alpha: float | None = None,
    axis_name: str | None = None,
    exchange: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with error feedback for workers whose data differ; EC-GD-DIANA in full.

    :func:`efopt.ec_sgd` with :func:`efopt.diana` in front: a second message teaches
    everybody what each worker's gradient has of its own, so that it need not be owed.

    .. math::
      u_i = g_i - h_i + \bar h, \qquad
      h_i \leftarrow h_i + \alpha Q(g_i - h_i), \qquad
      \bar h = \frac{1}{n} \sum_i h_i

    With full gradients it converges to the optimum at a constant rate. With minibatches
    the noise remains: :func:`efopt.ec_lsvrg_diana` removes that too.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``payload_bits`` of both compressors per leaf, worker and step.
    Properties: conservative; linear to the optimum with full gradients.
    Placement: residual and shift per worker, all else replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      learning_rate: A float or a schedule; for the last digits a constant, at most one
        over the smoothness.
      shift_compressor: An unbiased :class:`efopt.Compressor` for the shifts, such as
        ``random_k(k=1, unbiased=True)``. Give it another seed than a random
        ``compressor``.
      alpha: How fast shifts are learned, at most ``1 / (1 + omega)``, which ``None``
        takes.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How gradients meet; ``None`` for the compressor's own way.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If a compressor is not one, or ``alpha`` is no number.
      ValueError: If ``shift_compressor`` is biased or the exchange unknown; from
        ``init``, if ``compressor`` is not contractive for a leaf or ``alpha`` too
        large.

    Examples:
      >>> import efopt
      >>> shifts = efopt.random_k(k=1, unbiased=True)
      >>> tx = efopt.ec_sgd_diana(efopt.top_k(k=1), 0.1, shifts, axis_name="data")

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-SGD-DIANA, EC-GD-DIANA)
    """
    estimator = diana(shift_compressor, alpha, axis_name)
    return error_compensated(
        "ec_sgd_diana", compressor, learning_rate, axis_name, exchange, estimator
    )
