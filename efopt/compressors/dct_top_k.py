"""Top-k of cosine coefficients: what moves fast in every tile of a leaf."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs import nested
from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.compressors.identity import Identity
from efopt.compressors.power_sgd import matmul
from efopt.ground import checks
from efopt.ground.checks import keyword_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCTTopK(Codec):
    """The largest coefficients of the cosine transform of every tile.

    A block is a leaf as a matrix, ``(rows, columns)``; a vector has one column.
    """

    k: int
    tile: int
    values: Codec = Identity()
    chooses: ClassVar[bool] = True

    def __repr__(self):
        outer = f"dct_top_k(k={self.k}, tile={self.tile})"
        return checks.composed(outer, self.values)

    def with_values(self, values):
        return dataclasses.replace(self, values=values)

    def keeps_no_residual(self):
        return self.values.keeps_no_residual()

    def block_shape(self, shape):
        if len(shape) < 2:
            return (1, math.prod(shape), 1)
        return (1, math.prod(shape[:-1]), shape[-1])

    def sides(self, block: tuple[int, ...]) -> tuple[int, int]:
        """The sides of a tile: the largest divisors of those of a block."""
        rows, columns = (
            max(c for c in range(1, min(self.tile, side) + 1) if side % c == 0)
            for side in block
        )
        return rows, columns

    def kept(self, block: tuple[int, ...]) -> tuple[int, int]:
        """How many tiles a block has, and how many coefficients each sends."""
        size = math.prod(self.sides(block))
        return math.prod(block) // size, min(self.k, size)

    def encode(self, x, blocks, turn):
        (rows, columns), (a, b) = blocks.shape, self.sides(blocks.shape)
        n, (tiles, k) = x.shape[0], self.kept(blocks.shape)
        x = x.reshape(n, rows // a, a, columns // b, b)
        x = matmul("nraqb,ia->nriqb", x, cosines(a, x.dtype))
        x = matmul("nriqb,jb->nrqij", x, cosines(b, x.dtype)).reshape(n, tiles, a * b)
        _, index = lax.top_k(jnp.abs(x), k)
        values = jnp.take_along_axis(x, index, axis=2)
        return {
            "values": nested.write(self.values, values, blocks, turn),
            "indices": index.astype(np.min_scalar_type(a * b - 1)),
        }

    def decode(self, payload, blocks, turn):
        values = self._values(payload, blocks, turn)
        return self.unfold(self._placed(values, payload, blocks), blocks)

    def told(self, payload, blocks, turn):
        values = self._values(payload, blocks, turn)
        some = (values, jnp.ones_like(values))
        x, marks = (self._placed(v, payload, blocks) for v in some)
        return x, marks

    def _values(self, payload: Any, blocks: Blocks, turn: Turn) -> jax.Array:
        """The coefficients that are sent: ``(n, tiles, k)``."""
        kept = self.kept(blocks.shape)
        return nested.read(self.values, payload["values"], kept, blocks, turn)

    def _placed(self, values: jax.Array, payload: Any, blocks: Blocks) -> jax.Array:
        """All coefficients of every tile, ``(n * tiles, size)``, the others zero."""
        n, tiles, k = values.shape
        at = (
            jnp.arange(n * tiles, dtype=jnp.int32)[:, None],
            payload["indices"].reshape(n * tiles, k).astype(jnp.int32),
        )
        size = math.prod(self.sides(blocks.shape))
        x = jnp.zeros_like(values, shape=(n * tiles, size))
        values = values.reshape(n * tiles, k)
        return x.at[at].add(values, unique_indices=True, mode="promise_in_bounds")

    def unfold(self, x, blocks):
        (rows, columns), (a, b) = blocks.shape, self.sides(blocks.shape)
        x = x.reshape(-1, rows // a, columns // b, a, b)
        x = matmul("nrqij,ia->nrqaj", x, cosines(a, x.dtype))
        x = matmul("nrqaj,jb->nraqb", x, cosines(b, x.dtype))
        return x.reshape(-1, rows, columns)

    def delta(self, shape):
        """The transform keeps lengths: as of top-k, of the largest share of a tile."""
        block = self.block_shape(shape)[1:]
        tiles, k = self.kept(block)
        values = self.values.delta((tiles, k))
        return None if values is None else values * k * tiles / math.prod(block)


def cosines(size: int, dtype: Any) -> Any:
    """The orthonormal cosine transform of type II, a row a frequency."""
    place, frequency = np.arange(size)[None, :], np.arange(size)[:, None]
    rows = np.cos(np.pi * (2 * place + 1) * frequency / (2 * size))
    rows *= np.where(frequency == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return rows.astype(dtype)


@keyword_only
def dct_top_k(*, k: int, tile: int = 64) -> Compressor:
    r"""Sends the largest coefficients of the cosine transform of every tile of a leaf.

    .. math::
      C(X) = D^T \, \mathrm{top}_k(D X D'^T) \, D' \quad\text{per tile}

    where ``D`` and ``D'`` are orthonormal cosine transforms. What is smooth or repeats
    itself in a tile is few coefficients; for what does not, it is top-k of noise, at
    the price of two small matrix products each way. The compressor of
    :func:`efopt.optimizers.demo`.

    A matrix is cut in tiles whose sides are the largest divisors of its own that do not
    exceed ``tile``, as in the authors' code: a side that is prime and longer gives
    tiles one wide. Leading axes of a leaf of three or more are joined; a vector is cut
    in runs.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: for every tile ``k`` values in the leaf's dtype and ``k`` indices, uint8,
    uint16 or uint32, the narrowest that fits the tile.
    Cost: ``k * (bits(dtype) + bits(index))`` bits per tile.
    Properties: biased; contraction ``delta = k / d`` per tile of ``d`` coordinates,
    reached when all coefficients are equal; not linear; no randomness.
    Placement: stateless.

    Args:
      k: Coefficients to keep of each tile, at least 1; of a smaller tile all. Static.
      tile: The longest side of a tile, at least 1. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python int (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If one is below 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.compressors.dct_top_k(k=1)
      >>> updates, _ = tx.update(jnp.full(4, 2.0), tx.init(jnp.zeros(4)))
      >>> print(updates)  # a constant is one coefficient
      [2. 2. 2. 2.]

    References:
      Peng et al, `DeMo: Decoupled Momentum Optimization
      <https://arxiv.org/abs/2411.19870>`_, 2024 (section 3)
    """
    return make(
        DCTTopK(
            k=checks.static_int("dct_top_k", "k", k),
            tile=checks.static_int("dct_top_k", "tile", tile),
        )
    )
