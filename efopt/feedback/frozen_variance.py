"""Adam's steps with a variance that is known to all: what is sent is momentum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.compressors import Compressor, scaled_sign
from efopt.exchanges.all_reduce import mean_in_range
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.feedback.local_momentum import LocalMomentum, LocalMomentumState
from efopt.feedback.momenta import alive, mixed
from efopt.feedback.rates import hold, rates
from efopt.ground import bits, checks
from efopt.workers.axes import AxisName


class FrozenVarianceState(NamedTuple):
    """State of :func:`scale_by_one_bit_adam` and of 0/1 Adam.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      mu: The averaged momentum, shaped like the parameters. Equal on all workers.
      nu: The running mean of squared averaged gradients. Equal on all workers.
      residual: What this worker still owes of its momentum, shaped like the
        parameters. A :class:`efopt.PerWorker` if there is an axis.
      link: With the owners' residual, an :class:`efopt.exchanges.LinkState`.
      last_rate: As of :class:`efopt.feedback.ErrorFeedbackState`.
      local: With local steps, what is kept between meetings; ``()`` without.
    """

    count: jax.typing.ArrayLike
    mu: Any
    nu: Any
    residual: Any
    link: Any
    last_rate: Any
    local: Any = ()


def frozen_variance(
    api: str,
    dense_at: Callable[[jax.Array], jax.Array],
    *,
    b1: Any,
    b2: Any,
    eps: Any,
    compressor: Compressor,
    axis_name: AxisName | None,
    exchange: Exchange | str | None,
    learning_rate: Any = None,
    meets_at: Callable[[jax.Array], jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction; between dense steps momentum travels compressed.

    With ``meets_at`` there are steps at which nothing travels. What comes out at a
    meeting is to be multiplied by the sum of the rates since the last one, and what
    comes out between meetings is of no use.

    Args:
      api: The transformation, for errors.
      dense_at: Whether at a step gradients are averaged uncompressed, and the variance
        moves.
      b1: Decay of the momentum.
      b2: Decay of the variance.
      eps: Added to its root.
      compressor: Of the momentum.
      axis_name: The workers' axes.
      exchange: How they meet.
      learning_rate: The rate or schedule behind, if residuals are to keep its units.
      meets_at: Whether at a step workers meet, as they do at dense ones; ``None``: at
        all. Needs a learning rate.
    """
    checks.decay(api, "b1", b1)
    checks.decay(api, "b2", b2)
    if isinstance(eps, int | float) and not eps > 0:
        raise ValueError(f"`{api}(eps=...)` must be positive, got {eps}.")
    link = open_link(
        api, compressor, axis_name=axis_name, exchange=exchange, role="adam"
    )
    local = None if meets_at is None else LocalMomentum(meets_at, b1, eps)
    if local is not None:
        local.refuse(link, exchange)

    def init_fn(params: Any) -> Any:
        zeros = link.zeros(params)
        return FrozenVarianceState(
            count=jnp.zeros([], jnp.int32),
            mu=zeros,
            nu=zeros,
            residual=link.wrap(zeros, rule="mean"),
            link=link.init(params),
            last_rate=() if learning_rate is None else jnp.zeros([], jnp.float32),
            local=() if local is None else local.init(link, zeros),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        owed = link.unwrap(state.residual)
        grads = link.receive(updates, like=owed)
        total: Any = learning_rate
        own: Any = ()
        if local is not None:  # what a meeting moves by is all rates of its round
            now = rates(learning_rate, state.count, state.last_rate)[0]
            total = state.local.elapsed + now
            own = local.walk(link.unwrap(state.local.own), grads, state.nu, now)
        rate, last, ratio = rates(total, state.count, state.last_rate)

        def dense(grads: Any, mu: Any, nu: Any, owed: Any, server: Any) -> Any:
            mean = grads if link.axes is None else mean_in_range(grads, link.axes)
            # 2102.02888 Algorithm 1, warm-up: m and v of averaged gradients
            mu = mixed(b1, mu, mean)
            nu = mixed(b2, nu, jax.tree.map(_square, mean, nu))
            return mu, nu, owed, server

        def compressed(grads: Any, mu: Any, nu: Any, owed: Any, server: Any) -> Any:
            # m_i = beta1 m + (1 - beta1) g_i, plus what is owed, without what has never
            # had a gradient: one bit cannot say zero
            if local is None:
                sent = alive(mixed(b1, mu, grads), nu)
            else:
                sent = local.mean(own, nu, rate)
            old = mu, owed, server
            if ratio is not None:
                owed = jax.tree.map(lambda e: e * ratio.astype(e.dtype), owed)
            sent = optax.tree.add(sent, owed)
            got = link.average(
                sent, server, state.count, like=grads, ratio=ratio, wide=True
            )
            lost = alive(got.lost, nu)
            if link.axes is not None:  # empty leaves are equal on all workers
                lost = link.axes.vary(lost)
            new = alive(got.mean, nu), lost, got.state
            if rate is not None:  # nothing is paid at a rate of zero
                _, new = hold(rate, (), new, old)
            return new[0], nu, *new[1:]

        def none(grads: Any, mu: Any, nu: Any, owed: Any, server: Any) -> Any:
            return mu, nu, owed, server

        meets = is_dense = dense_at(state.count)
        branches = [compressed, dense] if local is None else [compressed, dense, none]
        which = jnp.where(is_dense, 1, 0)
        if local is not None:
            meets |= local.meets_at(state.count)
            which = jnp.where(meets, which, 2)
        mu, nu, owed, server = lax.switch(
            which, branches, *(grads, state.mu, state.nu, owed, state.link)
        )
        rounds = ()
        if local is not None:
            own = local.met(own, mu, meets)
            elapsed = jnp.where(meets, 0, total)
            rounds = LocalMomentumState(link.wrap(own, state.local.own), elapsed)
        if learning_rate is not None:  # residuals are in units of the last sending's
            last = jnp.where(which == 0, last, state.last_rate)
        # x = x - gamma m / (sqrt(v) + eps)
        out = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        out = jax.tree.map(lambda u, g: bits.cast(u, g.dtype), out, grads)
        return out, FrozenVarianceState(
            count=optax.safe_increment(state.count),
            mu=mu,
            nu=nu,
            residual=link.wrap(owed, state.residual),
            link=server,
            last_rate=last,
            local=rounds,
        )

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))


