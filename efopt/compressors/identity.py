"""No compression: the baseline, and the codec through which others send arrays."""

import dataclasses
from typing import ClassVar

import jax

from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Codec, Message
from efopt.codecs.compressor import Compressor, make
from efopt.ground import bits


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
    """Sends the leaf as it is, in its own dtype and shape."""

    linear: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def __repr__(self):
        return "identity()"

    def block_shape(self, shape):
        return (1, *shape)

    def encode(self, x, blocks, turn):
        del turn
        return {"values": bits.cast(x, blocks.dtype)}

    def decode(self, payload, blocks, turn):
        del turn
        return payload["values"].astype(blocks.compute_dtype)

    def delta(self, shape):
        return 1.0

    def omega(self, shape):
        return 0.0


def plain(x: jax.Array, blocks: Blocks, turn: Turn) -> Message:
    """A message that holds blocks as they are, in the compute dtype."""
    return Message(Identity(), {"values": x}, blocks, turn)


def identity() -> Compressor:
    """Sends every leaf uncompressed.

    With :func:`efopt.error_feedback` it equals ``jax.lax.pmean`` bit for bit, which
    makes it the baseline of every comparison and the filling of ``optax.partition`` for
    leaves that should stay dense.

    Shapes: any leaf -> the same. Payload: the leaf, in its own dtype.
    Cost: ``bits(dtype) * d`` bits per leaf of ``d`` coordinates.
    Properties: linear; unbiased with ``omega = 0``; contraction ``delta = 1``.
    Placement: stateless.

    Returns:
      A :class:`efopt.Compressor`.

    Examples:
      >>> import efopt
      >>> efopt.compressors.identity().payload_bits((10,))
      320
    """
    return make(Identity())
