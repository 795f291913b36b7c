"""How each array of a state is sharded behind its worker: by path and shape."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efopt.workers.axes import Axes
from efopt.workers.node import is_node

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is known of one parameter.

    Attributes:
      spec: How it is sharded.
      shape: Its shape; ``None``: nothing in the tree can be it.
    """

    spec: PartitionSpec
    shape: tuple[int, ...] | None


class Rule:
    """Specs for the arrays of a tree, from those of the parameters.

    Args:
      tree: The tree in which arrays are looked up.
      params_specs: A tree like the parameters, of ``PartitionSpec``, or ``None``.
      params: The parameters or their structs, or ``None``.
    """

    def __init__(self, tree: Any, params_specs: Any, params: Any):
        specs = {} if params_specs is None else _flat_specs(params_specs)
        if params is not None:
            shapes = {p: jnp.shape(x) for p, x in _flat(params)}
            _check_params(specs, shapes)
            found = {path: shapes[path] for path in specs}
        else:
            told, left_out = _told(tree)
            if params_specs is not None and told:
                _check_told(tree, specs, told, left_out)
            found = _shapes(tree, specs, told)
        paths = jax.tree_util.tree_flatten_with_path(params_specs, is_leaf=_is_spec)[0]
        self._names = {jax.tree_util.keystr(path): spec for path, spec in paths}
        self._parameters = {p: Parameter(s, found[p]) for p, s in specs.items()}

    def of(self, path: Path, shape: tuple[int, ...], axes: Axes | None) -> Any:
        """The spec of an array behind its worker axis, or ``None``: its own rule.

        Args:
          path: Where it stands.
          shape: Its shape, without a worker axis.
          axes: The axes of the workers, if they own it.
        """
        name = _owner(path, self._parameters)
        if name is None:
            return None
        known = self._parameters[name]
        if known.shape != shape:
            return None
        clash = set(axes.names) & set(_names(known.spec)) if axes else ()
        if clash:
            raise ValueError(
                f"`params_specs` shards {_show(name)} by {known.spec} over "
                f"{sorted(clash)[0]!r}, an axis of the workers: each worker owns a "
                "residual for all of a parameter. Shard parameters over other axes."
            )
        return known.spec

    def at(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The spec of a parameter that a scheme knows by ``jax.tree_util.keystr``."""
        named = [n for n in self._names if path.endswith(n) or n.endswith(path)]
        # The one that agrees for longest, and itself if it is there.
        name = max(named, key=lambda n: (n == path, min(len(n), len(path))), default="")
        spec = self._names.get(name, PartitionSpec())
        return spec if len(spec) <= len(shape) else PartitionSpec()

    def require_fit(self, mesh: Any) -> None:
        """Raises if a spec names an axis that the mesh lacks, or does not divide."""
        for name, known in self._parameters.items():
            for axis in _names(known.spec):
                if axis not in mesh.shape:
                    raise ValueError(
                        f"`params_specs` shards {_show(name)} by {known.spec}, and the "
                        f"mesh has no axis {axis!r}, but {tuple(mesh.axis_names)}."
                    )
            for size, entry in zip(known.shape or (), known.spec, strict=False):
                parts = math.prod(mesh.shape[a] for a in _names((entry,)))
                if size % parts:
                    raise ValueError(
                        f"`params_specs` shards {_show(name)} of shape {known.shape} "
                        f"by {known.spec}: {size} does not divide by {parts}."
                    )


def path_of(path: Any) -> Path:
    """A path of JAX as strings, whatever the containers."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _flat(tree: Any) -> list[tuple[Path, Any]]:
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_spec)[0]
    return [(path_of(path), x) for path, x in paths]


def _flat_specs(params_specs: Any) -> dict[Path, PartitionSpec]:
    specs = dict(_flat(params_specs))
    for path, spec in specs.items():
        if not _is_spec(spec):
            raise TypeError(
                "`params_specs` must be a tree like the parameters with a "
                f"`PartitionSpec` at every leaf, got {spec!r} at {_show(path)}."
            )
    return specs


def _check_params(specs: dict[Path, Any], shapes: dict[Path, Any]) -> None:
    for path in specs.keys() ^ shapes.keys():
        where = "specs" if path in specs else "params"
        raise ValueError(
            f"`params_specs` must have the structure of `params`: {_show(path)} is in "
            f"`{'params_' if where == 'specs' else ''}{where}` alone."
        )
    for path, spec in specs.items():
        if len(spec) > len(shapes[path]):
            raise ValueError(_too_long(path, spec, shapes[path]))


