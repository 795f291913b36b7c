"""EF-signSGD: EF-SGD at one bit a coordinate."""

from typing import Any

import jax
import optax

from efopt.compressors import scaled_sign
from efopt.exchanges.exchange import Exchange
from efopt.ground import checks
from efopt.optimizers.ef_sgd import ef_sgd
from efopt.optimizers.weight_decay import Mask
from efopt.workers.axes import AxisName


@checks.keyword_only
def ef_signsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    block_size: int | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD at one bit a coordinate, with what was lost added to the next step.

    .. math::
      p_i = \gamma g_i + e_i, \quad
      \Delta_i = \frac{\|p_i\|_1}{d} \operatorname{sign}(p_i), \quad
      x \leftarrow x - \frac{1}{n} \sum_i \Delta_i, \quad
      e_i \leftarrow p_i - \Delta_i

    :func:`efopt.ef_sgd` with :func:`efopt.scaled_sign`: as many bits as signSGD, the
    learning rates of SGD, and its convergence, also where signs alone are led astray.
    Momentum stands on each worker, in front of the sign; behind it, it would not train
    at ordinary rates. It makes steps ``1 / (1 - momentum)`` times as long, and with a
    residual that lags behind the largest rate that is stable is smaller than SGD's:
    where training diverges, halve the rate or share the scale among fewer coordinates
    (``block_size``). Weight decay is added to the gradient.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``d + 32 * ceil(d / block_size)`` bits per leaf of ``d`` coordinates, worker
    and step.
    Properties: conservative; converges like SGD; a leaf's zero block stays zero.
    Placement: residual and momentum per worker, all else replicated.

    Args:
      learning_rate: A float or a schedule.
      momentum: Decay of each worker's momentum, in [0, 1); ``None`` for none, as in the
        paper.
      nesterov: Whether the momentum is Nesterov's.
      block_size: Coordinates that share a scale; ``None``: the whole leaf, as in the
        paper. Static.
      weight_decay: Strength of the weight decay.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None`` for ``"all_gather"``.
      accumulator_dtype: The dtype of the momentum; ``None``: that of the parameters.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``block_size`` is not a Python int.
      ValueError: If the momentum or ``block_size`` is out of range, or the exchange
        unknown or unable to carry whole leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.ef_signsgd(0.1, momentum=0.9)
      >>> updates, state = tx.update(jnp.array([1.0, -3.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [-0.2  0.2]

    References:
      Karimireddy et al, `Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes <https://arxiv.org/abs/1901.09847>`_, 2019 (Algorithm 1)
    """
    checks.block_size("ef_signsgd", block_size)
    # 1901.09847 Algorithm 1 is Algorithm 2 with C(p) = (|p|_1 / d) sign(p).
    return ef_sgd(
        scaled_sign(block_size),
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        mask=mask,
        axis_name=axis_name,
        exchange=exchange,
        accumulator_dtype=accumulator_dtype,
    )
