"""Shorter floating-point numbers: casts, and powers of two."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.compressors.quantize import private_bits
from efopt.ground import bits, checks

CASTS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast(Codec):
    """Every coordinate in ``dtype``; 8-bit ones with a power of two a block."""

    dtype: str
    block_size: int | None = 256  # type: ignore[misc]

    def __repr__(self):
        return f"cast({self.dtype!r}, block_size={self.block_size})"

    def encode(self, x, blocks, turn):
        del turn
        # Beyond float32's range there is nothing to scale to.
        x = bits.cast(x, jnp.float32)
        if not self.scaled:
            return {"values": bits.cast(x, self.dtype)}
        exponent = _exponent_above(x, float(jnp.finfo(self.dtype).max))
        inverse = _power_of_two(jnp.uint32(254) - jnp.minimum(exponent, 254))
        inverse = jnp.where(exponent == 0, 0, inverse)
        return {
            "values": bits.cast(x * inverse[:, None], self.dtype),
            "exponent": exponent.astype(jnp.uint8)[:, None],
        }

    def decode(self, payload, blocks, turn):
        del turn
        values = payload["values"].astype(jnp.float32)
        if self.scaled:
            values = values * _power_of_two(payload["exponent"].astype(jnp.uint32))
        return values.astype(blocks.compute_dtype)

    @property
    def scaled(self) -> bool:
        return jnp.finfo(self.dtype).bits == 8

    def delta(self, shape):
        info = jnp.finfo(self.dtype)
        lost = 2.0 ** (-2 * (info.nmant + 1))
        if self.scaled:  # the largest is at least half of max, the rest may be tiny
            size = self.block_shape(shape)[1]
            lost += size * (float(info.smallest_subnormal) / float(info.max)) ** 2
        elif info.nexp < jnp.finfo(jnp.float32).nexp:
            return None  # without a scale small coordinates vanish
        return 1 - lost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Natural(Codec):
    """Sign and exponent; the mantissa decides at random which exponent."""

    seed: int = 0

    unbiased: ClassVar[bool] = True
    block_size: ClassVar[int | None] = 1024

    def __repr__(self):
        return f"natural(seed={self.seed})"

    def encode(self, x, blocks, turn):
        word = lax.bitcast_convert_type(bits.cast(x, jnp.float32), jnp.uint32)
        magnitude = word & np.uint32(0x7FFFFFFF)
        dither = private_bits(self.seed, blocks, turn, 23).astype(jnp.uint32)
        # The carry into the exponent has the probability of the mantissa.
        exponent = jnp.minimum((magnitude + dither) >> np.uint32(23), np.uint32(254))
        exponent = jnp.where(magnitude < np.uint32(1 << 23), 0, exponent)
        exponent = jnp.where(magnitude < np.uint32(255 << 23), exponent, 255)
        return {
            "exponents": exponent.astype(jnp.uint8),
            "signs": bits.pack_bits(word >> np.uint32(31)),
        }

    def decode(self, payload, blocks, turn):
        del turn
        magnitude = _power_of_two(payload["exponents"].astype(jnp.uint32))
        negative = bits.unpack_bits(payload["signs"], blocks.size)
        values = jnp.where(negative, -magnitude, magnitude)
        return values.astype(blocks.compute_dtype)

    def omega(self, shape):
        del shape
        return 1 / 8

    def delta(self, shape):
        del shape
        return 7 / 8


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """float32 from a biased exponent, uint32: zero for 0, infinity for 255."""
    return lax.bitcast_convert_type(exponent << np.uint32(23), jnp.float32)


def _exponent_above(x: jax.Array, largest: float) -> jax.Array:
    """Biased exponents of the powers of two that bring rows of ``x`` under ``largest``.

    Returns uint32 ``(n,)``; zero for a row whose largest magnitude is below 3e-36.
    """
    most = jnp.max(jnp.abs(x), axis=1)
    word = lax.bitcast_convert_type(most * np.float32(1 / largest), jnp.uint32)
    exponent = (word + np.uint32(0x7FFFFF)) >> np.uint32(23)
    exponent = jnp.where(most < 2.0**-118, 0, jnp.maximum(exponent, 1))
    return jnp.where(jnp.isfinite(most), exponent, 255)


def cast(dtype: Any, block_size: int | None = 256) -> Compressor:
    """Sends every coordinate in a shorter floating-point format.

    bfloat16 keeps float32's range; float16 three more digits of a shorter range: what
    lies beyond 65504 saturates and what lies below 3e-8 vanishes. The 8-bit formats
    carry a power of two for every block, such that its largest magnitude is in their
    upper range: nothing overflows. Values that are not finite arrive not finite.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: the values in ``dtype``; for 8 bits also one uint8 exponent a block. In
    words of uint32 whatever they hold: compilers widen narrow floats on the wire.
    Cost: ``16 * d`` or ``8 * d + 8 * ceil(d / block_size)`` bits per leaf and the last
    block's padding.
    Properties: biased; contraction ``delta`` at least ``1 - 2^-16`` for bfloat16, ``1 -
    2^-8`` for float8_e4m3fn and ``1 - 2^-6`` for float8_e5m2 (less ``d`` times a
    negligible number); none for float16, whose small values vanish; not linear.
    Placement: stateless. float64 leaves are first rounded to float32.

    Args:
      dtype: ``bfloat16``, ``float16``, ``float8_e4m3fn`` or ``float8_e5m2``, as a name
        or a dtype. Static.
      block_size: Coordinates that share a power of two (8 bits), and the unit in which
        leaves are split over workers; ``None``: the whole leaf. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If ``dtype`` is no dtype or ``block_size`` no Python int (for example
        traced by ``optax.inject_hyperparams``).
      ValueError: If ``dtype`` is another one, or ``block_size < 1``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.cast(jnp.float8_e4m3fn)
      >>> updates, _ = tx.update(jnp.array([900.0, -33.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [896. -32.]

    References:
      Micikevicius et al, `FP8 Formats for Deep Learning
      <https://arxiv.org/abs/2209.05433>`_, 2022
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise TypeError(
            f"`cast(dtype)` takes a dtype, one of {', '.join(CASTS)}; got {dtype!r}."
        ) from error
    checks.choice("cast", "dtype", name, CASTS)
    return make(Cast(dtype=name, block_size=checks.block_size("cast", block_size)))


def natural(seed: int = 0) -> Compressor:
    r"""Sends sign and exponent: each magnitude becomes one of the two powers around it.

    Nine bits a coordinate and almost no variance, without a scale to agree on.

    .. math::
      C(x) = \operatorname{sign}(x) \cdot
      \begin{cases} 2^{a + 1} & \text{with probability } |x| / 2^a - 1 \\
      2^a & \text{else} \end{cases}, \quad a = \lfloor \log_2 |x| \rfloor

    Subnormal numbers are sent as zero, magnitudes above ``2**127`` as ``2**127``.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: uint8 exponents, and uint8 signs, 8 to a byte; leaves are padded to blocks
    of at most 1024.
    Cost: ``9 * d`` bits per leaf and the last block's padding.
    Properties: unbiased, ``omega = 1/8``, for normal numbers up to ``2**127``; as a
    contraction ``delta = 7/8``; not linear; random rounding.
    Placement: stateless; random numbers differ from worker to worker. float64 leaves
    are first rounded to float32.

    Args:
      seed: Selects the random numbers, in [0, 2**32). Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If ``seed`` is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If ``seed`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.natural()
      >>> updates, _ = tx.update(jnp.array([4.0, -0.5]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [ 4.  -0.5]

    References:
      Horvath et al, `Natural Compression for Distributed Deep Learning
      <https://arxiv.org/abs/1905.10988>`_, 2019 (Definition 1)
    """
    return make(Natural(seed=checks.seed("natural", seed)))
