"""Local parameters: the common ones, and how far a worker has gone from them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.ground import bits
from efopt.ground.dtypes import wide, wide_zeros
from efopt.workers.axes import Axes, AxisName, varying
from efopt.workers.node import PerWorker, is_node
from efopt.workers.per_worker import spmd_name
from efopt.workers.value_and_grad import mesh_of


class LocalState(NamedTuple):
    """What a worker keeps between meetings.

    Attributes:
      drift: This worker's parameters minus the common ones, shaped like them, at least
        float32.
      inner: The state of its own optimizer.
    """

    drift: Any
    inner: Any


def walk(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """One worker's optimizer, whose updates add up in a drift.

    It is called with the common parameters, and calls ``inner`` with its own.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> LocalState:
        return LocalState(wide_zeros(params), inner.init(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        own = moved(params, state.drift)
        updates, inner_state = inner.update(updates, state.inner, own, **extra_args)
        drift = jax.tree.map(lambda d, u: d + u.astype(d.dtype), state.drift, updates)
        return updates, LocalState(drift, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def moved(params: Any, drift: Any) -> Any:
    """Parameters plus a drift, in the dtypes of the parameters.

    Args:
      params: The common parameters.
      drift: A tree like them, in which some leaves may be masked out by Optax.
    """

    def add(d, p):
        return p if _is_masked(d) else bits.cast(wide(p) + d, jnp.result_type(p))

    return jax.tree.map(add, drift, params, is_leaf=_is_masked)


def local_params(params: Any, axis_name: AxisName | None, state: Any = None) -> Any:
    """The parameters at which this worker takes its gradient, marked as its own.

    Inside ``shard_map``, ``jax.grad`` with respect to replicated parameters returns the
    gradient already summed over workers: an uncompressed all-reduce, and nothing left
    to compress. Differentiate with respect to ``local_params(params, axis_name)``
    instead. Under ``pmap``, ``vmap`` and without checks this changes nothing.

    Name every mapped axis along which batches differ. What is mapped and not named
    here, JAX sums gradients over: right for parts of one batch whose loss is a sum over
    them, and no average. Nothing in the types tells the two apart.

    Under :func:`efopt.local_steps` workers go their own ways between meetings: give the
    optimizer's state too, and what comes out are this worker's own parameters, the
    common ones plus its drift. In a plain jitted step over global arrays it is those of
    all workers, stacked and marked, for :func:`efopt.value_and_grad`::

      loss, grads = efopt.value_and_grad(loss_fn, axis_name="dcn")(
          efopt.local_params(params, "dcn", opt_state), batch)

    A state without a drift in it changes nothing, so that a step that is written so
    fits any optimizer.

    Args:
      params: Any pytree of arrays: with ``state``, the common parameters.
      axis_name: The mapped axis over which the workers are laid out, or a tuple of
        axes. With ``state`` it may be ``None``: a single worker.
      state: The optimizer's state, or anything that holds it.

    Returns:
      The same values, or with a drift those of this worker, typed as varying over
      ``axis_name``. Outside mapped functions, with a drift, an
      :class:`efopt.PerWorker` of arrays ``(workers, *shape)``.

    Raises:
      TypeError: If ``axis_name`` is neither a string nor a tuple of strings.
      ValueError: If an axis is not bound, or named twice; if the drift is over another
        axis, of another number of workers or not placed, or the parameters are some
        worker's already.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> jax.vmap(lambda x: efopt.local_params(x, "data"), axis_name="data")(
      ...     jnp.arange(2.0))
      Array([0., 1.], dtype=float32)
    """
    axes = None
    if axis_name is not None or state is None:
        axes = Axes.of("local_params", axis_name)
    found = _drifts(axes, state)
    if axes is None:
        for x in found:
            params = moved(params, x.drift)
        return params
    if not axes.bound() and state is not None and not found:
        return params
    if axes.bound():
        if found:
            require_common("`local_params(params, axis_name, state)`", axes, params)
        for x in found:
            params = moved(params, x.local("`local_params`").drift)
        return axes.vary(params)
    if not found:
        axes.require_bound("`local_params`")
    return _stacked(params, found, axes)


def _drifts(axes: Axes | None, state: Any) -> list[Any]:
    """The marked states of workers that drift, or of a single one, in any state."""
    stop = lambda x: is_node(x) or isinstance(x, LocalState)  # noqa: E731
    found = []
    for x in jax.tree.leaves(state, is_leaf=stop):
        if not isinstance(x.value if is_node(x) else x, LocalState):
            continue
        own = x.axis_name if is_node(x) else None
        if own != (None if axes is None else axes.key):
            raise ValueError(
                f"`local_params(axis_name={axes and axes.key!r})` got the state of "
                f"workers that drift apart along {own!r}: give both the same "
                "`axis_name`."
            )
        found.append(x)
    return found


def require_common(api: str, axes: Axes, params: Any) -> None:
    """Raises if parameters are marked, or typed, as each worker's own."""
    marked = any(map(is_node, jax.tree.leaves(params, is_leaf=is_node)))
    for path, p in jax.tree_util.tree_flatten_with_path(params)[0]:
        if marked or set(axes.names) & varying(p):
            raise ValueError(
                f"{api} takes the common parameters, to which it adds each worker's "
                "drift, and got some that differ from worker to worker along "
                f"{axes.key!r} already, at {jax.tree_util.keystr(path) or 'the root'}. "
                "Pass those of the train state as they are."
            )


def _stacked(params: Any, found: list[Any], axes: Axes) -> PerWorker:
    """The parameters of all workers, ``(workers, *shape)``."""
    require_common("`local_params(params, axis_name, state)`", axes, params)
    mesh = mesh_of(params, axes, "local_params")
    n = axes.size_on(mesh)
    for x in found:
        x.require_whole("`local_params`")
        same = mesh_of(x, axes, "local_params") == mesh
        for path, d in jax.tree_util.tree_flatten_with_path(x.value.drift)[0]:
            if d.shape[:1] != (n,) or not same:
                raise ValueError(
                    "`local_params(params, axis_name, state)` needs parameters and "
                    f"state that are placed together, on a mesh with {n} workers along "
                    f"{axes.key!r}; got a drift of shape {d.shape} at "
                    f"{jax.tree_util.keystr(path) or 'the root'}. Place them with "
                    "`efopt.distribute((params, state), mesh, params_specs)`."
                )

    def one(*drifts):
        own = params
        for drift in drifts:
            own = moved(own, drift)
        return own

    name = spmd_name(axes, params)
    over_workers = jax.vmap(one, spmd_axis_name=name)
    return PerWorker(over_workers(*[x.value.drift for x in found]), axes.key)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
