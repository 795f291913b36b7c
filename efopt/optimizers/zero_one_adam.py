"""0/1 Adam: no warm-up, a variance that is refreshed ever more seldom."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.compressors import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.feedback.frozen_variance import frozen_variance, one_bit
from efopt.ground import checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    freeze: int,
    refresh: int = 16,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    compressor: Compressor | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam that sends one bit a coordinate each way, and dense gradients now and then.

    .. math::
      t \in T_v: \quad & m \leftarrow \beta_1 m + (1 - \beta_1) \bar g, \quad
      v \leftarrow \beta_2 v + (1 - \beta_2) \bar g^2 \\
      \text{else}: \quad & p_i = \beta_1 m + (1 - \beta_1) g_i
      + \tfrac{\gamma_{t-1}}{\gamma_t} e_i, \quad
      e_i \leftarrow p_i - C(p_i), \quad
      m \leftarrow C \Big( \frac{1}{n} \sum_i C(p_i)
      + \tfrac{\gamma_{t-1}}{\gamma_t} \tilde e \Big) \\
      & x \leftarrow x - \gamma_t \Big( \frac{m}{\sqrt v + \epsilon} + \lambda x \Big)

    The steps :math:`T_v` begin with ``refresh`` neighbours, and their distance doubles
    after every ``refresh`` of them: 1, 2, ..., 16, 18, ..., 48, 52 for 16, of which
    the first 1000 steps hold 95. From step ``freeze`` on there are none.
    :func:`efopt.optimizers.one_bit_adam` has one dense stretch instead; what is said
    there of zeros and of the variance holds here, but that a coordinate whose gradient
    comes later is found at the next refresh. Residuals are in units of steps and follow
    a schedule by the ratio of the last two rates; at a rate of zero nothing is paid.

    At a refresh the momentum takes the dense average too, as in the authors' code; in
    the paper's algorithm it travels at one bit beside it.

    *Not here:* the paper's local steps between exchanges, in which parameters differ
    from worker to worker. Every step meets.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: with the default compressor ``1 + 32 / 1024`` bits per coordinate each way; at
    a refresh dense. Both are in the program, each in a branch.
    Properties: conservative in steps.
    Placement: the residual per worker, that of the owners split over them, momentum and
    variance replicated.

    Args:
      learning_rate: A float or a schedule.
      freeze: The step from which the variance stands still, at least 1; the end of the
        learning rate's warm-up in the paper. ``var_freeze_step`` in DeepSpeed. Static.
      refresh: After how many refreshes their distance doubles, at least 1;
        ``var_update_scaler`` in DeepSpeed, whose 16 it is. Static.
      b1: As of :func:`efopt.optimizers.one_bit_adam`, and so the three below.
      b2: As there.
      eps: As there.
      compressor: As there.
      weight_decay: As there.
      mask: As there.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: As there.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, or ``freeze`` or ``refresh`` no Python
        int.
      ValueError: If a number is out of range, or the exchange cannot carry the
        compressor.

    Examples:
      >>> import efopt
      >>> tx = efopt.optimizers.zero_one_adam(1e-3, freeze=10_000, axis_name="data")

    References:
      Lu et al, `Maximizing Communication Efficiency for Large-scale Training via 0/1
      Adam <https://arxiv.org/abs/2202.06009>`_, 2022 (Algorithm 1, without local steps)
    """
    checks.static_int("zero_one_adam", "freeze", freeze, least=1)
    checks.static_int("zero_one_adam", "refresh", refresh, least=1)
    chosen, way = one_bit(compressor, axis_name, exchange)
    return optax.chain(
        frozen_variance(
            "zero_one_adam",
            lambda count: (count < freeze) & _refreshed(count, refresh),
            b1=b1,
            b2=b2,
            eps=eps,
            compressor=chosen,
            axis_name=axis_name,
            exchange=way,
            learning_rate=learning_rate,
        ),
        add_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _refreshed(count: jax.Array, group: int) -> jax.Array:
    """Whether a step is one of ``group`` at a distance of 1, ``group`` of 2, of 4..."""
    before = count.astype(jnp.int32)  # the group of distance 2^g begins at group 2^g
    power = 31 - lax.clz(before // group + 1)
    distance = jnp.left_shift(jnp.int32(1), power)
    return (before + 1 - group * (distance - 1)) % distance == 0
