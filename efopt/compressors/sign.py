"""Sign compression: one bit a coordinate and nothing of its size."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.ground import bits


@dataclasses.dataclass(frozen=True)
class Sign(Codec):
    """One bit a coordinate, no scale. The blocks only serve to cut leaves in ranges."""

    one_bit: ClassVar[bool] = True
    block_size: ClassVar[int | None] = 1024

    def __repr__(self):
        return "sign()"

    def encode(self, x, blocks, turn):
        del blocks, turn
        return {"signs": bits.pack_bits(x >= 0)}  # Algorithm 1: sign(g)

    def decode(self, payload, blocks, turn):
        del turn
        one = jnp.ones((), blocks.compute_dtype)
        return jnp.where(bits.unpack_bits(payload["signs"], blocks.size), one, -one)

    def keeps_no_residual(self):
        return (
            "it forgets all magnitudes; store the residual with `efopt.quantize(4)` or "
            "`efopt.scaled_sign(64)`"
        )


def sign() -> Compressor:
    r"""Sends the sign of every coordinate, and nothing of its size.

    The compressor of signSGD. It forgets magnitudes altogether, so the learning rate
    alone sets the step; it is not contractive, and error feedback does not repair it:
    use :func:`scaled_sign` there. With ``exchange="majority_vote"`` one bit travels
    each way.

    .. math::  C(x)_j = \operatorname{sign}(x_j), \quad \operatorname{sign}(0) = +1

    One bit cannot say zero: a coordinate that is exactly zero counts as positive.

    Shapes: each leaf ``(...)`` -> same shape and dtype, entries +1 and -1.
    Payload: uint8, 8 signs to a byte, leaves padded to blocks of at most 1024.
    Cost: ``d`` bits per leaf of ``d`` coordinates and the padding of its last block.
    Properties: biased; no contraction factor; not linear; no randomness.
    Placement: stateless.

    Returns:
      A :class:`efopt.Compressor`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.sign()
      >>> updates, _ = tx.update(jnp.array([0.5, -3.0, 0.0]), tx.init(jnp.zeros(3)))
      >>> print(updates)
      [ 1. -1.  1.]

    References:
      Bernstein et al, `signSGD: Compressed Optimisation for Non-Convex Problems
      <https://arxiv.org/abs/1802.04434>`_, 2018 (Algorithm 1)
    """
    return make(Sign())
