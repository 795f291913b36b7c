"""EF-SGD: any compressor, with the learning rate inside the memory."""

from typing import Any

import jax
import optax

from efopt.compressors import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.feedback import error_feedback
from efopt.ground import checks
from efopt.optimizers.momentum import on_workers, trace_of
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def ef_sgd(
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    momentum_at: str = "workers",
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on compressed gradients, with what was lost added to the next step.

    .. math::
      p_i = \gamma g_i + e_i, \quad
      x \leftarrow x - \frac{1}{n} \sum_i C(p_i), \quad
      e_i \leftarrow p_i - C(p_i)

    The paper's algorithm to the letter: the learning rate stands inside the memory, so
    that residuals are in units of parameters, and under any schedule the parameters
    minus the mean residual (:func:`efopt.virtual_params`) walk exactly the path of SGD.
    Learning rates are those of SGD. At a rate of zero the workers go on paying what
    they owe.

    *Where momentum goes.* ``momentum_at="workers"``, the default, keeps one on each
    worker, in front of the compressor: what is compressed changes slowly, and the
    virtual path is that of SGD with momentum. Right for coarse compressors.
    ``momentum_at="server"`` keeps a single one behind the average, with no memory per
    worker; but it amplifies the bursts in which residuals are paid. Top-k and PowerSGD
    bear that. :func:`efopt.scaled_sign` does not: it fails to train at ordinary rates.

    Weight decay is added to the gradient, in front of momentum and compression, as in
    SGD.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step; see
    :func:`efopt.error_feedback` for what each exchange makes of it.
    Properties: conservative; converges like SGD for any contraction ``delta > 0``; with
    the identity it is SGD.
    Placement: residual and the workers' momentum per worker, all else replicated.

    Args:
      compressor: An :class:`efopt.Compressor`.
      learning_rate: A float or a schedule.
      momentum: Decay of the momentum, in [0, 1); ``None`` for none, as in the paper.
      nesterov: Whether the momentum is Nesterov's.
      momentum_at: ``"workers"`` or ``"server"``.
      weight_decay: Strength of the weight decay.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None`` for the compressor's own way.
      accumulator_dtype: The dtype of the momentum; ``None``: that of the parameters.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one.
      ValueError: If the momentum is out of range, its place or the exchange unknown, or
        the exchange cannot carry the compressor.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.ef_sgd(efopt.top_k(k=1), learning_rate=0.1)
      >>> updates, state = tx.update(jnp.array([1.0, -3.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)  # 0.1 is owed of the first coordinate
      [0.  0.3]
      >>> print(efopt.virtual_params(updates, state))
      [-0.1  0.3]

    References:
      Karimireddy et al, `Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes <https://arxiv.org/abs/1901.09847>`_, 2019 (Algorithm 2)
    """
    checks.choice("ef_sgd", "momentum_at", momentum_at, ("workers", "server"))
    trace = trace_of("ef_sgd", momentum, nesterov=nesterov, dtype=accumulator_dtype)
    behind = momentum is not None and momentum_at == "server"
    # Every part has one place, whatever the options: the feedback is `state[3]`.
    return optax.chain(
        on_workers(add_decay(weight_decay, mask), axis_name),
        optax.identity() if behind else on_workers(trace, axis_name),
        optax.scale_by_learning_rate(learning_rate),  # 1901.09847 Algorithm 2:
        error_feedback(  # p = gamma g + e, delta = C(p), e = p - delta
            compressor,
            axis_name=axis_name,
            exchange=exchange,
            # What follows adds updates as they are, x = x - delta: a rate of minus one,
            # which tells `virtual_params` in what units residuals are.
            learning_rate=-1.0,
        ),
        *([trace] if behind else []),
    )
