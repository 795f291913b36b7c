"""A compressor, an exchange and an axis: what a feedback scheme talks through."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efopt.codecs.codec import Codec, Message, Turn, compute_dtype
from efopt.codecs.compressor import (
    Compressor,
    check_float,
    close_memory,
    init_memory,
    open_memory,
)
from efopt.codecs.conversation import alone, converse
from efopt.codecs.layout import Bucket, Layout, plan
from efopt.compressors.identity import Identity
from efopt.exchanges.all_gather import AllGather
from efopt.exchanges.all_reduce import AllReduce
from efopt.exchanges.exchange import Exchange, all_gather
from efopt.exchanges.groups import group_key, range_size, server_shapes
from efopt.exchanges.two_phase import MajorityVote, TwoPhase
from efopt.workers import axes
from efopt.workers.node import PerWorker

EXCHANGES: dict[str, Exchange] = {
    e.name: e for e in (AllReduce(), AllGather(), TwoPhase(), MajorityVote())
}


@dataclasses.dataclass(frozen=True)
class Channel:
    """Averages arrays over workers; alone (``axis_name=None``) it is a round trip.

    Attributes:
      api: The transformation that opened it, for errors.
      codec: How an array is written.
      exchange: How workers meet, where it can carry a leaf's codec; ``None``, or where
        it cannot: the codec's own way.
      axis_name: The mapped axis of the workers, or ``None``.
    """

    api: str
    codec: Codec
    exchange: Exchange | None
    axis_name: str | None

    def route(self, codec: Codec) -> Exchange:
        """How messages of ``codec`` travel."""
        if self.exchange is not None and self.exchange.refusal(codec) is None:
            return self.exchange
        return EXCHANGES[codec.default_exchange]

    def _kept(self, layout: Layout) -> list[Bucket]:
        """The buckets whose owners keep a server residual."""
        return [b for b in layout.buckets if self.route(b.codec).keeps]

    def init(self, params: Any) -> tuple[Any, Any]:
        """The codec's memory and the server residual for a tree of parameters."""
        memory = init_memory(self.codec, params, self.api)
        keeps = any(self.route(c).keeps for c in self.codec.members())
        if self.axis_name is None or not keeps:
            return memory, ()
        leaves = jax.tree.leaves(params)
        if not leaves:  # a placeholder of `optax.tree.map_params`: stand in for params
            return memory, params
        shapes = [jnp.shape(x) for x in leaves]
        dtypes = [jnp.result_type(x) for x in leaves]
        layout = plan(self.codec.assign(params), shapes, dtypes)
        n = lax.axis_size(self.axis_name) if axes.is_bound(self.axis_name) else 1
        server = []
        for (blocks, *block), dtype in server_shapes(self._kept(layout)):
            zeros = jnp.zeros((range_size(blocks, n), *block), dtype)
            server.append(PerWorker.wrap(zeros, self.axis_name, blocks))
        return memory, tuple(server)

    def receive(self, updates: Any, count: jax.Array, like: Any = None) -> "Inbound":
        """Checks updates on their way in, and lays them out in buckets.

        Args:
          updates: The updates of this worker.
          count: The step, equal on all workers.
          like: A tree of arrays with the structure and shapes that they must have.
        """
        if self.axis_name is not None:
            alone = ", or pass `axis_name=None` for a single worker"
            axes.require_bound(self.api, self.axis_name, alone)
        paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        if like is not None:
            _check_like(self.api, paths, treedef, like)
        dtypes = [check_float(path, x, self.api) for path, x in paths]
        arrays = [jnp.asarray(x) for _, x in paths]
        if self.axis_name is not None:
            axes.require_local(self.api, self.axis_name, updates)
        worker = jnp.uint32(0)
        if self.axis_name is not None:
            worker = lax.axis_index(self.axis_name).astype(jnp.uint32)
        turn = Turn(count.astype(jnp.uint32), worker)
        codecs = self.codec.assign(updates)
        layout = plan(codecs, [x.shape for x in arrays], dtypes)
        return Inbound(treedef, arrays, layout, turn)

    def average(
        self,
        inbound: "Inbound",
        xs: Sequence[jax.Array],
        memory: Any,
        server: Any,
        ratio: jax.Array | None = None,
    ) -> tuple[list[Message], list[jax.Array], Any, Any]:
        """Averages one array per bucket over the workers.

        Args:
          inbound: What :meth:`receive` returned for this step's updates.
          xs: One array per bucket, ``(n, *block)``, in the compute dtype.
          memory: As returned by :meth:`init`.
          server: As returned by :meth:`init`, or by this method.
          ratio: Factor on the server residual before it is added, or ``None``.

        Returns:
          Messages of the averages (equal on all workers), what this worker has not yet
          paid of its arrays, the new memory, and the new server residual.
        """
        layout, treedef, name = inbound.layout, inbound.treedef, self.axis_name
        memories = open_memory(layout, treedef, memory)
        if name is None:
            averages, rests, memories = converse(
                layout, xs, memories, inbound.turn, alone
            )
            return averages, rests, close_memory(layout, treedef, memories, memory), ()

        routes = [self.route(b.codec) for b in layout.buckets]
        dense = all(isinstance(b.codec, Identity) for b in layout.buckets)
        owed = self._owed(layout, server, lax.axis_size(name), ratio)

        def meet(messages: dict[int, Message]) -> dict[int, Message]:
            nonlocal owed
            ways: dict[Exchange, list[int]] = {}
            for i, message in messages.items():
                # A conversation may ask through another codec than the bucket's own.
                way = routes[i]
                if way.refusal(message.codec) is not None:
                    way = EXCHANGES[message.codec.default_exchange]
                ways.setdefault(way, []).append(i)
            means = {}
            for way, numbers in ways.items():
                asked = [messages[i] for i in numbers]
                got, left = way.meet(asked, name, owed if way.keeps else (), dense)
                means.update(zip(numbers, got, strict=True))
                owed = left if way.keeps else owed
            return means

        averages, rests, memories = converse(layout, xs, memories, inbound.turn, meet)
        memory = close_memory(layout, treedef, memories, memory)
        rests = [
            x - average.decode() if way.pays_average else rest
            for way, x, average, rest in zip(routes, xs, averages, rests, strict=True)
        ]
        if owed:
            pairs = zip(owed, server, strict=True)
            server = tuple(PerWorker.wrap(x, s.axis_name, s.split) for x, s in pairs)
        return averages, rests, memory, server

    def owed_by_owners(self, params: Any, server: Any) -> list[jax.Array]:
        """What the owners still owe of each leaf, whole.

        Args:
          params: The parameters given to :meth:`init`, or their structs.
          server: The server residual, laid out in any way; inside the mapped function
            it is gathered.
        """
        leaves = jax.tree.leaves(params)
        shapes = [jnp.shape(x) for x in leaves]
        dtypes = [jnp.result_type(x) for x in leaves]
        layout = plan(self.codec.assign(params), shapes, dtypes)
        kept = self._kept(layout)
        wholes = {}
        for node, key in zip(server, dict.fromkeys(map(group_key, kept)), strict=True):
            x = node.value
            if axes.is_bound(node.axis_name):
                x = all_gather(node.local(self.api), node.axis_name)
            wholes[key] = x.reshape(-1, *key[1])[: node.split]
        xs, ends = [], dict.fromkeys(wholes, 0)
        for b in layout.buckets:
            if b not in kept:
                xs.append(jnp.zeros(b.shape, compute_dtype(b.dtype)))
                continue
            key = group_key(b)
            start, ends[key] = ends[key], ends[key] + b.shape[0]
            xs.append(wholes[key][start : ends[key]])
        zeros = [jnp.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True)]
        return layout.part(xs, jnp.uint32(0), zeros)

    def _owed(self, layout, server, num_workers, ratio):
        shapes = [shape for shape, _ in server_shapes(self._kept(layout))]
        known = [(node.split, *jnp.shape(node.value)[2:]) for node in server]
        if known != shapes:
            raise ValueError(
                f"{self.api} keeps a server residual for the blocks that `init` saw, "
                f"{known}, and the updates make {shapes} (blocks, block size). Updates "
                "must have the structure and shapes of the parameters given to `init`, "
                'and under `exchange="two_phase"` these cannot be sharded over another '
                "mesh axis: use another exchange there."
            )
        owed = []
        for node in server:
            x = node.local(self.api, range_size(node.split, num_workers))
            owed.append(x if ratio is None else x * ratio.astype(x.dtype))
        return tuple(owed)


