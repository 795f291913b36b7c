"""QSGD (random dithering): random multiples of the block's norm."""

import dataclasses

from efopt.codecs.compressor import Compressor, make
from efopt.codecs.uniform import Uniform
from efopt.ground import checks
from efopt.ground.checks import keyword_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class QSGD(Uniform):
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


@keyword_only
def qsgd(levels: int = 7, *, block_size: int | None = 512, seed: int = 0) -> Compressor:
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
      seed: Selects the random numbers, in [0, 2**32). Static. Two in one chain draw
        alike unless each has its own.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If an option is out of range.

    Examples:
      >>> import efopt
      >>> efopt.compressors.qsgd(levels=7, block_size=512).payload_bits((1024,)) / 1024
      4.03125

    References:
      Alistarh et al, `QSGD: Communication-Efficient SGD via Gradient Quantization and
      Encoding <https://arxiv.org/abs/1610.02132>`_, 2016 (equation 4)
    """
    levels = checks.static_int("qsgd", "levels", levels, below=128)
    block_size = checks.block_size("qsgd", block_size)
    seed = checks.seed("qsgd", seed)
    return make(QSGD(levels=levels, block_size=block_size, seed=seed))
