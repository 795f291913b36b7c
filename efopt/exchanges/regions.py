"""Regions: a manual ``shard_map`` around a scheme, opened where the user's step is not.

A step over global arrays hands over stacked gradients, or is mapped over the workers'
axes alone and leaves the others to the compiler. A compressor that flattened there
would make it gather; inside a region over all axes every device has its own shard.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from efopt.exchanges.home import Home
from efopt.workers.axes import Axes, manual_axes
from efopt.workers.node import PerWorker
from efopt.workers.placement import partition_specs
from efopt.workers.value_and_grad import mesh_of

Around = Callable[[Callable[..., Any], Any, Any, bool], tuple[Any, Any]]


def around(
    api: str, workers: Axes, axes: Axes, updates: Any, state: Any
) -> Around | None:
    """What runs a scheme on shards, or ``None`` where it runs on them already.

    Args:
      api: The transformation, for errors.
      workers: The workers' axes.
      axes: Those of them over which they compress.
      updates: This worker's updates, or those of all, stacked in a ``PerWorker``.
      state: The state of the scheme, which holds a :class:`Home`.

    Raises:
      ValueError: If a region is needed and the state is not placed.
    """
    mapped = manual_axes()
    if isinstance(updates, PerWorker):
        mesh = mesh_of(updates, workers)
        _check_stacked(api, workers, updates, mesh)
        home = _home(api, state, axes, mesh)
        _check_lie(api, workers, home, updates)
        return _region(home, workers, mesh, (), stacked=True)
    if not workers.bound() or not set(workers.names) <= set(mapped):
        return None  # `vmap`, `pmap`, or an error that is worded better further on
    mesh = jax.sharding.get_abstract_mesh()
    rest = [a for a in mesh.axis_names if a not in mapped and mesh.shape[a] > 1]
    if not rest:
        return None
    home = _home(api, state, axes, mesh)
    return _region(home, workers, None, mapped, stacked=False)


def read(api: str, axes: Axes, state: Any, body: Callable[[Any], Any]) -> Any:
    """What ``body`` reads of a placed state: a tree like the parameters, and global.

    Args:
      api: The function, for errors.
      axes: The axes over which the workers compress.
      state: The state of a scheme, from wherever it is looked at.
      body: A function of the state as each device holds it.
    """
    mapped = manual_axes() if axes.bound() else ()
    mesh = jax.sharding.get_abstract_mesh() if mapped else mesh_of(state, axes, api)
    rest = {a for a in mesh.axis_names if a not in mapped}
    if not any(mesh.shape[a] > 1 for a in rest):
        return body(state)
    specs = _home(api, state, axes, mesh).spec_tree()
    placed = _left(partition_specs(state, specs), mapped)
    return jax.shard_map(
        body,
        mesh=None if mapped else mesh,
        in_specs=(placed,),
        out_specs=specs,
        axis_names=rest,
    )(state)


def home_of(state: Any) -> Home | None:
    """The home of a scheme's state; ``None``: it has none."""
    is_home = lambda x: isinstance(x, Home)  # noqa: E731
    homes = [x for x in jax.tree.leaves(state, is_leaf=is_home) if is_home(x)]
    return homes[0] if homes else None


def _home(api: str, state: Any, axes: Axes, mesh: Any) -> Home:
    home = home_of(state)
    if home is None or home.specs is None:
        raise ValueError(
            f"{api} works on what each device holds of a leaf, and the state does not "
            "know how leaves are sharded over the mesh axes that are left to the "
            "compiler here. Place it with `efopt.distribute(state, mesh, params_specs)`"
            " before the step, also if `params_specs` is None: nothing sharded."
        )
    inner = tuple((a, mesh.shape[a]) for a in mesh.axis_names if a not in axes.names)
    if home.inner != inner:
        raise ValueError(
            f"{api} got a state that is placed for a mesh with {dict(home.inner)} "
            f"behind each worker, and this step runs on one with {dict(inner)}. Place "
            "parameters and state together: `efopt.distribute(state, mesh, "
            "params_specs)`."
        )
    return home


