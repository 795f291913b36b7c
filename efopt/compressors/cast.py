"""Casts: every coordinate in a shorter floating-point format."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.ground import bits, checks
from efopt.ground.checks import keyword_only

CASTS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast(Codec):
    """Every coordinate in ``dtype``; 8-bit ones with a power of two a block."""

    dtype: str
    block_size: int | None = 256  # type: ignore[misc]

    pointwise: ClassVar[bool] = True

    def __repr__(self):
        return f"cast({self.dtype!r}, block_size={self.block_size})"

    def encode(self, x, blocks, turn):
        del turn
        # Beyond float32's range there is nothing to scale to.
        x = bits.cast(x, jnp.float32)
        if not self.scaled:
            return {"values": bits.cast(x, self.dtype)}
        exponent = _exponent_above(x, float(jnp.finfo(self.dtype).max))
        inverse = bits.float_of_exponent(jnp.uint32(254) - jnp.minimum(exponent, 254))
        inverse = jnp.where(exponent == 0, 0, inverse)
        # Nothing is rounded up beyond float32's range: above the last number that the
        # format can say there, it is that number, as near as a half unit anywhere.
        info = jnp.finfo(self.dtype)
        last = (inverse * np.float32((2 - float(info.eps)) * 2.0**127))[:, None]
        x = jnp.clip(x * inverse[:, None], -last, last)
        return {
            "values": bits.cast(x, self.dtype),
            "exponent": exponent.astype(jnp.uint8)[:, None],
        }

    def decode(self, payload, blocks, turn):
        del turn
        values = payload["values"].astype(jnp.float32)
        if self.scaled:
            exponent = payload["exponent"].astype(jnp.uint32)
            values = values * bits.float_of_exponent(exponent)
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


def _exponent_above(x: jax.Array, largest: float) -> jax.Array:
    """Biased exponents of the powers of two that bring rows of ``x`` under ``largest``.

    Returns uint32 ``(n,)``; zero for a row whose largest magnitude is below 3e-36.
    """
    most = jnp.max(jnp.abs(x), axis=1)
    word = lax.bitcast_convert_type(most * np.float32(1 / largest), jnp.uint32)
    exponent = (word + np.uint32(0x7FFFFF)) >> np.uint32(23)
    exponent = jnp.where(most < bits.TINY, 0, jnp.maximum(exponent, 1))
    return jnp.where(jnp.isfinite(most), exponent, 255)


@keyword_only
def cast(dtype: Any, *, block_size: int | None = 256) -> Compressor:
    """Sends every coordinate in a shorter floating-point format.

    bfloat16 keeps float32's range; float16 three more digits of a shorter range: what
    lies beyond 65504 saturates and what lies below 3e-8 vanishes. The 8-bit formats
    carry a power of two for every block, such that its largest magnitude is in their
    upper range, and no finite number becomes infinite. Values that are not finite
    arrive not finite.

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
      >>> tx = efopt.compressors.cast(jnp.float8_e4m3fn)
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
