"""The link: a compressor, an exchange and axes, through which trees are averaged.

A scheme opens one and sees trees alone; blocks, buckets, messages, the codec's state
and the owners' residuals stay behind it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Codec, Message
from efopt.codecs.layout import Bucket, Layout, lay_out
from efopt.codecs.states import init_states, is_placeholder
from efopt.exchanges import entrances, in_flight, incoming, owners, table, watched
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.home import Home, LinkState
from efopt.exchanges.meeting import meet, round_trip
from efopt.exchanges.packing import Packing
from efopt.exchanges.pieces import Cut, scatter, spare_axes
from efopt.exchanges.trip import Back, Kept, Trip
from efopt.ground import bits
from efopt.ground.barriers import zeros_after
from efopt.ground.dtypes import check_float, wide_zeros
from efopt.workers import node
from efopt.workers.axes import Axes, vary, varying
from efopt.workers.node import PerWorker


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
      delay: Steps that a payload waits before it is exchanged, 0 or 1.
      workers: All axes along which updates differ; ``axes`` are those of them over
        which they are compressed.
    """

    api: str
    codec: Codec
    exchange: Exchange | None
    axes: Axes | None
    start: int = 0
    stream: int = 0
    delay: int = 0
    workers: Axes | None = None

    @property
    def fast(self) -> tuple[str, ...]:
        """The axes over which updates are averaged as they are, before anything."""
        if self.axes is None or self.workers is None:
            return ()
        return tuple(n for n in self.workers.names if n not in self.axes.names)

    # ------------------------------------------------------------------------- state

    def init(self, params: Any) -> LinkState:
        """The state for a tree of parameters, arrays or structs."""
        states = init_states(self.codec, params, self.api)
        keeps = self.axes is not None and self.keeps()
        seen = watched.fresh(len(jax.tree.leaves(params)), keeps)
        home = () if self.axes is None else Home.of(self, params)
        if is_placeholder(params):
            mark = jnp.zeros([])
            if self.axes is not None:
                mark = PerWorker.wrap(mark, self.axes)
            flight = in_flight.InFlight(mark, jnp.zeros([])) if self.delay else ()
            return LinkState(states, mark if keeps else (), home, seen, flight)
        server, flight = (), ()
        if keeps:
            assert self.axes is not None
            server = owners.fresh(self.kept(self.layout(params)), self.axes)
        if self.delay:
            flight = self.flight(self.layout(params))
        return LinkState(states, server, home, seen, flight)

    def flight(self, layout: Layout, shards: tuple[str, ...] = ()) -> Any:
        """Nothing in flight, for what one device holds.

        Args:
          layout: What its buckets are.
          shards: The mesh axes behind each worker, if every shard has its own.
        """
        return in_flight.fresh(layout, self.axes, shards)

    def zeros(self, params: Any) -> Any:
        """A residual of zero, one worker's, in the compute dtypes."""
        return wide_zeros(params)

    def wrap(self, tree: Any, like: Any = None, *, rule: str | None = None) -> Any:
        """Marks what is this worker's own, if there are several workers.

        Args:
          tree: A tree of arrays.
          like: Where it takes the place of another: the marked tree it was unwrapped
            from.
          rule: Else, what becomes of it on another number of workers: ``"mean"`` keeps
            the workers' mean; ``None``: nobody knows (see :class:`efopt.PerWorker`).
        """
        if like is None or self.axes is None:
            marked = node.wrap(tree, self.axes, rule)
            if self.fast and not is_placeholder(tree):
                marked = dataclasses.replace(marked, home=Home.of(self, tree))
            return marked
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
        return [self.route(codec) for codec in self.codec.assign(tree)]

    def route(self, codec: Codec) -> Exchange:
        """The exchange that carries what a codec writes."""
        if self.exchange is not None and self.exchange.refusal(codec) is None:
            return self.exchange
        return table.default(codec)

    # ------------------------------------------------------------------------- a trip

    def receive(self, updates: Any, like: Any = None) -> Any:
        """Updates on their way in, as arrays, or an error.

        Args:
          updates: The updates of this worker.
          like: A tree of arrays of this worker, whose structure and shapes they must
            have.
        """
        if self.axes is not None:
            self.require_bound()
        paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        if like is not None:
            incoming.check_like(self.api, paths, treedef, like)
        for path, x in paths:
            check_float(path, x, self.api)
        if self.axes is not None:
            self.axes.require_local(self.api, updates)
            if like is not None:
                incoming.require_kept(self.api, self.axes, paths, like)
        return treedef.unflatten([jnp.asarray(x) for _, x in paths])

    def require_bound(self) -> None:
        """Raises unless the axes are mapped here."""
        axes = self.workers
        assert axes is not None
        cure = "; or pass `axis_name=None` for a single worker"
        axes.require_bound(self.api, cure)

    def turn(self, count: jax.Array) -> Turn:
        """The step, and this worker, for what draws random numbers."""
        worker = jnp.uint32(0) if self.axes is None else self.axes.index()
        return Turn(count.astype(jnp.uint32), worker.astype(jnp.uint32), self.stream)

    def scatter(self, updates: Any, home: Home) -> Any:
        """This device's pieces of the mean over the fast axes, if there are any.

        Args:
          updates: The updates of this worker.
          home: That of a state which is placed.
        """
        if not self.fast or self.workers is None:
            return updates
        self.workers.require_local(self.api, updates)
        arrays, treedef = jax.tree.flatten(updates)
        arrays = scatter(home.cuts(), list(map(jnp.asarray, arrays)), self.fast)
        return treedef.unflatten(arrays)

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
        like = tree if like is None else like
        packing, pieces = self.packed(tree, like, state.home)
        layout, learned = packing.layout, self.unwrap(state.codec)
        trip = Trip(
            api=self.api,
            axes=self.axes,
            layout=layout,
            ways=[self.route(b.codec) for b in layout.buckets],
            xs=layout.join(pieces),
            turn=self.turn(count),
            ratio=ratio,
            valid=packing.valid(),
        )
        before = Kept(packing.open_states(learned), state.server, state.flight)
        means, rests, kept = self._way()(trip, before)
        if not wide:
            rests = [_and_rounding(m, r) for m, r in zip(means, rests, strict=True)]
        seen = state.watched
        if seen != ():
            seen = watched.seen(seen, trip, packing.pieces(like), rests, state.server)
        lost = packing.own(rests)
        if keep is None:
            decoded = [mean.decode() for mean in means]
        else:
            lost = keep(lost)
            in_place_of = packing.treedef.flatten_up_to(lost)
            decoded = _decoded_last(layout, means, rests, in_place_of)
        if not wide:
            pairs = zip(decoded, layout.buckets, strict=True)
            decoded = [bits.cast(x, b.dtype) for x, b in pairs]
        mean = packing.whole(decoded, wide=wide)
        states = packing.close_states(kept.states, learned)
        states = jax.tree.map(_wrapped_as, state.codec, states, is_leaf=node.is_node)
        new = LinkState(states, kept.server, state.home, seen, kept.flight)
        return Averaged(mean, lost, new)

    def _way(self) -> Callable[[Trip, Kept], Back]:
        """How what is said comes back averaged: later, at once, or from nobody."""
        if self.delay:
            return in_flight.meet_later
        return round_trip if self.axes is None else meet

    def entrance(
        self, update: Callable[..., Any], own: bool = False
    ) -> Callable[..., Any]:
        """``update_fn`` of a scheme, from wherever it is called.

        Args:
          update: The function, of updates, state, parameters and extra arguments.
          own: Whether what comes out is each worker's own still.
        """
        return entrances.entrance(self, update, own)

    # ------------------------------------------------------------------------ inside

    def keeps(self) -> bool:
        """Whether owners may keep a server residual."""
        return any(self.route(c).keeps for c in self.codec.members())

    def kept(self, layout: Layout) -> list[Bucket]:
        """The buckets whose owners keep a server residual."""
        return [b for b in layout.buckets if self.route(b.codec).keeps]

    def packed(
        self, tree: Any, like: Any, home: Any
    ) -> tuple[Packing, list[jax.Array]]:
        """How a tree is packed whose updates are ``like``, and this device's pieces."""
        arrays, treedef = jax.tree.flatten(tree)
        codecs = self._codecs(like, home)
        cuts = self._cuts(arrays, codecs, home)
        pieces = [cut.take(x) for cut, x in zip(cuts, arrays, strict=True)]
        shapes, kinds = [cut.piece for cut in cuts], [varying(x) for x in pieces]
        dtypes = [x.dtype for x in jax.tree.leaves(like)]
        layout = lay_out(codecs, shapes, dtypes, kinds)
        return Packing(treedef, cuts, dtypes, layout), pieces

    def _codecs(self, tree: Any, home: Any) -> list[Codec]:
        """The codec of each leaf: on a mesh as its home knows them."""
        if home == () or not home.inner:
            return self.codec.assign(tree)
        shapes = [[x.shape for x in jax.tree.leaves(t)] for t in (tree, home.pieces())]
        if shapes[0] != shapes[1]:  # sharded otherwise than the state was told
            return self.codec.assign(tree)
        return home.codecs()

    def _cuts(self, arrays: Any, codecs: Any, home: Any) -> list[Cut]:
        """How leaves are cut, those that arrive as pieces among them."""
        pairs = zip(arrays, codecs, strict=True)
        cuts = [self._cut(x, codec) for x, codec in pairs]
        if self.fast and home.specs is not None:
            known = zip(cuts, home.cuts(), strict=True)
            cuts = [of_home if of_home.kept else cut for cut, of_home in known]
        return cuts

    def _cut(self, x: jax.Array, codec: Codec) -> Cut:
        """How a leaf is cut; one that speaks in rounds is not."""
        names = ()
        if self.axes is not None and codec.one_message and x.size:
            names = spare_axes(x, self.axes)
        return Cut(x.shape, names, Axes(names).size() if names else 1)

    def layout(self, tree: Any) -> Layout:
        """What is packed together of a tree of whole leaves, arrays or structs."""
        leaves = jax.tree.leaves(tree)
        shapes = [jnp.shape(x) for x in leaves]
        dtypes = [jnp.result_type(x) for x in leaves]
        return lay_out(self.codec.assign(tree), shapes, dtypes)


def _wrapped_as(like: Any, state: Any) -> Any:
    """One leaf's state, wrapped as it came."""
    return like.rewrap(state) if node.is_node(like) else state


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
