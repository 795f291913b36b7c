"""A plan: what a configuration would send, how long that takes, and whether it pays."""

import math
from collections import Counter
from dataclasses import dataclass

from efopt.ground.tables import table
from efopt.hlo.networks import MeshNetworks, Network, duration, rate
from efopt.hlo.report import WireReport
from efopt.wire.rounds import Rounds

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
      num_workers: The number of workers. On a mesh each of them is many devices, and
        sizes are those of one device.
      leaves: The leaves, empty ones included.
      report: The collectives, as the named platform would compile them.
      dense_float32: Those of an uncompressed all-reduce in float32; on a mesh, of the
        gradient's shards over the slow axis.
      dense_bfloat16: Those of one in bfloat16.
      baseline: Which of the two to compare with: ``"bfloat16"`` if no leaf is wider.
      network: That between workers; on a mesh those of its axes.
      compute_seconds: Computation of a step, whatever is sent.
      compress_seconds: What compressing adds to it.
      advice: What would help if this does not, and notes; lines of text.
      rounds: With ``plan(every=...)``, what rounds of local steps make of it; all else
        is then about a meeting of all leaves.
    """

    compressor: str
    num_workers: int
    leaves: tuple[LeafPlan, ...]
    report: WireReport
    dense_float32: WireReport
    dense_bfloat16: WireReport
    baseline: str
    network: Network | MeshNetworks
    compute_seconds: float
    compress_seconds: float
    advice: tuple[str, ...] = ()
    rounds: Rounds | None = None

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
        """Bytes that leave one worker in a step; on a mesh one device, by any axis."""
        return self.report.bytes_sent_per_worker

    @property
    def slow(self) -> tuple[str, ...]:
        """The slow axes of the mesh, or none."""
        return self.network.slow if isinstance(self.network, MeshNetworks) else ()

    @property
    def devices_per_card(self) -> int:
        """Devices that share a network card on the slow axis."""
        return (
            self.network.devices_per_card
            if isinstance(self.network, MeshNetworks)
            else 1
        )

    @property
    def bytes_per_device(self) -> int:
        """Bytes that leave one device over the slow axis; of a flat axis all."""
        return self.bytes_per_card // self.devices_per_card

    @property
    def bytes_per_card(self) -> int:
        """Bytes that leave one network card over the slow axis."""
        return self.network.bytes_sent(self.report)

    @property
    def exchange_seconds(self) -> float:
        """Seconds that a step waits for links; latency alone without a bandwidth."""
        return self.network.seconds(self.report)

    @property
    def step_seconds(self) -> float:
        """Computation, compression and exchange, one after the other."""
        return self.compute_seconds + self.compress_seconds + self.exchange_seconds

    @property
    def dense_step_seconds(self) -> float:
        """A step with the uncompressed :attr:`baseline`."""
        return self.compute_seconds + self.network.seconds(self.dense)

    @property
    def saved_bytes(self) -> int:
        """Bytes that leave a worker, or a network card, less than with the baseline."""
        return self.network.bytes_sent(self.dense) - self.network.bytes_sent(
            self.report
        )

    @property
    def helps(self) -> bool:
        """Whether a step is shorter than dense; with no bandwidth, if it sends less."""
        if self.network.bandwidth is None:
            return self.saved_bytes > 0
        return self.step_seconds < self.dense_step_seconds

    @property
    def break_even_bandwidth(self) -> float | None:
        """Bits a second at which this and dense take equally long.

        If it sends less than dense, it pays on slower networks: ``inf`` means on any.
        If it sends more, it can pay only on faster ones, by fewer messages. ``None``:
        on none. On a mesh those of a network card on the slow axis.
        """
        slower = (
            self.compress_seconds
            + self.network.latencies(self.report)
            - self.network.latencies(self.dense)
        )
        if self.saved_bytes > 0:
            return 8 * self.saved_bytes / slower if slower > 0 else math.inf
        return 8 * self.saved_bytes / slower if slower < 0 else None

    @property
    def verdict(self) -> str:
        """In a sentence, whether it pays."""
        if self.num_workers == 1:
            return "This will not help: one worker sends nothing."
        if self.slow and not self.dense.collectives:
            return f"This will not help: nothing crosses {', '.join(self.slow)}."
        if self.rounds is not None:
            return self.rounds.verdict
        if not self.helps:
            return f"This will not help. {self._pays()}"
        if self.network.bandwidth is None:
            sent = max(1, self.network.bytes_sent(self.report))
            ratio = self.network.bytes_sent(self.dense) / sent
            dense = f"dense {self.baseline}"
            over = f" over {', '.join(self.slow)}" if self.slow else ""
            return f"{ratio:.1f} times fewer bytes{over} than {dense}. {self._pays()}"
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
        card = " a network card" if self.devices_per_card > 1 else ""
        return f"It pays on links {side} than {rate(even)}{card}."

    def __str__(self) -> str:
        ways = Counter((leaf.compressor, leaf.exchange) for leaf in self.leaves)
        sent = (f"{c} by {e}, leaves: {count}" for (c, e), count in ways.items())
        return "\n".join(
            [
                f"{self.compressor}, workers: {self.num_workers}{self._where()}",
                *sent,
                "",
                *self._leaves(),
                "",
                str(self.report),
                "",
                *self._comparison(),
                "",
                *([str(self.rounds)] if self.rounds is not None else []),
                self.verdict,
                *self.advice,
            ]
        )

    def _where(self) -> str:
        if not self.slow:
            return ""
        sizes = ", ".join(f"{name}={size}" for name, size in self.report.mesh)
        slow = f" along {' and '.join(self.slow)}, mesh: {sizes}"
        card = f", devices a network card: {self.devices_per_card}"
        return slow + (card if self.devices_per_card > 1 else "")

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
        sent = [f"over {', '.join(self.slow)}"] if self.slow else ["link bytes"]
        sent += ["of a card"] if self.devices_per_card > 1 else []
        head = ["", "collectives", *sent]
        timed = self.network.bandwidth is not None
        rows = [[*head, "exchange", "step"] if timed else head]
        for name, report in reports.items():
            card = self.network.bytes_sent(report)
            cells = [f"{len(report.collectives)}"]
            cells += [f"{card // self.devices_per_card:,}"]
            cells += [f"{card:,}"] if self.devices_per_card > 1 else []
            if timed:
                exchange = self.network.seconds(report)
                extra = self.compress_seconds if name == "this" else 0.0
                step = self.compute_seconds + extra + exchange
                cells += [duration(exchange), duration(step)]
            rows.append([name, *cells])
        return table(rows, "<" + ">" * (len(rows[0]) - 1))
