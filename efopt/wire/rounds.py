"""Rounds: what local steps with a meeting every few of them send, and how long."""

import dataclasses
import math

from efopt.ground import checks
from efopt.hlo.networks import MeshNetworks, Network, duration, rate
from efopt.hlo.report import WireReport


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What :func:`efopt.local_steps` would send. Printed, some lines about a round.

    Attributes:
      every: Steps of a round.
      meetings: The collectives of each meeting in it, one for each fragment.
      dense: Those of an uncompressed average at every step, to compare with.
      baseline: The dtype of that.
      network: That between workers; on a mesh those of its axes.
      compute_seconds: Computation of a step.
      compress_seconds: What compressing adds to a round.
    """

    every: int
    meetings: tuple[WireReport, ...]
    dense: WireReport
    baseline: str
    network: Network | MeshNetworks
    compute_seconds: float
    compress_seconds: float

    @property
    def bytes_per_round(self) -> int:
        """Bytes that leave a worker, or a network card, in a round."""
        return sum(map(self.network.bytes_sent, self.meetings))

    @property
    def bytes_per_step(self) -> float:
        """The same, averaged over the steps of a round."""
        return self.bytes_per_round / self.every

    @property
    def peak_bytes(self) -> int:
        """The most that leave one in a single step."""
        return max(map(self.network.bytes_sent, self.meetings), default=0)

    @property
    def exchange_seconds(self) -> float:
        """Seconds that a round waits for links; latency alone without a bandwidth."""
        return sum(map(self.network.seconds, self.meetings))

    @property
    def round_seconds(self) -> float:
        """Computation, compression and exchange of a round, one after the other."""
        computed = self.every * self.compute_seconds
        return computed + self.compress_seconds + self.exchange_seconds

    @property
    def step_seconds(self) -> float:
        """The same, averaged over the steps of a round."""
        return self.round_seconds / self.every

    @property
    def dense_step_seconds(self) -> float:
        """A step with the uncompressed average at every step."""
        return self.compute_seconds + self.network.seconds(self.dense)

    @property
    def balanced_every(self) -> int | None:
        """The shortest round whose exchange takes no longer than its computation.

        From there on the network is no bottleneck. ``None`` if either is not known.
        """
        if self.network.bandwidth is None or not self.compute_seconds:
            return None
        return max(1, math.ceil(self.exchange_seconds / self.compute_seconds))

    def every_within(self, share: float) -> int | None:
        """The shortest round whose meetings take at most a share of its computation.

        Compression counts, as what does not hide. ``None`` if bandwidth or computation
        is not known.

        Args:
          share: Such as 0.1: a step is then at most a tenth longer than without.
        """
        if checks.static_float("every_within", "share", share) == 0:
            raise ValueError("`every_within(share)` must be above 0: nothing is free.")
        if self.network.bandwidth is None or not self.compute_seconds:
            return None
        meetings = self.exchange_seconds + self.compress_seconds
        # A rounding error is no step.
        return max(1, math.ceil(meetings / (share * self.compute_seconds) - 1e-9))

    @property
    def verdict(self) -> str:
        """In a sentence, whether it pays to meet that rarely."""
        dense = f"dense {self.baseline} at every step"
        if self.network.bandwidth is None:
            ratio = self.network.bytes_sent(self.dense) / max(1e-9, self.bytes_per_step)
            return f"{ratio:,.1f} times fewer bytes than {dense}."
        ratio = self.dense_step_seconds / max(1e-12, self.step_seconds)
        said = f"A step is {ratio:.1f} times as fast as {dense}."
        if self.balanced_every is None:
            return said
        return (
            f"{said} From rounds of {self.balanced_every:,} steps on the exchange "
            "takes no longer than the computation, and meetings no more than a tenth "
            f"of it from {self.every_within(0.1):,} on."
        )

    def __str__(self) -> str:
        sent = f"{self.bytes_per_step:,.0f} bytes a step, at most {self.peak_bytes:,}"
        meetings = f", meetings: {len(self.meetings)}" if len(self.meetings) > 1 else ""
        lines = [f"rounds of {self.every:,} steps{meetings}: {sent}"]
        if self.network.bandwidth is not None:
            lines.append(
                f"a round takes {duration(self.round_seconds)}, of it "
                f"{duration(self.exchange_seconds)} the exchange at "
                f"{rate(self.network.bandwidth)}"
            )
        return "\n".join(lines)
