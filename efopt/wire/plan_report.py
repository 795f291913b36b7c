"""A plan: what a configuration would send, how long that takes, and whether it pays."""

import math
from collections import Counter
from dataclasses import dataclass

from efopt.ground.tables import table
from efopt.hlo.links import Link, duration, rate
from efopt.hlo.report import WireReport

_PRINTED_LEAVES = 12


@dataclass(frozen=True)
class LeafPlan:
    """What one leaf adds to a plan.

    Attributes:
      name: Its path in the tree.
      shape: Its shape.
      compressor: What compresses it.
      exchange: How it travels.
      payload_bits: Bits that one worker hands to the exchange.
      operand_bytes: Its share of the operand bytes of what it travels with, in
        proportion to its payload, and with a share of the padding.
      bytes_sent_per_worker: Its share of the bytes that leave a worker.
    """

    name: str
    shape: tuple[int, ...]
    compressor: str
    exchange: str
    payload_bits: int
    operand_bytes: float
    bytes_sent_per_worker: float


@dataclass(frozen=True)
class Plan:
    """What a configuration would send in a step. Printed, it says whether that pays.

    Attributes:
      compressor: The compressor.
      num_workers: The number of workers.
      leaves: The leaves, empty ones included.
      report: The collectives, as the named platform would compile them.
      dense_float32: Those of an uncompressed all-reduce in float32.
      dense_bfloat16: Those of one in bfloat16.
      baseline: Which of the two to compare with: ``"bfloat16"`` if no leaf is wider.
      link: The link.
      compute_seconds: Computation of a step, whatever is sent.
      compress_seconds: What compressing adds to it.
      advice: What would help if this does not, and notes; lines of text.
    """

    compressor: str
    num_workers: int
    leaves: tuple[LeafPlan, ...]
    report: WireReport
    dense_float32: WireReport
    dense_bfloat16: WireReport
    baseline: str
    link: Link
    compute_seconds: float
    compress_seconds: float
    advice: tuple[str, ...] = ()

    @property
    def dense(self) -> WireReport:
        """The collectives of the :attr:`baseline`."""
        wide = self.baseline == "float32"
        return self.dense_float32 if wide else self.dense_bfloat16

    @property
    def payload_bits(self) -> int:
        """Bits that one worker hands to the exchange in a step."""
        return sum(leaf.payload_bits for leaf in self.leaves)

    @property
    def operand_bytes(self) -> int:
        """Bytes that one worker gives to collectives in a step."""
        return self.report.operand_bytes

    @property
    def bytes_sent_per_worker(self) -> int:
        """Bytes that leave one worker in a step."""
        return self.report.bytes_sent_per_worker

    @property
    def exchange_seconds(self) -> float:
        """Seconds that a step waits for the link; latency alone without a bandwidth."""
        return self.link.seconds(self.report)

    @property
    def step_seconds(self) -> float:
        """Computation, compression and exchange, one after the other."""
        return self.compute_seconds + self.compress_seconds + self.exchange_seconds

    @property
    def dense_step_seconds(self) -> float:
        """A step with the uncompressed :attr:`baseline`."""
        return self.compute_seconds + self.link.seconds(self.dense)

    @property
    def saved_bytes(self) -> int:
        """Bytes that leave a worker less than with the baseline."""
        return self.dense.bytes_sent_per_worker - self.bytes_sent_per_worker

    @property
    def helps(self) -> bool:
        """Whether a step is shorter than dense; with no bandwidth, if it sends less."""
        if self.link.bandwidth is None:
            return self.saved_bytes > 0
        return self.step_seconds < self.dense_step_seconds

    @property
    def break_even_bandwidth(self) -> float | None:
        """Bits a second at which this and dense take equally long.

        If it sends less than dense, it pays on slower links: ``inf`` means on any. If
        it sends more, it can pay only on faster ones, by fewer messages. ``None``: on
        none.
        """
        slower = (
            self.compress_seconds
            + self.link.latencies(self.report)
            - self.link.latencies(self.dense)
        )
        if self.saved_bytes > 0:
            return 8 * self.saved_bytes / slower if slower > 0 else math.inf
        return 8 * self.saved_bytes / slower if slower < 0 else None

    @property
    def verdict(self) -> str:
        """In a sentence, whether it pays."""
        if self.num_workers == 1:
            return "This will not help: one worker sends nothing."
        if not self.helps:
            return f"This will not help. {self._pays()}"
        if self.link.bandwidth is None:
            sent = max(1, self.bytes_sent_per_worker)
            ratio = self.dense.bytes_sent_per_worker / sent
            dense = f"dense {self.baseline}"
            return f"{ratio:.1f} times fewer bytes than {dense}. {self._pays()}"
        ratio = self.dense_step_seconds / self.step_seconds
        dense = f"dense {self.baseline}"
        return f"A step is {ratio:.1f} times as fast as {dense}. {self._pays()}"

    def _pays(self) -> str:
        even = self.break_even_bandwidth
        dense = f"dense {self.baseline}"
        if even is None:
            return f"It sends no less than {dense}."
        if even == math.inf:
            return "It pays on any link" + (
                "." if self.compress_seconds else ", if compressing takes no time."
            )
        side = "slower" if self.saved_bytes > 0 else "faster"
        return f"It pays on links {side} than {rate(even)}."

    def __str__(self) -> str:
        ways = Counter((leaf.compressor, leaf.exchange) for leaf in self.leaves)
        sent = (f"{c} by {e}, leaves: {count}" for (c, e), count in ways.items())
        return "\n".join(
            [
                f"{self.compressor}, workers: {self.num_workers}",
                *sent,
                "",
                *self._leaves(),
                "",
                str(self.report),
                "",
                *self._comparison(),
                "",
                self.verdict,
                *self.advice,
            ]
        )

    def _leaves(self) -> list[str]:
        rows = [["leaf", "shape", "payload bits", "operand bytes", "link bytes"]]
        order = sorted(range(len(self.leaves)), key=lambda i: -self._bits(i))
        for i in sorted(order[:_PRINTED_LEAVES]):
            leaf = self.leaves[i]
            sizes = leaf.payload_bits, leaf.operand_bytes, leaf.bytes_sent_per_worker
            shape = str(list(leaf.shape)).replace(" ", "")
            rows.append([leaf.name, shape, *(f"{x:,.0f}" for x in sizes)])
        if len(order) > _PRINTED_LEAVES:
            rows.append([f"and {len(order) - _PRINTED_LEAVES} smaller", *[""] * 4])
        totals = self.payload_bits, self.operand_bytes, self.bytes_sent_per_worker
        return table([*rows, ["total", "", *(f"{x:,}" for x in totals)]], "<<>>>")

    def _bits(self, i: int) -> int:
        return self.leaves[i].payload_bits

    def _comparison(self) -> list[str]:
        reports = {
            "this": self.report,
            "dense float32": self.dense_float32,
            "dense bfloat16": self.dense_bfloat16,
        }
        rows = [["", "collectives", "link bytes", "exchange", "step"]]
        for name, report in reports.items():
            cells = [f"{len(report.collectives)}", f"{report.bytes_sent_per_worker:,}"]
            if self.link.bandwidth is not None:
                exchange = self.link.seconds(report)
                extra = self.compress_seconds if name == "this" else 0.0
                step = self.compute_seconds + extra + exchange
                cells += [duration(exchange), duration(step)]
            rows.append([name, *cells])
        width = len(rows[1])
        return table([row[:width] for row in rows], "<>>>>"[:width])