def _told(tree: Any) -> tuple[dict[Path, tuple[int, ...]], set[Path]]:
    """What schemes in the tree have been told of the parameters.

    Returns:
      The shapes of parameters, and where a mask has left some out.
    """
    is_home = lambda x: hasattr(x, "places")  # noqa: E731
    told: dict[Path, tuple[int, ...]] = {}
    left_out: set[Path] = set()
    for x in jax.tree.leaves(tree, is_leaf=is_home):
        if is_home(x):
            told.update(x.places())
            left_out.update(x.gaps())
    return told, left_out


def _check_told(
    tree: Any,
    specs: dict[Path, Any],
    told: dict[Path, tuple[int, ...]],
    left_out: set[Path],
) -> None:
    """Raises if specs and parameters are not of the same names.

    A scheme may have been told of a part of the parameters, so that paths begin deeper
    there; or of more.
    """
    owners = {_owner(path, specs) for path, _ in _arrays(tree)}
    unknown = [
        name
        for name in specs
        if name not in owners
        and not any(_ends_alike(path, name) for path in told)
        and not any(_reaches_into(name, gap) for gap in left_out)
    ]
    if unknown:
        raise ValueError(_of_others(unknown))
    for path in told:
        if not any(_ends_alike(path, name) for name in specs):
            raise ValueError(
                f"`params_specs` has no spec of {_show(path)}, a parameter that was "
                "given to `init`. It must be a tree like the parameters, with `P()` "
                "for those that are replicated."
            )


def _ends_alike(a: Path, b: Path) -> bool:
    """Whether the longer path ends with the shorter one."""
    n = min(len(a), len(b))
    return a[len(a) - n :] == b[len(b) - n :]


def _reaches_into(name: Path, gap: Path) -> bool:
    """Whether a parameter may be where a mask has left some out."""
    return any(name[i : i + len(gap)] == gap for i in range(len(name)))


def _shapes(
    tree: Any, specs: dict[Path, Any], told: dict[Path, tuple[int, ...]]
) -> dict[Path, Any]:
    """The shape of every parameter, from what is told of them, or the arrays."""
    for path, spec in specs.items():
        if path in told and len(spec) > len(told[path]):
            raise ValueError(_too_long(path, spec, told[path]))
    found: dict[Path, list[tuple[int, tuple[int, ...]]]] = {p: [] for p in specs}
    arrays = 0
    for path, shape in _arrays(tree):
        arrays += bool(shape)
        name = _owner(path, specs)
        if name is not None:
            found[name].append((len(path), shape))
    known = bool(told.keys() & specs.keys()) or any(found.values())
    if any(map(len, specs.values())) and arrays and not known:
        raise ValueError(_of_others(specs))
    return {
        path: told[path] if path in told else _shape(path, spec, found[path])
        for path, spec in specs.items()
    }


def _shape(path: Path, spec: Any, found: list[Any]) -> tuple[int, ...] | None:
    fitting = [(-depth, math.prod(s), s) for depth, s in found if len(s) >= len(spec)]
    if fitting:
        return max(fitting)[2]
    depths = sorted(depth for depth, _ in found)
    # Alone in front: the parameter itself, or a residual. Among several of the same
    # depth may be the factors of one, and they are no parameter.
    if path and depths and depths.count(depths[0]) == 1:
        raise ValueError(_too_long(path, spec, min(found)[1]))
    return None


def _arrays(tree: Any) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """Path and shape, without a worker axis, of all that may be like a parameter."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]:
        if not is_node(x):
            yield path_of(path), jnp.shape(x)
        elif x.split is None and not x.shards:
            for rest, y in jax.tree_util.tree_flatten_with_path(x.value)[0]:
                yield path_of((*path, *rest)), jnp.shape(y)[1:]


def _owner(path: Path, names: Any) -> Path | None:
    """The longest of the names with which a path ends."""
    for start in range(len(path) + 1):
        if path[start:] in names:
            return path[start:]
    return None


def _names(spec: Any) -> Iterator[str]:
    """The mesh axes of a spec."""
    for entry in spec:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, tuple):
            yield from entry


def _show(path: Path) -> str:
    return "/".join(path) or "the parameters"


def _of_others(names: Iterable[Path]) -> str:
    return (
        "`params_specs` names parameters of which the tree has none: "
        f"{', '.join(map(_show, names))}. It must be a tree like the parameters."
    )


def _too_long(path: Path, spec: Any, shape: Any) -> str:
    return (
        f"`params_specs` shards {_show(path)} by {spec}, which has more entries than "
        f"its shape {shape}."
    )
