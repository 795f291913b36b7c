"""dist-EF-SGD: compressed both ways, with a residual at both ends."""

from typing import Any

import jax
import optax

from efopt.compressors import Compressor, scaled_sign
from efopt.feedback import error_feedback
from efopt.ground import checks
from efopt.optimizers.momentum import on_workers, trace_of
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def dist_ef_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    compressor: Compressor | None = None,
    momentum: jax.typing.ArrayLike | None = 0.9,
    nesterov: bool = True,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum SGD whose gradients are compressed on the way there and back.

    .. math::
      m_i &\leftarrow \mu m_i + g_i, \quad
      p_i = \mu m_i + g_i + \tfrac{\gamma_{t-1}}{\gamma_t} e_i, \quad
      e_i \leftarrow p_i - C(p_i) \\
      s &= \frac{1}{n} \sum_i C(p_i) + \tfrac{\gamma_{t-1}}{\gamma_t} \tilde e, \quad
      \tilde e \leftarrow s - C(s), \quad
      x \leftarrow x - \gamma_t C(s)

    The one-bit optimizer for more than a few workers: what leaves each of them does not
    grow with their number. There is no server; every worker averages one range of the
    blocks, keeps that part of the residual :math:`\tilde e`, and compresses it again.
    Momentum is each worker's own, Nesterov's by default, in front of the compressor,
    and weight decay is added to the gradient before it.

    Residuals are in units of gradients and follow a schedule by the ratio of the last
    two rates, so that :func:`efopt.virtual_params` walks the path of momentum SGD. At a
    rate of zero nothing is paid: residuals are held as they are, and the ratio is taken
    to the last rate that was not zero. Momentum goes on.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: with the default compressor ``1 + 32 / 1024`` bits per coordinate each way,
    and the padding of ranges, up to workers times the block size for each group of
    equal blocks.
    Properties: conservative; converges like SGD for any contraction ``delta > 0``.
    Placement: residual and momentum per worker, the server's residual split over the
    workers, all else replicated.

    Args:
      learning_rate: A float or a schedule.
      compressor: A blocked :class:`efopt.Compressor`; ``None``:
        ``scaled_sign(block_size=1024)``. The paper's blocks are layers.
      momentum: Decay of each worker's momentum, in [0, 1); ``None`` for none.
      nesterov: Whether the momentum is Nesterov's.
      weight_decay: Strength of the weight decay.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker, who has nobody
        to compress again for.
      accumulator_dtype: The dtype of the momentum; ``None``: that of the parameters.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one.
      ValueError: If the momentum is out of range, or the compressor sends whole leaves.

    Examples:
      >>> import efopt
      >>> tx = efopt.dist_ef_sgd(0.1, axis_name="data", weight_decay=1e-4)

    References:
      Zheng et al, `Communication-Efficient Distributed Blockwise Momentum SGD with
      Error-Feedback <https://arxiv.org/abs/1905.10936>`_, 2019 (dist-EF-blockSGDM)
    """
    trace = trace_of(
        "dist_ef_sgd", momentum, nesterov=nesterov, dtype=accumulator_dtype
    )
    return optax.chain(  # 1905.10936, dist-EF-blockSGDM:
        on_workers(add_decay(weight_decay, mask), axis_name),
        on_workers(trace, axis_name),  # m_i = mu m_i + g_i; mu m_i + g_i
        error_feedback(  # p_i, e_i of the workers; s, e of the owners of ranges
            scaled_sign(block_size=1024) if compressor is None else compressor,
            axis_name=axis_name,
            exchange=None if axis_name is None else "two_phase",
            learning_rate=learning_rate,  # gamma_{t-1} / gamma_t, at both ends
        ),
        optax.scale_by_learning_rate(learning_rate),  # x = x - gamma_t C(s)
    )
