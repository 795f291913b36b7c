"""PowerSGD with momentum behind the average."""

from typing import Any

import jax
import optax

from efopt.compressors import power_sgd
from efopt.feedback import error_feedback
from efopt.ground import checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def power_sgd_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 4,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    min_compression: float = 2,
    seed: int = 0,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum SGD on gradients that travel as products of two thin matrices.

    .. math::
      p_i = g_i + e_i, \quad
      u = P \Big( \frac{1}{n} \sum_i p_i^T P \Big)^T, \quad
      e_i \leftarrow p_i - P (p_i^T P)^T, \quad
      m \leftarrow \lambda m + u, \quad
      x \leftarrow x - \gamma (u + m)

    The optimizer for networks of large matrices on an interconnect with a fast
    all-reduce: its bytes do not grow with the workers, and it trains with the settings
    of SGD. Momentum stands behind the average, the same on all workers, which this
    compressor bears: what a projection leaves out comes back in small shares. Do not
    carry the arrangement over to :func:`efopt.scaled_sign`, whose residuals are paid in
    bursts that momentum behind them amplifies; there use :func:`efopt.ef_signsgd` or
    :func:`efopt.dist_ef_sgd`.

    Note that a step is ``u + m``, with the new momentum, as published: the first is
    twice as long as that of plain SGD. Weight decay is added behind the average,
    uncompressed, in front of momentum. The residual is in units of gradients and is not
    rescaled when the rate changes.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``32 * rank * (rows + columns)`` bits per matrix, in two all-reduces for the
    whole tree; vectors, and matrices that would shrink less than ``min_compression``
    times, travel dense.
    Properties: conservative; linear, so that all workers average what one would send.
    Placement: the residual is per worker, all else replicated.

    Args:
      learning_rate: A float or a schedule.
      rank: Columns of a factor, at least 1. Static.
      momentum: Decay of the momentum, in [0, 1).
      weight_decay: Strength of the weight decay.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      min_compression: As of :func:`efopt.power_sgd`. Static.
      seed: As of :func:`efopt.power_sgd`. Static.
      accumulator_dtype: The dtype of the momentum; ``None``: that of the parameters.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``rank``, ``min_compression`` or ``seed`` is not a Python number.
      ValueError: If one of them or the momentum is out of range.

    Examples:
      >>> import efopt
      >>> tx = efopt.power_sgd_momentum(0.1, rank=2, axis_name="data")

    References:
      Vogels et al, `PowerSGD: Practical Low-Rank Gradient Compression for Distributed
      Optimization <https://arxiv.org/abs/1905.13727>`_, 2019 (Algorithms 1 and 2)
    """
    compressor = power_sgd(rank, min_compression=min_compression, seed=seed)
    checks.decay("power_sgd_momentum", "momentum", momentum)
    trace = optax.trace(momentum, accumulator_dtype=accumulator_dtype)
    return optax.chain(  # 1905.13727 Algorithm 2, the compressor being Algorithm 1:
        error_feedback(compressor, axis_name=axis_name),  # Delta = g + e, its mean, e
        add_decay(weight_decay, mask),
        _added(trace),  # m = lambda m + u; u + m
        optax.scale_by_learning_rate(learning_rate),  # x = x - gamma (u + m)
    )


def _added(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adds what ``inner`` makes of updates to them."""

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        new, state = inner.update(updates, state, params)
        return optax.tree.add(updates, new), state

    return optax.GradientTransformation(inner.init, update_fn)
