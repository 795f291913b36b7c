"""Local SGD, and post-local SGD: workers average their parameters now and then."""

import optax

from efopt.compressors import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.ground import checks
from efopt.outer.diloco import diloco
from efopt.workers.axes import AxisName


@checks.keyword_only
def local_sgd(
    inner: optax.GradientTransformation,
    *,
    axis_name: AxisName | None = None,
    every: int = 8,
    start: int = 0,
    compressor: Compressor | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Local steps of an optimizer, after which workers average their parameters.

    .. math::
      \theta \leftarrow \theta - \frac{1}{n} \sum_i C(\theta - \theta_i + e_i)

    The outer step is plain, of rate 1: without a compressor the common parameters are
    the mean of the workers'. With ``start`` it is *post-local* SGD: so many steps with
    a meeting at the end of each, then rounds. With a compressor, error feedback stands
    between, as in Qsparse-local-SGD.

    Shapes: any tree of floating-point leaves -> the same, in the parameters' dtypes.
    Cost: ``compressor.payload_bits`` per leaf and worker, once in ``every`` steps;
    without one, the leaf's own.
    Properties: as :func:`efopt.local_steps`; the outer residual is conserved.
    Placement: drift, inner states and residual per worker.

    Args:
      inner: Each worker's optimizer, learning rate included, such as ``optax.sgd``.
      axis_name: The mapped axis of the workers, or a tuple of axes; ``None`` for a
        single worker.
      every: Steps of a round. Static.
      start: Steps with a meeting at the end of each, before rounds begin; in the paper
        until the learning rate first decays. Static.
      compressor: What compresses the differences; ``None``: nothing does.
      exchange: As for :func:`efopt.error_feedback`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If an option is of another type, or not static.
      ValueError: If one is out of range; otherwise as :func:`efopt.local_steps`.

    Examples:
      >>> import optax
      >>> import efopt
      >>> post_local = efopt.outer.local_sgd(
      ...     optax.sgd(0.1, momentum=0.9), axis_name="data", every=8, start=1000)

    References:
      Stich, `Local SGD Converges Fast and Communicates Little
      <https://arxiv.org/abs/1805.09767>`_, 2018 (Algorithm 1)
      Lin et al, `Don't Use Large Mini-Batches, Use Local SGD
      <https://arxiv.org/abs/1808.07217>`_, 2018 (post-local SGD)
      Basu et al, `Qsparse-local-SGD <https://arxiv.org/abs/1906.02367>`_, 2019
      (Algorithm 1)
    """
    return diloco(
        inner,
        axis_name=axis_name,
        every=every,
        compressor=compressor,
        exchange=exchange,
        outer_learning_rate=1.0,
        momentum=None,
        start=start,
    )
