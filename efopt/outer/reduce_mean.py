"""The mean of stacked deltas, compressed: for loops that hold a worker axis."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from efopt.ground.checks import keyword_only
from efopt.outer.meeting import homes
from efopt.workers.axes import Axes, AxisName
from efopt.workers.node import PerWorker
from efopt.workers.placement import distribute, stack_workers


@keyword_only
def init_mean(
    scheme: optax.GradientTransformation,
    params: Any,
    *,
    num_workers: int | None = None,
    mesh: Any = None,
    params_specs: Any = None,
) -> Any:
    """The first state for :func:`reduce_mean`.

    Args:
      scheme: What averages, such as ``efopt.error_feedback(..., axis_name=...)``.
      params: The parameters, one worker's: a tree like a row of the deltas.
      num_workers: Workers along the first axis of the deltas, without a mesh.
      mesh: The mesh on which deltas lie, with the axis of the workers.
      params_specs: How parameters are sharded behind each worker, as for
        :func:`efopt.distribute`.

    Returns:
      The state, placed on the mesh or stacked.

    Raises:
      ValueError: If not exactly one of ``num_workers`` and ``mesh`` is given.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> feedback = efopt.error_feedback(efopt.sign(), axis_name="diloco")
      >>> state = efopt.outer.init_mean(feedback, jnp.zeros(3), num_workers=4)
    """
    if (num_workers is None) == (mesh is None):
        raise ValueError(
            "`init_mean` takes exactly one of `num_workers`, for deltas on one device, "
            f"and `mesh`; got {num_workers=} and {mesh=}."
        )
    state = scheme.init(params)
    if mesh is not None:
        given = None if params_specs is None else params
        return distribute(state, mesh, params_specs, params=given)
    assert num_workers is not None
    return stack_workers(state, num_workers)


@keyword_only
def reduce_mean(
    scheme: optax.GradientTransformation,
    deltas: Any,
    *,
    state: Any,
    axis_name: AxisName,
) -> tuple[Any, Any]:
    """The mean over workers of stacked deltas, by way of compressed messages.

    For a loop that holds deltas with a leading worker axis and averages them, as
    ``drjax.reduce_mean(model_delta)`` does in an outer step: the same arrays in and
    out, and a state more, in which each worker keeps what its message did not say::

      mean, state = efopt.outer.reduce_mean(
          feedback, model_delta, state=state, axis_name="diloco")

    Deltas that lie on a mesh with that axis are exchanged over it, by shard; others are
    those of a simulation, on one device.

    Args:
      scheme: What averages over this axis, such as ``efopt.error_feedback(...,
        axis_name=...)``.
      deltas: A tree of arrays ``(workers, ...)``.
      state: As returned by :func:`init_mean`, or by this function.
      axis_name: The axis of the workers, or a tuple of axes.

    Returns:
      The mean, a tree of arrays ``(...)``, equal on all workers, and the new state.

    Raises:
      TypeError: If ``axis_name`` is neither a string nor a tuple of strings, or
        ``scheme`` is no transformation.
      ValueError: If deltas and state are not of the same workers, the state is not of
        an exchange over this axis, or the step is mapped over it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> feedback = efopt.error_feedback(efopt.top_k(k=1), axis_name="diloco")
      >>> state = efopt.outer.init_mean(feedback, jnp.zeros(2), num_workers=2)
      >>> deltas = jnp.array([[4.0, 1.0], [2.0, 3.0]])
      >>> mean, state = efopt.outer.reduce_mean(
      ...     feedback, deltas, state=state, axis_name="diloco")
      >>> print(mean)
      [2.  1.5]
    """
    axes = Axes.of("reduce_mean", axis_name)
    if axes.bound():
        raise ValueError(
            "`reduce_mean(axis_name=...)` is for arrays that hold all workers, and "
            f"this step is mapped over {axes.key!r} already: call `scheme.update`."
        )
    if not any(set(x.link.axes.names) == set(axes.names) for x in homes(state)):
        raise ValueError(
            f"`reduce_mean(axis_name={axes.key!r})` needs a scheme with an exchange "
            "over this axis, such as `efopt.error_feedback(compressor, "
            f"axis_name={axes.key!r})`, and the state that "
            "`efopt.outer.init_mean` makes of it."
        )
    update = optax.with_extra_args_support(scheme).update
    if _lies_on(deltas, axes):
        marked: Any = PerWorker(deltas, axes.key)
        return update(marked, state)
    if len(axes.names) > 1:
        raise ValueError(
            f"`reduce_mean(axis_name={axis_name!r})` names several axes, and the "
            "deltas lie on no mesh with them."
        )
    _require_rows(deltas, state)
    means, state = jax.vmap(update, axis_name=axes.key)(deltas, state)
    return jax.tree.map(lambda x: x[0], means), state


def _require_rows(deltas: Any, state: Any) -> None:
    """Raises unless all have a row for each of the same workers."""
    n = next((jnp.shape(x)[:1] for x in jax.tree.leaves(deltas)), ())
    for name, tree in (("deltas", deltas), ("state", state)):
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if jnp.shape(x)[:1] != n or not n:
                raise ValueError(
                    "`reduce_mean` takes deltas and a state of arrays with a row for "
                    f"each worker, as many in all. The first delta has {(*n, 0)[0]}, "
                    f"and shape {jnp.shape(x)} came in the {name} at "
                    f"{jax.tree_util.keystr(path) or 'the root'}. Make the state with "
                    "`efopt.outer.init_mean(scheme, params, num_workers=...)`, or for "
                    "deltas on a mesh with `mesh=...`."
                )


def _lies_on(tree: Any, axes: Axes) -> bool:
    """Whether arrays lie on a mesh with the axes, by their types or shardings."""
    meshes: list[Any] = [jax.sharding.get_abstract_mesh()]
    for x in jax.tree.leaves(tree):
        meshes.append(getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None))
        own = getattr(x, "sharding", None)
        meshes.append(own.mesh if isinstance(own, NamedSharding) else None)
    return any(m is not None and set(axes.names) <= set(m.axis_names) for m in meshes)
