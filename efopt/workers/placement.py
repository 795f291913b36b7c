"""Where state lives: laying a pytree out over workers, on a mesh or stacked."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker, is_node
from efopt.workers.ranges import range_size


def partition_specs(tree: Any, params_specs: Any = None) -> Any:
    """The ``PartitionSpec`` of every leaf of a state, for ``jax.shard_map``.

    Leaves inside a :class:`efopt.PerWorker` are split over its axis, all others are
    replicated.

    Args:
      tree: A state, a ``TrainState``, or anything that contains one; arrays or
        ``jax.ShapeDtypeStruct``.
      params_specs: Specs of parameters that are sharded over other mesh axes: every
        subtree with the structure of ``params_specs`` takes them, behind the worker
        axis where it is per worker. ``None``: parameters are replicated.

    Returns:
      A pytree of the structure of ``tree`` with a ``PartitionSpec`` at every leaf.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.error_feedback(efopt.scaled_sign(), axis_name="data")
      >>> specs = efopt.partition_specs(tx.init(jnp.zeros(3)))
      >>> specs.residual.value == jax.sharding.PartitionSpec("data")
      True
    """
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    given = jax.tree.leaves(params_specs, is_leaf=is_spec)
    structure = jax.tree.structure(params_specs, is_leaf=is_spec)

    def matches(x):
        if params_specs is None or jax.tree.structure(x) != structure:
            return False
        pairs = zip(jax.tree.leaves(x), given, strict=True)
        return all(jnp.ndim(leaf) >= len(spec) for leaf, spec in pairs)

    def specs(subtree, *lead):
        def one(x):
            if is_node(x):
                own = (x.axis_name, x.shards) if x.shards else (x.axis_name,)
                return dataclasses.replace(x, value=specs(x.value, *own))
            if matches(x):
                return jax.tree.map(
                    lambda s: PartitionSpec(*lead, *s), params_specs, is_leaf=is_spec
                )
            return PartitionSpec(*lead)

        return jax.tree.map(one, subtree, is_leaf=lambda x: is_node(x) or matches(x))

    return specs(tree)


def distribute(tree: Any, mesh: jax.sharding.Mesh, params_specs: Any = None) -> Any:
    """Lays a state out over the workers of a mesh, ready for a jitted, donated step.

    Per-worker values get one copy a worker (or one range of blocks), everything else is
    replicated. Every array is copied, also where it already lies right: a donated step
    deletes its inputs, and those must not be the caller's own parameters. Python
    numbers become arrays, or the second step would compile anew.

    Args:
      tree: A state fresh from ``init``, a ``TrainState``, or anything that contains
        one. A state already laid out over as many workers is placed as it is. Of
        ``jax.ShapeDtypeStruct`` leaves, as ``jax.eval_shape(tx.init, params)`` returns,
        comes the same with shardings: enough to compile for devices one does not have.
      mesh: The mesh; every axis that the tree names must be one of its axes.
      params_specs: As in :func:`efopt.partition_specs`.

    Returns:
      The same pytree with global arrays.

    Raises:
      ValueError: If the mesh lacks an axis, or the state is laid out over another
        number of workers.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> tx = efopt.error_feedback(efopt.scaled_sign(), axis_name="data")
      >>> state = efopt.distribute(tx.init(jnp.zeros(3)), mesh)
      >>> state.residual.value.shape == (jax.device_count(), 3)
      True
    """

    def spread(node):
        names = Axes.of("distribute", node.axis_name).names
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"`distribute(tree, mesh)` needs a mesh with the axis {name!r} of "
                    f"the per-worker state, got axes {tuple(mesh.axis_names)}."
                )
        m = math.prod(mesh.shape[name] for name in node.shards)
        return _spread(node, math.prod(mesh.shape[name] for name in names), m)

    def lay_out(tree):
        return jax.tree.map(
            lambda x: spread(x) if is_node(x) else _strong(x), tree, is_leaf=is_node
        )

    def place(x, spec):
        # A step returns empty arrays replicated, unless shardings are part of types.
        if x.size == 0 and AxisType.Explicit not in mesh.axis_types:
            spec = P()
        sharding = NamedSharding(mesh, spec)
        if abstract:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        # A copy of our own first: `device_put` may hand out the caller's buffers, even
        # under `may_alias=False`, and a donated step would delete them.
        return jax.device_put(jnp.copy(x), sharding)

    def spec_of(path, shape):
        return _spec_at(path, shape, params_specs)

    lays_itself_out = lambda x: hasattr(x, "placed")  # noqa: E731
    tree = jax.tree.map(
        lambda x: x.placed(mesh, spec_of) if lays_itself_out(x) else x,
        tree,
        is_leaf=lays_itself_out,
    )
    leaves = jax.tree.leaves(tree)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    tree = jax.eval_shape(lay_out, tree) if abstract else lay_out(tree)
    return jax.tree.map(place, tree, partition_specs(tree, params_specs))


def stack_workers(tree: Any, num_workers: int | tuple[int, ...]) -> Any:
    """Stacks a state for ``pmap`` or ``vmap``: a leading worker axis on every leaf.

    Args:
      tree: A state fresh from ``init``, a ``TrainState``, or anything that holds one.
      num_workers: The number of workers, at least 1; for several mapped axes a tuple,
        their lengths in the order of ``axis_name``.

    Returns:
      The same pytree, every leaf with a leading axis of length ``num_workers``, or one
      for each of them. Map over it with ``in_axes=0``, the first axis outermost;
      inside, the state looks as under ``shard_map``.

    Raises:
      TypeError: If ``num_workers`` is neither a Python int nor a tuple of such.
      ValueError: If one is below 1, or the state is laid out over another number.

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

    def apart(x):
        return x.reshape(*sizes, *x.shape[1:])

    def stack(x):
        if is_node(x):
            value = _spread(x, math.prod(sizes)).value
            value = jax.tree.map(lambda v: apart(v[:, None]), value)
            return PerWorker(value, x.axis_name, x.split)
        x = _strong(x)
        return jnp.broadcast_to(x, (*sizes, *x.shape)).copy()

    return jax.tree.map(stack, tree, is_leaf=is_node)


