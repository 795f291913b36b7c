"""The link: a compressor, an exchange and axes, through which trees are averaged.

A scheme opens one and sees trees alone; blocks, buckets, messages, the codec's state
and the owners' residuals stay behind it.
"""

import dataclasses
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
from efopt.exchanges import table
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.groups import group_key, server_shapes
from efopt.ground import bits, checks
from efopt.ground.barriers import zeros_after
from efopt.ground.dtypes import check_float, compute_dtype, wide_zeros
from efopt.workers import node
from efopt.workers.axes import Axes
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
    """

    codec: Any
    server: Any


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
        if self.axes is None or not keeps:
            return LinkState(states, ())
        if not jax.tree.leaves(params):
            # A placeholder of `optax.tree.map_params`: stand in for params.
            return LinkState(states, params)
        n = self.axes.size() if self.axes.bound() else 1
        server = []
        for (blocks, *block), dtype in self._server_shapes(self._layout(params)):
            zeros = jnp.zeros((range_size(blocks, n), *block), dtype)
            server.append(PerWorker.wrap(zeros, self.axes, blocks))
        return LinkState(states, tuple(server))

    def zeros(self, params: Any) -> Any:
        """A residual of zero, one worker's, in the compute dtypes."""
        return wide_zeros(params)

    def wrap(self, tree: Any) -> Any:
        """Marks what is this worker's own, if there are several workers."""
        return node.wrap(tree, self.axes)

    def unwrap(self, value: Any) -> Any:
        """Inverse of :meth:`wrap`, inside the mapped function."""
        return node.unwrap(self.api, value)

    # ------------------------------------------------------------------------ routing

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
            single = ", or pass `axis_name=None` for a single worker"
            self.axes.require_bound(self.api, single)
        paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        if like is not None:
            _check_like(self.api, paths, treedef, like)
        for path, x in paths:
            check_float(path, x, self.api)
        if self.axes is not None:
            self.axes.require_local(self.api, updates)
        return treedef.unflatten([jnp.asarray(x) for _, x in paths])

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
        layout = self._layout(tree if like is None else like)
        states = open_states(layout, treedef, state.codec)
        xs, turn = layout.join(arrays), self.turn(count)
        if self.axes is None:
            turns = [turn] * len(xs)
            means, rests, states = converse(layout, xs, states, turns, alone)
            server = ()
        else:
            means, rests, states, server = self._meet(
                layout, xs, states, turn, state.server, ratio
            )
        if not wide:
            rests = [_and_rounding(m, r) for m, r in zip(means, rests, strict=True)]
        wides = [jax.ShapeDtypeStruct(x.shape, compute_dtype(x.dtype)) for x in given]
        lost: Any = treedef.unflatten(layout.part(rests, wides))
        if keep is None:
            decoded = [mean.decode() for mean in means]
        else:
            lost = keep(lost)
            decoded = _decoded_last(layout, means, rests, treedef.flatten_up_to(lost))
        if not wide:
            pairs = zip(decoded, layout.buckets, strict=True)
            decoded = [bits.cast(x, b.dtype) for x, b in pairs]
        mean = treedef.unflatten(layout.part(decoded, wides if wide else given))
        states = close_states(layout, treedef, states, state.codec)
        return Averaged(mean, lost, LinkState(states, server))

    def dense_first(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """``update_fn`` of a scheme, with the first updates averaged uncompressed.

        Until then nothing is owed and nothing learned: of the state, which has a field
        ``count``, that alone moves on.
        """
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

    def _meet(self, layout, xs, states, turn, server, ratio):
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
            for way in dict.fromkeys(ways):
                numbers = [i for i in messages if ways[i] == way]
                if not numbers:
                    continue
                asked = [messages[i] for i in numbers]
                given = owed if way.keeps else ()
                got, left = way.meet(asked, way.level(axes), given)
                means.update(zip(numbers, got, strict=True))
                owed = left if way.keeps else owed
            return means

        means, rests, states = converse(layout, xs, states, turns, meet)
        rests = [
            x - mean.decode() if way.pays_average else rest
            for way, x, mean, rest in zip(ways, xs, means, rests, strict=True)
        ]
        pairs = zip(owed, server, strict=True)
        server = tuple(PerWorker.wrap(x, axes, s.split) for x, s in pairs)
        return means, rests, states, server

    def _owed(self, layout, server, ratio):
        """What this worker owes as an owner, one array per group of blocks."""
        assert self.axes is not None
        shapes = [shape for shape, _ in self._server_shapes(layout)]
        known = [(own.split, *jnp.shape(own.value)[2:]) for own in server]
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
        averages.append(mean.decode_in(zeros))
    return averages


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
