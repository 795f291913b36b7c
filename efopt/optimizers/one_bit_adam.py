"""1-bit Adam: dense at first, then one-bit momentum over a frozen variance."""

import jax
import optax

from efopt.compressors import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.feedback.frozen_variance import warmed_up
from efopt.ground import checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    warmup: int,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    compressor: Compressor | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam that sends one bit a coordinate each way, after a dense warm-up.

    .. math::
      t \le T_w: \quad & m \leftarrow \beta_1 m + (1 - \beta_1) \bar g, \quad
      v \leftarrow \beta_2 v + (1 - \beta_2) \bar g^2 \\
      t > T_w: \quad & p_i = \beta_1 m + (1 - \beta_1) g_i + e_i, \quad
      e_i \leftarrow p_i - C(p_i), \quad
      m \leftarrow C \Big( \frac{1}{n} \sum_i C(p_i) + \tilde e \Big) \\
      & x \leftarrow x - \gamma \Big( \frac{m}{\sqrt v + \epsilon} + \lambda x \Big)

    Adam is not linear in the gradient and does not bear compressed gradients; with a
    variance that stands still it is. All but rate and decay is
    :func:`efopt.feedback.scale_by_one_bit_adam`, which says what is sent, what becomes
    of coordinates without gradient, and what it keeps.

    Known faults: the warm-up is to be guessed, and is the larger part of all bytes; a
    variance that is frozen while gradients still shrink makes later steps too small,
    and too large where they grow. Adam behind :func:`efopt.error_feedback` is no way
    around it: its variance sees the bursts in which a residual is paid.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: with the default compressor ``1 + 32 / 1024`` bits per coordinate each way;
    in the warm-up dense.
    Properties: conservative in momentum.
    Placement: the residual per worker, that of the owners split over them, momentum and
    variance replicated.

    Args:
      learning_rate: A float or a schedule.
      warmup: As of :func:`efopt.feedback.scale_by_one_bit_adam`, and so the four below;
        ``freeze_step`` in DeepSpeed. Static.
      b1: As there.
      b2: As there.
      eps: As there.
      compressor: As there.
      weight_decay: Strength of the weight decay, decoupled as in AdamW.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: As there.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, or ``warmup`` no Python int.
      ValueError: If a number is out of range, or the exchange cannot carry the
        compressor.

    Examples:
      >>> import efopt
      >>> tx = efopt.optimizers.one_bit_adam(1e-3, warmup=1000, axis_name="data")

    References:
      Tang et al, `1-bit Adam: Communication Efficient Large-Scale Training with Adam's
      Convergence Speed <https://arxiv.org/abs/2102.02888>`_, 2021 (Algorithm 1)
    """
    return optax.chain(
        warmed_up(
            "one_bit_adam",
            warmup=warmup,
            b1=b1,
            b2=b2,
            eps=eps,
            compressor=compressor,
            axis_name=axis_name,
            exchange=exchange,
        ),
        add_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
