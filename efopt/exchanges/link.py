"""The link: a compressor, an exchange and axes, through which trees are averaged.

A scheme opens one and sees trees alone; blocks, buckets, messages, the codec's state
and the owners' residuals stay behind it.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Codec, Message
from efopt.codecs.compressor import Compressor
from efopt.codecs.conversation import alone, converse
from efopt.codecs.layout import Bucket, Layout, lay_out
from efopt.codecs.states import close_states, init_states, open_states
from efopt.exchanges import regions, table
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.groups import group_key, server_shapes
from efopt.exchanges.home import Home, SpecOf
from efopt.exchanges.pieces import Cut, gather, spare_axes
from efopt.ground import bits, checks
from efopt.ground.barriers import zeros_after
from efopt.ground.dtypes import check_float, compute_dtype, wide_zeros
from efopt.workers import node
from efopt.workers.axes import Axes, vary, varying
from efopt.workers.node import PerWorker
from efopt.workers.ranges import range_size


class LinkState(NamedTuple):
    """State of a link.

    Attributes:
      codec: The compressor's own state for each leaf, ``()`` if it has none. Equal on
        all workers.
      server: What the owners of ranges still owe, under ``exchange="two_phase"``: one
        :class:`efopt.PerWorker` per group of equal blocks, at least float32. Else
        ``()``.
      home: Where the trees live, a :class:`Home`; static. ``()`` without an axis.
    """

    codec: Any
    server: Any
    home: Any = ()

    def placed(self, mesh: Any, spec_of: SpecOf) -> "LinkState":
        """The state laid out for a mesh on which parameters have these specs."""
        return self if self.home == () else self.home.link.placed(self, mesh, spec_of)


class Averaged(NamedTuple):
    """What came of :meth:`Link.average`.

    Attributes:
      mean: The average over workers, a tree, equal on all of them.
      lost: What this worker's message did not say, a tree in the compute dtypes; or
        what became of it, if the caller said how it is kept.
      state: The new state of the link.
    """

    mean: Any
    lost: Any
    state: LinkState


@dataclasses.dataclass(frozen=True)
class Link:
    """Averages trees over workers, compressed; alone it is a round trip.

    Attributes:
      api: The transformation that opened it, for errors.
      codec: How an array is written.
      exchange: How workers meet, where it can carry a leaf's codec; ``None``, or where
        it cannot: as suits that codec.
      axes: The axes of the workers; ``None`` for a single one.
      start: Steps that are averaged uncompressed first.
      stream: Tells its random numbers from those of other roles in the same chain.
    """

    api: str
    codec: Codec
    exchange: Exchange | None
    axes: Axes | None
    start: int = 0
    stream: int = 0

    # ------------------------------------------------------------------------- state

    def init(self, params: Any) -> LinkState:
        """The state for a tree of parameters, arrays or structs."""
        states = init_states(self.codec, params, self.api)
        keeps = any(self._route(c).keeps for c in self.codec.members())
        if self.axes is None:
            return LinkState(states, ())
        home = Home.of(self, params)
        if not keeps:
            return LinkState(states, (), home)
        if not jax.tree.leaves(params):
            # A placeholder of `optax.tree.map_params`: stand in for params.
            return LinkState(states, params, home)
        return LinkState(states, self._server(self._layout(params)), home)

    def placed(self, state: LinkState, mesh: Any, spec_of: SpecOf) -> LinkState:
        """The state laid out by shard, where a mesh has axes behind each worker."""
        home = state.home.on(mesh, spec_of)
        if state.home.specs is not None:
            if (home.specs, home.inner) != (state.home.specs, state.home.inner):
                raise ValueError(
                    f"{self.api} got a state that is placed for another mesh or other "
                    "specs of the parameters already; start from `tx.init(params)`."
                )
            return state
        if not home.inner:
            return state._replace(home=home)
        shards = home.shards()
        codecs = self.codec.assign(shards)
        states = init_states(self.codec, shards, self.api)
        if states != ():
            leaves = home.treedef.flatten_up_to(states)
            states = home.treedef.unflatten(
                [_by_shard(s, home.axes_of(i)) for i, s in enumerate(leaves)]
            )
        cuts = [
            Cut(home.shard(i), spare if codec.one_message else (), home.extent(spare))
            for i, codec in enumerate(codecs)
            for spare in (home.spare(i),)
        ]
        layout = lay_out(codecs, [cut.piece for cut in cuts], home.dtypes)
        return LinkState(states, self._server(layout, home.inner_names), home)

    def _server(self, layout: Layout, shards: tuple[str, ...] = ()) -> Any:
        """Server residuals of zero."""
        assert self.axes is not None
        n = self.axes.size() if self.axes.bound() else 1
        server = []
        for (blocks, *block), dtype in self._server_shapes(layout):
            zeros = jnp.zeros((range_size(blocks, n), *block), dtype)
            server.append(PerWorker.wrap(zeros, self.axes, blocks, shards))
        return tuple(server)

    def zeros(self, params: Any) -> Any:
        """A residual of zero, one worker's, in the compute dtypes."""
        return wide_zeros(params)

    def wrap(self, tree: Any, like: Any = None) -> Any:
        """Marks what is this worker's own, if there are several workers.

        Args:
          tree: A tree of arrays.
          like: Where it takes the place of another: the marked tree it was unwrapped
            from.
        """
        if like is None or self.axes is None:
            return node.wrap(tree, self.axes)
        return jax.tree.map(_wrapped_as, like, tree, is_leaf=node.is_node)

    def unwrap(self, value: Any) -> Any:
        """Inverse of :meth:`wrap`, inside the mapped function."""
        unwrap = functools.partial(node.unwrap, self.api)
        return jax.tree.map(unwrap, value, is_leaf=node.is_node)

    # ------------------------------------------------------------------------ routing

    def codecs(self, tree: Any) -> list[Codec]:
        """The codec of each leaf of a tree of arrays or structs."""
        return self.codec.assign(tree)

    def routes(self, tree: Any) -> list[Exchange]:
        """The exchange that carries each leaf of a tree of arrays or structs."""
        return [self._route(codec) for codec in self.codec.assign(tree)]

    def _route(self, codec: Codec) -> Exchange:
        if self.exchange is not None and self.exchange.refusal(codec) is None:
            return self.exchange
        return table.default(codec)

    # ------------------------------------------------------------------------- a trip

    def receive(self, updates: Any, like: Any = None) -> Any:
        """Updates on their way in, as arrays, or an error.

        Args:
          updates: The updates of this worker.
          like: A tree of arrays with the structure and shapes that they must have.
        """
        if self.axes is not None:
            self._require_bound(self.axes)
        paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        if like is not None:
            _check_like(self.api, paths, treedef, like)
        for path, x in paths:
            check_float(path, x, self.api)
        if self.axes is not None:
            self.axes.require_local(self.api, updates)
        return treedef.unflatten([jnp.asarray(x) for _, x in paths])

    def _require_bound(self, axes: Axes) -> None:
        cure = (
            "; in a plain jitted step over global arrays take the gradients of "
            f"`efopt.value_and_grad(..., axis_name={axes.key!r})` as they are; or pass "
            "`axis_name=None` for a single worker"
        )
        axes.require_bound(self.api, cure)

    def turn(self, count: jax.Array) -> Turn:
        """The step, and this worker, for what draws random numbers."""
        worker = jnp.uint32(0) if self.axes is None else self.axes.index()
        return Turn(count.astype(jnp.uint32), worker.astype(jnp.uint32), self.stream)

    def average(
        self,
        tree: Any,
        state: LinkState,
        count: jax.Array,
        *,
        like: Any = None,
        ratio: jax.Array | None = None,
        wide: bool = False,
        keep: Callable[[Any], Any] | None = None,
    ) -> Averaged:
        """Averages a tree over the workers.

        Args:
          tree: What this worker has to say: a tree of floating-point arrays.
          state: As returned by :meth:`init`, or by this method.
          count: The step, equal on all workers.
          like: The updates in whose dtypes payloads travel and the average is applied;
            ``None``: ``tree``.
          ratio: Factor on the server residual before it is added, or ``None``.
          wide: Whether the average stays in the compute dtypes. Else it comes in the
            dtypes of ``like``, and its rounding, which every worker owes, is among
            what is lost.
          keep: What becomes of what is lost; called before the average is decoded, so
            that this can take its place in memory.
        """
        arrays, treedef = jax.tree.flatten(tree)
        given = arrays if like is None else jax.tree.leaves(like)
        codecs = self.codec.assign(tree if like is None else like)
        cuts = [self._cut(x, codec) for x, codec in zip(arrays, codecs, strict=True)]
        arrays = [cut.take(x) for cut, x in zip(cuts, arrays, strict=True)]
        shapes, kinds = [cut.piece for cut in cuts], [varying(x) for x in arrays]
        layout = lay_out(codecs, shapes, [x.dtype for x in given], kinds)
        codec_state = self.unwrap(state.codec)
        states = open_states(layout, treedef, codec_state)
        xs, turn = layout.join(arrays), self.turn(count)
        if self.axes is None:
            turns = [turn] * len(xs)
            means, rests, states = converse(layout, xs, states, turns, alone)
            server = ()
        else:
            ends = {i: cut.valid() for i, cut in enumerate(cuts)}
            valid = {i: end for i, end in ends.items() if end is not None}
            means, rests, states, server = self._meet(
                layout, xs, states, turn, state.server, ratio, valid
            )
        if not wide:
            rests = [_and_rounding(m, r) for m, r in zip(means, rests, strict=True)]
        wides = [
            jax.ShapeDtypeStruct(shape, compute_dtype(x.dtype))
            for shape, x in zip(shapes, given, strict=True)
        ]
        lost: Any = treedef.unflatten(gather(cuts, layout.part(rests, wides)))
        if keep is None:
            decoded = [mean.decode() for mean in means]
        else:
            lost = keep(lost)
            decoded = _decoded_last(layout, means, rests, treedef.flatten_up_to(lost))
        if not wide:
            pairs = zip(decoded, layout.buckets, strict=True)
            decoded = [bits.cast(x, b.dtype) for x, b in pairs]
            wides = [
                jax.ShapeDtypeStruct(shape, x.dtype)
                for shape, x in zip(shapes, given, strict=True)
            ]
        mean = treedef.unflatten(gather(cuts, layout.part(decoded, wides)))
        states = close_states(layout, treedef, states, codec_state)
        states = jax.tree.map(_wrapped_as, state.codec, states, is_leaf=node.is_node)
        return Averaged(mean, lost, LinkState(states, server, state.home))

    def entrance(
        self, update: Callable[..., Any], own: bool = False
    ) -> Callable[..., Any]:
        """``update_fn`` of a scheme, from wherever it is called.

        It runs on what each device holds. Called on stacked gradients in a plain jitted
        step, or inside a function mapped over the workers alone, it opens a region that
        is mapped over the other mesh axes too. With ``start`` the first updates are
        averaged uncompressed: until then nothing is owed and nothing learned, and of
        the state, which has a field ``count``, that alone moves on.

        Args:
          update: The function, of updates, state, parameters and extra arguments.
          own: Whether what comes out is each worker's own still.
        """
        inside = self._dense_first(update)

        def update_fn(updates, state, params=None, **extra_args):
            if self.axes is None:
                _check_single(self.api, updates)
                return inside(updates, state, params, **extra_args)
            if not node.is_node(updates):
                self._require_bound(self.axes)
            around = regions.around(self.api, self.axes, updates, state)
            if around is None:
                return inside(updates, state, params, **extra_args)
            return around(inside, updates, state, own)

        return update_fn

    def _dense_first(self, update: Callable[..., Any]) -> Callable[..., Any]:
        if not self.start:
            return update

        def update_fn(updates, state, params=None, **extra_args):
            def dense(updates, state):
                out = updates if self.axes is None else self.axes.pmean(updates)
                return out, state._replace(count=optax.safe_increment(state.count))

            def compressed(updates, state):
                return update(updates, state, params, **extra_args)

            updates = self.receive(updates)
            return lax.cond(state.count < self.start, dense, compressed, updates, state)

        return update_fn

    def owed_by_owners(self, params: Any, server: Any) -> Any:
        """What the owners still owe of each leaf, whole: a tree like ``params``.

        Args:
          params: The parameters given to :meth:`init`, or their structs.
          server: The server residual, laid out in any way; inside the mapped function
            it is gathered.
        """
        leaves, treedef = jax.tree.flatten(params)
        layout = self._layout(params)
        kept = self._kept(layout)
        wholes = {}
        for own, key in zip(server, dict.fromkeys(map(group_key, kept)), strict=True):
            x, axes = own.value, Axes.of(self.api, own.axis_name)
            if axes.bound():
                x = axes.all_gather(own.local(self.api))
            wholes[key] = x.reshape(-1, *key[1])[: own.split]
        xs, ends = [], dict.fromkeys(wholes, 0)
        for b in layout.buckets:
            if b not in kept:
                xs.append(jnp.zeros(b.shape, compute_dtype(b.dtype)))
                continue
            key = group_key(b)
            start, ends[key] = ends[key], ends[key] + b.shape[0]
            xs.append(wholes[key][start : ends[key]])
        zeros = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in leaves]
        return treedef.unflatten(layout.part(xs, zeros))

    # ------------------------------------------------------------------------ inside

    def _cut(self, x: jax.Array, codec: Codec) -> Cut:
        """How a leaf is cut; one that speaks in rounds is not."""
        names = ()
        if self.axes is not None and codec.one_message and x.size:
            names = spare_axes(x, self.axes)
        return Cut(x.shape, names, Axes(names).size() if names else 1)

    def _layout(self, tree: Any) -> Layout:
        leaves = jax.tree.leaves(tree)
        shapes = [jnp.shape(x) for x in leaves]
        dtypes = [jnp.result_type(x) for x in leaves]
        return lay_out(self.codec.assign(tree), shapes, dtypes)

    def _kept(self, layout: Layout) -> list[Bucket]:
        """The buckets whose owners keep a server residual."""
        return [b for b in layout.buckets if self._route(b.codec).keeps]

    def _server_shapes(self, layout: Layout) -> list[Any]:
        return server_shapes(self._kept(layout))

    def _meet(self, layout, xs, states, turn, server, ratio, valid):
        """The conversations about all buckets, each by the way of its codec."""
        assert self.axes is not None
        axes, codecs = self.axes, [b.codec for b in layout.buckets]
        ways = [self._route(codec).settled(codecs) for codec in codecs]
        # Where messages are equal, so must be what they draw.
        turns = [_at(turn, way.level(axes), axes) for way in ways]
        xs = [way.enter(x, axes) for way, x in zip(ways, xs, strict=True)]
        owed = self._owed(layout, server, ratio)

        def meet(messages: dict[int, Message]) -> dict[int, Message]:
            nonlocal owed
            means: dict[int, Message] = {}
            kinds = [(way, b.kind) for way, b in zip(ways, layout.buckets, strict=True)]
            for way, kind in dict.fromkeys(kinds):
                # Leaves that differ along different axes do not travel together.
                numbers = [i for i in messages if kinds[i] == (way, kind)]
                if not numbers:
                    continue
                asked = [messages[i] for i in numbers]
                given = owed if way.keeps else ()
                got, left = way.meet(asked, way.level(axes), given)
                means.update(zip(numbers, got, strict=True))
                owed = left if way.keeps else owed
            return means

        means, rests, states = converse(layout, xs, states, turns, meet, valid)
        rests = [
            x - mean.decode() if way.pays_average else rest
            for way, x, mean, rest in zip(ways, xs, means, rests, strict=True)
        ]
        pairs = zip(owed, server, strict=True)
        server = tuple(PerWorker.wrap(x, axes, s.split, s.shards) for x, s in pairs)
        return means, rests, states, server

    def _owed(self, layout, server, ratio):
        """What this worker owes as an owner, one array per group of blocks."""
        assert self.axes is not None
        shapes = [shape for shape, _ in self._server_shapes(layout)]
        known = [
            (own.split, *jnp.shape(own.value)[3 if own.shards else 2 :])
            for own in server
        ]
        if known != shapes:
            raise ValueError(
                f"{self.api} keeps a server residual for the blocks that `init` saw, "
                f"{known}, and the updates make {shapes} (blocks, block size). Updates "
                "must have the structure and shapes of the parameters given to `init`, "
                'and under `exchange="two_phase"` these cannot be sharded over another '
                "mesh axis: use another exchange there."
            )
        owed = []
        for own in server:
            x = own.local(self.api, range_size(own.split, self.axes.size()))
            owed.append(x if ratio is None else x * ratio.astype(x.dtype))
        return tuple(owed)


