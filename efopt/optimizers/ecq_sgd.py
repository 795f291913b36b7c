"""ECQ-SGD: a stochastic quantiser with damped error feedback."""

import optax

from efopt.compressors import Compressor, quantize
from efopt.exchanges.exchange import Exchange
from efopt.feedback import damped_error_feedback
from efopt.ground import checks
from efopt.workers.axes import AxisName


@checks.keyword_only
def ecq_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    compressor: Compressor | None = None,
    alpha: float = 0.2,
    beta: float = 0.9,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on stochastically quantised gradients, with part of the error paid back.

    .. math::
      q_i = Q(g_i + \alpha h_i), \quad
      x \leftarrow x - \frac{\gamma}{n} \sum_i q_i, \quad
      h_i \leftarrow \beta h_i + g_i - q_i

    The quantiser is unbiased, so SGD would converge without feedback; feedback takes
    away some of the variance that quantising adds, and the two factors keep it from
    adding its own. The error is in units of gradients: behind it stands the learning
    rate.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: at a constant rate it stalls above the optimum, where SGD does or the
    workers' gradients differ; ``alpha = 0`` is plain quantised SGD.
    Placement: the error per worker, all else replicated.

    Args:
      learning_rate: A float or a schedule.
      compressor: An unbiased :class:`efopt.Compressor`; ``None``: ``quantize(4,
        stochastic=True)``, integers of the largest magnitude of every block.
      alpha: The part of the error that is paid, in [0, 1].
      beta: The part of the error that is remembered, in [0, 1].
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None`` for the compressor's own way.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, or a factor is no number.
      ValueError: If a factor is out of range or the compressor biased.

    Examples:
      >>> import efopt
      >>> tx = efopt.optimizers.ecq_sgd(0.1, alpha=0.5, axis_name="data")

    References:
      Wu et al, `Error Compensated Quantized SGD and its Applications to Large-scale
      Distributed Optimization <https://arxiv.org/abs/1806.08054>`_, 2018
    """
    if compressor is None:
        compressor = quantize(4, stochastic=True)
    feedback = damped_error_feedback(
        compressor, alpha=alpha, beta=beta, axis_name=axis_name, exchange=exchange
    )
    if not compressor.unbiased:
        raise ValueError(
            f"`ecq_sgd(compressor={compressor!r})` needs an unbiased quantiser, such "
            "as `efopt.quantize(4, stochastic=True)`. For biased compressors take "
            "`efopt.convex.ec_sgd`."
        )
    return optax.chain(  # 1806.08054:
        feedback,  # q = Q(g + alpha h), h = beta h + g - q
        optax.scale_by_learning_rate(learning_rate),  # x = x - gamma mean q
    )
