"""Transformations in front of the exchange, with a state of each worker's own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from efopt.ground.checks import keyword_only
from efopt.workers import unreduced
from efopt.workers.axes import Axes, AxisName
from efopt.workers.node import PerWorker, is_node


@keyword_only
def per_worker(
    inner: optax.GradientTransformation,
    *,
    axis_name: AxisName,
    fold_keys: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``inner`` on each worker's own updates, with a state of its own.

    For whatever stands in front of the exchange in a chain and keeps state, such as
    local momentum: ``chain(per_worker(optax.trace(0.9), axis_name="data"),
    error_feedback(...))``. Without it that state would differ from worker to worker
    unmarked, which
    ``shard_map`` refuses and ``pmap`` silently corrupts.

    *Random numbers.* Workers draw numbers of their own, as the average of independent
    noise needs it: with every random key in the state of ``inner``, worker ``i`` works
    as if it were ``jax.random.fold_in(key, i)``. The keys that are kept are those of
    ``inner`` alone, equal on all workers, so that a resumed run draws what it would
    have drawn. Known as keys are typed ones (``jax.random.key``) and arrays of uint32
    that look like raw ones in a field whose name says ``key`` or ``rng``, as Optax's
    noise has them. ``fold_keys=False`` leaves all as they are: all workers draw the
    same, unless their keys were made different.

    Placement: the whole state of ``inner`` is a :class:`efopt.PerWorker`.

    Args:
      inner: Any Optax transformation without collectives.
      axis_name: The mapped axis of the workers, or a tuple of axes.
      fold_keys: Whether random keys in the state of ``inner`` are folded with the
        worker's index.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``axis_name`` is neither a string nor a tuple of strings, or
        ``fold_keys`` no bool.
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
    if not isinstance(fold_keys, bool):
        raise TypeError(f"`per_worker(fold_keys=...)` is a bool, got {fold_keys!r}.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        state = jax.tree.map(jnp.asarray, inner.init(params))
        return PerWorker.wrap(state, axes, rule="mean")

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        updates = unreduced.stacked("`per_worker`", axes, updates)
        if is_node(updates):  # stacked gradients, in a plain jitted step
            return _stacked(updates, state, params, extra_args)
        axes.require_bound("`per_worker`")
        axes.require_local("`per_worker`", updates)
        own = state.local(f"`per_worker(axis_name={axis_name!r})`")
        index = axes.index() if has_keys(own) else None
        out, own = one(updates, own, index, params, extra_args)
        return out, state.rewrap(own)

    def one(updates: Any, own: Any, index: Any, params: Any, extra_args: Any) -> Any:
        if not (fold_keys and has_keys(own)):
            return inner.update(updates, own, params, **extra_args)
        folded = with_keys(own, lambda key: _fold(key, index))
        out, new = inner.update(updates, folded, params, **extra_args)
        # Keys go on as they do without a worker; of the rest nothing is computed.
        _, common = inner.update(updates, own, params, **extra_args)
        new = jax.tree_util.tree_map_with_path(
            lambda path, x, y: y if is_key(path, x) else x, new, common
        )
        return out, new

    def _stacked(updates: Any, state: Any, params: Any, extra_args: Any) -> Any:
        state.require_whole(f"`per_worker(axis_name={axis_name!r})`")
        leaves = jax.tree.leaves((updates, state))
        rows = {x.shape[0] for x in leaves}
        if len(rows) > 1:
            raise ValueError(
                f"`per_worker(axis_name={axis_name!r})` got the gradients of "
                f"{leaves[0].shape[0]} workers, and a state that is not theirs. Place "
                "it before the step: `efopt.distribute(state, mesh, params_specs)`."
            )
        workers = jnp.arange(leaves[0].shape[0] if leaves else 1)
        name = spmd_name(axes, leaves)
        if leaves and name is None:
            rows = NamedSharding(jax.typeof(leaves[0]).sharding.mesh, P(axes.key))
            workers = jax.reshard(workers, rows)
        over_workers = jax.vmap(
            lambda updates, own, index: one(updates, own, index, params, extra_args),
            spmd_axis_name=name,
        )
        out, own = over_workers(updates.value, state.value, workers)
        return updates.with_value(out), state.with_value(own)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def spmd_name(axes: Axes, tree: Any, stacked: bool = True) -> Any:
    """The ``spmd_axis_name`` of a ``vmap`` over the rows of workers.

    ``None`` where no mesh axis joins them, or where the types of a tree of arrays tell
    it: on an Explicit mesh.
    """
    kinds = [
        kind
        for x in jax.tree.leaves(tree)
        for kind in getattr(jax.typeof(x).sharding.mesh, "axis_types", ())
    ]
    return axes.key if stacked and AxisType.Explicit not in kinds else None


def has_keys(state: Any) -> bool:
    """Whether a state holds random keys."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return any(is_key(path, x) for path, x in paths)


def with_keys(state: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
    """A state with its random keys changed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: change(x) if is_key(path, x) else x, state
    )


def is_key(path: Any, x: Any) -> bool:
    """Whether a leaf is a random key, or several, typed or raw."""
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    name = jax.tree_util.keystr(path[-2:], simple=True).lower()
    raw = dtype == jnp.uint32 and jnp.shape(x)[-1:] == _raw_shape()
    return raw and ("key" in name or "rng" in name)


def _raw_shape() -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def _fold(key: jax.Array, index: jax.Array) -> jax.Array:
    """A key, or an array of them, folded with the worker's index."""
    fold = lambda key: jax.random.fold_in(key, index)  # noqa: E731
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    for _ in range(key.ndim if typed else key.ndim - 1):
        fold = jax.vmap(fold)
    return fold(key)
