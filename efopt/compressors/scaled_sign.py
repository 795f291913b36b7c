"""Scaled sign compression: one bit a coordinate, one mean magnitude a block."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Blocks
from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.signs import fair_signs, signed
from efopt.ground import checks

LANE = 1 << 16  # coordinates of a leaf up to which lanes are not the slower


@dataclasses.dataclass(frozen=True)
class ScaledSign(Codec):
    """One bit a coordinate and one scale a block, the mean magnitude."""

    block_size: int | None = None  # type: ignore[misc]

    pointwise: ClassVar[bool] = True

    def __repr__(self):
        return f"scaled_sign(block_size={self.block_size})"

    def encode(self, x, blocks, turn):
        # Algorithm 1: (|p|_1 / d) sign(p).
        return {
            "signs": fair_signs(x, blocks, turn),
            "scale": mean_magnitude(x, blocks.mean_weight(), blocks)[:, None],
        }

    def decode(self, payload, blocks, turn):
        del turn
        scale = blocks.everywhere().of(payload["scale"][:, 0])
        return signed(payload["signs"], scale, blocks)

    def lane(self, size):
        return None if self.block_size or size > LANE else (8, "signs")

    def delta(self, shape):
        return 1 / self.block_shape(shape)[1]


def mean_magnitude(x: jax.Array, weight: jax.Array, blocks: Blocks) -> jax.Array:
    """Mean of ``|x|`` over the valid coordinates of each block: ``(n,)``.

    One pass that neither overflows at 1e38 nor vanishes at 1e-30: every term is first
    divided by a power of two near ``size``, which is exact.
    """
    powers = [2.0 ** (size - 1).bit_length() for size in blocks.members]
    power = np.asarray(powers, x.dtype)
    terms = jnp.abs(x) * blocks.everywhere().of(jnp.asarray(1 / power))
    return blocks.sum(terms) * (weight * power)


def scaled_sign(block_size: int | None = None) -> Compressor:
    r"""Sends the sign of every coordinate and the mean magnitude of every block.

    The compressor of EF-signSGD: 32 times smaller than float32, and contractive, so
    error feedback makes it converge like SGD. Small blocks follow the gradient's scale
    more closely and can be exchanged in two phases.

    .. math::  C(x) = \frac{\|x\|_1}{d} \operatorname{sign}(x)  \quad\text{per block}

    A block of zeros has scale zero and decodes to zero. A zero in another block is sent
    as a coin that falls the other way at every second step, and the opposite way on
    each two neighbours among the workers: as with :func:`efopt.sign`, it does not
    drift. Padding has no share in a scale.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: uint8, 8 signs to a byte; one scale a block, float32 (float64 for float64).
    Cost: ``d + 32 * ceil(d / block_size)`` bits per leaf and the last block's padding.
    Properties: biased; contraction ``delta = |x|_1^2 / (d |x|_2^2)``, at least
    ``1 / d`` and about ``2 / pi`` on Gaussian blocks of ``d``; not linear; random
    in what becomes of zeros alone.
    Placement: stateless; the step counter of the transformation turns the coins.

    Args:
      block_size: Coordinates that share a scale, at least 1; ``None``: the whole leaf.
        Static. 1024 is a good choice.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If ``block_size`` is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If ``block_size < 1``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.scaled_sign()
      >>> updates, _ = tx.update(jnp.array([1.0, -3.0, 2.0]), tx.init(jnp.zeros(3)))
      >>> print(updates)
      [ 2. -2.  2.]

    References:
      Karimireddy et al, `Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes <https://arxiv.org/abs/1901.09847>`_, 2019 (Algorithm 1)
    """
    return make(ScaledSign(checks.block_size("scaled_sign", block_size)))
