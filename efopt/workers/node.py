"""The pytree node that marks what differs from worker to worker."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from efopt.ground.imports import when_imported
from efopt.workers.axes import Axes, AxisName, vary, varying
from efopt.workers.ranges import range_size

# What becomes of each worker's values on another number of workers: their mean is kept;
# they are equal on all; ranges of blocks are cut anew; true on all, for what is to be
# done again; payloads are written anew by the state that holds them.
RULES = ("mean", "equal", "ranges", "true", "stored")


@dataclasses.dataclass
class PerWorker:
    """State that differs from worker to worker along a mapped axis.

    Every array inside has a leading worker axis: of length 1 inside the mapped function
    and on a state fresh from ``init``, of length ``n`` as a global array placed by
    :func:`efopt.distribute`. The node marks itself, so the placement helpers find it in
    any pytree: an Optax chain, a Flax ``TrainState``, a checkpoint. Orbax takes it as
    it is, and so does ``flax.serialization``.

    It also knows whose values it holds. Fresh from ``init`` they stand for those of any
    worker; once it is laid out each worker has its own. What is then cut out of it for
    a single worker, as ``flax.jax_utils.unreplicate`` and ``addressable_data(0)`` do
    with arrays that are equal everywhere, is *a share*: it can be looked at, but not
    placed or updated again, for the others' values are lost. Save the whole state, or
    the shares of all workers, concatenated along the first axis before they are placed.

    Mapping over a state to make ``PartitionSpec`` or ``NamedSharding`` of its arrays,
    as ``optax.tree.map_params`` does, is about one worker's arrays: the worker axis is
    put in front of what does not begin with it. (Of what is laid out by shard, only
    :func:`efopt.partition_specs` knows more.)

    Attributes:
      value: Pytree of arrays ``(1 or n, ...)``.
      axis_name: The mapped axis of the workers, or a tuple of axes. Static.
      split: ``None``: each worker owns a copy of its own (residuals). An int: the
        workers own consecutive ranges of that many blocks, which stand on the second
        axis; fresh from ``init`` one holds all of them (server residuals). A tuple: one
        int for each array. Static, and no part of the pytree's structure.
      shards: The mesh axes behind each worker along which values differ as well, where
        they are laid out by shard; these have an array axis of their own, behind that
        of the workers. Static, and no part of the pytree's structure.
      sizes: The lengths of the axes over which it is laid out; ``None``: it is fresh.
        Static, and no part of the pytree's structure.
      store: Of what is stored by a codec: what writes and reads it. Static, and no part
        of the pytree's structure.
      home: Of what may lie otherwise than the parameters: knows, once there is a mesh,
        the spec of each array behind the worker axis (``home.on(mesh, spec_of)
        .kept()``). Static, and no part of the pytree's structure.
      specs: These specs, on a state that is placed; ``None``: those of the parameters.
        Static, and no part of the pytree's structure.
      share: 0, or, of one worker's share, one more than the number of dimensions of its
        first array, with which it was cut out. Static.
      rule: What :func:`efopt.checkpoints.resize` makes of it on another number of
        workers, one of :data:`RULES`. ``None``: nobody has said, and it refuses.
        Static, and no part of the pytree's structure.
    """

    value: Any
    axis_name: AxisName
    split: int | tuple[int, ...] | None = None
    shards: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)
    share: int = 0
    store: Any = dataclasses.field(default=None, compare=False)
    rule: str | None = dataclasses.field(default=None, compare=False)
    home: Any = dataclasses.field(default=None, compare=False)
    specs: tuple[Any, ...] | None = dataclasses.field(default=None, compare=False)

    @property
    def lead(self) -> int:
        """How many axes stand in front of a worker's values."""
        return 2 if self.shards else 1

    def __contains__(self, key: Any) -> bool:
        """Whether its value has an entry: Flax's ``TrainState`` asks gradients that."""
        return isinstance(self.value, Mapping) and key in self.value

    def __getitem__(self, key: Any) -> "PerWorker":
        """An entry of its value, marked as it is."""
        return self.with_value(self.value[key])

    def splits(self) -> list[int | None]:
        """The ``split`` of every array."""
        number = len(jax.tree.leaves(self.value))
        if isinstance(self.split, tuple):
            return list(self.split)
        return [self.split] * number

    def with_value(self, value: Any) -> "PerWorker":
        """The same node around other values, such as specs."""
        return dataclasses.replace(self, value=value)

    def placed(self, mesh: Any, spec_of: Any) -> "PerWorker":
        """The same node, which knows how its arrays lie on a mesh."""
        if self.home is None:
            return self
        return dataclasses.replace(self, specs=self.home.on(mesh, spec_of).kept())

    def require_whole(self, api: str) -> None:
        """Raises if this is one worker's share of what several own."""
        if self.share:
            raise ValueError(
                f"{api} got the share of one worker of a state that was laid out over "
                f"{math.prod(self.sizes or ())} along {self.axis_name!r}, as "
                "`flax.jax_utils.unreplicate`, `x[0]` and `x.addressable_data(0)` "
                "leave of it. Workers differ in this state, and given to all it would "
                "lose what the others owe. Save and restore the whole state; or begin "
                "anew with `tx.init(params)`; or concatenate the shares of all workers "
                "along the first axis, in their order."
            )

    def local(self, api: str) -> Any:
        """The value without its worker axis, inside the mapped function.

        Args:
          api: The caller, for the error.
        """
        axes = Axes.of(api, self.axis_name)
        self.require_whole(api)
        typed = {*axes.names, *self.shards} if axes.typed() else set()
        lead = self.lead
        paths = jax.tree_util.tree_flatten_with_path(self.value)[0]
        for (path, x), split in zip(paths, self.splits(), strict=True):
            placed = x.shape[:lead] == (1,) * lead
            if placed and split is not None:
                placed = x.shape[lead] == range_size(split, axes.size())
            placed = placed and typed <= varying(x)
            if not placed:
                raise ValueError(
                    f"{api} got per-worker state that is not laid out over the "
                    f"workers: {jax.tree_util.keystr(path) or 'its value'} has shape "
                    f"{x.shape} inside the function mapped over {self.axis_name!r}. "
                    "Place the state with `efopt.distribute(state, mesh)` and pass "
                    "`efopt.partition_specs(state)` as in_specs and out_specs of "
                    "`jax.shard_map`; for `pmap` and `vmap` use "
                    "`efopt.stack_workers(state, n)`."
                )
        return jax.tree.map(lambda x: x.reshape(x.shape[lead:]), self.value)

    @classmethod
    def wrap(
        cls,
        value: Any,
        axes: Axes,
        split: int | tuple[int, ...] | None = None,
        shards: tuple[str, ...] = (),
        rule: str | None = None,
    ) -> "PerWorker":
        """The node around one worker's value, given without its worker axis."""
        value = vary(axes.vary(value), *shards)
        lead = (1, 1) if shards else (1,)
        value = jax.tree.map(lambda x: x.reshape(*lead, *x.shape), value)
        sizes = axes.sizes() if axes.bound() else None
        return cls(value, axes.key, split, shards, sizes, rule=rule)

    def rewrap(self, value: Any) -> "PerWorker":
        """The same mark on this worker's new value, given without its worker axis."""
        axes = Axes.of("PerWorker", self.axis_name)
        new = self.wrap(value, axes, self.split, self.shards, self.rule)
        return dataclasses.replace(new, store=self.store)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a node is beside its arrays; by what is compared, structures differ."""

    axis_name: AxisName
    share: int
    # Of these, arrays tell as much as structures should: a state is of one structure
    # before and after it is placed.
    split: int | tuple[int, ...] | None = dataclasses.field(compare=False)
    shards: tuple[str, ...] = dataclasses.field(compare=False)
    sizes: tuple[int, ...] | None = dataclasses.field(compare=False)
    store: Any = dataclasses.field(compare=False)
    rule: str | None = dataclasses.field(compare=False)
    home: Any = dataclasses.field(compare=False)
    specs: tuple[Any, ...] | None = dataclasses.field(compare=False)


def _flatten(node: PerWorker) -> tuple[tuple[Any], _Static]:
    about = node.split, node.shards, node.sizes, node.store, node.rule
    about = *about, node.home, node.specs
    return (node.value,), _Static(node.axis_name, node.share, *about)


def _flatten_with_keys(node: PerWorker) -> tuple[tuple[Any], _Static]:
    children, static = _flatten(node)
    return ((jax.tree_util.GetAttrKey("value"), children[0]),), static


def _unflatten(static: _Static, children: Any) -> PerWorker:
    (value,) = children
    share = static.share
    if static.sizes is not None and math.prod(static.sizes) > 1:
        share = _share(value, static)
    value = _behind_worker_axis(value, static)
    return PerWorker(
        value,
        static.axis_name,
        static.split,
        static.shards,
        static.sizes,
        share,
        static.store,
        static.rule,
        static.home,
        static.specs,
    )


jax.tree_util.register_pytree_with_keys(
    PerWorker, _flatten_with_keys, _unflatten, _flatten
)


def _share(value: Any, static: _Static) -> int:
    """The ``share`` of a node that was laid out, told by its arrays if there are any.

    Inside the mapped function a leading axis of length 1 is as it should be. There,
    arrays are tracers, or at least the axes are bound.
    """
    arrays = [
        x for x in jax.tree.leaves(value) if isinstance(x, jax.Array | np.ndarray)
    ]
    sizes = static.sizes or ()
    if not arrays or any(isinstance(x, Tracer) for x in arrays):
        return static.share
    shape = arrays[0].shape
    if static.share:
        whole = (len(shape) + 1, *shape[:1]) == (static.share, math.prod(sizes))
        return 0 if whole else static.share
    stacked = shape[: len(sizes) + 1] == (*sizes, 1)
    if stacked or any(x.shape[:1] != (1,) for x in arrays):
        return 0
    bound = Axes.of("PerWorker", static.axis_name).bound()
    return 0 if bound else len(shape) + 1


def _behind_worker_axis(value: Any, static: _Static) -> Any:
    """Specs and shardings with the worker axis in front, anything else as it is."""
    is_spec = lambda x: isinstance(x, PartitionSpec | NamedSharding)  # noqa: E731
    if not any(map(is_spec, jax.tree.leaves(value, is_leaf=is_spec))):
        return value
    lead = (static.axis_name, static.shards) if static.shards else (static.axis_name,)

    names = Axes.of("PerWorker", static.axis_name).names

    def one(x):
        if isinstance(x, NamedSharding):
            # A mesh without that axis is one on which no workers are laid out.
            workers = set(names) <= set(x.mesh.axis_names)
            return x.update(spec=one(x.spec)) if workers else x
        # A region may be mapped over some of the axes already.
        if isinstance(x, PartitionSpec) and x[:1] != lead[:1]:
            return PartitionSpec(*lead, *x)
        return x

    return jax.tree.map(one, value, is_leaf=is_spec)


def wrap(value: Any, axes: Axes | None, rule: str | None = None) -> Any:
    """Marks what is each worker's own, if there are several workers."""
    return value if axes is None else PerWorker.wrap(value, axes, rule=rule)


