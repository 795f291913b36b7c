"""Gradients whose sum over the workers is yet to be taken, as Explicit types say it.

On a mesh of Explicit axes the gradient with respect to a parameter that is typed as
reduced over the workers' axes, ``jax.reshard(p, P(*spec, reduced={"dcn"}))``, comes
typed as unreduced: a sum of which every worker holds one term. Of what nobody has
summed each worker's own is there still.
"""

from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker, is_node


def stacked(api: str, axes: Axes, updates: Any) -> Any:
    """Updates as they are; of those typed as unreduced, one row a worker.

    Row ``i`` is the term of worker ``i`` times their number ``n``: the mean of the rows
    is the sum that was to be taken, and a row is the gradient of one worker's batch
    where the loss is a mean over all. Nothing moves.

    Args:
      api: The transformation, for errors.
      axes: The axes of the workers.
      updates: Updates, from wherever a transformation is called.

    Raises:
      ValueError: If types say of some leaf that it is summed over the workers already,
        in part or in whole, or is to be summed over other axes too.
    """
    if is_node(updates) or axes.bound():
        return updates
    arrays, treedef = jax.tree_util.tree_flatten_with_path(updates)
    kinds = [getattr(jax.typeof(x), "sharding", None) for _, x in arrays]
    if not any(_explicit_along(kind, axes) for kind in kinds):
        return updates  # types say nothing
    rows = []
    for (path, x), kind in zip(arrays, kinds, strict=True):
        where = jax.tree_util.keystr(path) or "the root"
        _require(api, axes, where, x, kind)
        rows.append(_rows(x, kind, axes))
    return PerWorker(treedef.unflatten(rows), axes.key)


def axes_of(x: Any) -> frozenset[str]:
    """The mesh axes over which a type says that an array's sum is yet to be taken."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", None)
    return frozenset(getattr(spec, "unreduced", ()) or ())


def _explicit_along(kind: Any, axes: Axes) -> bool:
    """Whether types tell how an array lies along the workers' axes."""
    mesh = kind.mesh if kind is not None else None
    if mesh is None or not set(axes.names) <= set(mesh.axis_names):
        return False
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(types[name] == AxisType.Explicit for name in axes.names)


def _require(api: str, axes: Axes, where: str, x: Any, kind: Any) -> None:
    known, key, terms = jax.typeof(x), axes.key, axes_of(x)
    if not terms & set(axes.names):
        raise ValueError(
            f"{api} works over {key!r} and got global updates of the type {known} at "
            f"{where}, which is no worker's own: nothing is left to compress. Take the "
            f"gradients of `efopt.value_and_grad(..., axis_name={key!r})` as they are; "
            "or, where the model is written for reduced types, differentiate with "
            "respect to `jax.reshard(p, P(*spec, reduced="
            f"{set(axes.names)!r}))`, every parameter."
        )
    if terms != set(axes.names):
        raise ValueError(
            f"{api} works over {key!r} and got updates at {where} of the type {known}, "
            f"unreduced over {sorted(terms)}: these must be the same axes. Sum over "
            "the others before, `jax.reshard(g, P(*spec, unreduced="
            f"{set(axes.names)!r}))`; or name them all as those of the workers."
        )
    how = getattr(kind.spec, "unreduced_kind", None)
    if how is not None and getattr(how, "name", str(how)).lower() != "sum":
        raise ValueError(
            f"{api} averages sums, and got updates at {where} of the type {known}, "
            f"whose terms are to be joined by {how}."
        )
    if any(t != AxisType.Explicit for t in kind.mesh.axis_types):
        raise ValueError(
            f"{api} got unreduced updates at {where} on a mesh whose axes are not all "
            f"Explicit, {kind.mesh}: how they lie along the others no type tells. "
            "Make all of them Explicit, or take the gradients of "
            f"`efopt.value_and_grad(..., axis_name={key!r})`."
        )


def _rows(x: jax.Array, kind: Any, axes: Axes) -> jax.Array:
    """``(workers, *shape)``, each row with the worker whose term it is."""
    entries, n = kind.spec.partitions, axes.size_on(kind.mesh)
    return jax.shard_map(
        lambda term: term[None] * n,
        mesh=kind.mesh,
        in_specs=P(*entries, unreduced=frozenset(axes.names)),
        out_specs=P(axes.key, *entries),
        check_vma=False,
    )(x)
