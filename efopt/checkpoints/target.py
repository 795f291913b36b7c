"""Where a checkpoint of other workers is restored to."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from efopt.checkpoints.arrays import auto, columns
from efopt.checkpoints.record import check
from efopt.workers.axes import Axes
from efopt.workers.node import is_node
from efopt.workers.placement import distribute


def target(
    tree: Any,
    mesh: jax.sharding.Mesh,
    params_specs: Any = None,
    *,
    saved: Mapping[str, Any],
    params: Any = None,
) -> Any:
    """The shapes of a checkpoint, and where on today's mesh to restore them.

    For a checkpointer that restores into structs, such as Orbax's, whose own answer to
    another number of workers, ``strict=False``, cuts residuals off or fills up with
    zeros and says nothing. Every device gets a part of the coordinates of all saved
    workers, so that none holds all of it, nor does any host.

    Args:
      tree: Today's state, or its structs: ``jax.eval_shape(tx.init, params)``.
      mesh: Today's mesh. Behind each worker it must be as it was.
      params_specs: As in :func:`efopt.partition_specs`.
      saved: The lengths of the workers' axes when the checkpoint was saved, by name; or
        the :func:`efopt.checkpoints.record` of it, against which the state is checked.
      params: As in :func:`efopt.partition_specs`.

    Returns:
      A tree like ``tree`` of ``jax.ShapeDtypeStruct``: give it to the checkpointer, and
      what that returns to :func:`efopt.checkpoints.resize`.

    Raises:
      ValueError: If an axis of the state is missing in ``saved`` or on the mesh; as
        :func:`efopt.checkpoints.check`, and as :func:`efopt.distribute`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = efopt.error_feedback(efopt.scaled_sign(), axis_name="data")
      >>> state = jax.eval_shape(tx.init, jnp.zeros(3))
      >>> old = efopt.checkpoints.target(state, mesh, saved={"data": 24})
      >>> old.residual.value.shape
      (24, 3)
    """
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
    )
    is_record = isinstance(saved.get("workers"), Mapping)  # not an axis of that name
    sizes, workers = dict(mesh.shape), saved["workers"] if is_record else saved
    for name, size in workers.items():
        if name not in sizes:
            raise ValueError(
                f"`target(tree, mesh, saved={dict(workers)})`: the mesh has no axis "
                f"{name!r}, but {tuple(mesh.axis_names)}."
            )
        sizes[name] = size
    for path, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]:
        for name in Axes.of("target", x.axis_name).names if is_node(x) else ():
            if name not in workers:
                raise ValueError(
                    f"`target(tree, mesh, saved=...)`: {jax.tree_util.keystr(path)} is "
                    f"over the axis {name!r}, and lengths are given of "
                    f"{sorted(workers)}."
                )
    old = AbstractMesh(tuple(sizes.values()), tuple(sizes), mesh.axis_types)
    placed = distribute(structs, old, params_specs, params=params)  # pyright: ignore
    if is_record:
        check(saved, placed)

    def one(x):
        if not is_node(x):
            return _struct(x, NamedSharding(auto(mesh), x.sharding.spec))
        leaves, treedef = jax.tree.flatten(x.value)
        new = [
            _struct(
                y, columns(y.shape, y.sharding.spec, mesh, x.lead + (s is not None))
            )
            for y, s in zip(leaves, x.splits(), strict=True)
        ]
        return x.with_value(treedef.unflatten(new))

    return jax.tree.map(one, placed, is_leaf=is_node)


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
