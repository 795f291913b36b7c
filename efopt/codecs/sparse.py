"""Sparse codecs: a few coordinates of every block."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs import nested
from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Codec
from efopt.ground import checks
from efopt.ground.randomness import hash_words

LANE = 1 << 13  # coordinates of a leaf up to which lanes are not the slower


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Codec, abc.ABC):
    """Keeps ``k`` coordinates, or the fraction, of every block.

    A subclass selects and places them; ``values`` writes them.
    """

    fraction: float | None = None
    k: int | None = None
    block_size: int | None = None  # type: ignore[misc]
    values: Codec
    chooses: ClassVar[bool] = True

    def arguments(self) -> str:
        """The arguments of the factory, as they are written in a program."""
        size = f"fraction={self.fraction}" if self.k is None else f"k={self.k}"
        return f"{size}, block_size={self.block_size}"

    def kept(self, size: int) -> int:
        """Coordinates kept of a block of ``size``."""
        return checks.kept(self.fraction, self.k, size)

    def with_values(self, values):
        return dataclasses.replace(self, values=values)

    def block_shape(self, shape):
        n, size = super().block_shape(shape)
        checks.numbered(repr(self), shape, size)
        return (n, size)

    def keeps_no_residual(self):
        return self.values.keeps_no_residual()

    def number(self, blocks: Blocks) -> int:
        """Coordinates kept of a row of the batch."""
        return sum(map(self.kept, blocks.members))

    @abc.abstractmethod
    def select(
        self, x: jax.Array, blocks: Blocks, turn: Turn
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The kept values ``(n, k)``, and what a receiver needs to place them."""

    @abc.abstractmethod
    def places(self, payload: Any, blocks: Blocks, turn: Turn) -> jax.Array:
        """Where the values stand: int32 ``(n, k)``."""

    def encode(self, x, blocks, turn):
        values, found = self.select(x, blocks, turn)
        return {
            "values": nested.write(self.values, values, blocks.whole(), turn),
            **found,
        }

    def decode(self, payload, blocks, turn):
        values = self.read(payload, blocks, turn)
        shape = len(values), blocks.size
        # Like the values: a loop's start has to vary over the workers as they do.
        zeros = jnp.zeros_like(values, shape=shape, dtype=blocks.compute_dtype)
        return self.filled(zeros, values, payload, blocks, turn)

    def told(self, payload, blocks, turn):
        x = self.decode(payload, blocks, turn)
        ones = jnp.ones_like(x, shape=(len(x), self.number(blocks)))
        return x, self.filled(jnp.zeros_like(x), ones, payload, blocks, turn)

    def decode_in(self, zeros, payload, blocks, turn):
        values = self.read(payload, blocks, turn)
        return self.filled(zeros, values, payload, blocks, turn)

    def filled(self, zeros, values, payload, blocks, turn):
        """Zeros with the values in their places; all of them, if none was left out."""
        if values.shape[1] == blocks.size:
            return values
        return self.put(zeros, values, payload, blocks, turn)

    def rest(self, x, payload, blocks, turn):
        values = self.read(payload, blocks, turn)
        if values.shape[1] == blocks.size:
            return x - values
        return self.add(x, -values, payload, blocks, turn)

    def put(
        self, zeros: jax.Array, values: jax.Array, payload: Any, blocks: Any, turn: Turn
    ) -> jax.Array:
        """Zeros with the values in their places, to the bit.

        Not added: compilers drop the sum with a zero, or not, and then -0.0 is 0.0.
        """
        return self._scattered("set", zeros, values, payload, blocks, turn)

    def add(
        self, x: jax.Array, values: jax.Array, payload: Any, blocks: Blocks, turn: Turn
    ) -> jax.Array:
        """Blocks ``x (n, size)`` with values ``(n, k)`` added in their places."""
        return self._scattered("add", x, values, payload, blocks, turn)

    def _scattered(self, how, x, values, payload, blocks, turn):
        places = self.places(payload, blocks, turn)

        def put(x, index, values, unique=True):
            update = getattr(x.at[index], how)
            return update(values, unique_indices=unique, mode="promise_in_bounds")

        row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
        if blocks.end in (None, x.size):
            return put(x, (row, places), values)
        flat, at = x.reshape(-1)[: blocks.end], row * np.int32(blocks.size) + places
        if len(x) > 1:
            flat = put(flat, at[:-1], values[:-1])
        # The last block alone has padding, of zeros. What lies there is not written: it
        # writes another's value once more, or adds nothing.
        at, values = at[-1], values[-1]
        valid = at < blocks.end
        other = jnp.argmax(valid)
        spare = jnp.minimum(at[other], np.int32(blocks.end - 1))
        value = -0.0 if how == "add" else jnp.where(valid[other], values[other], 0)
        at, values = jnp.where(valid, at, spare), jnp.where(valid, values, value)
        return blocks.padded(put(flat, at, values, unique=False))

    def read(self, payload: Any, blocks: Blocks, turn: Turn) -> jax.Array:
        """The values ``(n, k)`` of a payload."""
        k, whole = self.number(blocks), blocks.whole()
        return nested.read(self.values, payload["values"], (k,), whole, turn)

    def delta(self, shape):
        """What the values keep of the share that is kept."""
        size = self.block_shape(shape)[1]
        k = self.kept(size)
        values = self.values.delta((k,))
        return None if values is None else values * k / size


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedCoordinates(Sparse):
    """Coordinates drawn anew each step, the same on every worker.

    A subclass draws them, of blocks of unequal sizes too. No index is sent, and
    payloads add up if values do.
    """

    rescaled: bool = False
    seed: int = 0

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.values.linear

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.rescaled and self.values.unbiased

    def arguments(self):
        return f"{super().arguments()}, unbiased={self.rescaled}, seed={self.seed}"

    def key(self, blocks: Blocks, turn: Turn) -> jax.Array:
        """One word for every block, the same on every worker: uint32 ``(n,)``."""
        return hash_words(np.uint32(self.seed), turn.draw, blocks.index)

    def select(self, x, blocks, turn):
        if self.number(blocks) == blocks.size:
            return x, {}
        values = jnp.take_along_axis(x, self.places({}, blocks, turn), axis=1)
        if self.rescaled:
            kept = [self.kept(size) for size in blocks.members]
            factor = np.divide(blocks.members, kept).astype(x.dtype)
            factor = blocks.runs(kept).of(jnp.asarray(factor))
            largest = float(jnp.finfo(x.dtype).max)
            scaled = jnp.clip(values * factor, -largest, largest)
            values = jnp.where(jnp.isfinite(values), scaled, values)
        return values, {}

    def lane(self, size):
        # Not with values that are blocks themselves, one to a leaf.
        apart = self.block_size or not self.values.exact or size > LANE
        return None if apart else (1, "sample")

    def delta(self, shape):
        if not self.rescaled:
            return super().delta(shape)
        omega = self.omega(shape)
        return None if omega is None or omega >= 1 else 1 - omega

    def omega(self, shape):
        size = self.block_shape(shape)[1]
        values = self.values.omega((self.kept(size),))
        if not self.unbiased or values is None:
            return None
        return size / self.kept(size) * (1 + values) - 1
