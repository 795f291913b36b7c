"""Runs: numbers that belong to the blocks of a batch, so many to each.

An operator that is written with them reads the same whether its blocks are of one size
or leaves of many sizes, side by side.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Runs:
    """``length`` numbers for each of ``n`` equal blocks: ``(n, length)``."""

    length: int

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the run of each member starts in a row, for :meth:`number`."""
        return (0,)

    def place(self) -> jax.Array:
        """Which of its run each number is: uint32, against ``(n, length)``."""
        return jnp.arange(self.length, dtype=jnp.uint32)[None]

    def number(self, values: Sequence[int]) -> jax.typing.ArrayLike:
        """A number that is known of each member, for each of its run: uint32."""
        (value,) = values
        return np.uint32(value)

    def of(self, values: jax.Array) -> jax.Array:
        """Values ``(n,)``, one a block, each for all of its run."""
        return values[:, None]


@dataclasses.dataclass(frozen=True)
class UnequalRuns(Runs):
    """Runs of unequal lengths, one behind the other in one row: ``(1, length)``."""

    lengths: tuple[int, ...]
    length: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "length", sum(self.lengths))

    @property
    def starts(self):
        return tuple(int(n) for n in _starts(self.lengths))

    def owner(self) -> jax.Array:
        """To which member each number belongs: int32 ``(length,)``."""
        return jnp.asarray(_owners(self.lengths)).astype(jnp.int32)

    def place(self):
        flat = jnp.arange(self.length, dtype=jnp.uint32)[None]
        return flat - self.number(self.starts)

    def number(self, values):
        return self.of(jnp.asarray(np.asarray(values, np.uint32)))

    def of(self, values):
        return values.at[self.owner()].get(mode="promise_in_bounds")[None]


@functools.lru_cache(maxsize=1024)
def _starts(lengths: tuple[int, ...]) -> np.ndarray:
    return np.cumsum([0, *lengths[:-1]])


@functools.lru_cache(maxsize=256)
def _owners(lengths: tuple[int, ...]) -> np.ndarray:
    short = np.uint16 if len(lengths) <= 1 << 16 else np.int32
    return np.repeat(np.arange(len(lengths), dtype=short), lengths)


def run_sums(x: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
    """Sums of runs ``(1, sum(lengths))``, none of them negative: ``(len(lengths),)``.

    Each in the order of :func:`efopt.ground.sums.block_sum`, to the bit.
    """
    while max(lengths) > 1:
        shorter = tuple(-(-n // 8) for n in lengths)
        runs = UnequalRuns(shorter)
        width, end = runs.number(shorter), runs.number(lengths)
        place, start = runs.place(), runs.number(_starts(lengths).tolist())
        parts = []
        for j in range(8):
            at = place + width * np.uint32(j)
            inside = start + jnp.minimum(at, end - np.uint32(1))
            part = x[0].at[inside.astype(jnp.int32)].get(mode="promise_in_bounds")
            parts.append(jnp.where(at < end, part, 0))
        while len(parts) > 1:
            parts = [parts[j] + parts[j + 1] for j in range(0, len(parts), 2)]
        x, lengths = parts[0], shorter
    return x[0]
