"""Where state lives: laying a pytree out over workers, on a mesh or stacked."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from efopt.workers import branches
from efopt.workers.axes import Axes, AxisName
from efopt.workers.node import PerWorker, is_node
from efopt.workers.ranges import range_size
from efopt.workers.specs import Rule, path_of
from efopt.workers.stacks import is_stacked


def partition_specs(tree: Any, params_specs: Any = None, *, params: Any = None) -> Any:
    """The ``PartitionSpec`` of every leaf of a state, for ``jax.shard_map``.

    Leaves inside a :class:`efopt.PerWorker` are split over its axis, all others are
    replicated.

    Parameters that are sharded over other mesh axes say so in ``params_specs``. Every
    array whose path ends with the path of a parameter and whose shape is that
    parameter's (behind the worker axis, where it is per worker) is sharded like it:
    moments, residuals and the parameters themselves, under any wrapper, also where
    ``optax.partition`` or ``optax.masked`` leave out the others. Arrays of other
    shapes, such as factored moments, are replicated, or laid out by their own rule.

    The shapes are those of ``params`` if given, or those that a scheme with an axis
    saw in ``init``. Else the parameter is, of the arrays with its path and at least as
    many axes as its spec, the one with the shortest path, as it stands in a
    ``TrainState`` or beside the state; of several the largest.

    Args:
      tree: A state, a ``TrainState``, or anything that contains one; arrays or
        ``jax.ShapeDtypeStruct``.
      params_specs: A tree like the parameters with a ``PartitionSpec`` at every leaf.
        ``None``: parameters are replicated.
      params: The parameters, or their structs, where the tree does not tell.

    Returns:
      A pytree of the structure of ``tree`` with a ``PartitionSpec`` at every leaf.

    Raises:
      TypeError: If a leaf of ``params_specs`` is no ``PartitionSpec``.
      ValueError: If specs name parameters that are not there, have more entries than
        their shapes, or shard what is per worker over an axis of the workers.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.error_feedback(efopt.scaled_sign(), axis_name="data")
      >>> specs = efopt.partition_specs(tx.init(jnp.zeros(3)))
      >>> specs.residual.value == jax.sharding.PartitionSpec("data")
      True
    """
    branches.require_common("`partition_specs`", tree)
    branches.require_marked("`partition_specs`", tree)
    branches.require_one_structure("`partition_specs`", tree)
    return _specs(tree, Rule(tree, params_specs, params))


def _specs(tree: Any, rule: Rule) -> Any:
    def outside(path, x):
        if not is_node(x):
            return rule.of(path_of(path), jnp.shape(x), None) or P()
        axes = Axes.of("partition_specs", x.axis_name)
        if x.shards or x.split is not None:
            spec = P(axes.key, x.shards) if x.shards else P(axes.key)
            return x.with_value(jax.tree.map(lambda _: spec, x.value))

        if x.specs is not None:
            own = iter(x.specs)
            return x.with_value(
                jax.tree.map(lambda _: P(axes.key, *next(own)), x.value)
            )

        def inside(rest, y):
            spec = rule.of(path_of((*path, *rest)), jnp.shape(y)[1:], axes) or P()
            return P(axes.key, *spec)

        return x.with_value(jax.tree_util.tree_map_with_path(inside, x.value))

    return jax.tree_util.tree_map_with_path(outside, tree, is_leaf=is_node)


def distribute(
    tree: Any,
    mesh: jax.sharding.Mesh,
    params_specs: Any = None,
    *,
    params: Any = None,
) -> Any:
    """Lays a state out over the workers of a mesh, ready for a jitted, donated step.

    Per-worker values get one copy a worker (or one range of blocks), everything else is
    replicated, or sharded by ``params_specs``. Each array is made where it will live: a
    device never holds more of it than its own part, and for a moment one worker's.
    Every array is copied, also where it already lies right: a donated step deletes its
    inputs, and those must not be the caller's own parameters. Python numbers become
    arrays, or the second step would compile anew.

    Args:
      tree: A state fresh from ``init``, a ``TrainState``, or anything that contains
        one. A state already laid out over as many workers is placed as it is. Of
        ``jax.ShapeDtypeStruct`` leaves, as ``jax.eval_shape(tx.init, params)`` returns,
        comes the same with shardings: enough to compile for devices one does not have.
      mesh: The mesh; every axis that the tree names must be one of its axes.
      params_specs: As in :func:`efopt.partition_specs`.
      params: As there.

    Returns:
      The same pytree with global arrays.

    Raises:
      TypeError: As there.
      ValueError: As there; if the mesh lacks an axis, or its axes do not divide a
        parameter; if the state is stacked, or laid out over another number of workers
        (see :func:`efopt.checkpoints.resize`), or is the share of a single one (see
        :class:`efopt.PerWorker`).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = efopt.error_feedback(efopt.scaled_sign(), axis_name="data")
      >>> state = efopt.distribute(tx.init(jnp.zeros(3)), mesh)
      >>> state.residual.value.shape == (jax.device_count(), 3)
      True
    """
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(
            "`distribute(tree, mesh)` takes a mesh, as `jax.make_mesh(...)` makes one, "
            f"got {type(mesh).__name__}."
        )
    branches.require_common("`distribute`", tree)
    branches.require_marked("`distribute`", tree)
    leaves = jax.tree.leaves(tree)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    if is_stacked(tree):
        raise ValueError(
            "`distribute(tree, mesh)` got a state that `stack_workers` laid out for "
            "`pmap` or `vmap`: every array has an axis of workers in front. "
            "`efopt.checkpoints.resize(state, n)` takes it down again, also to as many "
            "workers as it has."
        )
    rule = Rule(tree, params_specs, params)
    rule.require_fit(mesh)
    _specs(tree, rule)  # or an error
    lays_itself_out = lambda x: hasattr(x, "placed")  # noqa: E731

    def lay_out(x):
        made = lambda: x.placed(mesh, rule.at)  # noqa: E731
        return jax.eval_shape(made) if abstract else made()

    tree = jax.tree.map(
        lambda x: lay_out(x) if lays_itself_out(x) else x,
        tree,
        is_leaf=lays_itself_out,
    )

    def place(spread, x, spec):
        shape = _described(spread, x)
        # A step returns empty arrays replicated, unless shardings are part of types.
        if 0 in shape.shape and AxisType.Explicit not in mesh.axis_types:
            spec = P()
        sharding = NamedSharding(mesh, spec)
        if abstract:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        return _made(spread, x, shape, sharding)

    def one(path, x, specs):
        if not is_node(x):
            return place(_strong, x, specs)
        sizes, where = _mesh_sizes(x, mesh), jax.tree_util.keystr(path)
        value = jax.tree.map(
            place, _spreads(x, sizes, "distribute", where, mesh), x.value, specs.value
        )
        return dataclasses.replace(x, value=value, sizes=sizes)

    return jax.tree_util.tree_map_with_path(
        one, tree, _specs(tree, rule), is_leaf=is_node
    )


def _mesh_sizes(node: PerWorker, mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    names = Axes.of("distribute", node.axis_name).names
    for name in (*names, *node.shards):
        if name not in mesh.shape:
            raise ValueError(
                f"`distribute(tree, mesh)` needs a mesh with the axis {name!r} of "
                f"the per-worker state, got axes {tuple(mesh.axis_names)}."
            )
    return tuple(mesh.shape[name] for name in names)


def _described(spread: Any, x: Any) -> Any:
    """What ``spread`` makes of an array, as a struct, wherever the array lies."""
    struct = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    return jax.eval_shape(spread, struct)


def _made(spread: Any, x: Any, shape: Any, sharding: NamedSharding) -> jax.Array:
    """``spread(x)``, in memory of its own, each part on the device where it will live.

    What is given travels to the devices as small as it may: as it will be sharded
    behind the axis that is new.
    """
    # Types that carry shardings would have to be told in every operation.
    given = sharding.mesh
    assert isinstance(given, jax.sharding.Mesh)
    kinds = (AxisType.Auto,) * len(given.axis_names)
    mesh = jax.sharding.Mesh(given.devices, given.axis_names, kinds)
    auto = NamedSharding(mesh, sharding.spec)
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    if jnp.shape(x) == shape.shape:
        way = auto
    elif isinstance(spread, _Spread) and spread.split is None:
        lead = 2 if spread.shards else 1
        way = NamedSharding(mesh, P(*[None] * lead, *sharding.spec[lead:]))
    else:
        way = NamedSharding(mesh, P())
    x = jax.device_put(x, way)
    # Nor is it to be told by a mesh that the program has set.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        made = jax.jit(spread, out_shardings=auto)(x)
    return jax.device_put(made, sharding)


def stack_workers(
    tree: Any,
    num_workers: int | tuple[int, ...],
    *,
    devices: Sequence[Any] | None = None,
) -> Any:
    """Stacks a state for ``pmap`` or ``vmap``: a leading worker axis on every leaf.

    To resume a stacked state, save and restore all of it: what workers owe differs, and
    ``flax.jax_utils.unreplicate`` keeps that of one (see :class:`efopt.PerWorker`).

    Args:
      tree: A state fresh from ``init``, a ``TrainState``, or anything that holds one.
      num_workers: The number of workers, at least 1; for several mapped axes a tuple,
        their lengths in the order of ``axis_name``.
      devices: For ``pmap``: as many devices, on each of which its worker's copy is
        made. ``None``: all are made on one, as ``vmap`` needs them.

    Returns:
      The same pytree, every leaf with a leading axis of length ``num_workers``, or one
      for each of them. Map over it with ``in_axes=0``, the first axis outermost;
      inside, the state looks as under ``shard_map``.

    Raises:
      TypeError: If ``num_workers`` is neither a Python int nor a tuple of such.
      ValueError: If one is below 1; if the state is laid out over another number, or is
        the share of a single worker; if there are more or fewer devices.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.error_feedback(efopt.scaled_sign(), axis_name="data")
      >>> efopt.stack_workers(tx.init(jnp.zeros(3)), 4).residual.value.shape
      (4, 1, 3)
    """
    sizes = num_workers if isinstance(num_workers, tuple) else (num_workers,)
    for size in sizes or (None,):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(
                "`stack_workers(tree, num_workers)` takes a Python int, or a tuple of "
                f"such, got {num_workers!r}."
            )
        if size < 1:
            raise ValueError(
                "`stack_workers(tree, num_workers)` needs at least 1, got "
                f"{num_workers!r}."
            )

    branches.require_common("`stack_workers`", tree)
    placing = None
    if devices is not None:
        if len(devices) != math.prod(sizes):
            raise ValueError(
                f"`stack_workers(devices=...)` needs one device a worker, got "
                f"{len(devices)} for {math.prod(sizes)} workers."
            )
        names = tuple(f"workers{i}" for i in range(len(sizes)))
        mesh = jax.sharding.Mesh(np.asarray(devices).reshape(sizes), names)
        placing = NamedSharding(mesh, P(*names))

    def place(spread, x):
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        if placing is None:
            return jax.jit(spread)(x)
        return _made(spread, x, _described(spread, x), placing)

    def stack(path, x):
        if not is_node(x):
            return place(_Stack(sizes), x)
        where = jax.tree_util.keystr(path)
        spreads = _spreads(x, sizes, "stack_workers", where, stack=True)
        value = jax.tree.map(place, spreads, x.value)
        return dataclasses.replace(x, value=value, sizes=sizes)

    return jax.tree_util.tree_map_with_path(stack, tree, is_leaf=is_node)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """Makes of one worker's array that of all.

    Attributes:
      axis_name: The axes of the workers, for the error.
      fresh: Whether the array may be one worker's, to be given to all.
      sizes: Their lengths.
      split: The number of blocks that workers share out, or ``None``.
      shards: How many shards stand behind the worker axis; 0: there is no such axis.
      stack: Whether the array is stacked for a mapping, one axis a mapped axis.
      where: Where it stands, for the error.
    """

    axis_name: AxisName
    fresh: bool
    sizes: tuple[int, ...]
    split: int | None
    shards: int = 0
    stack: bool = False
    where: str = dataclasses.field(default="", compare=False)

    def __call__(self, x: Any) -> jax.Array:
        x, n = self._spread(_strong(x)), math.prod(self.sizes)
        if not self.stack:
            return x
        return x.reshape(*self.sizes, 1, *x.shape[1:]) if x.shape[0] == n else x

    def _spread(self, x: jax.Array) -> jax.Array:
        n, lead = math.prod(self.sizes), (1, 1) if self.shards else (1,)
        wide = (n, self.shards) if self.shards else (n,)
        if self.split is None:
            if x.shape[: len(lead)] == wide:
                return x
            if self.fresh and x.shape[: len(lead)] == lead:
                return jnp.broadcast_to(x, (*wide, *x.shape[len(lead) :]))
        else:
            rows, rest = range_size(self.split, n), x.shape[len(lead) + 1 :]
            if x.shape[: len(lead) + 1] == (*wide, rows):
                return x
            if self.fresh and x.shape[: len(lead) + 1] == (*lead, self.split):
                padding = [(0, rows * n - self.split)] + [(0, 0)] * len(rest)
                x = jnp.pad(x.reshape(self.split, *rest), padding)
                x = x.reshape(n, *lead[1:], rows, *rest)
                return jnp.broadcast_to(x, (*wide, rows, *rest))
        raise ValueError(
            f"the per-worker state over {self.axis_name!r} has an array of shape "
            f"{x.shape} at {self.where or 'the root'}, which is laid out neither for "
            f"one worker nor for {n}. Start from `tx.init(params)`, or make the state "
            f"one of {n} workers by `efopt.checkpoints.resize(state, {n})`."
        )


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Makes one copy a worker of what is equal on all."""

    sizes: tuple[int, ...]

    def __call__(self, x: Any) -> jax.Array:
        x = _strong(x)
        return jnp.broadcast_to(x, (*self.sizes, *x.shape))


def _spreads(
    node: PerWorker,
    sizes: tuple[int, ...],
    api: str,
    where: str,
    mesh: jax.sharding.Mesh | None = None,
    stack: bool = False,
) -> Any:
    """A tree like the node's value, of what lays each array out."""
    node.require_whole(f"`{api}`")
    # What was laid out over one worker is that of any, as is a fresh state.
    fresh = math.prod(node.sizes or ()) == 1
    shards = math.prod(mesh.shape[a] for a in node.shards) if mesh else 1
    shards = shards if node.shards else 0
    spreads = [
        _Spread(node.axis_name, fresh, sizes, split, shards, stack, where)
        for split in node.splits()
    ]
    return jax.tree.unflatten(jax.tree.structure(node.value), spreads)


def _strong(x: Any) -> jax.Array:
    """A copy, an array of definite dtype: a Python number would be weakly typed."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return jnp.copy(x)
    return jax.lax.convert_element_type(jnp.copy(x), x.dtype)