@checks.keyword_only
def scale_by_one_bit_adam(
    *,
    warmup: int,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    compressor: Compressor | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction from momentum that travels at one bit a coordinate.

    For ``warmup`` steps gradients are averaged dense, and momentum and variance are
    Adam's. Then the variance is frozen, and Adam is linear in the gradient, as error
    feedback wants it:

    .. math::
      m_i &= \beta_1 m + (1 - \beta_1) g_i, \quad p_i = m_i + e_i, \quad
      e_i \leftarrow p_i - C(p_i) \\
      s &= \frac{1}{n} \sum_i C(p_i) + \tilde e, \quad
      m \leftarrow C(s), \quad \tilde e \leftarrow s - C(s), \quad
      u = m / (\sqrt{v} + \epsilon)

    The owners of ranges keep :math:`\tilde e`, as in :func:`efopt.dist_ef_sgd`. As
    published there is no correction of the bias of young means: the first steps are
    :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}`, about 3, times as long as the rate, so
    warm the rate up too.

    *Zeros.* One bit cannot say zero, and where the variance is zero any bit is divided
    by ``eps``. A coordinate that had no gradient in all of the warm-up, such as the row
    of an embedding beyond the lengths that were trained, therefore has no momentum and
    no residual afterwards: it stands still, also if a gradient comes later. Let the
    warm-up see what is to be trained, or leave such leaves to dense Adam, by
    ``optax.partition``.

    *Nearly zero.* A coordinate that has hardly had a gradient, such as a weight of a
    unit that is seldom active, is sent bits as large as those of its block and divides
    them by next to nothing: training may diverge within steps. A larger ``eps``, of the
    order of the roots of most variances, bounds that; on a small network of rectified
    units 1e-4 trains, and 1e-8 does not at any rate.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: with the default compressor ``1 + 32 / 1024`` bits per coordinate each way;
    in the warm-up dense. Both are in the program, each in a branch.
    Properties: conservative in momentum; in the warm-up Adam without bias correction.
    Placement: ``residual`` and the link's ``server`` per worker, all else replicated:
    in float32 three copies of the parameters, and one in ``n``.

    Args:
      warmup: Dense steps, at least 1; 15 to 25 % of the run in the paper. Static.
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the variance, in [0, 1).
      eps: Added to the variance's root, positive. The default is that of Adam, and too
        small where some coordinates hardly have gradients, as above.
      compressor: Of the momentum; ``None``: ``efopt.scaled_sign(block_size=1024)``.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How they meet; ``None``: ``"two_phase"`` for a compressor in blocks,
        another's own way. Without effect over one worker.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, or ``warmup`` no Python int.
      ValueError: If a number is out of range, or the exchange cannot carry the
        compressor.

    Examples:
      >>> import optax
      >>> import efopt
      >>> lamb = optax.chain(
      ...     efopt.feedback.scale_by_one_bit_adam(warmup=1000, axis_name="data"),
      ...     optax.scale_by_trust_ratio(),
      ...     optax.scale_by_learning_rate(1e-3))

    References:
      Tang et al, `1-bit Adam: Communication Efficient Large-Scale Training with Adam's
      Convergence Speed <https://arxiv.org/abs/2102.02888>`_, 2021 (Algorithm 1)
    """
    return warmed_up(
        "scale_by_one_bit_adam",
        warmup=warmup,
        b1=b1,
        b2=b2,
        eps=eps,
        compressor=compressor,
        axis_name=axis_name,
        exchange=exchange,
    )


def warmed_up(
    api: str,
    *,
    warmup: int,
    compressor: Compressor | None,
    axis_name: AxisName | None,
    exchange: Exchange | str | None,
    **decays: Any,
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_one_bit_adam`, of this name in errors."""
    checks.static_int(api, "warmup", warmup, least=1)
    chosen, way = one_bit(compressor, axis_name, exchange)
    return frozen_variance(
        api,
        lambda count: count < warmup,
        compressor=chosen,
        axis_name=axis_name,
        exchange=way,
        **decays,
    )


def one_bit(compressor: Any, axis_name: Any, exchange: Any) -> tuple[Any, Any]:
    """The compressor and the exchange: one bit each way unless told otherwise."""
    if compressor is None:
        compressor = scaled_sign(block_size=1024)
    blocked = isinstance(compressor, Compressor) and compressor.block_size is not None
    if axis_name is not None and exchange is None and blocked:
        exchange = "two_phase"
    return compressor, exchange


def _square(g: jax.Array, v: jax.Array) -> jax.Array:
    wide = g.astype(v.dtype)
    return wide * wide
