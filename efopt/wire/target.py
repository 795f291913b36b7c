"""For whom a program is compiled, and what that compiler makes of its collectives."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from efopt.codecs.compressor import Compressor
from efopt.compressors.identity import identity
from efopt.hlo import tpu
from efopt.hlo.report import WireReport
from efopt.wire.place import Place
from efopt.wire.trace import exchanged, exchanged_on

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
      place: The mesh, and where leaves lie on it; ``None``: a flat axis of workers.
    """

    num_workers: int
    platform: str | None
    topology: str | None
    place: Place | None = None

    def check(self) -> None:
        """Raises unless there can be such a target."""
        if self.platform is not None and self.platform not in PLATFORMS:
            raise ValueError(
                f"`plan(platform=...)` must be one of "
                f"{', '.join(map(repr, PLATFORMS))} or None, got {self.platform!r}."
            )
        if self.topology is None:
            return
        if self.place is not None:
            raise ValueError(
                f"`plan(topology={self.topology!r})` is of one slice with a flat axis "
                "of workers; with `mesh` leave it out."
            )
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
        if self.place is not None:
            mesh, specs, axes = self.place.mesh, self.place.specs, self.place.axes
            found = exchanged_on(
                mesh, compressor, tree, specs, axes.key, exchange, sums
            )
            if self.platform == "tpu":
                slow = set(axes.names)
                found = [tpu.tiled(c) if slow & set(c.axes or ()) else c for c in found]
            return WireReport(tuple(found), mesh=self.place.sizes)
        found = exchanged(compressor, tree, self.num_workers, exchange, sums)
        if self.topology is not None:
            found = [tpu.compiled(c, self.topology) for c in found]
        return WireReport(tuple(found))

    def dense(self, tree: Any, dtype: str) -> WireReport:
        """What an uncompressed all-reduce in ``dtype`` sends.

        On a mesh that of the gradient's shards over the workers' axes alone: a step
        that does not compress has no pieces to gather.
        """
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
        report = self.report(identity(), cast)
        return report if self.place is None else report.over(self.place.axes.names)

    def of(self, leaves: Sequence[int]) -> "Target":
        """The target of a list of some of the leaves."""
        if self.place is None:
            return self
        return dataclasses.replace(self, place=self.place.of(leaves))
