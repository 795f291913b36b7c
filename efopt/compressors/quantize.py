"""Linear quantisation: integers of a few bits, and one step size a block."""

import dataclasses

from efopt.codecs.compressor import Compressor, make
from efopt.codecs.uniform import Uniform
from efopt.ground import checks
from efopt.ground.checks import keyword_only

SCALES = ("absmax", "l2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Uniform):
    """``2**(bits - 1) - 1`` levels on either side of zero."""

    bits: int

    def __repr__(self):
        return (
            f"quantize(bits={self.bits}, block_size={self.block_size}, "
            f"stochastic={self.stochastic}, scale={self.scale!r}, seed={self.seed})"
        )

    def steps(self):
        return 2 ** (self.bits - 1) - 1

    def keeps_no_residual(self):
        if self.stochastic or self.bits > 4:
            return None
        return (
            f"rounded to the nearest, {self.bits} bits lose the small coordinates of "
            "a residual at every step, and training stalls or diverges; pass "
            "`stochastic=True`, or use 8 bits"
        )


@keyword_only
def quantize(
    bits: int = 8,
    *,
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
      seed: Selects the random numbers, in [0, 2**32). Static. Two in one chain draw
        alike unless each has its own.

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
