"""DeMo: a momentum of each worker's own, of which what moves fast is shared."""

import jax
import optax

from efopt.compressors.dct_top_k import dct_top_k
from efopt.exchanges.exchange import Exchange
from efopt.feedback import damped_error_feedback
from efopt.ground import checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def demo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = 0.999,
    k: int = 32,
    tile: int = 64,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Steps along the sign of what workers share of momenta that they keep.

    .. math::
      m_i \leftarrow \beta m_i + \gamma g_i, \quad
      q_i = C(m_i), \quad
      m_i \leftarrow m_i - q_i, \quad
      x \leftarrow x - \gamma \Big( \operatorname{sign} \sum_i q_i + \lambda x \Big)

    where ``C`` is :func:`efopt.compressors.dct_top_k`. What a worker does not send
    stays in its momentum: momentum and error feedback are one buffer, and the bytes are
    those of a few coefficients a tile. It takes a learning rate like Adam's.

    *What it breaks on purpose.* The momentum decays, so that what waits is forgotten in
    part, and the sign forgets all lengths: nothing is conserved, and the step does not
    shrink with the gradient. A coordinate of which nobody says anything does not move.

    *Sum or mean.* Here it is the sign of the sum, as the paper writes it. In its
    authors' code a coefficient is averaged over the workers that have sent it, and one
    that a single worker chose counts as much as one that all did:
    ``exchange=efopt.exchanges.all_gather(senders=True)``, of the same bytes.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: as :func:`efopt.compressors.dct_top_k`, gathered from all workers.
    Properties: biased; not conservative; the average is bit-identical on all workers.
    Placement: the momentum per worker, as the ``residual`` of
    :func:`efopt.feedback.damped_error_feedback`; all else replicated.

    Args:
      learning_rate: A float or a schedule.
      decay: The decay of the momentum, in [0, 1). Static.
      k: Coefficients that are sent of a tile, at least 1. Static.
      tile: The longest side of a tile, at least 1. Static.
      weight_decay: Strength of the weight decay, added behind the sign.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None`` for all-gather.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If an option is not a Python number where it must be.
      ValueError: If one is out of range, or the exchange unknown or unable to carry the
        coefficients.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.optimizers.demo(0.1, k=1)
      >>> grads = jnp.array([3.0, 3.0, 3.0, 1.0])
      >>> print(tx.update(grads, tx.init(grads))[0])  # the constant is largest
      [-0.1 -0.1 -0.1 -0.1]

    References:
      Peng et al, `DeMo: Decoupled Momentum Optimization
      <https://arxiv.org/abs/2411.19870>`_, 2024 (Algorithm 1)
    """
    checks.decay("demo", "decay", decay)
    checks.static_float("demo", "decay", decay)
    return optax.chain(
        # 2411.19870 Algorithm 1: m = beta m + gamma g,
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        # q = the largest coefficients of m, m = m - q,
        damped_error_feedback(
            dct_top_k(k=k, tile=tile),
            alpha=decay,
            beta=decay,
            axis_name=axis_name,
            exchange=exchange,
        ),
        optax.scale_by_sign(),  # x = x - gamma sign(sum q)
        add_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