def unwrap(api: str, value: Any) -> Any:
    """Inverse of :func:`wrap`, inside the mapped function."""
    return value.local(api) if is_node(value) else value


def is_node(x: Any) -> bool:
    """Whether ``x`` is a :class:`PerWorker`; for ``is_leaf``."""
    return isinstance(x, PerWorker)


def laid_out(tree: Any) -> Any:
    """A state inside the mapped function, its nodes marked as those of all workers.

    Whatever goes through without an update, of a state that was laid out by hand.
    """

    def mark(x):
        axes = Axes.of("PerWorker", x.axis_name) if is_node(x) else None
        if axes is None or not axes.bound():
            return x
        return dataclasses.replace(x, sizes=axes.sizes())

    return jax.tree.map(mark, tree, is_leaf=is_node)


def marked_as(tree: Any, before: Any) -> Any:
    """A new state, whose nodes know what those of the old one did of their place."""

    def one(old, new):
        if not is_node(old) or not is_node(new):
            return new
        return dataclasses.replace(new, home=old.home, specs=old.specs)

    return jax.tree.map(one, before, tree, is_leaf=is_node)


def _register_with_flax(serialization: Any) -> None:
    """Teaches ``flax.serialization`` the node.

    Unknown nodes are stored whole by Flax, static fields and all, and come back as
    opaque objects.
    """

    def save(node: PerWorker) -> dict[str, Any]:
        stored = {"value": serialization.to_state_dict(node.value)}
        if node.sizes is not None:
            whose = [node.share, *node.sizes]
            stored["whose"] = np.asarray(whose, np.int32)
        return stored

    def restore(target: PerWorker, stored: Any) -> PerWorker:
        value = serialization.from_state_dict(target.value, stored["value"])
        share, *sizes = np.asarray(stored.get("whose", [0])).tolist()
        sizes = tuple(sizes) or None
        return dataclasses.replace(target, value=value, sizes=sizes, share=share)

    serialization.register_serialization_state(PerWorker, save, restore)


when_imported("flax.serialization", _register_with_flax)
