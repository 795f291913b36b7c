"""0/1 Adam: no warm-up, a variance that is refreshed ever more seldom."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.compressors import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.feedback.frozen_variance import frozen_variance, one_bit
from efopt.ground import checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import Axes, AxisName
from efopt.workers.local import require_common


class _RoundState(NamedTuple):
    """Steps taken, and the sum of the rates since the last meeting."""

    count: jax.typing.ArrayLike
    elapsed: jax.typing.ArrayLike


@checks.keyword_only
def zero_one_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    freeze: int,
    refresh: int = 16,
    longest: int = 1,
    doubling: int | None = None,
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

    *Local steps.* With ``longest`` above one, workers do not meet at every step once
    the variance stands still. The distance of meetings is one for ``doubling`` steps
    from ``freeze`` on, two for as many, four..., and at most ``longest``. Between them
    nothing crosses the axis, and each worker moves by its own momentum; at a meeting,
    of rates that sum to :math:`\Gamma` since the last,

    .. math::
      \text{between}: \quad & m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \quad
      d_i \leftarrow d_i - \gamma_t \frac{m_i}{\sqrt v + \epsilon} \\
      \text{there}: \quad & m, m_i \leftarrow \text{what one bit each way makes of the }
      - \frac{\sqrt v + \epsilon}{\Gamma} d_i, \quad d_i \leftarrow 0 \\
      & x \leftarrow x - \Gamma \Big( \frac{m}{\sqrt v + \epsilon} + \lambda x \Big)

    The drift :math:`d_i` is in the state, and the parameters of the train state are
    those of the last meeting, equal on all workers: as under
    :func:`efopt.local_steps`, gradients are to be taken at ``efopt.local_params(params,
    axis_name, opt_state)``. The paper's buffer :math:`u_i` is
    :math:`-(\sqrt v + \epsilon) d_i`.

    Known faults: those of :func:`efopt.feedback.scale_by_one_bit_adam`, its small
    ``eps`` above all; a variance that stands still; local steps take two more copies of
    the parameters on each worker.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: with the default compressor ``1 + 32 / 1024`` bits per coordinate each way; at
    a refresh dense; between meetings nothing. Each is in the program, in a branch.
    Properties: conservative in steps: what was applied and what is owed add up to what
    workers have moved by.
    Placement: the residual per worker, that of the owners split over them, momentum and
    variance replicated; with local steps a drift and a momentum per worker too.

    Args:
      learning_rate: A float or a schedule.
      freeze: The step from which the variance stands still, at least 1; the end of the
        learning rate's warm-up in the paper. ``var_freeze_step`` in DeepSpeed. Static.
      refresh: After how many refreshes their distance doubles, at least 1;
        ``var_update_scaler`` in DeepSpeed, whose 16 it is. Static.
      longest: The most steps from one meeting to the next, at least 1: at 1 all meet at
        every step. ``local_step_clipper`` in DeepSpeed, whose default was 16. Static.
      doubling: After how many steps that distance doubles, at least 1; needed with
        ``longest`` above 1. In the paper the steps in which the learning rate halves;
        ``local_step_scaler`` in DeepSpeed, whose default was 32678. Static.
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
      TypeError: If ``compressor`` is not one, or ``freeze``, ``refresh``, ``longest``
        or ``doubling`` no Python int.
      ValueError: If a number is out of range, one of ``longest`` and ``doubling`` is
        given without the other, or the exchange cannot carry the compressor or, with
        local steps, averages over fast axes at every step; at trace time, with these,
        if the parameters are not the common ones.

    Examples:
      >>> import efopt
      >>> tx = efopt.optimizers.zero_one_adam(1e-3, freeze=10_000, axis_name="data")

    References:
      Lu et al, `Maximizing Communication Efficiency for Large-scale Training via 0/1
      Adam <https://arxiv.org/abs/2202.06009>`_, 2022 (Algorithm 1)
    """
    api = "zero_one_adam"
    checks.static_int(api, "freeze", freeze, least=1)
    checks.static_int(api, "refresh", refresh, least=1)
    checks.static_int(api, "longest", longest, least=1, below=2**30)
    if doubling is not None:
        checks.static_int(api, "doubling", doubling, least=1, below=2**31)
    if (longest > 1) != (doubling is not None):
        raise ValueError(
            f"`{api}` takes `longest`, the most steps between meetings, and `doubling`,"
            " after how many steps their distance doubles, together; got "
            f"{longest=} and {doubling=}."
        )
    meets_at = None
    last: Any = optax.scale_by_learning_rate(learning_rate)
    if doubling is not None:
        meets_at = functools.partial(
            _meets, first=freeze, longest=longest, every=doubling
        )
        last = _scale_by_round(learning_rate, meets_at, Axes.maybe(api, axis_name))
    chosen, way = one_bit(compressor, axis_name, exchange)
    return optax.chain(
        frozen_variance(
            api,
            lambda count: (count < freeze) & _refreshed(count, refresh),
            b1=b1,
            b2=b2,
            eps=eps,
            compressor=chosen,
            axis_name=axis_name,
            exchange=way,
            learning_rate=learning_rate,
            meets_at=meets_at,
        ),
        add_decay(weight_decay, mask),
        last,
    )


def _refreshed(count: jax.Array, group: int) -> jax.Array:
    """Whether a step is one of ``group`` at a distance of 1, ``group`` of 2, of 4..."""
    before = count.astype(jnp.int32)  # the group of distance 2^g begins at group 2^g
    power = 31 - lax.clz(before // group + 1)
    distance = jnp.left_shift(jnp.int32(1), power)
    return (before + 1 - group * (distance - 1)) % distance == 0


def _meets(count: jax.Array, *, first: int, longest: int, every: int) -> jax.Array:
    """Whether all meet after a step: from ``first`` on at 1, 2, 4..., ``longest``."""
    local = jnp.maximum(count.astype(jnp.int32) - first, 0)
    power = jnp.minimum(local // every, longest.bit_length())
    distance = jnp.minimum(jnp.left_shift(jnp.int32(1), power), longest)
    return (count < first) | ((local + 1) % distance == 0)


def _scale_by_round(
    learning_rate: Any, meets_at: Callable[[jax.Array], jax.Array], axes: Axes | None
) -> optax.GradientTransformation:
    """Minus the rates since the last meeting, and zero between meetings."""

    def init_fn(params: Any) -> Any:
        del params
        return _RoundState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        if axes is not None and params is not None:
            require_common("`zero_one_adam(longest=...)`", axes, params)
        count, meets = state.count, meets_at(state.count)
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        total = state.elapsed + jnp.asarray(rate, jnp.float32)
        factor = jnp.where(meets, -total, 0)
        updates = jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates)
        elapsed = jnp.where(meets, 0, total)
        return updates, _RoundState(optax.safe_increment(count), elapsed)

    return optax.GradientTransformation(init_fn, update_fn)
