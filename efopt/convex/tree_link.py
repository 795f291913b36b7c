"""The link with trees in and trees out, over today's channel of buckets.

It has the names and the meaning of `efopt.exchanges.link.open_link`, which takes its
place: then this file goes, and nothing changes for who calls it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efopt.codecs.codec import compute_dtype
from efopt.exchanges.link import Channel, open_channel
from efopt.workers import node


class Averaged(NamedTuple):
    """What a round over the link brought.

    Attributes:
      mean: The average, equal on all workers.
      lost: What this worker's message did not say.
      state: The link's new state.
    """

    mean: Any
    lost: Any
    state: Any


@dataclasses.dataclass(frozen=True)
class Link:
    """A compressor, an exchange and an axis."""

    channel: Channel

    def init(self, params: Any) -> Any:
        return self.channel.init(params)

    def codecs(self, tree: Any) -> list[Any]:
        return self.channel.codec.assign(tree)

    def routes(self, tree: Any) -> list[Any]:
        return [self.channel.route(codec) for codec in self.codecs(tree)]

    def receive(self, updates: Any, like: Any = None) -> Any:
        self.channel.receive(updates, jnp.zeros([], jnp.int32), like)
        return jax.tree.map(jnp.asarray, updates)

    def average(self, tree: Any, state: Any, count: Any, like: Any) -> Averaged:
        channel, (memory, server) = self.channel, state
        inbound = channel.receive(like, count)
        said = inbound.join(jax.tree.leaves(tree))
        means, rests, *state = channel.average(inbound, said, memory, server)
        wide = jax.tree.leaves(tree)
        mean = inbound.part([m.decode() for m in means], wide)
        return Averaged(mean, inbound.part(rests, wide), tuple(state))

    def wrap(self, tree: Any) -> Any:
        return node.wrap(tree, self.channel.axis_name)

    def unwrap(self, tree: Any) -> Any:
        return node.unwrap(self.channel.api, tree)

    def zeros(self, params: Any) -> Any:
        def zeros(p):
            return jnp.zeros(jnp.shape(p), compute_dtype(jnp.result_type(p)))

        return jax.tree.map(zeros, params)


def open_link(api: str, compressor: Any, axis_name: Any, exchange: Any) -> Link:
    return Link(open_channel(api, compressor, axis_name, exchange))
