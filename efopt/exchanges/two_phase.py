"""Reduce-scatter and all-gather, compressed both ways; and the vote, which is one."""

import dataclasses
from typing import ClassVar

import jax
from jax import lax

from efopt.codecs.codec import Message
from efopt.exchanges import carrier, exchange
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.groups import group, owner_turn


@dataclasses.dataclass(frozen=True)
class TwoPhase(Exchange):
    """Workers own ranges of blocks; each averages its range and compresses it again.

    ``all_to_all`` brings every owner all payloads of its range. It adds what it still
    owes (its server residual), compresses the sum, keeps the new error, and
    ``all_gather`` brings its payload to everybody. About two payloads leave each
    worker, however many workers there are.

    References:
      Zheng et al, `Communication-Efficient Distributed Blockwise Momentum SGD with
      Error-Feedback <https://arxiv.org/abs/1905.10936>`_, 2019 (Algorithm 2)
      Tang et al, `DoubleSqueeze <https://arxiv.org/abs/1905.05957>`_, 2019
    """

    name: ClassVar[str] = "two_phase"
    splits: ClassVar[bool] = True
    keeps: ClassVar[bool] = True

    def refusal(self, codec):
        if codec.block_size is None:
            cure = 'use exchange="' + codec.default_exchange + '"'
            if "block_size" in {f.name for f in dataclasses.fields(codec)}:
                cure = f"give it a `block_size` or {cure}"
            return f"it sends whole leaves, which cannot be split over workers; {cure}"
        return None

    def meet(self, messages, axis_name, server, dense):
        del dense
        n, my = lax.axis_size(axis_name), lax.axis_index(axis_name)
        groups = group(messages, n)
        payloads = [g.whole.payload for g in groups]
        words = carrier.pack(payloads, n)
        words = lax.all_to_all(words, axis_name, 0, 0, tiled=True)

        owned = [g.owned(my) for g in groups]
        mine = [_structs(p, n) for p in payloads]

        def decode(payloads):
            triples = zip(groups, payloads, owned, strict=True)
            return [
                Message(g.whole.codec, p, blocks, g.whole.turn).once().decode()
                for g, p, blocks in triples
            ]

        means = exchange.decode_mean(words, mine, decode)
        if self.keeps:
            means = [m + s for m, s in zip(means, server, strict=True)]
        replies = []
        for g, mean, blocks in zip(groups, means, owned, strict=True):
            turn = owner_turn(g.whole.turn, n)
            replies.append(g.whole.codec.write(mean, blocks, turn))
        if self.keeps:
            pairs = zip(means, replies, strict=True)
            server = tuple(reply.rest(mean) for mean, reply in pairs)

        words = carrier.pack([r.payload for r in replies], 1)[0]
        carriers = exchange.all_gather(words, axis_name)
        gathered = carrier.unpack(carriers, mine, 1)
        parts = [g.part(p) for g, p in zip(groups, gathered, strict=True)]
        by_message = {
            id(m): p
            for g, ps in zip(groups, parts, strict=True)
            for m, p in zip(g.messages, ps, strict=True)
        }
        return [by_message[id(m)].once() for m in messages], server


@dataclasses.dataclass(frozen=True)
class MajorityVote(TwoPhase):
    """Every worker sends signs and receives the sign of their sum: one bit each way.

    A tie, which an even number of workers allows, counts as +1, like a zero gradient.
    What a worker has paid is the vote, not its own sign, so error feedback around it
    stays conservative.

    References:
      Bernstein et al, `signSGD with Majority Vote is Communication Efficient And Fault
      Tolerant <https://arxiv.org/abs/1810.05291>`_, 2018 (Algorithm 1)
    """

    name: ClassVar[str] = "majority_vote"
    keeps: ClassVar[bool] = False
    pays_average: ClassVar[bool] = True

    def refusal(self, codec):
        if not codec.one_bit:
            return "a vote counts plain signs; use `efopt.sign()`"
        return super().refusal(codec)


def _structs(payload, num_workers):
    """One worker's range of a group's payload, as structs."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0] // num_workers, *x.shape[1:]), x.dtype
        ),
        payload,
    )
