"""For whom a program is compiled, and what that compiler makes of its collectives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from efopt.compressors.compressor import Compressor
from efopt.compressors.identity import identity
from efopt.wire import links, tpu
from efopt.wire.report import Collective, WireReport
from efopt.wire.trace import exchanged

PLATFORMS = ("cpu", "gpu", "tpu")
# A CPU does not sum these types: they travel as others, so many times as wide.
_WIDENED = {"bf16": ("f32", 2), "f8e4m3fn": ("f16", 2), "f8e5m2": ("f16", 2)}


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
        self, compressor: Compressor, tree: Any, exchange: str | None = None
    ) -> WireReport:
        """What one step of ``compressor`` sends about a tree of structs."""
        asked = exchanged(compressor, tree, self.num_workers, exchange)
        return WireReport(self.compiled(asked))

    def dense(self, tree: Any, dtype: str) -> WireReport:
        """What an uncompressed all-reduce in ``dtype`` sends."""
        cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
        return self.report(identity(), cast)

    def compiled(self, collectives: Sequence[Collective]) -> tuple[Collective, ...]:
        """The collectives after the compiler."""
        if self.platform == "cpu":
            return tuple(map(_widened, collectives))
        if self.topology is not None:
            return tuple(tpu.compiled(c, self.topology) for c in collectives)
        return tuple(collectives)


def _widened(c: Collective) -> Collective:
    if c.operation != "all-reduce" or c.element_types[0] not in _WIDENED:
        return c
    wider, factor = _WIDENED[c.element_types[0]]
    given = factor * c.operand_bytes
    return replace(
        c,
        element_types=(wider,) * len(c.element_types),
        operand_bytes=given,
        link_bytes=links.link_bytes(c.operation, given, c.group_size),
    )
