"""Uniform quantisers: small integers and one scale a block."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.ground import bits, checks, randomness
from efopt.ground.sums import block_sum

SCALES = ("absmax", "l2")
FRACTION = 23  # binary digits after the point of a coordinate in units of its step
TINY = 2.0**-118  # blocks below it are zero: their step is subnormal
ROUNDED_UP = 1 + 2.0**-7  # by how much a step may exceed scale / levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Uniform(Codec):
    """Multiples of a step, from ``-levels`` to ``levels`` of them, packed.

    Rounding is done in integers, on coordinates in fixed point: the same result on
    every backend, with and without ``jit``.
    """

    block_size: int | None = None  # type: ignore[misc]
    stochastic: bool = True
    scale: str = "absmax"
    seed: int = 0

    def steps(self) -> int:
        """Levels on either side of zero."""
        raise TypeError("`_Uniform.steps` is for subclasses to implement.")

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.stochastic

    def encode(self, x, blocks, turn):
        levels, most = self.steps(), jnp.max(jnp.abs(x), axis=1)
        # In units of a power of two near the largest, nothing overflows or vanishes.
        unit = power_of_two(most)
        x = x * (1 / unit)[:, None]
        scale = norm(x) if self.scale == "l2" else most * (1 / unit)
        step = bits.round_up(scale * (1 / levels))
        inverse = jnp.where(step == 0, 0, 1 / jnp.where(step == 0, 1, step))
        fixed = (x * inverse[:, None] * 2.0**FRACTION).astype(jnp.int32)
        if self.stochastic:
            fixed = fixed + private_bits(self.seed, blocks, turn, FRACTION)
        else:
            fixed = fixed + np.int32(2 ** (FRACTION - 1))
        whole = jnp.clip(fixed >> np.int32(FRACTION), -levels, levels)
        symbols = (whole + np.int32(levels)).astype(jnp.uint8)
        narrow = jnp.bfloat16 if step.dtype == jnp.float32 else step.dtype
        largest = jnp.where(jnp.isfinite(most), float(jnp.finfo(narrow).max), jnp.inf)
        step = jnp.where(most < TINY, 0, jnp.minimum(step * unit, largest))
        return {
            "values": _pack(symbols, levels),
            "step": step.astype(narrow)[:, None],
        }

    def decode(self, payload, blocks, turn):
        del turn
        symbols = _unpack(payload["values"], self.steps(), blocks.size)
        whole = symbols.astype(jnp.int32) - np.int32(self.steps())
        dtype = blocks.compute_dtype
        return whole.astype(dtype) * payload["step"].astype(dtype)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(_Uniform):
    """``2**(bits - 1) - 1`` levels on either side of zero."""

    bits: int

    def __repr__(self):
        return (
            f"quantize(bits={self.bits}, block_size={self.block_size}, "
            f"stochastic={self.stochastic}, scale={self.scale!r}, seed={self.seed})"
        )

    def steps(self):
        return 2 ** (self.bits - 1) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class QSGD(_Uniform):
    """Levels of the block's norm, rounded at random."""

    levels: int
    scale: str = "l2"

    def __repr__(self):
        return (
            f"qsgd(levels={self.levels}, block_size={self.block_size}, "
            f"seed={self.seed})"
        )

    def steps(self):
        return self.levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernGrad(_Uniform):
    """Zero, or plus or minus the block's largest magnitude, at random."""

    def __repr__(self):
        return f"terngrad(block_size={self.block_size}, seed={self.seed})"

    def steps(self):
        return 1


def private_bits(seed: int, blocks: Any, turn: Any, number: int) -> jax.Array:
    """``number`` random bits for every coordinate, other ones on every worker.

    Returns int32 ``(n, size)`` in ``[0, 2**number)``. A counter is hashed: several
    times cheaper than a cryptographic generator.
    """
    key = randomness.hash_words(np.uint32(seed), turn.step, turn.worker, blocks.index)
    place = jnp.arange(blocks.size, dtype=jnp.uint32)[None, :]
    word = randomness.hash_words(key[:, None], place)
    return (word >> np.uint32(32 - number)).astype(jnp.int32)


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


