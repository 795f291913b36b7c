"""Natural compression: sign and exponent, powers of two at random."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.ground import bits, checks
from efopt.ground.checks import keyword_only
from efopt.ground.randomness import private_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Natural(Codec):
    """Sign and exponent; the mantissa decides at random which exponent."""

    seed: int = 0

    unbiased: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True
    block_size: ClassVar[int | None] = 1024

    def __repr__(self):
        return f"natural(seed={self.seed})"

    def encode(self, x, blocks, turn):
        word = lax.bitcast_convert_type(bits.cast(x, jnp.float32), jnp.uint32)
        magnitude = word & np.uint32(0x7FFFFFFF)
        dither = private_bits(self.seed, blocks, turn, 23).astype(jnp.uint32)
        # Definition 1: the carry into the exponent has the probability of the mantissa.
        exponent = jnp.minimum((magnitude + dither) >> np.uint32(23), np.uint32(254))
        exponent = jnp.where(magnitude < np.uint32(1 << 23), 0, exponent)
        exponent = jnp.where(magnitude < np.uint32(255 << 23), exponent, 255)
        return {
            "exponents": exponent.astype(jnp.uint8),
            "signs": bits.pack_bits(word >> np.uint32(31)),
        }

    def decode(self, payload, blocks, turn):
        del turn
        magnitude = bits.float_of_exponent(payload["exponents"].astype(jnp.uint32))
        negative = bits.unpack_bits(payload["signs"], blocks.size)
        values = jnp.where(negative, -magnitude, magnitude)
        return values.astype(blocks.compute_dtype)

    def omega(self, shape):
        del shape
        return 1 / 8

    def delta(self, shape):
        del shape
        return 7 / 8


@keyword_only
def natural(*, seed: int = 0) -> Compressor:
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
      seed: Selects the random numbers, in [0, 2**32). Static. Two in one chain draw
        alike unless each has its own.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If ``seed`` is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If ``seed`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.compressors.natural()
      >>> updates, _ = tx.update(jnp.array([4.0, -0.5]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [ 4.  -0.5]

    References:
      Horvath et al, `Natural Compression for Distributed Deep Learning
      <https://arxiv.org/abs/1905.10988>`_, 2019 (Definition 1)
    """
    return make(Natural(seed=checks.seed("natural", seed)))