def open_link(
    api: str,
    compressor: Any,
    *,
    axis_name: Any = None,
    exchange: Any = None,
    start: int = 0,
    role: str = "",
) -> Link:
    """Checks the options that every scheme around a compressor shares.

    Args:
      api: The name of the scheme, for errors.
      compressor: An :class:`efopt.Compressor`.
      axis_name: The mapped axis of the workers, a tuple of axes, or ``None``.
      exchange: An :class:`efopt.exchanges.Exchange`, the name of one, or ``None``.
      start: Steps that are averaged uncompressed first.
      role: Names what it is used for where a chain may hold several: two roles never
        draw the same random numbers.

    Raises:
      TypeError: If ``compressor``, ``axis_name``, ``exchange`` or ``start`` is not what
        it must be.
      ValueError: If the exchange is unknown, needs an axis or cannot carry the
        compressor.
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"`{api}(compressor)` takes an `efopt.Compressor`, such as "
            f"`efopt.scaled_sign()`; got {compressor!r}."
        )
    axes = Axes.maybe(api, axis_name)
    checks.static_int(api, "start", start, least=0)
    way = table.read(api, exchange)
    if axes is None and way is not None:
        raise ValueError(
            f"`{api}(exchange={exchange!r})` needs `axis_name`: with "
            "`axis_name=None` there is one worker and nobody to meet."
        )
    if way is not None:
        reasons = [way.refusal(member) for member in compressor.codec.members()]
        if None not in reasons:
            raise ValueError(
                f"`{api}({compressor!r}, exchange={exchange!r})` cannot work: "
                f"{reasons[0]}."
            )
    stream = zlib.crc32(role.encode()) if role else 0
    label = f"`{api}({compressor!r})`"
    return Link(label, compressor.codec, way, axes, start, stream)


def _by_shard(state: Any, names: tuple[str, ...]) -> Any:
    """A codec's state of one leaf, of which every shard has its own."""
    if not names or not jax.tree.leaves(state):
        return state
    return PerWorker.wrap(state, Axes(names))


