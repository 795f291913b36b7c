"""Optax transformations whose state is each worker's own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.workers import axes
from efopt.workers.node import PerWorker


def per_worker(
    inner: optax.GradientTransformation, axis_name: str
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on each worker's own updates, with a state of its own.

    For whatever stands in front of the exchange in a chain and keeps state, such as
    local momentum: ``chain(per_worker(optax.trace(0.9), "data"),
    error_feedback(...))``. Without it that state would differ from worker to worker
    unmarked, which
    ``shard_map`` refuses and ``pmap`` silently corrupts.

    Placement: the whole state of ``inner`` is a :class:`efopt.PerWorker`.

    Args:
      inner: Any Optax transformation without collectives.
      axis_name: The mapped axis of the workers.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``axis_name`` is not a string.
      ValueError: At trace time, if the axis is not bound, updates are already averaged
        over it, or the state is not placed.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import efopt
      >>> tx = efopt.per_worker(optax.trace(0.9), "data")
      >>> tx.init(jnp.zeros(3)).value.trace.shape
      (1, 3)
    """
    axes.need_axis_name("per_worker", axis_name)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        return PerWorker.wrap(jax.tree.map(jnp.asarray, inner.init(params)), axis_name)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        axes.require_bound("`per_worker`", axis_name)
        axes.require_local("`per_worker`", axis_name, updates)
        own = state.local(f"`per_worker(axis_name={axis_name!r})`")
        updates, own = inner.update(updates, own, params, **extra_args)
        return updates, PerWorker.wrap(own, axis_name)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`.

    Attributes:
      count: Mini-steps since the last step. shape=(), int32.
      accumulator: This worker's mean of the mini-batch gradients so far, at least
        float32. Per worker.
      inner: The state of the inner transformation.
    """

    count: jax.Array
    accumulator: PerWorker
    inner: Any


def accumulate(
    inner: optax.GradientTransformation, every: int, axis_name: str
) -> optax.GradientTransformationExtraArgs:
    """Averages the gradients of ``every`` mini-steps, then updates, and meets, once.

    In place of ``optax.MultiSteps``, which keeps an accumulator that differs from
    worker to worker unmarked and runs the exchange at every mini-step. Here mini-steps
    send nothing: the exchange stands in a branch that all workers take together. In
    between, updates are zero.

    Placement: the accumulator is a :class:`efopt.PerWorker`, the counter is replicated.

    Args:
      inner: Any Optax transformation, usually a chain that holds the exchange.
      every: Mini-steps a step, at least 1. Static.
      axis_name: The mapped axis of the workers.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``every`` is not a Python int or ``axis_name`` not a string.
      ValueError: If ``every < 1``; at trace time, if the axis is not bound, updates are
        already averaged over it, or the state is not placed.

    Examples:
      >>> import optax
      >>> import efopt
      >>> step = optax.chain(
      ...     efopt.error_feedback(efopt.scaled_sign(), axis_name="data"),
      ...     optax.sgd(0.1))
      >>> tx = efopt.accumulate(step, every=4, axis_name="data")
    """
    axes.need_axis_name("accumulate", axis_name)
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(
            "`accumulate(every=...)` must be a Python int, got "
            f"{type(every).__name__}. With `optax.inject_hyperparams` pass "
            "`static_args=('every',)`."
        )
    if every < 1:
        raise ValueError(f"`accumulate(every=...)` must be at least 1, got {every}.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        wide = jax.tree.map(_wide_zeros, params)
        return AccumulateState(
            count=jnp.zeros([], jnp.int32),
            accumulator=PerWorker.wrap(wide, axis_name),
            inner=inner.init(params),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        axes.require_bound("`accumulate`", axis_name)
        axes.require_local("`accumulate`", axis_name, updates)
        total = state.accumulator.local(f"`accumulate(axis_name={axis_name!r})`")
        total = jax.tree.map(lambda a, g: a + g.astype(a.dtype) / every, total, updates)

        def step(total, inner_state):
            mean = jax.tree.map(lambda a, g: a.astype(g.dtype), total, updates)
            return inner.update(mean, inner_state, params, **extra_args)

        def take(total, inner_state):
            out, inner_state = step(total, inner_state)
            return out, jax.tree.map(jnp.zeros_like, total), inner_state

        def skip(total, inner_state):
            out, _ = jax.eval_shape(step, total, inner_state)
            return jax.tree.map(axes.zeros_like, out), total, inner_state

        last = state.count == every - 1
        out, total, inner_state = lax.cond(last, take, skip, total, state.inner)
        count = jnp.where(last, 0, state.count + 1)
        accumulator = PerWorker.wrap(total, axis_name)
        return out, AccumulateState(count, accumulator, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide_zeros(p: Any) -> jax.Array:
    return jnp.zeros(jnp.shape(p), jnp.promote_types(jnp.result_type(p), jnp.float32))
