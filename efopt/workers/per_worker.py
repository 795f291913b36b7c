"""Transformations in front of the exchange, with a state of each worker's own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efopt.ground.checks import keyword_only
from efopt.workers.axes import Axes, AxisName
from efopt.workers.node import PerWorker, is_node


@keyword_only
def per_worker(
    inner: optax.GradientTransformation, *, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on each worker's own updates, with a state of its own.

    For whatever stands in front of the exchange in a chain and keeps state, such as
    local momentum: ``chain(per_worker(optax.trace(0.9), axis_name="data"),
    error_feedback(...))``. Without it that state would differ from worker to worker
    unmarked, which
    ``shard_map`` refuses and ``pmap`` silently corrupts.

    Placement: the whole state of ``inner`` is a :class:`efopt.PerWorker`.

    Args:
      inner: Any Optax transformation without collectives.
      axis_name: The mapped axis of the workers, or a tuple of axes.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``axis_name`` is neither a string nor a tuple of strings.
      ValueError: At trace time, if the axis is not bound, updates are already averaged
        over it, or the state is not placed.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import efopt
      >>> tx = efopt.per_worker(optax.trace(0.9), axis_name="data")
      >>> tx.init(jnp.zeros(3)).value.trace.shape
      (1, 3)
    """
    axes = Axes.of("per_worker", axis_name)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        return PerWorker.wrap(jax.tree.map(jnp.asarray, inner.init(params)), axes)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        if is_node(updates):  # stacked gradients, in a plain jitted step
            return _stacked(updates, state, params, extra_args)
        axes.require_bound("`per_worker`")
        axes.require_local("`per_worker`", updates)
        own = state.local(f"`per_worker(axis_name={axis_name!r})`")
        updates, own = inner.update(updates, own, params, **extra_args)
        return updates, PerWorker.wrap(own, axes)

    def _stacked(updates: Any, state: Any, params: Any, extra_args: Any) -> Any:
        def one(updates, own):
            return inner.update(updates, own, params, **extra_args)

        over_workers = jax.vmap(one, spmd_axis_name=axes.key)
        out, own = over_workers(updates.value, state.value)
        return dataclasses.replace(updates, value=out), PerWorker(own, axes.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
