"""Home: where the trees of a link live, on a mesh with axes behind each worker.

Of the parameters' global shapes, and of their specs once the state is placed, follows
what every device holds: its shard of each leaf, and of what is equal on the devices of
a worker its piece. State that is laid out by shard is made anew from these.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from efopt.codecs.codec import Codec
from efopt.codecs.layout import lay_out
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
        self._check_fast(mesh, specs)
        return dataclasses.replace(self, specs=specs, inner=tuple(inner))

    def _check_fast(self, mesh: Any, specs: Any) -> None:
        for name in self.link.fast:
            if name not in mesh.axis_names:
                raise ValueError(
                    f"{self.link.api} averages over the fast axis {name!r}, and the "
                    f"mesh has no such axis, but {tuple(mesh.axis_names)}."
                )
            for path, spec in zip(self.paths, specs, strict=True):
                named = {n for e in spec for n in (e if isinstance(e, tuple) else (e,))}
                if name in named:
                    raise ValueError(
                        f"{self.link.api} averages over the fast axis {name!r}, along "
                        f"which `params_specs` shards {path} by {spec}. Its shards are "
                        "averaged there already: leave the axis out of `axis_name`, "
                        "and take the inner exchange."
                    )

    @property
    def inner_names(self) -> tuple[str, ...]:
        """The mesh axes behind each worker."""
        return tuple(name for name, _ in self.inner)

    def axes_of(self, i: int) -> tuple[str, ...]:
        """The inner axes over which the state of a leaf is, in the mesh's order."""
        return self._named(self.kept()[i])

    def spare(self, i: int) -> tuple[str, ...]:
        """The inner axes over which a leaf is equal."""
        assert self.specs is not None
        known = self._named(self.specs[i])
        return tuple(name for name in self.inner_names if name not in known)

    def _named(self, spec: P) -> tuple[str, ...]:
        named = set()
        for entry in spec:
            named |= set(entry) if isinstance(entry, tuple) else {entry}
        return tuple(name for name in self.inner_names if name in named)

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
        return self._structs([self.shard(i) for i in range(len(self.shapes))])

    def require_shards(self, updates: Any) -> None:
        """Raises if a device holds other parts of the updates than the state knows."""
        found, treedef = jax.tree_util.tree_flatten_with_path(updates)
        if treedef != self.treedef or self.specs is None:
            return
        for i, (path, x) in enumerate(found):
            if jnp.shape(x) == self.shard(i):
                continue
            raise ValueError(
                f"{self.link.api} got updates of shape {jnp.shape(x)} at "
                f"{jax.tree_util.keystr(path) or 'the root'}, where the state is "
                f"placed for shards of shape {self.shard(i)}: {self.specs[i]} of a "
                f"parameter of shape {self.shapes[i]} on {dict(self.inner)}. Give "
                "`efopt.distribute(state, mesh, params_specs)` the specs by which the "
                "step is mapped, and `efopt.partition_specs(state, params_specs)` to "
                "its `in_specs` and `out_specs`."
            )

    def cuts(self) -> list[Cut]:
        """How one device cuts what it holds of each leaf, where that is in pieces.

        A leaf of a single message is, over the axes along which it is equal. Where the
        link has fast axes, and an array axis divides, the state keeps it so.
        """
        return [self._cut(i, codec) for i, codec in enumerate(self._written())]

    def codecs(self) -> list[Codec]:
        """The codec of each leaf, as a device behind a worker writes what it holds."""
        found = []
        for i, (codec, spec) in enumerate(
            zip(self._written(), self.kept(), strict=True)
        ):
            if codec.spans:
                shape = list(self.shard(i))
                entries = [*spec, *[None] * (len(shape) - len(spec))]
                names = [e if isinstance(e, tuple) else (e,) for e in entries]
                names = tuple(tuple(n for n in e if n is not None) for e in names)
                known = {n for entry in names for n in entry}
                equal = tuple(n for n in self.inner_names if n not in known)
                codec = codec.of_shards(self.shapes[i], names, equal)
            found.append(codec)
        return found

    def pieces(self) -> Any:
        """What one device keeps of the parameters in the state: a tree of structs."""
        pairs = zip(self.cuts(), range(len(self.shapes)), strict=True)
        return self._structs([c.piece if c.kept else self.shard(i) for c, i in pairs])

    def kept(self) -> tuple[P, ...]:
        """The spec, behind the worker, of what the state keeps of each leaf."""
        assert self.specs is not None
        specs = []
        for spec, cut in zip(self.specs, self.cuts(), strict=True):
            if cut.kept and cut.axis is not None:
                entries = [*spec, *[None] * (len(cut.shape) - len(spec))]
                before = entries[cut.axis]
                before = before if isinstance(before, tuple) else (before,)
                names = [n for n in (*before, *cut.names) if n is not None]
                entries[cut.axis] = names[0] if len(names) == 1 else tuple(names)
                spec = P(*entries)
            specs.append(spec)
        return tuple(specs)

    def _written(self) -> list[Codec]:
        """The codec of each leaf: of its shard, or of all where it spans them."""
        whole = self.link.codecs(self._structs(self.shapes))
        apart = self.link.codecs(self.shards())
        pairs = zip(whole, apart, strict=True)
        return [w if w.spans or a.spans else a for w, a in pairs]

    def _cut(self, i: int, codec: Any) -> Cut:
        shape, fast = self.shard(i), self.link.fast
        if not (codec.one_message or codec.spans) or not math.prod(shape):
            return Cut(shape)
        # Along the fast axes pieces lie side by side.
        spare = [n for n in self.spare(i) if n not in fast]
        names = (*spare, *(n for n in self.spare(i) if n in fast))
        number = self.extent(names)
        fitting = [d for d, size in enumerate(shape) if size % number == 0]
        if not fast or not fitting:
            return Cut(shape) if codec.spans else Cut(shape, names, number)
        return Cut(shape, names, number, fitting[0], kept=True)

    def _structs(self, shapes: Any) -> Any:
        pairs = zip(shapes, self.dtypes, strict=True)
        return self.treedef.unflatten([jax.ShapeDtypeStruct(*pair) for pair in pairs])

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
      watched: What the link sees of its own work, if :func:`efopt.watch.observe` asked
        for it: an :class:`efopt.watch.Watched`, equal on all workers. Else ``()``.
      flight: What the last step has written and the next will exchange, an
        :class:`InFlight`; ``()`` if every step exchanges its own.
    """

    codec: Any
    server: Any
    home: Any = ()
    watched: Any = ()
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
    codecs, states = home.codecs(), ()
    if link.codec.stateful:
        pieces = jax.tree.leaves(home.pieces())
        made = [c.init(x.shape, x.dtype) for c, x in zip(codecs, pieces, strict=True)]
        names = [c.state_axes(home.axes_of(i)) for i, c in enumerate(codecs)]
        pairs = zip(made, names, strict=True)
        states = [_sharded(state, link.axes, own) for state, own in pairs]
        states = home.treedef.unflatten(states)
    pieces = [cut.piece for cut in home.cuts()]
    layout = lay_out(codecs, pieces, home.dtypes)
    server = ()
    if link.keeps():
        server = owners.fresh(link.kept(layout), link.axes, home.inner_names)
    flight = ()
    if state.flight:
        require_fresh(link.api, state.flight.payloads)
        flight = link.flight(layout, home.inner_names)
    return LinkState(states, server, home, state.watched, flight)


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
