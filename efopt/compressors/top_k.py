"""Top-k sparsification: the coordinates of largest magnitude."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.sparse import Sparse
from efopt.compressors.identity import Identity
from efopt.ground import checks
from efopt.ground.checks import keyword_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Sparse):
    """The coordinates of largest magnitude; ties go to the first."""

    values: Codec = Identity()

    def __repr__(self):
        return checks.composed(f"top_k({self.arguments()})", self.values)

    def select(self, x, blocks, turn):
        del turn
        k = self.kept(blocks.size)
        if k == blocks.size:
            return x, {}
        index = largest(x, k)
        narrow = np.min_scalar_type(blocks.size - 1)
        values = jnp.take_along_axis(x, index, axis=1)
        return values, {"indices": index.astype(narrow)}

    def places(self, payload, blocks, turn):
        del blocks, turn
        return payload["indices"].astype(jnp.int32)


def largest(x: jax.Array, k: int) -> jax.Array:
    """Where the ``k`` largest magnitudes of each row of ``(n, size)`` stand.

    In falling order, ties by index: int32 ``(n, k)``. Exact in two levels: the ``k``
    largest lie in those ``k`` chunks of neighbours whose maxima are the largest, and of
    equal maxima in the first ones, so that two short rows are ranked instead of a long
    one: the maxima, and the members of the chunks that are kept.
    """
    n, size = x.shape
    length = _chunk(size, k)
    if length == 1:
        return lax.top_k(jnp.abs(x), k)[1]
    chunks = -(-size // length)
    x = jnp.pad(x, ((0, 0), (0, chunks * length - size))).reshape(n, chunks, length)
    maxima = jnp.abs(x)
    while maxima.shape[2] > 1:  # on a CPU ten times faster than a reduction
        maxima = jnp.maximum(maxima[:, :, ::2], maxima[:, :, 1::2])
    _, kept = lax.top_k(maxima[:, :, 0], k)
    kept = jnp.sort(kept, axis=1)  # of equal members the first is to win
    members = jnp.take_along_axis(x, kept[:, :, None], 1, mode="promise_in_bounds")
    place = kept[:, :, None] * length + jnp.arange(length)[None, None, :]
    members = jnp.where(place < size, jnp.abs(members), -1).reshape(n, k * length)
    place = place.reshape(n, k * length)
    _, which = lax.top_k(members, k)
    return jnp.take_along_axis(place, which, axis=1, mode="promise_in_bounds")


def _chunk(size: int, k: int) -> int:
    """The length of a chunk, a power of two: what makes the two short rows equal."""
    return 1 << max(0, round(math.log2(size / k) / 2))


@keyword_only
def top_k(
    *,
    fraction: float | None = None,
    k: int | None = None,
    block_size: int | None = None,
) -> Compressor:
    r"""Sends the coordinates of largest magnitude of every block.

    The best contraction for its size, at the price of sorting and of indices on the
    wire; workers choose different coordinates, so payloads cannot be summed.

    .. math::  C(x)_j = x_j \, 1[j \in \mathrm{top}_k(|x|)]

    Ties go to the lower index.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``k`` values in the leaf's dtype and ``k`` indices per block, uint8, uint16
    or uint32, the narrowest that fits the block. A block kept whole sends no indices.
    Cost: ``k * (bits(dtype) + bits(index))`` bits per block.
    Properties: biased; contraction ``delta = k / d`` per block of ``d`` coordinates,
    reached when all magnitudes are equal; not linear; no randomness.
    Placement: stateless.

    Args:
      fraction: Share of each block to keep, in (0, 1], rounded up. Static.
      k: Coordinates to keep of each block, at least 1; a smaller leaf is sent whole.
        Static. Give exactly one of the two.
      block_size: Coordinates per block; ``None``: the whole leaf is one. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If not exactly one of ``fraction`` and ``k`` is given, or one is out
        of range, or ``k`` exceeds ``block_size``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.top_k(k=1)
      >>> updates, _ = tx.update(jnp.array([1.0, -3.0, 2.0]), tx.init(jnp.zeros(3)))
      >>> print(updates)
      [ 0. -3.  0.]

    References:
      Stich et al, `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_,
      2018
    """
    block_size = checks.block_size("top_k", block_size)
    checks.sparsity("top_k", fraction, k, block_size)
    return make(TopK(fraction=fraction, k=k, block_size=block_size))
