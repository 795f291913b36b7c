"""signSGD, alone and by majority vote."""

import jax
import optax

from efopt.compressors import sign
from efopt.exchanges.exchange import Exchange
from efopt.feedback import compress
from efopt.ground import checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def signsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = "majority_vote",
) -> optax.GradientTransformationExtraArgs:
    r"""Steps of one size in every coordinate, along the sign of the gradient.

    .. math::
      x \leftarrow x - \gamma \Big( \operatorname{sign} \sum_i \operatorname{sign}(g_i)
      + \lambda x \Big)

    One bit a coordinate in each direction, no memory, and a vote that survives workers
    which send nonsense, as long as they are fewer than half. It takes a learning rate
    like Adam's, 100 to 1000 times below that of SGD. It does not converge in general:
    where the noise is skewed or batches are small it may climb, and
    :func:`efopt.ef_signsgd` is the cure at the same number of bits.

    Weight decay is added after the vote, uncompressed. A gradient of zero and a tied
    vote count as +1. Over one worker the vote is that worker's sign.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``d`` bits per worker and step for ``d`` coordinates, and as many back in a
    vote; the mean of signs has every worker's bits sent to all others.
    Properties: biased; not conservative, nothing is owed; with identical workers, the
    step of one of them.
    Placement: replicated.

    Args:
      learning_rate: A float or a schedule.
      weight_decay: Strength of the weight decay.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet: ``"majority_vote"``, or ``"all_gather"`` for the mean of
        the signs, which keeps how clear the majority is and costs more bytes with each
        worker. ``None`` is that too. Without effect over one worker.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: If ``exchange`` is unknown; from ``update``, if weight decay is on
        and parameters are missing or of another structure than ``mask``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.signsgd(0.1, axis_name="data")
      >>> grads = jnp.array([[1.0, -2.0], [3.0, 1.0], [-1.0, -1.0]])  # 3 workers
      >>> state = efopt.stack_workers(tx.init(jnp.zeros(2)), 3)
      >>> print(jax.vmap(tx.update, axis_name="data")(grads, state)[0][0])
      [-0.1  0.1]

    References:
      Bernstein et al, `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018 (Algorithms 1 and 3)
      Bernstein et al, `signSGD with Majority Vote is Communication Efficient And Fault
      Tolerant <https://arxiv.org/abs/1810.05291>`_, 2018 (Algorithm 1)
    """
    return optax.chain(
        # 1810.05291 Algorithm 1: sign(sum_i sign(g_i)); 1802.04434 Algorithm 1 alone
        signs("signsgd", axis_name, exchange),
        add_decay(weight_decay, mask),  # + lambda x, uncompressed
        optax.scale_by_learning_rate(learning_rate),
    )


def signs(
    api: str, axis_name: AxisName | None, exchange: Exchange | str | None
) -> optax.GradientTransformation:
    """The workers' signs as one update; of one worker, its own."""
    if exchange is not None and not isinstance(exchange, Exchange):
        checks.choice(api, "exchange", exchange, ("majority_vote", "all_gather"))
    if axis_name is None:
        return compress(sign())
    return compress(sign(), axis_name=axis_name, exchange=exchange)
