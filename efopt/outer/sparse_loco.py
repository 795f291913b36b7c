"""SparseLoCo: a few coordinates of every chunk, in two bits, with a fading memory."""

import optax

from efopt.compressors import Compressor, compose, quantize, top_k
from efopt.exchanges.exchange import Exchange
from efopt.feedback import damped_error_feedback
from efopt.ground import checks
from efopt.outer.local_steps import local_steps
from efopt.workers.axes import AxisName


@checks.keyword_only
def sparse_loco(
    inner: optax.GradientTransformation,
    *,
    axis_name: AxisName | None = None,
    every: int = 30,
    compressor: Compressor | None = None,
    decay: float = 0.95,
    exchange: Exchange | str | None = None,
    outer_learning_rate: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Local steps of an optimizer, and a sparse message of two bits a value.

    .. math::
      a_i = \beta e_i + \theta - \theta_i, \quad
      q_i = C(a_i), \quad e_i \leftarrow a_i - q_i, \quad
      \theta \leftarrow \theta - \frac{\gamma}{n} \sum_i q_i

    There is no outer momentum: the residual, which fades by :math:`\beta`, is in its
    place. What is sent and what is then owed add up to what was owed before, times
    :math:`\beta`, and the pseudo-gradient, to the bit of the arithmetic.

    The average is that of the paper, over all workers, also where some of them sent
    nothing for a coordinate. The code that was released with it averages over those who
    sent it: ``exchange=efopt.exchanges.all_gather(senders=True)``, of the same bytes.
    Steps are then larger, above all with few workers.

    Shapes: any tree of floating-point leaves -> the same, in the parameters' dtypes.
    Cost: ``compressor.payload_bits`` per leaf and worker, once in ``every`` steps: with
    the default 0.22 bits a coordinate, or 0.007 a step.
    Properties: as :func:`efopt.local_steps`; conservative up to ``decay``, as above.
    Placement: drift, inner states and residual per worker.

    Args:
      inner: Each worker's optimizer, learning rate included; the paper's is AdamW.
      axis_name: The mapped axis of the workers, or a tuple of axes; ``None`` for a
        single worker.
      every: Steps of a round; the paper has 15 to 250. Static.
      compressor: What compresses pseudo-gradients; ``None``: the 64
        largest coordinates of every tile of 64 rows and columns, in two bits each.
      decay: What is left of a residual from one round to the next, in [0, 1].
      exchange: As for :func:`efopt.error_feedback`.
      outer_learning_rate: Of the outer step, a float or a schedule over meetings.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If an option is of another type, or not static.
      ValueError: If one is out of range; otherwise as :func:`efopt.local_steps`.

    Examples:
      >>> import optax
      >>> import efopt
      >>> tx = efopt.outer.sparse_loco(optax.adamw(2e-4), axis_name="dcn")

    References:
      Sarfi et al, `Communication Efficient LLM Pre-training with SparseLoCo
      <https://arxiv.org/abs/2508.15706>`_, 2025 (Algorithm 1)
    """
    if compressor is None:
        compressor = compose(top_k(k=64, tile=(64, 64)), quantize(2))
    checks.share("sparse_loco", "decay", decay)
    # alpha = beta makes the residual beta e + Delta - q, of which q is compressed
    feedback = damped_error_feedback(
        compressor, alpha=decay, beta=decay, axis_name=axis_name, exchange=exchange
    )
    return local_steps(
        inner,
        optax.chain(feedback, optax.sgd(outer_learning_rate)),
        every=every,
        axis_name=axis_name,
    )