def _spec_at(path: str, shape: tuple[int, ...], params_specs: Any) -> PartitionSpec:
    """The spec of a parameter, found by the end of its path."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    found = jax.tree_util.tree_flatten_with_path(params_specs, is_leaf=is_spec)[0]
    for where, spec in found:
        name = jax.tree_util.keystr(where)
        if len(spec) <= len(shape) and (name.endswith(path) or path.endswith(name)):
            return spec
    return P()


def _spread(node: PerWorker, n: int, m: int = 1) -> PerWorker:
    """The node with a worker axis of length ``n`` on every array."""
    if node.shards and node.split is None:

        def copies(x):
            if x.shape[:2] == (n, m):
                return x
            return jnp.broadcast_to(x, (n, m, *x.shape[2:])).copy()

        return dataclasses.replace(node, value=jax.tree.map(copies, node.value))
    if node.shards:
        split = node.split or 0

        def by_shard(x):
            if x.shape[:2] == (n, m):
                return x
            rows = range_size(split, n)
            padding = [(0, rows * n - split)] + [(0, 0)] * (x.ndim - 3)
            x = jnp.pad(x[0, 0], padding).reshape(n, 1, rows, *x.shape[3:])
            return jnp.broadcast_to(x, (n, m, *x.shape[2:])).copy()

        return dataclasses.replace(node, value=jax.tree.map(by_shard, node.value))

    def one(x):
        x = _strong(x)
        if node.split is not None:
            if x.shape[:2] == (1, node.split):
                rows = range_size(node.split, n)
                padding = [(0, rows * n - node.split)] + [(0, 0)] * (x.ndim - 2)
                return jnp.pad(x[0], padding).reshape(n, rows, *x.shape[2:])
            if x.shape[:2] == (n, range_size(node.split, n)):
                return x
        elif x.shape[:1] == (1,):
            return jnp.broadcast_to(x, (n, *x.shape[1:])).copy()
        elif x.shape[:1] == (n,):
            return x
        raise ValueError(
            f"the per-worker state over {node.axis_name!r} has an array of shape "
            f"{x.shape}, which is laid out neither for one worker nor for {n}. Start "
            "from `tx.init(params)`, or from a state of the same number of workers."
        )

    return PerWorker(jax.tree.map(one, node.value), node.axis_name, node.split)


def _strong(x: Any) -> jax.Array:
    """An array of definite dtype: a Python number would be weakly typed."""
    x = jnp.asarray(x)
    return jax.lax.convert_element_type(x, x.dtype)
