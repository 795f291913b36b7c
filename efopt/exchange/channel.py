"""A compressor, an exchange and an axis: what a feedback scheme talks through."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.compressors.base import Codec, Turn
from efopt.compressors.compressor import (
    Compressor,
    check_float,
    flatten_memory,
    init_memory,
)
from efopt.compressors.conversation import alone, converse
from efopt.exchange.all_gather import AllGather
from efopt.exchange.all_reduce import AllReduce
from efopt.exchange.base import Exchange
from efopt.exchange.groups import range_size, server_shapes
from efopt.exchange.two_phase import MajorityVote, TwoPhase
from efopt.workers import axis
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
      exchange: How workers meet; ``None`` when alone.
      axis_name: The mapped axis of the workers, or ``None``.
    """

    api: str
    codec: Codec
    exchange: Exchange | None
    axis_name: str | None

    def init(self, params: Any) -> tuple[Any, Any]:
        """The codec's memory and the server residual for a tree of parameters."""
        memory = init_memory(self.codec, params, self.api)
        if self.exchange is None or not self.exchange.keeps:
            return memory, ()
        leaves = jax.tree.leaves(params)
        if not leaves:  # a placeholder of `optax.tree.map_params`: stand in for params
            return memory, params
        assert self.axis_name is not None
        shapes = [tuple(jnp.shape(x)) for x in leaves]
        dtypes = [jnp.result_type(x) for x in leaves]
        n = lax.axis_size(self.axis_name) if axis.is_bound(self.axis_name) else 1
        server = []
        for (blocks, *block), dtype in server_shapes(self.codec, shapes, dtypes):
            zeros = jnp.zeros((range_size(blocks, n), *block), dtype)
            server.append(PerWorker.wrap(zeros, self.axis_name, blocks))
        return memory, tuple(server)

    def average(
        self,
        treedef: Any,
        arrays: Sequence[jax.Array],
        dtypes: Sequence[np.dtype],
        memory: Any,
        server: Any,
        count: jax.Array,
        ratio: jax.Array | None = None,
    ) -> tuple[list[jax.Array], list[jax.Array], Any, Any]:
        """Averages one array per leaf over the workers.

        Args:
          treedef: The structure of the updates.
          arrays: One array per leaf, in the compute dtype.
          dtypes: The leaves' own dtypes.
          memory: As returned by :meth:`init`.
          server: As returned by :meth:`init`, or by this method.
          count: The step, equal on all workers.
          ratio: Factor on the server residual before it is added, or ``None``.

        Returns:
          The averages (equal on all workers), what this worker has paid of its arrays,
          the new memory, and the new server residual.
        """
        memories = flatten_memory(self.codec, treedef, memory)
        step = count.astype(jnp.uint32)
        if self.exchange is None or self.axis_name is None:
            turn = Turn(step, jnp.uint32(0))
            averages, paid, memories = converse(
                self.codec, arrays, dtypes, memories, turn, alone
            )
            return averages, paid, self._memory(treedef, memories), server

        name, exchange = self.axis_name, self.exchange
        turn = Turn(step, lax.axis_index(name).astype(jnp.uint32))
        owed = self._owed(server, lax.axis_size(name), ratio)

        def meet(messages):
            nonlocal owed
            means, owed = exchange.meet(messages, name, owed)
            return means

        averages, paid, memories = converse(
            self.codec, arrays, dtypes, memories, turn, meet
        )
        if exchange.pays_average:
            paid = averages
        if exchange.keeps:
            pairs = zip(owed, server, strict=True)
            server = tuple(PerWorker.wrap(x, name, s.split) for x, s in pairs)
        return averages, paid, self._memory(treedef, memories), server

    def _memory(self, treedef, memories):
        return treedef.unflatten(memories) if self.codec.stateful else ()

    def _owed(self, server, num_workers, ratio):
        owed = []
        for node in server:
            extent = range_size(node.split, num_workers)
            x = node.local(self.api, extent)
            owed.append(x if ratio is None else x * ratio.astype(x.dtype))
        return tuple(owed)


def open_channel(
    api: str, compressor: Any, axis_name: str | None, exchange: str | None
) -> Channel:
    """Checks the options that every transformation around a compressor shares."""
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"`{api}(compressor)` takes an `efopt.Compressor`, such as "
            f"`efopt.scaled_sign()`; got {compressor!r}."
        )
    axis.check_axis_name(api, axis_name)
    codec, label = compressor.codec, f"`{api}({compressor!r})`"
    if axis_name is None:
        if exchange is not None:
            raise ValueError(
                f"`{api}(exchange={exchange!r})` needs `axis_name`: with "
                "`axis_name=None` there is one worker and nobody to meet."
            )
        return Channel(label, codec, None, None)
    name = codec.default_exchange if exchange is None else exchange
    if name not in EXCHANGES:
        raise ValueError(
            f"`{api}(exchange=...)` must be one of {', '.join(map(repr, EXCHANGES))} or "
            f"None for the compressor's own, got {exchange!r}."
        )
    reason = EXCHANGES[name].refusal(codec)
    if reason is not None:
        raise ValueError(
            f"`{api}({compressor!r}, exchange={name!r})` cannot work: {reason}."
        )
    return Channel(label, codec, EXCHANGES[name], axis_name)


def open_updates(
    channel: Channel, updates: Any, like: Any = None
) -> tuple[Any, list[jax.Array], list[np.dtype]]:
    """Checks updates on their way in: the structure, the arrays, their dtypes.

    Args:
      channel: The channel they are for.
      updates: The updates of this worker.
      like: A tree of arrays with the structure and shapes that they must have.
    """
    if channel.axis_name is not None:
        axis.require_bound(channel.api.strip("`"), channel.axis_name)
    paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
    if like is not None:
        _check_like(channel.api, paths, treedef, like)
    dtypes = [check_float(path, x, channel.api) for path, x in paths]
    arrays = [jnp.asarray(x) for _, x in paths]
    if channel.axis_name is not None and axis.is_typed(channel.axis_name):
        for (path, _), x in zip(paths, arrays, strict=True):
            if channel.axis_name not in axis.varying(x):
                raise ValueError(
                    f"{channel.api} got updates that are already equal on all workers "
                    f"along {channel.axis_name!r}, at "
                    f"{jax.tree_util.keystr(path) or 'the root'}: there is nothing left "
                    "to compress. Inside `jax.shard_map`, `jax.grad` sums over workers "
                    "when parameters are replicated; differentiate with respect to "
                    f"`efopt.local_params(params, {channel.axis_name!r})`."
                )
    return treedef, arrays, dtypes


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
