"""Compressed reduce-scatter and all-gather: two-way compression."""

import dataclasses
from typing import ClassVar

import jax

from efopt.codecs.codec import Message
from efopt.exchanges import carrier
from efopt.exchanges.exchange import Exchange, decode_mean
from efopt.exchanges.groups import group, owner_turn


@dataclasses.dataclass(frozen=True, repr=False)
class TwoPhase(Exchange):
    """Workers own ranges of blocks; each averages its range and compresses it again."""

    name: ClassVar[str] = "two_phase"
    keeps: ClassVar[bool] = True

    def refusal(self, codec):
        if codec.block_size is not None:
            return None
        cure = f'use exchange="{"all_reduce" if codec.linear else "all_gather"}"'
        if "block_size" in {f.name for f in dataclasses.fields(codec)}:
            cure = f"give it a `block_size` or {cure}"
        return f"it sends whole leaves, which cannot be split over workers; {cure}"

    def meet(self, messages, axes, server):
        n, my = axes.size(), axes.index()
        groups = group(messages, n)
        payloads = [g.whole.payload for g in groups]
        arrived = axes.all_to_all(carrier.pack(payloads, n))

        owned = [g.owned(my) for g in groups]
        mine = [_structs(p, n) for p in payloads]
        parts = [
            Message(g.whole.codec, p, blocks, g.whole.turn)
            for g, p, blocks in zip(groups, mine, owned, strict=True)
        ]
        # 1905.10936 Algorithm 2, the server: s = mean of C(p_i) + ratio e, then C(s)
        means = decode_mean(arrived, parts)
        if self.keeps:
            means = [m + e for m, e in zip(means, server, strict=True)]
        replies = []
        for g, mean, blocks in zip(groups, means, owned, strict=True):
            turn = owner_turn(g.whole.turn, n)
            replies.append(g.whole.codec.write(mean, blocks, turn))
        if self.keeps:
            pairs = zip(means, replies, strict=True)
            server = tuple(reply.rest(mean) for mean, reply in pairs)

        carriers = axes.all_gather(carrier.pack([r.payload for r in replies], 1)[0])
        gathered = carrier.unpack(carriers, mine, 1)
        answers: dict[int, Message] = {}
        for g, payload in zip(groups, gathered, strict=True):
            answers.update(zip(g.places, g.part(payload), strict=True))
        return [answers[i].once() for i in range(len(messages))], server


def two_phase() -> Exchange:
    """Compressed reduce-scatter and all-gather, with a residual at the owners' end.

    ``all_to_all`` brings every worker all payloads of the range of blocks that it owns.
    It averages them, adds what it still owes (its server residual), compresses the sum,
    keeps the new error, and ``all_gather`` brings its payload to everybody: two-way, or
    bidirectional, compression. ``b`` bytes of payload are ``2 (n - 1) / n b`` link
    bytes a worker, however many workers there are. For compressors with a
    ``block_size``.

    Returns:
      An :class:`efopt.exchanges.Exchange`.

    Examples:
      >>> import efopt
      >>> tx = efopt.error_feedback(
      ...     efopt.scaled_sign(1024), axis_name="data",
      ...     exchange=efopt.exchanges.two_phase())

    References:
      Zheng et al, `Communication-Efficient Distributed Blockwise Momentum SGD with
      Error-Feedback <https://arxiv.org/abs/1905.10936>`_, 2019 (Algorithm 2)
      Tang et al, `DoubleSqueeze <https://arxiv.org/abs/1905.05957>`_, 2019
    """
    return TwoPhase()


def _structs(payload, num_workers):
    """One worker's range of a group's payload, as structs."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (x.shape[0] // num_workers, *x.shape[1:]), x.dtype
        ),
        payload,
    )
