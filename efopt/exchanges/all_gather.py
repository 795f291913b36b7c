"""All-gather: every worker receives every payload and averages what it decodes."""

import dataclasses
from typing import ClassVar

from efopt.compressors.identity import plain
from efopt.exchanges import carrier
from efopt.exchanges.exchange import Exchange, decode_mean


@dataclasses.dataclass(frozen=True, repr=False)
class AllGather(Exchange):
    """One ``all_gather`` of the packed payloads of all leaves."""

    name: ClassVar[str] = "all_gather"

    def meet(self, messages, axes, server):
        payloads = [m.payload for m in messages]
        carriers = axes.all_gather(carrier.pack(payloads, 1)[0])
        pairs = zip(messages, decode_mean(carriers, messages), strict=True)
        return [plain(mean, m.blocks, m.turn) for m, mean in pairs], server


def all_gather() -> Exchange:
    """All-gather of payloads, which every worker decodes and averages.

    Carries every compressor. ``b`` bytes of payload are ``(n - 1) b`` link bytes a
    worker: for a few workers, or for payloads far smaller than the leaf. The default of
    compressors that are not linear.

    Returns:
      An :class:`efopt.exchanges.Exchange`.

    Examples:
      >>> import efopt
      >>> tx = efopt.error_feedback(
      ...     efopt.scaled_sign(), axis_name="data",
      ...     exchange=efopt.exchanges.all_gather())
    """
    return AllGather()
