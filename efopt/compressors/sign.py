"""Sign compression: one bit a coordinate and nothing of its size."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.signs import fair_signs, signed
from efopt.ground import bits, checks
from efopt.ground.checks import keyword_only

ZEROS = ("fair", "positive")


@dataclasses.dataclass(frozen=True)
class Sign(Codec):
    """One bit a coordinate, no scale. The blocks only serve to cut leaves in ranges."""

    zero: str = "fair"

    one_bit: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True
    block_size: ClassVar[int | None] = 1024

    def __repr__(self):
        return "sign()" if self.zero == "fair" else f"sign(zero={self.zero!r})"

    def encode(self, x, blocks, turn):  # Algorithm 1: sign(g)
        if self.zero == "fair":
            return {"signs": fair_signs(x, blocks, turn)}
        return {"signs": bits.pack_tests(x, lambda lane: lane >= 0)}

    def decode(self, payload, blocks, turn):
        del turn
        one = jnp.ones((), blocks.compute_dtype)
        return signed(payload["signs"], one, blocks)

    def keeps_no_residual(self):
        return (
            "it forgets all magnitudes; store the residual with `efopt.quantize(4)` or "
            "`efopt.scaled_sign(64)`"
        )


@keyword_only
def sign(*, zero: str = "fair") -> Compressor:
    r"""Sends the sign of every coordinate, and nothing of its size.

    The compressor of signSGD. It forgets magnitudes altogether, so the learning rate
    alone sets the step; it is not contractive, and error feedback does not repair it:
    use :func:`scaled_sign` there. With ``exchange="majority_vote"`` one bit travels
    each way.

    .. math::  C(x)_j = \operatorname{sign}(x_j), \quad \operatorname{sign}(0) = \pm 1

    *Zeros.* One bit cannot say zero. A coordinate that is exactly zero, such as the row
    of an embedding that no batch touches, is sent as a coin that falls the other way at
    every second step: it moves by a step and back, and never drifts. Two neighbours
    among the workers send opposite coins, so that where few have a gradient their
    average or vote is left to these. A tie of an even vote is a zero as well, and is
    decided by the coin of the range's owner, the same for all. Were zero always
    positive, as with ``zero="positive"``, each untouched coordinate would move by the
    full rate at every step, and with an even number of workers ties would push the
    parameters away from the minimum.

    Shapes: each leaf ``(...)`` -> same shape and dtype, entries +1 and -1.
    Payload: uint8, 8 signs to a byte, leaves padded to blocks of at most 1024.
    Cost: ``d`` bits per leaf of ``d`` coordinates and the padding of its last block.
    Properties: biased; odd but for the coins, and odd in the mean; no contraction
    factor; not linear; random in what becomes of zeros alone.
    Placement: stateless; the step counter of the transformation turns the coins.

    Args:
      zero: ``"fair"``, or ``"positive"``: zeros and ties count as +1. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      ValueError: If ``zero`` is another word.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.sign()
      >>> grads = jnp.array([0.5, -3.0, 0.0])
      >>> first, state = tx.update(grads, tx.init(grads))
      >>> second, state = tx.update(grads, state)
      >>> print(first + second)  # what the zero was sent as, it takes back
      [ 2. -2.  0.]

    References:
      Bernstein et al, `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018 (Algorithm 1)
    """
    return make(Sign(checks.choice("sign", "zero", zero, ZEROS)))
