"""Collectives as messages on a link: how many bytes, how many messages, how long.

The algorithms are those that :mod:`efopt.wire` lists.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from efopt.hlo.report import WireReport

# Operation: bytes that leave a worker with `b` operand bytes, and messages in sequence.
_ALGORITHMS: dict[str, tuple[Callable[[int, int], int], Callable[[int], int]]] = {
    "all-reduce": (lambda b, n: -(-2 * (n - 1) * b // n), lambda n: 2 * (n - 1)),
    "reduce-scatter": (lambda b, n: -(-(n - 1) * b // n), lambda n: n - 1),
    "all-gather": (lambda b, n: (n - 1) * b, lambda n: n - 1),
    "all-to-all": (lambda b, n: -(-(n - 1) * b // n), lambda n: n - 1),
    "ragged-all-to-all": (lambda b, n: -(-(n - 1) * b // n), lambda n: n - 1),
    "collective-permute": (lambda b, n: b, lambda n: 1),
    "collective-broadcast": (lambda b, n: b, lambda n: n - 1),
}
OPERATIONS = frozenset(_ALGORITHMS)


def link_bytes(operation: str, operand_bytes: int, group_size: int) -> int:
    """Bytes that leave one worker of ``group_size``."""
    if group_size == 1:
        return 0
    return _ALGORITHMS[operation][0](operand_bytes, group_size)


def messages(operation: str, group_size: int) -> int:
    """Messages that one worker sends one after the other."""
    return _ALGORITHMS[operation][1](group_size) if group_size > 1 else 0


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
