"""Distributed Lion: Lion's signs by vote, and Lion Cub's few bits in their place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.compressors import Compressor, sign
from efopt.exchanges.all_reduce import mean_in_range
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.ground import bits, checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


class DistributedLionState(NamedTuple):
    """State of :func:`distributed_lion`, of its first part.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      momentum: This worker's running mean of its gradients, shaped like the parameters.
        A :class:`efopt.PerWorker` if there is an axis.
      link: State of the compressor and the exchange.
    """

    count: jax.typing.ArrayLike
    momentum: Any
    link: Any


@checks.keyword_only
def distributed_lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    compressor: Compressor | None = None,
    average_momentum: int | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    accumulator_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion whose momenta stay with the workers: one bit there, and one bit back.

    .. math::
      u_i = \beta_1 m_i + (1 - \beta_1) g_i, \quad
      m_i \leftarrow \beta_2 m_i + (1 - \beta_2) g_i, \quad
      x \leftarrow x - \gamma \Big( \operatorname{sign} \sum_i \operatorname{sign}(u_i)
      + \lambda x \Big)

    With ``exchange="all_gather"`` the mean of the signs stands in place of their vote.
    There is no residual: what a sign does not say is in the momentum still, and fades.

    *Lion Cub.* With a ``compressor`` of a few bits, :math:`\operatorname{sign}
    \frac{1}{n} \sum_i C(u_i)` stands in place of the vote: a worker that is sure
    outweighs those that are not, which counts where gradients are noisy or differ. The
    paper scales a layer by its 1-norm; ``efopt.quantize(4)`` scales blocks by their
    largest, which is as robust to what sticks out. ``average_momentum=k`` averages the
    momenta, dense, at every ``k``-th step: local momenta drift apart where data differ.

    Weight decay is added behind the vote, uncompressed; inside a sign, as where a
    decayed gradient is passed in, it would decide every bit that a gradient does not.
    Ties and zeros are fair coins, as :func:`efopt.sign` says; in the sign of a mean
    they are zero.

    Known faults: the vote follows the majority of workers and not the mean of their
    gradients, so that with data that differ it may end elsewhere; it needs a rate 3 to
    10 times below Adam's, and large batches.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``d`` bits per worker and step for ``d`` coordinates, and as many back in a
    vote; with a ``compressor`` its bits; momenta dense at every ``average_momentum``-th
    step, in a branch that a report of the program's bytes counts.
    Properties: biased; not conservative; the step of one worker is Lion's.
    Placement: the momentum is per worker, all else replicated.

    Args:
      learning_rate: A float or a schedule.
      b1: Share of the momentum in what is sent, in [0, 1); 0.9 and 0.99 as in Lion.
      b2: Decay of the running mean, in [0, 1).
      compressor: An :class:`efopt.Compressor` for Lion Cub; ``None``: signs.
      average_momentum: At every how many steps momenta are averaged; ``None``: never.
        Static.
      weight_decay: Strength of the weight decay.
      mask: The leaves that decay, a tree of booleans (or a prefix of one) or a function
        of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None``: signs by ``"majority_vote"``, a ``compressor``
        in its own way. Without effect over one worker.
      accumulator_dtype: The dtype of the momentum; ``None``: that of the parameters.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is none, or ``average_momentum`` no Python int.
      ValueError: If a decay is out of range, momenta are to be averaged without an
        axis, or the exchange is unknown or cannot carry what is sent; from ``update``,
        if weight decay is on and parameters are missing or of another structure than
        ``mask``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.optimizers.distributed_lion(0.1, axis_name="data")
      >>> grads = jnp.array([[1.0, -2.0], [3.0, 1.0], [-1.0, -1.0]])  # 3 workers
      >>> state = efopt.stack_workers(tx.init(jnp.zeros(2)), 3)
      >>> step = jax.jit(jax.vmap(tx.update, axis_name="data"))
      >>> print(step(grads, state)[0][0])
      [-0.1  0.1]

    References:
      Liu et al, `Communication Efficient Distributed Training with Distributed Lion
      <https://arxiv.org/abs/2404.00438>`_, 2024 (Algorithm 1)
      Ishikawa et al, `Lion Cub: Minimizing Communication Overhead in Distributed Lion
      <https://arxiv.org/abs/2411.16462>`_, 2024
    """
    checks.decay("distributed_lion", "b1", b1)
    checks.decay("distributed_lion", "b2", b2)
    if average_momentum is not None:
        checks.static_int("distributed_lion", "average_momentum", average_momentum)
        if axis_name is None:
            raise ValueError(
                "`distributed_lion(average_momentum=...)` needs `axis_name`: one worker"
                " has nobody to average with."
            )
    votes = compressor is None
    if votes and exchange is not None and not isinstance(exchange, Exchange):
        ways = ("majority_vote", "all_gather")
        checks.choice("distributed_lion", "exchange", exchange, ways)
    if axis_name is None:
        exchange = None
    elif votes and exchange is None:
        exchange = "majority_vote"
    link = open_link(
        "distributed_lion",
        sign() if compressor is None else compressor,
        axis_name=axis_name,
        exchange=exchange,
        role="lion",
    )

    def init_fn(params: Any) -> Any:
        zeros = optax.tree.zeros_like(params, dtype=accumulator_dtype)
        count = jnp.zeros([], jnp.int32)
        momentum = link.wrap(zeros, rule="mean")
        return DistributedLionState(count, momentum, link.init(params))

    def averaged(count: jax.Array, momentum: Any) -> Any:
        if average_momentum is None:
            return momentum
        axes = link.axes
        assert axes is not None
        return lax.cond(
            (count + 1) % average_momentum == 0,
            lambda m: axes.vary(mean_in_range(m, axes)),
            lambda m: m,
            momentum,
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        momentum = link.unwrap(state.momentum)
        grads = link.receive(updates, like=momentum)
        # 2404.00438 Algorithm 1: sign(beta1 m + (1 - beta1) g), by vote or in the mean
        ahead = _mixed(b1, momentum, grads)
        got = link.average(ahead, state.link, state.count, like=grads)
        mean = got.mean if votes else jax.tree.map(jnp.sign, got.mean)
        # m = beta2 m + (1 - beta2) g
        new = jax.tree.map(
            lambda x, m: bits.cast(x, m.dtype), _mixed(b2, momentum, grads), momentum
        )
        new = averaged(state.count, new)
        count = optax.safe_increment(state.count)
        momentum = link.wrap(new, state.momentum)
        return mean, DistributedLionState(count, momentum, got.state)

    signs = optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))
    return optax.chain(
        signs,
        add_decay(weight_decay, mask),  # + lambda x, behind the vote
        optax.scale_by_learning_rate(learning_rate),
    )


def _mixed(decay: Any, momentum: Any, grads: Any) -> Any:
    """``decay * m + (1 - decay) * g`` in at least float32."""

    def mix(m, g):
        wide = jnp.promote_types(jnp.promote_types(m.dtype, g.dtype), jnp.float32)
        share = jnp.asarray(decay, wide)
        return share * m.astype(wide) + (1 - share) * g.astype(wide)

    return jax.tree.map(mix, momentum, grads)
