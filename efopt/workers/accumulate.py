"""Gradient accumulation: several mini-batches, and one meeting."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.ground import checks
from efopt.ground.dtypes import wide_zeros
from efopt.workers import unreduced
from efopt.workers.axes import Axes, AxisName, zeros_like
from efopt.workers.node import PerWorker, is_node, laid_out


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


@checks.keyword_only
def accumulate(
    inner: optax.GradientTransformation, *, every: int, axis_name: AxisName
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
      axis_name: The mapped axis of the workers, or a tuple of axes.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``every`` is not a Python int, or ``axis_name`` names no axes.
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
    axes = Axes.of("accumulate", axis_name)
    checks.static_int("accumulate", "every", every)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        return AccumulateState(
            count=jnp.zeros([], jnp.int32),
            accumulator=PerWorker.wrap(wide_zeros(params), axes, rule="mean"),
            inner=inner.init(params),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        updates = unreduced.stacked("`accumulate`", axes, updates)
        if is_node(updates):  # stacked gradients, in a plain jitted step
            total = dataclasses.replace(updates, value=state.accumulator.value)
            wrap = lambda total: state.accumulator.with_value(total.value)  # noqa: E731
        else:
            axes.require_bound("`accumulate`")
            axes.require_local("`accumulate`", updates)
            total = state.accumulator.local(f"`accumulate(axis_name={axis_name!r})`")
            wrap = state.accumulator.rewrap
        total = jax.tree.map(lambda a, g: a + g.astype(a.dtype) / every, total, updates)

        def step(total, inner_state):
            mean = jax.tree.map(lambda a, g: a.astype(g.dtype), total, updates)
            return inner.update(mean, inner_state, params, **extra_args)

        def take(total, inner_state):
            out, inner_state = step(total, inner_state)
            return out, jax.tree.map(jnp.zeros_like, total), inner_state

        def skip(total, inner_state):
            out, _ = jax.eval_shape(step, total, inner_state)
            return jax.tree.map(zeros_like, out), total, inner_state

        last = state.count == every - 1
        out, total, inner_state = lax.cond(
            last, take, skip, total, laid_out(state.inner)
        )
        count = jnp.where(last, 0, state.count + 1)
        return out, AccumulateState(count, wrap(total), inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
