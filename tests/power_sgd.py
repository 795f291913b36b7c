"""A small PowerSGD, written against the codec contract as a later compressor would be.

It proves that the contract is wide enough: two rounds, state that is shared by all
workers, matrices instead of blocks, and vectors that go dense in the same exchange.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from efopt.compressors.base import Blocks, Codec, Message
from efopt.compressors.compressor import make
from efopt.compressors.identity import Identity


@dataclasses.dataclass(frozen=True)
class PowerSGD(Codec):
    """Rank ``rank`` of every matrix, 1905.13727 Algorithm 1, warm start."""

    rank: int

    linear: ClassVar[bool] = True  # it asks through the identity, which is
    stateful: ClassVar[bool] = True
    default_exchange: ClassVar[str] = "all_reduce"

    def block_shape(self, shape):
        if len(shape) < 2:
            return (1, *shape)
        return (1, shape[0], int(np.prod(shape[1:])))

    def init(self, shape, dtype):
        if len(shape) < 2:
            return ()
        _, _, columns = self.block_shape(shape)
        q = np.random.RandomState(0).randn(1, columns, self.rank)
        return jnp.asarray(q, jnp.float32)

    def rounds(self, x, blocks, state, turn):
        if x.ndim < 3:
            message = self._ask(x, blocks, turn)
            mean = yield message
            return mean, message.decode(), state
        p = yield self._ask(jnp.einsum("bnm,bmr->bnr", x, state), blocks, turn)
        p, _ = jnp.linalg.qr(p)
        mine = jnp.einsum("bnm,bnr->bmr", x, p)
        q = yield self._ask(mine, blocks, turn)
        return (
            jnp.einsum("bnr,bmr->bnm", p, q),
            jnp.einsum("bnr,bmr->bnm", p, mine),
            q,
        )

    def _ask(self, x, blocks, turn):
        blocks = Blocks(blocks.index, None, None, x.shape[1:], jnp.dtype(jnp.float32))
        return Message(Identity(), Identity().encode(x, blocks, turn), blocks, turn)


def power_sgd(rank: int):
    return make(PowerSGD(rank))


def initial_q(shape, rank) -> jax.Array:
    return PowerSGD(rank).init(shape, np.dtype("float32"))[0]
