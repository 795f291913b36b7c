"""The exchanges by name, and which one suits a codec."""

from typing import Any

from efopt.codecs.codec import Codec
from efopt.exchanges.all_gather import AllGather
from efopt.exchanges.all_reduce import AllReduce
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.majority_vote import MajorityVote
from efopt.exchanges.two_phase import TwoPhase

EXCHANGES: dict[str, Exchange] = {
    e.name: e for e in (AllReduce(), AllGather(), TwoPhase(), MajorityVote())
}


def default(codec: Codec) -> Exchange:
    """What the network can sum, it sums; all else is gathered."""
    return EXCHANGES["all_reduce" if codec.linear else "all_gather"]


def read(api: str, exchange: Any) -> Exchange | None:
    """The value behind an ``exchange=``: itself, or the one of that name."""
    if exchange is None or isinstance(exchange, Exchange):
        return exchange
    if not isinstance(exchange, str) or exchange not in EXCHANGES:
        raise ValueError(
            f"`{api}(exchange=...)` must be one of {', '.join(map(repr, EXCHANGES))}, "
            "an `efopt.exchanges.Exchange`, or None for the compressor's own, got "
            f"{exchange!r}."
        )
    return EXCHANGES[exchange]