@dataclasses.dataclass(frozen=True)
class Inbound:
    """One step's updates, checked, with their layout.

    Attributes:
      treedef: Their structure.
      arrays: Their leaves.
      layout: How the leaves are cut into buckets.
      turn: The step and this worker.
    """

    treedef: Any
    arrays: list[jax.Array]
    layout: Layout
    turn: Turn

    def join(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """One array per leaf to one per bucket, in the compute dtype."""
        xs = self.layout.join(leaves, self.turn.step)
        buckets = self.layout.buckets
        pairs = zip(xs, buckets, strict=True)
        return [x.astype(compute_dtype(b.dtype)) for x, b in pairs]

    def part(self, xs: Sequence[jax.Array], like: Sequence[jax.Array]) -> Any:
        """One array per bucket to a tree of the updates' structure."""
        return self.treedef.unflatten(self.layout.part(xs, self.turn.step, like))


def open_channel(
    api: str, compressor: Any, axis_name: str | None, exchange: str | None
) -> Channel:
    """Checks the options that every transformation around a compressor shares."""
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"`{api}(compressor)` takes an `efopt.Compressor`, such as "
            f"`efopt.scaled_sign()`; got {compressor!r}."
        )
    axes.check_axis_name(api, axis_name)
    codec, label = compressor.codec, f"`{api}({compressor!r})`"
    if axis_name is None:
        if exchange is not None:
            raise ValueError(
                f"`{api}(exchange={exchange!r})` needs `axis_name`: with "
                "`axis_name=None` there is one worker and nobody to meet."
            )
        return Channel(label, codec, None, None)
    if exchange is None:
        return Channel(label, codec, None, axis_name)
    if not isinstance(exchange, str) or exchange not in EXCHANGES:
        raise ValueError(
            f"`{api}(exchange=...)` must be one of {', '.join(map(repr, EXCHANGES))} "
            f"or None for the compressor's own, got {exchange!r}."
        )
    way = EXCHANGES[exchange]
    reasons = [way.refusal(member) for member in codec.members()]
    if None not in reasons:
        raise ValueError(
            f"`{api}({compressor!r}, exchange={exchange!r})` cannot work: {reasons[0]}."
        )
    return Channel(label, codec, way, axis_name)


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
