"""How long the collectives of a step take on a link."""

import math
from dataclasses import dataclass

from efopt.hlo.algorithms import messages
from efopt.hlo.report import WireReport


@dataclass(frozen=True)
class Link:
    """The link of each worker.

    Attributes:
      bandwidth: Bits a second that a worker can send; ``None`` if not stated.
      latency: Seconds that a message takes beside its bytes.
    """

    bandwidth: float | None = None
    latency: float = 0.0

    def latencies(self, report: WireReport) -> float:
        """Seconds of ``report`` that do not depend on the bandwidth."""
        return self.latency * sum(
            messages(c.operation, c.group_size) for c in report.collectives
        )

    def seconds(self, report: WireReport) -> float:
        """Messages one after the other times latency, and bytes by bandwidth."""
        rate = math.inf if self.bandwidth is None else self.bandwidth
        return self.latencies(report) + 8 * report.bytes_sent_per_worker / rate


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def rate(bits: float) -> str:
    """Bits a second in a readable unit."""
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits / 1e3:.3g} kbit/s"
