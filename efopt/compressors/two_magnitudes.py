"""Two bits a coordinate: its sign, and which of two mean magnitudes it has."""

import dataclasses

import jax.numpy as jnp

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.signs import fair_signs, signed
from efopt.compressors.scaled_sign import LANE, mean_magnitude
from efopt.ground import bits, checks
from efopt.ground.checks import keyword_only


@dataclasses.dataclass(frozen=True)
class TwoMagnitudes(Codec):
    """A sign and one bit more a coordinate, and two scales a block."""

    block_size: int | None = None  # type: ignore[misc]

    def __repr__(self):
        return f"two_magnitudes(block_size={self.block_size})"

    def encode(self, x, blocks, turn):
        weight = blocks.mean_weight()
        mean = mean_magnitude(x, weight, blocks)
        size = jnp.abs(blocks.mask(x))
        high = size > blocks.everywhere().of(mean)
        number = blocks.sum(high.astype(x.dtype))
        below = jnp.maximum(blocks.valid().astype(x.dtype) - number, 1)
        return {
            "signs": fair_signs(x, blocks, turn),
            "high": bits.pack_bits(high),
            "scales": jnp.stack(
                [
                    mean_magnitude(jnp.where(high, 0, size), 1 / below, blocks),
                    mean_magnitude(
                        jnp.where(high, size, 0), 1 / jnp.maximum(number, 1), blocks
                    ),
                ],
                axis=1,
            ),
        }

    def decode(self, payload, blocks, turn):
        del turn
        high = bits.unpack_bits(payload["high"], blocks.size)
        low, large = map(blocks.everywhere().of, payload["scales"].T)
        return signed(payload["signs"], jnp.where(high, large, low), blocks)

    def lane(self, size):
        return None if self.block_size or size > LANE else (8, "signs")

    def delta(self, shape):
        return 1 / self.block_shape(shape)[1]


@keyword_only
def two_magnitudes(*, block_size: int | None = None) -> Compressor:
    r"""Sends every coordinate's sign, and which of two magnitudes of its block it has.

    Coordinates above the mean magnitude of a block have one, the mean of those; all
    others the mean of the rest. Of all that say in two bits who is above the mean it is
    the nearest, and never farther than :func:`efopt.scaled_sign`. Meant for values that
    are of one order already, such as the largest of a block:
    ``compose(top_k(k=64, tile=(64, 64)), two_magnitudes())``. The grid of
    ``efopt.quantize(2)`` has three values, zero among them, and draws which way to
    round; in SparseLoCo on a small language model one did as well as the other.

    .. math::
      C(x)_j = \operatorname{sign}(x_j) \cdot
      \operatorname{mean}\{|x_i| : (|x_i| > m) = (|x_j| > m)\}, \quad
      m = \|x\|_1 / d  \quad\text{per block}

    A block of zeros decodes to zero; a zero in another block is a coin, as with
    :func:`efopt.scaled_sign`. Padding has no share in a scale.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: uint8, 8 signs to a byte, and as many bits more; two scales a block,
    float32 (float64 for float64).
    Cost: ``2 d + 64 * ceil(d / block_size)`` bits per leaf, and the last block's
    padding.
    Properties: biased; contraction, at least that of :func:`efopt.scaled_sign`, ``1 /
    d``, and about 0.88 on Gaussian blocks of ``d``; not linear; random in what becomes
    of zeros alone.
    Placement: stateless; the step counter of the transformation turns the coins.

    Args:
      block_size: Coordinates that share the scales, at least 1; ``None``: the whole
        leaf. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If ``block_size`` is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If ``block_size < 1``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.compressors.two_magnitudes()
      >>> grads = jnp.array([1.0, -8.0, 3.0, 10.0])
      >>> print(tx.update(grads, tx.init(grads))[0])
      [ 2. -9.  2.  9.]

    References:
      Sarfi et al, `Communication Efficient LLM Pre-training with SparseLoCo
      <https://arxiv.org/abs/2508.15706>`_, 2025 (two-bit values of a sparse message)
    """
    return make(TwoMagnitudes(checks.block_size("two_magnitudes", block_size)))