def _region(home: Home, axes: Axes, mesh: Any, mapped: Any, stacked: bool) -> Around:
    specs = home.spec_tree()

    def run(update, updates, state, own):
        tree = updates.value if stacked else updates
        state_specs = partition_specs(state, specs)
        given = jax.tree.map(lambda s: P(axes.key, *s), specs, is_leaf=_is_spec)
        if not stacked:  # the workers' axes are consumed already
            given = specs
            state_specs = _left(state_specs, axes.names)

        def body(tree, state):
            if stacked:
                tree = jax.tree.map(lambda x: x.reshape(x.shape[1:]), tree)
            out, state = update(tree, state)
            if own and stacked:
                out = jax.tree.map(lambda x: x[None], out)
            return out, state

        names = home.inner_names if not stacked else (*axes.names, *home.inner_names)
        out, state = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(given, state_specs),
            out_specs=(given if own else specs, state_specs),
            axis_names={n for n in names if n not in mapped},
        )(tree, state)
        if own and stacked:
            out = dataclasses.replace(updates, value=out)
        return out, state

    return run


def _check_stacked(api: str, axes: Axes, updates: PerWorker, mesh: Any) -> None:
    if updates.axis_name != axes.key:
        raise ValueError(
            f"{api} works over the axis {axes.key!r}, and the gradients are stacked "
            f"over {updates.axis_name!r}: give `efopt.value_and_grad` the same "
            "`axis_name`."
        )
    n = axes.size_on(mesh)
    for path, x in jax.tree_util.tree_flatten_with_path(updates.value)[0]:
        if x.shape[:1] != (n,):
            raise ValueError(
                f"{api} takes stacked gradients with one row for each of the {n} "
                f"workers along {axes.key!r}, got shape {x.shape} at "
                f"{jax.tree_util.keystr(path) or 'the root'}."
            )


def _check_lie(api: str, axes: Axes, home: Home, updates: PerWorker) -> None:
    """Raises if types say that rows lie otherwise than the state knows."""
    found, treedef = jax.tree_util.tree_flatten_with_path(updates.value)
    if treedef != home.treedef or home.specs is None:
        return
    for (path, x), spec in zip(found, home.specs, strict=True):
        kind = jax.typeof(x).sharding
        if {*kind.mesh.axis_types} != {AxisType.Explicit}:
            continue  # types say nothing
        expected = P(axes.key, *spec)
        if _entries(kind.spec) != _entries(expected):
            raise ValueError(
                f"{api} got gradients of the workers that are sharded by {kind.spec} "
                f"at {jax.tree_util.keystr(path) or 'the root'}, where the state is "
                f"placed for {expected}. Place parameters and state alike, "
                "`efopt.distribute({'params': ..., 'opt': ...}, mesh, params_specs)`; "
                "or `jax.reshard` the gradients before."
            )


def _entries(spec: P) -> list[tuple[str, ...]]:
    """The axes of every array axis, but for the last ones that have none."""
    entries = [
        () if e is None else e if isinstance(e, tuple) else (e,)
        for e in spec.partitions
    ]
    while entries and not entries[-1]:
        entries.pop()
    return entries


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)


def _left(specs: Any, names: tuple[str, ...]) -> Any:
    """The specs of a state, in which some axes are consumed."""
    consumed = lambda x: _consumed(x, names)  # noqa: E731
    return jax.tree.map(consumed, specs, is_leaf=_is_spec_or_node)


def _is_spec_or_node(x: Any) -> bool:
    return _is_spec(x) or isinstance(x, PerWorker)


def _consumed(x: Any, names: tuple[str, ...]) -> Any:
    """A spec, or a node of specs, in which some axes are not named."""
    if not isinstance(x, PerWorker):
        return _without(x, names)
    value = jax.tree.map(lambda s: _without(s, names), x.value, is_leaf=_is_spec)
    return x.with_value(value)


def _without(spec: P, names: tuple[str, ...]) -> P:
    """A spec in which some axes are not named."""

    def entry(e):
        kept = tuple(a for a in (e if isinstance(e, tuple) else (e,)) if a not in names)
        kept = tuple(a for a in kept if a is not None)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return P(*map(entry, spec))
