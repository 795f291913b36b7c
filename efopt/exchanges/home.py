"""Home: where the trees of a link live, on a mesh with axes behind each worker.

Of the parameters' global shapes, and of their specs once the state is placed, follows
what every device holds: its shard of each leaf, and of what is equal on the devices of
a worker its piece. State that is laid out by shard is made anew from these.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efopt.codecs.layout import lay_out
from efopt.codecs.states import init_states
from efopt.exchanges import owners
from efopt.exchanges.pieces import Cut
from efopt.ground.imports import when_imported
from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker
from efopt.workers.specs import Path, path_of

SpecOf = Callable[[str, tuple[int, ...]], P]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Home:
    """What is static about the trees of one link: a node without arrays.

    All are equal: a state has one structure, before and after it is placed, and where
    ``optax.tree.map_params`` calls ``init`` with something that is no parameters.

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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Home)

    def __hash__(self) -> int:
        return hash(Home)

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

    def places(self) -> dict[Path, tuple[int, ...]]:
        """The global shape of every leaf, by its path."""
        numbers = self.treedef.unflatten(range(len(self.shapes)))
        paths = jax.tree_util.tree_flatten_with_path(numbers)[0]
        pairs = zip(paths, self.shapes, strict=True)
        return {path_of(path): shape for (path, _), shape in pairs}

    def gaps(self) -> set[Path]:
        """Where there are no leaves: what a mask has left out, or nothing at all."""
        numbers = self.treedef.unflatten(range(len(self.shapes)))
        empty = lambda x: not jax.tree.leaves(x)  # noqa: E731
        paths = jax.tree_util.tree_flatten_with_path(numbers, is_leaf=empty)[0]
        return {path_of(path) for path, x in paths if empty(x)}

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

    def number(self, i: int, at: dict[str, int]) -> int:
        """Which shard of a leaf the device at a position behind its worker holds."""
        sizes, number = dict(self.inner), 0
        for name in self.axes_of(i):
            number = number * sizes[name] + at[name]
        return number

    def window(self, i: int, at: dict[str, int]) -> tuple[slice, ...]:
        """Where that shard stands in the leaf."""
        window = [slice(None)] * len(self.shapes[i])
        for d, entry in enumerate(self.specs[i] if self.inner and self.specs else ()):
            names = entry if isinstance(entry, tuple) else (entry,)
            names = tuple(name for name in names if name is not None)
            number, length = 0, self.shapes[i][d] // self.extent(names)
            for name in names:
                number = number * dict(self.inner)[name] + at[name]
            window[d] = slice(number * length, (number + 1) * length)
        return tuple(window)

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


class LinkState(NamedTuple):
    """State of a link.

    Attributes:
      codec: The compressor's own state for each leaf, ``()`` if it has none. Equal on
        all workers.
      server: What the owners of ranges still owe, under ``exchange="two_phase"``: an
        :class:`efopt.PerWorker` of one array per group of equal blocks, at least
        float32. Else ``()``.
      home: Where the trees live, a :class:`Home`; static. ``()`` without an axis.
      flight: What the last step has written and the next will exchange, an
        :class:`InFlight`; ``()`` if every step exchanges its own.
    """

    codec: Any
    server: Any
    home: Any = ()
    flight: Any = ()

    def placed(self, mesh: Any, spec_of: SpecOf) -> "LinkState":
        """The state laid out for a mesh on which parameters have these specs."""
        return self if self.home == () else by_shard(self, mesh, spec_of)


def by_shard(state: LinkState, mesh: Any, spec_of: SpecOf) -> LinkState:
    """The state laid out by shard, where a mesh has axes behind each worker."""
    link, home = state.home.link, state.home.on(mesh, spec_of)
    if state.home.specs is not None:
        if (home.specs, home.inner) != (state.home.specs, state.home.inner):
            raise ValueError(
                f"{link.api} got a state that is placed for another mesh or other "
                "specs of the parameters already; start from `tx.init(params)`."
            )
        return state
    if not home.inner:
        return state._replace(home=home)
    require_fresh(link.api, state.server)
    shards = home.shards()
    codecs = link.codecs(shards)
    states = init_states(link.codec, shards, link.api)
    if states != ():
        leaves = home.treedef.flatten_up_to(states)
        states = home.treedef.unflatten(
            [_sharded(s, link.axes, home.axes_of(i)) for i, s in enumerate(leaves)]
        )
    cuts = [
        Cut(home.shard(i), spare if codec.one_message else (), home.extent(spare))
        for i, codec in enumerate(codecs)
        for spare in (home.spare(i),)
    ]
    layout = lay_out(codecs, [cut.piece for cut in cuts], home.dtypes)
    server = ()
    if link.keeps():
        server = owners.fresh(link.kept(layout), link.axes, home.inner_names)
    flight = ()
    if state.flight:
        require_fresh(link.api, state.flight.payloads)
        flight = link.flight(layout, home.inner_names)
    return LinkState(states, server, home, flight)


def require_fresh(api: str, marked: Any) -> None:
    """Raises if what is about to be made anew has been laid out, and used, already."""
    if not isinstance(marked, PerWorker) or marked.sizes is None:
        return
    if not Axes.of(api, marked.axis_name).bound():  # made inside, it is fresh
        raise ValueError(
            f"{api} got a state that is laid out over workers, but not over the mesh "
            "axes behind them, by whose shards some of it is kept. Restore into what "
            "`efopt.distribute(state, mesh, params_specs)` makes of a fresh one."
        )


def _sharded(state: Any, axes: Axes, names: tuple[str, ...]) -> Any:
    """A codec's state of one leaf, of which every shard has its own.

    It is equal on all workers, and marked as if it were not: no device holds more.
    """
    if not names or not jax.tree.leaves(state):
        return state
    return PerWorker.wrap(state, axes, None, names, rule="equal")


def _register_with_flax(serialization: Any) -> None:
    """Teaches ``flax.serialization`` that there is nothing to store."""
    serialization.register_serialization_state(
        Home, lambda home: {}, lambda target, stored: target
    )


when_imported("flax.serialization", _register_with_flax)
