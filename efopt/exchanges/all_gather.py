"""Every worker receives every payload and averages what it decodes."""

import dataclasses
from typing import ClassVar

from efopt.compressors.identity import plain
from efopt.exchanges import carrier, exchange
from efopt.exchanges.exchange import Exchange


@dataclasses.dataclass(frozen=True)
class AllGather(Exchange):
    """One ``all_gather`` of the packed payloads of all leaves.

    Bytes on the link grow with the number of workers: fit for a few workers, or for
    payloads far smaller than the leaf.
    """

    name: ClassVar[str] = "all_gather"

    def meet(self, messages, axis_name, server, dense):
        del dense
        payloads = [m.payload for m in messages]
        carriers = exchange.all_gather(carrier.pack(payloads, 1)[0], axis_name)

        def decode(payloads):
            pairs = zip(messages, payloads, strict=True)
            return [m.with_payload(payload).once().decode() for m, payload in pairs]

        means = exchange.decode_mean(carriers, payloads, decode)
        pairs = zip(messages, means, strict=True)
        return [plain(mean, m.blocks, m.turn) for m, mean in pairs], server