def _wrapped_as(like: Any, state: Any) -> Any:
    """One leaf's state, wrapped as it came."""
    if not node.is_node(like):
        return state
    marked = PerWorker.wrap(state, Axes.of("link", like.axis_name), None, like.shards)
    return dataclasses.replace(marked, remake=like.remake)


def _at(turn: Turn, level: Axes, axes: Axes) -> Turn:
    """The turn of a worker as its exchange counts them."""
    if level == axes:
        return turn
    return turn._replace(worker=level.index().astype(jnp.uint32))


def _and_rounding(mean: Message, rest: jax.Array) -> jax.Array:
    """What is lost, and what the average loses when it is applied in a leaf's dtype."""
    if mean.blocks.dtype == rest.dtype:
        return rest
    average = mean.decode()
    return rest + (average - bits.round_to(average, mean.blocks.dtype))


def _decoded_last(
    layout: Layout,
    means: Sequence[Message],
    rests: Sequence[jax.Array],
    kept: Sequence[Any],
) -> list[jax.Array]:
    """The averages, each in the place of what was lost, once that is kept."""
    averages = []
    for b, mean, x in zip(layout.buckets, means, rests, strict=True):
        zeros = zeros_after(jax.tree.leaves(kept[b.leaves[0]])[0], x)
        zeros = vary(zeros, *varying(jax.tree.leaves(mean.payload)[0]))
        averages.append(mean.decode_in(zeros))
    return averages


def _check_single(api: str, updates: Any) -> None:
    if node.is_node(updates):
        raise ValueError(
            f"{api} has `axis_name=None`, a single worker, and the gradients are "
            f"stacked over {updates.axis_name!r}: pass "
            f"`axis_name={updates.axis_name!r}`."
        )


def _check_like(api, paths, treedef, like):
    expected = jax.tree.structure(like)
    if treedef != expected:
        raise ValueError(
            f"{api} got updates of another structure than the parameters given to "
            f"`init`:\n  got      {treedef}\n  expected {expected}"
        )
    for (path, x), e in zip(paths, jax.tree.leaves(like), strict=True):
        if jnp.shape(x) != e.shape:
            raise ValueError(
                f"{api} got updates of shape {jnp.shape(x)} at "
                f"{jax.tree_util.keystr(path) or 'the root'}, where `init` saw "
                f"{e.shape}."
            )
