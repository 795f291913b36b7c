"""MuLoCo: DiLoCo with Muon inside, whose steps bear coarse messages."""

import optax
import optax.contrib

from efopt.compressors import Compressor, quantize
from efopt.exchanges.exchange import Exchange
from efopt.feedback import damped_error_feedback
from efopt.ground import checks
from efopt.outer.local_steps import local_steps
from efopt.workers.axes import AxisName


@checks.keyword_only
def muloco(
    inner_learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName | None = None,
    every: int = 30,
    compressor: Compressor | None = None,
    decay: float = 1.0,
    exchange: Exchange | str | None = None,
    outer_learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: float | None = 0.9,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Local steps of Muon, two bits a coordinate between workers, and an outer step.

    .. math::
      a_i = \beta e_i + \theta - \theta_i, \quad
      q_i = C(a_i), \quad e_i \leftarrow a_i - q_i, \quad
      \theta \leftarrow \mathrm{Nesterov}\Big(\theta, \frac{1}{n} \sum_i q_i\Big)

    Matrices take steps of Muon, all other leaves of Adam, as ``optax.contrib.muon`` has
    it. For other inner settings build it from :func:`efopt.local_steps`.

    Shapes: any tree of floating-point leaves -> the same, in the parameters' dtypes.
    Cost: ``compressor.payload_bits`` per leaf and worker, once in ``every`` steps.
    Properties: as :func:`efopt.local_steps`; conservative up to ``decay``.
    Placement: drift, inner states and residual per worker, outer momentum replicated.

    Args:
      inner_learning_rate: Of Muon, a float or a schedule over steps.
      axis_name: The mapped axis of the workers, or a tuple of axes; ``None`` for a
        single worker.
      every: Steps of a round. Static.
      compressor: What compresses pseudo-gradients; ``None``: ``efopt.quantize(2)``.
      decay: What is left of a residual from one round to the next, in [0, 1].
      exchange: As for :func:`efopt.error_feedback`.
      outer_learning_rate: Of the outer step, a float or a schedule over meetings.
      momentum: Of the outer step, in [0, 1); ``None``: none.
      weight_decay: Of Muon.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If an option is of another type, or not static.
      ValueError: If one is out of range; otherwise as :func:`efopt.local_steps`.

    Examples:
      >>> import efopt
      >>> tx = efopt.outer.muloco(0.02, axis_name="dcn", every=30)

    References:
      Therien et al, `MuLoCo: Muon is a practical inner optimizer for DiLoCo
      <https://arxiv.org/abs/2505.23725>`_, 2025
    """
    if momentum is not None:
        checks.decay("muloco", "momentum", momentum)
    checks.share("muloco", "decay", decay)
    feedback = damped_error_feedback(
        quantize(2) if compressor is None else compressor,
        alpha=decay,
        beta=decay,
        axis_name=axis_name,
        exchange=exchange,
    )
    nesterov = optax.sgd(outer_learning_rate, momentum, nesterov=True)
    return local_steps(
        optax.contrib.muon(inner_learning_rate, weight_decay=weight_decay),
        optax.chain(feedback, nesterov),
        every=every,
        axis_name=axis_name,
    )
