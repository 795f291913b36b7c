"""Uniform quantisers: small integers and one step a block."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.blocks import Blocks
from efopt.codecs.codec import Codec, Message
from efopt.ground import bits
from efopt.ground.barriers import LARGE
from efopt.ground.randomness import private_bits
from efopt.ground.sums import block_sum

FRACTION = 23  # binary digits after the point of a coordinate in units of its step
WHOLE = 64  # levels from which a symbol is a byte of its own
ROUNDED_UP = 1 + 2.0**-7  # by how much a step may exceed scale / levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(Codec, abc.ABC):
    """Multiples of a step, from ``-levels`` to ``levels`` of them, packed.

    Rounding is done in integers, on coordinates in fixed point: the same result with
    and without ``jit``, and on every backend whose division is correctly rounded. On
    NVIDIA GPUs XLA's float32 ``1 / step`` is not: there a coordinate next to a tie may
    become its other neighbour, on all devices alike.
    """

    pointwise: ClassVar[bool] = True

    block_size: int | None = None  # type: ignore[misc]
    stochastic: bool = True
    scale: str = "absmax"
    seed: int = 0

    @abc.abstractmethod
    def steps(self) -> int:
        """Levels on either side of zero."""

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.stochastic

    def encode(self, x, blocks, turn):
        return self._encoded(x, blocks, turn, lambda symbols: symbols)

    def write(self, x, blocks, turn):
        # In one pass with the rest; what shares a byte is packed behind it.
        wall = self._computes_rest(blocks) and self.steps() < WHOLE
        kept = lax.optimization_barrier if wall else lambda symbols: symbols
        payload = self._encoded(x, blocks, turn, kept)
        return Message(self, payload, blocks, turn).once()

    def _encoded(self, x, blocks, turn, kept):
        whole, step = self._rounded(x, blocks, turn)
        symbols = kept((whole + np.int32(self.steps())).astype(jnp.uint8))
        step = step.astype(jnp.bfloat16 if step.dtype == jnp.float32 else step.dtype)
        return {"values": _pack(symbols, self.steps()), "step": step[:, None]}

    def _rounded(self, x, blocks, turn):
        """The multiples of each block's step, int32 ``(n, size)``, and the steps."""
        levels, most = self.steps(), jnp.max(jnp.abs(x), axis=1)
        # In units of a power of two near the largest, nothing overflows or vanishes.
        unit = power_of_two(most)
        x = x * (1 / unit)[:, None]
        scale = norm(x) if self.scale == "l2" else most * (1 / unit)
        step = bits.round_up(scale * (1 / levels))
        inverse = jnp.where(step == 0, 0, 1 / jnp.where(step == 0, 1, step))
        fixed = (x * inverse[:, None] * 2.0**FRACTION).astype(jnp.int32)
        if self.stochastic:  # 1610.02132, equation 4; one level: 1705.07878, equation 3
            fixed = fixed + private_bits(self.seed, blocks, turn, FRACTION)
        else:
            fixed = fixed + np.int32(2 ** (FRACTION - 1))
        whole = jnp.clip(fixed >> np.int32(FRACTION), -levels, levels)
        narrow = jnp.bfloat16 if step.dtype == jnp.float32 else step.dtype
        largest = jnp.where(jnp.isfinite(most), float(jnp.finfo(narrow).max), jnp.inf)
        step = jnp.where(most < bits.TINY, 0, jnp.minimum(step * unit, largest))
        return whole, step

    def decode(self, payload, blocks, turn):
        del turn
        symbols = _unpack(payload["values"], self.steps(), blocks.size)
        whole = symbols.astype(jnp.int32) - np.int32(self.steps())
        dtype = blocks.compute_dtype
        return whole.astype(dtype) * payload["step"].astype(dtype)

    def rest(self, x, payload, blocks, turn):
        """As computed, not as packed: an accelerator reads the blocks once less."""
        if not self._computes_rest(blocks):
            return super().rest(x, payload, blocks, turn)

        def computed(x, payload):
            del payload
            whole, step = self._rounded(x, blocks, turn)
            return x - whole.astype(x.dtype) * step[:, None]

        def packed(x, payload):
            return x - self.decode(payload, blocks, turn)

        return lax.platform_dependent(x, payload, cpu=packed, default=computed)

    def _computes_rest(self, blocks: Blocks) -> bool:
        return self.steps() >= WHOLE or blocks.coordinates >= LARGE

    def omega(self, shape):
        if not self.stochastic:
            return None
        size, step = self.block_shape(shape)[1], ROUNDED_UP / self.steps()
        # A coordinate's variance is at most step^2 / 4, and at most step times its
        # magnitude; the sum of magnitudes is largest beside one that is the scale.
        even = size * step**2 / 4
        if self.scale == "l2":
            return min(even, math.sqrt(size) * step)
        if self.steps() == 1:  # exactly the scale times the magnitudes
            return step * (1 + math.sqrt(size)) / 2 - 1
        return min(even, step * (1 + math.sqrt(size)) / 2)

    def delta(self, shape):
        if self.stochastic:
            omega = self.omega(shape)
            return None if omega is None or omega >= 1 else 1 - omega
        size, step = self.block_shape(shape)[1], ROUNDED_UP / self.steps()
        if self.scale == "l2":
            lost = size * step**2 / 4
            return None if lost >= 1 else 1 - lost
        # The largest loses at most half a step, and what scaling up has moved it by;
        # the others at most half a step or themselves.
        worst = min(step / 2, ROUNDED_UP - 1) ** 2
        return (1 - worst) / (1 + (size - 1) * step**2 / 4)


def power_of_two(largest: jax.Array) -> jax.Array:
    """A power of two near ``largest``, whose inverse is no subnormal number."""
    exponents = jnp.finfo(largest.dtype).nexp
    return jnp.clip(lax.reduce_precision(largest, exponents, 0), 2.0**-120, 2.0**126)


def norm(x: jax.Array) -> jax.Array:
    """l2 norm of each row of ``(n, size)``, magnitudes near 1: ``(n,)``.

    Squares lose their last bit, lest a compiler fuse them with the sum, unrounded.
    """
    info = jnp.finfo(x.dtype)
    squares = lax.reduce_precision(x * x, info.nexp, info.nmant - 1)
    return jnp.sqrt(block_sum(squares))


def _pack(symbols: jax.Array, levels: int) -> tuple[jax.Array, ...]:
    if levels == 1:
        return (bits.pack_trits(symbols),)
    return bits.pack_uints(symbols, (2 * levels).bit_length())


def _unpack(packed: tuple[jax.Array, ...], levels: int, size: int) -> jax.Array:
    if levels == 1:
        return bits.unpack_trits(packed[0], size)
    return bits.unpack_uints(packed, (2 * levels).bit_length(), size)
