"""Signum: signSGD on each worker's momentum."""

from typing import Any

import jax
import optax

from efopt.exchanges.exchange import Exchange
from efopt.ground import checks
from efopt.optimizers.momentum import on_workers
from efopt.optimizers.signsgd import signs
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def signum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: jax.typing.ArrayLike = 0.9,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = "majority_vote",
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps of one size in every coordinate, along the sign of a running mean.

    .. math::
      m_i \leftarrow \beta m_i + (1 - \beta) g_i, \quad
      x \leftarrow x - \gamma \Big( \operatorname{sign} \sum_i \operatorname{sign}(m_i)
      + \lambda x \Big)

    :func:`efopt.signsgd` with momentum on each worker, in front of the sign: the form
    in which sign methods train deep networks, at a learning rate like Adam's (100 to
    1000 times below SGD's). Momentum averages out much of the noise that leads signs
    astray, but it is no guarantee: compare with :func:`efopt.ef_signsgd`.

    Weight decay is added after the vote, uncompressed. A momentum of zero and a tied
    vote count as +1.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``d`` bits per worker and step for ``d`` coordinates, and as many back in a
    vote; the mean of signs has every worker's bits sent to all others.
    Properties: biased; not conservative; ``beta=0`` is signSGD.
    Placement: the momentum is per worker, all else replicated.

    Args:
      learning_rate: A float or a schedule.
      beta: Decay of the running mean, in [0, 1).
      weight_decay: Strength of the weight decay.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet: ``"majority_vote"``, or ``"all_gather"`` for the mean of
        the signs. Without effect over one worker.
      accumulator_dtype: The dtype of the momentum; ``None``: that of the parameters.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: If ``beta`` is out of range or ``exchange`` unknown; from
        ``update``, if weight decay is on and parameters are missing or of another
        structure than ``mask``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.optimizers.signum(0.1)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([10.0, -1.0]), state)
      >>> print(tx.update(jnp.array([-1.0, -1.0]), state)[0])  # the mean is still > 0
      [-0.1  0.1]

    References:
      Bernstein et al, `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018 (Algorithm 2)
      Bernstein et al, `signSGD with Majority Vote is Communication Efficient And Fault
      Tolerant <https://arxiv.org/abs/1810.05291>`_, 2018 (Algorithm 1)
    """
    checks.decay("signum", "beta", beta)
    mean = optax.ema(beta, debias=False, accumulator_dtype=accumulator_dtype)
    return optax.chain(
        # 1810.05291 Algorithm 1, of 1802.04434 Algorithm 2 for one worker:
        on_workers(mean, axis_name),  # m_i = beta m_i + (1 - beta) g_i
        signs("signum", axis_name, exchange),  # sign(sum_i sign(m_i))
        add_decay(weight_decay, mask),  # + lambda x, uncompressed
        optax.scale_by_learning_rate(learning_rate),
    )
