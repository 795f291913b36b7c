"""Home: where the trees of a link live, on a mesh with axes behind each worker.

Of the parameters' global shapes, and of their specs once the state is placed, follows
what every device holds: its shard of each leaf, and of what is equal on the devices of
a worker its piece. State that is laid out by shard is made anew from these.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

SpecOf = Callable[[str, tuple[int, ...]], P]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Home:
    """What is static about the trees of one link: a node without arrays.

    Attributes:
      link: The link itself, which makes state anew.
      treedef: The structure of the parameters given to ``init``.
      paths: The path of each leaf.
      shapes: Its global shape.
      dtypes: Its dtype.
      specs: How it is sharded behind each worker; ``None``: not placed yet.
      inner: Name and size of the mesh axes behind each worker, in the mesh's order.
    """

    link: Any
    treedef: Any
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    specs: tuple[P, ...] | None = None
    inner: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, link: Any, params: Any) -> "Home":
        """The home of a tree of arrays or structs, not placed yet."""
        found, treedef = jax.tree_util.tree_flatten_with_path(params)
        return cls(
            link,
            treedef,
            tuple(jax.tree_util.keystr(path) for path, _ in found),
            tuple(jnp.shape(x) for _, x in found),
            tuple(jnp.result_type(x) for _, x in found),
        )

    def on(self, mesh: Any, spec_of: SpecOf) -> "Home":
        """The same, placed on a mesh."""
        axes = self.link.axes
        inner = [(a, mesh.shape[a]) for a in mesh.axis_names if a not in axes.names]
        pairs = zip(self.paths, self.shapes, strict=True)
        specs = tuple(spec_of(path, shape) for path, shape in pairs)
        return dataclasses.replace(self, specs=specs, inner=tuple(inner))

    @property
    def inner_names(self) -> tuple[str, ...]:
        """The mesh axes behind each worker."""
        return tuple(name for name, _ in self.inner)

    def axes_of(self, i: int) -> tuple[str, ...]:
        """The inner axes over which a leaf is sharded, in the mesh's order."""
        assert self.specs is not None
        named = set()
        for entry in self.specs[i]:
            named |= set(entry) if isinstance(entry, tuple) else {entry}
        return tuple(name for name in self.inner_names if name in named)

    def spare(self, i: int) -> tuple[str, ...]:
        """The inner axes over which a leaf is equal."""
        known = self.axes_of(i)
        return tuple(name for name in self.inner_names if name not in known)

    def extent(self, names: tuple[str, ...]) -> int:
        """How many devices stand along some of the inner axes."""
        sizes, extent = dict(self.inner), 1
        for name in names:
            extent *= sizes[name]
        return extent

    def shard(self, i: int) -> tuple[int, ...]:
        """The shape of a leaf on one device, or an error if it does not divide."""
        assert self.specs is not None
        shape, spec = list(self.shapes[i]), tuple(self.specs[i])
        for d, entry in enumerate(spec):
            names = entry if isinstance(entry, tuple) else (entry,)
            by = self.extent(tuple(n for n in names if n is not None))
            if shape[d] % by:
                raise ValueError(
                    f"`distribute(tree, mesh, params_specs)`: {self.paths[i]} of shape "
                    f"{self.shapes[i]} cannot be sharded by {self.specs[i]}: axis {d} "
                    f"does not divide by {by}."
                )
            shape[d] //= by
        return tuple(shape)

    def shards(self) -> Any:
        """What one device holds of the parameters: a tree of structs."""
        leaves = [
            jax.ShapeDtypeStruct(self.shard(i), dtype)
            for i, dtype in enumerate(self.dtypes)
        ]
        return self.treedef.unflatten(leaves)

    def spec_tree(self) -> Any:
        """The specs as a tree like the parameters."""
        return self.treedef.unflatten(self.specs)
