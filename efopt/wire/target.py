"""For whom a program is compiled, and what that compiler makes of its collectives."""

from dataclasses import dataclass
from typing import Any

import jax

from efopt.codecs.compressor import Compressor
from efopt.compressors.identity import identity
from efopt.hlo import tpu
from efopt.hlo.report import WireReport
from efopt.wire.trace import exchanged

PLATFORMS = ("cpu", "gpu", "tpu")
# A CPU does not sum these types: they travel as others.
_CPU_SUMS = {"bfloat16": "float32"}


@dataclass(frozen=True)
class Target:
    """Workers, and the platform that they run on.

    Attributes:
      num_workers: Their number.
      platform: One of :data:`PLATFORMS`, or ``None``: programs stay as they are.
      topology: Of a TPU, or ``None``.
    """

    num_workers: int
    platform: str | None
    topology: str | None

    def check(self) -> None:
        """Raises unless there can be such a target."""
        if self.platform is not None and self.platform not in PLATFORMS:
            raise ValueError(
                f"`plan(platform=...)` must be one of "
                f"{', '.join(map(repr, PLATFORMS))} or None, got {self.platform!r}."
            )
        if self.topology is None:
            return
        if self.platform != "tpu":
            raise ValueError(
                f'`plan(topology=...)` needs `platform="tpu"`, got {self.platform!r} '
                f"and {self.topology!r}."
            )
        _, devices = tpu.parse(self.topology, "plan(topology=...)")
        if self.num_workers > devices:
            raise ValueError(
                f"`plan(num_workers={self.num_workers})` is more than the devices of "
                f"{self.topology!r}, {devices}."
            )

    def report(
        self, compressor: Compressor, tree: Any, exchange: Any = None
    ) -> WireReport:
        """What one step of ``compressor`` sends about a tree of structs."""
        sums = _CPU_SUMS if self.platform == "cpu" else {}
        found = exchanged(compressor, tree, self.num_workers, exchange, sums)
        if self.topology is not None:
            found = [tpu.compiled(c, self.topology) for c in found]
        return WireReport(tuple(found))

    def dense(self, tree: Any, dtype: str) -> WireReport:
        """What an uncompressed all-reduce in ``dtype`` sends."""
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
        return self.report(identity(), cast)
