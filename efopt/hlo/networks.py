"""How long the collectives of a step take on the networks between devices."""

import math
from dataclasses import dataclass

from efopt.hlo.algorithms import link_bytes, messages
from efopt.hlo.report import Collective, WireReport


@dataclass(frozen=True)
class Network:
    """The network that joins workers, as each of them sees it.

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

    def bytes_sent(self, report: WireReport) -> int:
        """Bytes of ``report`` that a worker sends."""
        return report.bytes_sent_per_worker

    def seconds(self, report: WireReport) -> float:
        """Messages one after the other times latency, and bytes by bandwidth."""
        rate = math.inf if self.bandwidth is None else self.bandwidth
        return self.latencies(report) + 8 * self.bytes_sent(report) / rate


@dataclass(frozen=True)
class MeshNetworks:
    """The networks of a mesh: a slow one that is compared by, and fast ones.

    A collective over several axes takes the slow ones first, with what has to cross
    them (:meth:`efopt.wire.Collective.bytes_across`), and then the others one after the
    other. An axis without a network takes no time.

    Attributes:
      slow: The slow axes; several count as one.
      between: Their network, as one card sees it: bits a second that it can send.
      fast: Name and network of other axes, of one device each.
      devices_per_card: Devices that share the network card.
    """

    slow: tuple[str, ...]
    between: Network = Network()
    fast: tuple[tuple[str, Network], ...] = ()
    devices_per_card: int = 1

    @property
    def bandwidth(self) -> float | None:
        """Bits a second that a card can send on the slow axis."""
        return self.between.bandwidth

    def latencies(self, report: WireReport) -> float:
        """Seconds of ``report`` that do not depend on that bandwidth."""
        return sum(map(self._others, report.collectives))

    def bytes_sent(self, report: WireReport) -> int:
        """Bytes of ``report`` that leave a card on the slow axis."""
        return self.devices_per_card * sum(
            c.bytes_across(self.slow) for c in report.collectives
        )

    def seconds(self, report: WireReport) -> float:
        """Seconds on all networks, one after the other."""
        rate = math.inf if self.bandwidth is None else self.bandwidth
        return self.latencies(report) + 8 * self.bytes_sent(report) / rate

    def _others(self, c: Collective) -> float:
        spans = dict(zip(c.axes or (), c.spans, strict=True))
        across = math.prod(n for name, n in spans.items() if name in self.slow)
        seconds = self.between.latency * messages(c.operation, across)
        gathers, networks = c.operation == "all-gather", dict(self.fast)
        given = c.operand_bytes * (across if gathers else 1)
        for name, n in spans.items():
            if name in self.slow:
                continue
            inside = networks.get(name, Network())
            rate = math.inf if inside.bandwidth is None else inside.bandwidth
            seconds += inside.latency * messages(c.operation, n)
            seconds += 8 * link_bytes(c.operation, given, n) / rate
            given *= n if gathers else 1
        return seconds


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
