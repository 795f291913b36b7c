"""Linear payloads are averaged by the network itself."""

import dataclasses
from typing import ClassVar

from jax import lax

from efopt.exchange.base import Exchange


@dataclasses.dataclass(frozen=True)
class AllReduce(Exchange):
    """``pmean`` of the payloads: one collective per dtype for the whole tree."""

    name: ClassVar[str] = "all_reduce"

    def refusal(self, codec):
        if not codec.linear:
            return (
                "its payloads may not be summed (it is not linear); use "
                f'exchange="{codec.default_exchange}"'
            )
        return None

    def meet(self, messages, axis_name, server):
        payloads = lax.pmean(tuple(m.payload for m in messages), axis_name)
        pairs = zip(messages, payloads, strict=True)
        return [m.with_payload(payload) for m, payload in pairs], server
