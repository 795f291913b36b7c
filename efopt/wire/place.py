"""Where a plan's workers and parameters lie: a mesh without devices, and specs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from efopt.exchanges.home import Home
from efopt.exchanges.link import Link
from efopt.workers.axes import Axes


@dataclasses.dataclass(frozen=True)
class Place:
    """A mesh, the axes of its workers, and the spec of every leaf.

    Attributes:
      mesh: The mesh, without devices.
      axes: The axes of the workers.
      specs: How each leaf is sharded behind them.
    """

    mesh: AbstractMesh
    axes: Axes
    specs: tuple[P, ...]

    @classmethod
    def read(cls, mesh: Any, axis_name: Any, params_specs: Any, params: Any) -> "Place":
        """The place that the arguments of a plan tell, or an error."""
        abstract = _mesh(mesh)
        axes = Axes.of("plan", axis_name)
        for name in axes.names:
            if name not in abstract.axis_names:
                raise ValueError(
                    f"`plan(axis_name={axis_name!r})` must name axes of the mesh, "
                    f"{_sizes(abstract)}."
                )
        specs = _specs(params_specs, params)
        named = jax.tree_util.tree_flatten_with_path(params)[0]
        for (path, x), spec in zip(named, specs, strict=True):
            where = jax.tree_util.keystr(path) or "the leaf"
            _check_spec(where, x.shape, spec, abstract, axes)
        return cls(abstract, axes, specs)

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Name and size of every axis."""
        return tuple(zip(self.mesh.axis_names, self.mesh.axis_sizes, strict=True))

    @property
    def num_workers(self) -> int:
        return self.axes.size_on(self.mesh)

    def of(self, leaves: Sequence[int]) -> "Place":
        """The place of a list of some of the leaves."""
        return dataclasses.replace(self, specs=tuple(self.specs[i] for i in leaves))

    def pieces(self, link: Link, tree: Any) -> list[tuple[int, ...]]:
        """What one device compresses of each leaf: the shape of its shard or piece."""
        specs = iter(self.specs)
        home = Home.of(link, tree).on(self.mesh, lambda *_: next(specs))
        return [cut.piece for cut in home.cuts()]


def _mesh(mesh: Any) -> AbstractMesh:
    """A mesh of the sizes by axis that a mapping, or another mesh, tells."""
    sizes = mesh if isinstance(mesh, Mapping) else getattr(mesh, "shape", None)
    if not isinstance(sizes, Mapping):
        raise TypeError(
            '`plan(mesh=...)` must be sizes by axis, such as `{"dcn": 4, "fsdp": 64}`, '
            f"or a mesh of JAX, got {type(mesh).__name__}."
        )
    wrong = [(a, n) for a, n in sizes.items() if type(a) is not str or not _count(n)]
    if wrong or not sizes:
        raise ValueError(
            '`plan(mesh=...)` must be sizes by axis, such as `{"dcn": 4, "fsdp": 64}`: '
            f"names, and ints of at least 1; got {dict(sizes)!r}."
        )
    auto = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(map(int, sizes.values())), tuple(sizes), axis_types=auto)


def _count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 1


def _specs(params_specs: Any, params: Any) -> tuple[P, ...]:
    """The spec of each leaf, as given; else as the leaf is placed; else replicated."""
    leaves, structure = jax.tree.flatten(params)
    if params_specs is None:
        given = [getattr(x, "sharding", None) for x in leaves]
        return tuple(s.spec if isinstance(s, NamedSharding) else P() for s in given)
    if isinstance(params_specs, P):
        return (params_specs,) * len(leaves)
    specs, found = jax.tree.flatten(params_specs, is_leaf=lambda x: isinstance(x, P))
    if found != structure or not all(isinstance(s, P) for s in specs):
        raise ValueError(
            "`plan(params_specs=...)` must be one `PartitionSpec`, or a tree of them "
            f"like `params`:\n  got      {found}\n  expected {structure}"
        )
    return tuple(specs)


def _check_spec(
    where: str, shape: tuple[int, ...], spec: P, mesh: AbstractMesh, axes: Axes
) -> None:
    def refuse(why: str) -> None:
        raise ValueError(
            f"`plan(params_specs=...)`: {where} of shape {shape} cannot be sharded by "
            f"{spec}: {why}."
        )

    entries = [e if isinstance(e, tuple) else (e,) for e in spec]
    names = [name for entry in entries for name in entry if name is not None]
    for name in names:
        if name not in mesh.axis_names:
            refuse(f"the mesh has no axis {name!r}, {_sizes(mesh)}")
        if name in axes.names:
            refuse(f"{name!r} is an axis of the workers, which all have the parameters")
    if len(set(names)) < len(names):
        refuse("it names an axis twice")
    if len(spec) > len(shape):
        refuse(f"it is for {len(spec)} axes")
    for i, entry in enumerate(entries):
        by = 1
        for name in entry:
            by *= mesh.shape[name] if name is not None else 1
        if shape[i] % by:
            refuse(f"axis {i} does not divide by {by}")


def _sizes(mesh: AbstractMesh) -> str:
    pairs = zip(mesh.axis_names, mesh.axis_sizes, strict=True)
    return ", ".join(f"{name}={size}" for name, size in pairs)