def quantize(
    bits: int = 8,
    block_size: int | None = 256,
    stochastic: bool | None = None,
    scale: str = "absmax",
    seed: int = 0,
) -> Compressor:
    r"""Sends integers of a few bits, and one step size a block.

    With eight bits the loss is small enough to forget and the wire is a quarter of
    float32's; with four and error feedback, an eighth.

    .. math::
      C(x)_j = s \, q_j, \quad q_j = \operatorname{round}(x_j / s), \quad
      s = \frac{\max_j |x_j|}{2^{bits - 1} - 1}  \quad\text{per block}

    Rounding is to the nearest, half up, or stochastic: up with a probability equal to
    the remainder. Below eight bits stochastic is the default, because error feedback
    around 4-bit rounding to the nearest can diverge: the same coordinates are lost
    again and again. ``s`` is rounded up to 8 significant bits, so that products with it
    are exact. A block whose largest magnitude is below 3e-36 is sent as zeros; one
    that is not finite arrives not finite.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``bits`` per coordinate in uint8 fields of 8, 4, 2 and 1 bits (two bits:
    three values, five to a byte), and one bfloat16 step a block (float64 for float64).
    Cost: ``bits * d + 16 * ceil(d / block_size)`` bits per leaf and the last block's
    padding; 1.6 instead of 2 bits.
    Properties: biased, or with ``stochastic`` unbiased with ``omega <= d / (4 L^2)``
    and ``omega <= (1 + sqrt(d)) / (2 L)`` for blocks of ``d`` and ``L = 2^(bits-1) -
    1`` levels (``"l2"``: ``sqrt(d) / L``), times 1.008 for the rounded step; biased:
    no random numbers, and a contraction ``delta`` near ``1 / (1 + (d - 1) / (4 L^2))``
    (``"l2"``: ``1 - d / (4 L^2)``, if positive); not linear.
    Placement: stateless; random numbers differ from worker to worker.

    Args:
      bits: Bits per coordinate, 2 to 8. Static.
      block_size: Coordinates that share a step, at least 1; ``None``: the whole leaf.
        Static.
      stochastic: Whether to round at random; ``None``: below 8 bits. Static.
      scale: ``"absmax"``: the largest magnitude is the last level; ``"l2"``: the norm
        of the block is, as in QSGD. Static.
      seed: Selects the random numbers, in [0, 2**32). Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``), or ``stochastic`` no bool.
      ValueError: If ``bits``, ``block_size``, ``scale`` or ``seed`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.quantize(bits=4, stochastic=False)
      >>> updates, _ = tx.update(jnp.array([7.0, -3.2, 0.4]), tx.init(jnp.zeros(3)))
      >>> print(updates)
      [ 7. -3.  0.]

    References:
      Alistarh et al, `QSGD: Communication-Efficient SGD via Gradient Quantization and
      Encoding <https://arxiv.org/abs/1610.02132>`_, 2016 (section 3.1)
    """
    bits = checks.static_int("quantize", "bits", bits, least=2, below=9)
    block_size = checks.block_size("quantize", block_size)
    seed = checks.seed("quantize", seed)
    if stochastic is None:
        stochastic = bits < 8
    checks.static_bool("quantize", "stochastic", stochastic)
    checks.choice("quantize", "scale", scale, SCALES)
    return make(
        Quantize(
            bits=bits,
            block_size=block_size,
            stochastic=stochastic,
            scale=scale,
            seed=seed,
        )
    )


def qsgd(levels: int = 7, block_size: int | None = 512, seed: int = 0) -> Compressor:
    r"""Sends each coordinate as a random multiple of the block's norm.

    Unbiased, so it works without feedback; the variance is that of random dithering.

    .. math::
      C(x)_j = \frac{\|x\|_2}{s} \operatorname{sign}(x_j) \, \xi_j, \quad
      \xi_j \in \{l, l + 1\}, \quad E \xi_j = \frac{s |x_j|}{\|x\|_2}

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``ceil(log2(2 levels + 1))`` bits per coordinate in uint8 fields of 8, 4, 2
    and 1 bits (one level: three values, five to a byte), and one bfloat16 step a block
    (float64 for float64).
    Cost: ``ceil(log2(2 levels + 1)) * d + 16 * ceil(d / block_size)`` bits per leaf and
    the last block's padding. No entropy coding: sizes are static.
    Properties: unbiased, ``omega = min(d / (4 s^2), sqrt(d) / s)`` for blocks of ``d``
    coordinates and ``s`` levels, times 1.008 for the rounded step, and a contraction
    only if that is below 1; not linear; random rounding.
    Placement: stateless; random numbers differ from worker to worker. Coordinates above
    1e38 may be rounded up to infinity.

    Args:
      levels: Levels on either side of zero, 1 to 127. Static.
      block_size: Coordinates that share a norm, at least 1; ``None``: the whole leaf.
        Static.
      seed: Selects the random numbers, in [0, 2**32). Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If an option is out of range.

    Examples:
      >>> import efopt
      >>> efopt.qsgd(levels=7, block_size=512).payload_bits((1024,)) / 1024
      4.03125

    References:
      Alistarh et al, `QSGD: Communication-Efficient SGD via Gradient Quantization and
      Encoding <https://arxiv.org/abs/1610.02132>`_, 2016 (equation 4)
    """
    levels = checks.static_int("qsgd", "levels", levels, below=128)
    block_size = checks.block_size("qsgd", block_size)
    seed = checks.seed("qsgd", seed)
    return make(QSGD(levels=levels, block_size=block_size, seed=seed))


def terngrad(block_size: int | None = None, seed: int = 0) -> Compressor:
    r"""Sends minus one, zero or one, and the largest magnitude of every block.

    .. math::
      C(x)_j = s \operatorname{sign}(x_j) \, b_j, \quad P(b_j = 1) = |x_j| / s, \quad
      s = \max_j |x_j|

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: uint8, 5 coordinates to a byte; one bfloat16 scale a block (float64 for
    float64).
    Cost: ``1.6 * d + 16 * ceil(d / block_size)`` bits per leaf, rounded up to bytes,
    and the last block's padding.
    Properties: unbiased, ``omega = s |x|_1 / |x|_2^2 - 1``, at most ``(sqrt(d) - 1) /
    2`` for blocks of ``d`` coordinates, but for the rounding of the scale (up to 0.8 %
    larger); no contraction for blocks of more than 8; not linear; random rounding.
    Placement: stateless; random numbers differ from worker to worker.

    Args:
      block_size: Coordinates that share a scale, at least 1; ``None``: the whole leaf,
        as published. Small blocks have far less variance. Static.
      seed: Selects the random numbers, in [0, 2**32). Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If an option is out of range.

    Examples:
      >>> import efopt
      >>> efopt.terngrad().payload_bits((1000,))
      1616

    References:
      Wen et al, `TernGrad: Ternary Gradients to Reduce Communication in Distributed
      Deep Learning <https://arxiv.org/abs/1705.07878>`_, 2017 (equation 3)
    """
    block_size = checks.block_size("terngrad", block_size)
    seed = checks.seed("terngrad", seed)
    return make(TernGrad(block_size=block_size, seed=seed))
