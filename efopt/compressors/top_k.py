"""Top-k sparsification: the coordinates of largest magnitude."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.sparse import Sparse
from efopt.compressors.identity import Identity
from efopt.ground import bits, checks
from efopt.ground.checks import keyword_only

# Integers a row that are sorted by counting: to sort the eleven chunks that are kept of
# every block took an H100 3.9 ms of a step's 9.9 (355 M coordinates, blocks of 1024).
FEW = 64
# Coordinates of a block from which a GPU ranks three rows and not two: of 355 M in
# blocks of 4096 an H100's step took 6.4 ms and not 7.2. A CPU took a quarter more.
LONG = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Sparse):
    """The coordinates of largest magnitude; ties go to the first."""

    values: Codec = Identity()
    tile: tuple[int, int] | None = None  # of the same area as a block

    def __repr__(self):
        return checks.composed(f"top_k({self.arguments()})", self.values)

    def arguments(self):
        if self.tile is None:
            return super().arguments()
        return super().arguments().partition(", block_size")[0] + f", tile={self.tile}"

    def kept(self, size):
        if self.tile is None or self.k is None:
            return super().kept(size)
        return checks.kept(self.k / math.prod(self.tile), None, size)

    def block_shape(self, shape):
        sides = self._sides(shape)
        if sides is None:
            return super().block_shape(shape)
        return (math.prod(shape) // math.prod(sides), math.prod(sides))

    def _sides(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The tile that parts a matrix without a rest; ``None``: runs part it better.

        Each side is the largest divisor that is not above that of ``tile``.
        """
        if self.tile is None or len(shape) < 2 or 0 in shape:
            return None
        pairs = zip(shape[-2:], self.tile, strict=True)
        sides = tuple(
            next(s for s in range(min(n, t), 0, -1) if n % s == 0) for n, t in pairs
        )
        return sides if 4 * math.prod(sides) >= math.prod(self.tile) else None

    def flatten(self, x):
        sides = self._sides(x.shape)
        if sides is None:
            return x.reshape(-1)
        return _swapped(x.reshape(_tiled(x.shape, sides))).reshape(-1)

    def unflatten(self, x, shape):
        sides = self._sides(shape)
        if sides is None:
            return x.reshape(shape)
        outer, rows, row, columns, column = _tiled(shape, sides)
        return _swapped(x.reshape(outer, rows, columns, row, column)).reshape(shape)

    def select(self, x, blocks, turn):
        del turn
        k = self.kept(blocks.size)
        if k == blocks.size:
            return x, {}
        index = largest(x, k)
        values = jnp.take_along_axis(x, index, axis=1)
        width = _width(blocks.size)
        return values, {"indices": bits.pack_uints(index.astype(jnp.uint32), width)}

    def places(self, payload, blocks, turn):
        del turn
        width, k = _width(blocks.size), self.kept(blocks.size)
        return bits.unpack_uints(payload["indices"], width, k).astype(jnp.int32)


def _width(size: int) -> int:
    """Bits that number the coordinates of a block, at least a byte."""
    return max(8, (size - 1).bit_length())


def _tiled(shape: tuple[int, ...], sides: tuple[int, ...]) -> tuple[int, ...]:
    (rows, columns), (row, column) = shape[-2:], sides
    return (math.prod(shape[:-2]), rows // row, row, columns // column, column)


def _swapped(x: jax.Array) -> jax.Array:
    """Rows of tiles to rows of a matrix, or back."""
    return x.transpose(0, 1, 3, 2, 4)


def largest(x: jax.Array, k: int) -> jax.Array:
    """Where the ``k`` largest magnitudes of each row of ``(n, size)`` stand.

    In falling order, ties by index: int32 ``(n, k)``. Exact in two levels: the ``k``
    largest lie in those ``k`` chunks of neighbours whose maxima are the largest, and of
    equal maxima in the first ones, so that two short rows are ranked instead of a long
    one: the maxima, and the members of the chunks that are kept. Or in three: the
    maxima are ranked so themselves.
    """
    two = functools.partial(_ranked, k=k, lengths=[_chunk(x.shape[1], k)])
    if k > FEW or x.shape[1] < LONG:
        return two(x)
    three = functools.partial(_ranked, k=k, lengths=_chunks(x.shape[1], k))
    return lax.platform_dependent(x, cuda=three, default=two)


def _ranked(x: jax.Array, k: int, lengths: list[int]) -> jax.Array:
    """:func:`largest`, chunks of these lengths inside of one another."""
    levels, lengths = [x], [length for length in lengths if length > 1]
    for length in reversed(lengths):
        chunks = _chunked(jnp.abs(levels[-1]), length)
        while chunks.shape[2] > 1:  # on a CPU ten times faster than a reduction
            chunks = jnp.maximum(chunks[:, :, ::2], chunks[:, :, 1::2])
        levels.append(chunks[:, :, 0])
    _, kept = lax.top_k(jnp.abs(levels.pop()), k)
    for length in lengths:
        kept = _sorted(kept)  # of equal members the first is to win
        x = levels.pop()
        n, size = x.shape
        chosen = kept[:, :, None]
        members = _chunked(x, length)
        members = jnp.take_along_axis(members, chosen, 1, mode="promise_in_bounds")
        place = chosen * length + jnp.arange(length)[None, None, :]
        members = jnp.where(place < size, jnp.abs(members), -1).reshape(n, k * length)
        _, which = lax.top_k(members, k)
        place = place.reshape(n, k * length)
        kept = jnp.take_along_axis(place, which, axis=1, mode="promise_in_bounds")
    return kept


def _chunked(x: jax.Array, length: int) -> jax.Array:
    """Rows ``(n, size)`` in chunks, the last one padded: ``(n, chunks, length)``."""
    n, size = x.shape
    chunks = -(-size // length)
    x = jnp.pad(x, ((0, 0), (0, chunks * length - size)))
    return x.reshape(n, chunks, length)


def _sorted(x: jax.Array) -> jax.Array:
    """Different integers ``(n, k)`` in rising order; a few by counting those below."""
    if x.shape[1] > FEW:
        return jnp.sort(x, axis=1)
    rank = jnp.sum(x[:, :, None] > x[:, None, :], axis=2, dtype=x.dtype)
    here = rank[:, None, :] == jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None]
    return jnp.sum(jnp.where(here, x[:, None, :], 0), axis=2, dtype=x.dtype)


def _chunk(size: int, k: int) -> int:
    """The length of a chunk, a power of two: what makes the two short rows equal."""
    return 1 << max(0, round(math.log2(size / k) / 2))


def _chunks(size: int, k: int) -> list[int]:
    """The same of chunks inside of chunks, the longer ones first: of three rows."""
    power = max(0, round(math.log2(size / k) * 2 / 3))
    return [1 << -(-power // 2), 1 << power // 2]


@keyword_only
def top_k(
    *,
    fraction: float | None = None,
    k: int | None = None,
    block_size: int | None = None,
    tile: tuple[int, int] | None = None,
) -> Compressor:
    r"""Sends the coordinates of largest magnitude of every block.

    The best contraction for its size, at the price of sorting and of indices on the
    wire; workers choose different coordinates, so payloads cannot be summed.

    .. math::  C(x)_j = x_j \, 1[j \in \mathrm{top}_k(|x|)]

    Ties go to the lower index.

    *Tiles.* With ``tile=(64, 64)`` the blocks of matrices are tiles of them, not runs
    of rows: what is largest in a few rows and columns takes no place from the rest. The
    sides are the largest divisors of a matrix's last two axes that are not above
    those of the tile, so that nothing is padded; where that leaves less than a quarter
    of a tile, and in vectors and pieces of leaves, blocks are runs of as many
    coordinates as a tile has. ``k`` is of a whole tile, and of smaller ones the same
    share.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``k`` values in the leaf's dtype and ``k`` indices per block, of as many
    bits as number it, at least 8 (12 for 4096), packed in bytes. A block kept whole
    sends no indices.
    Cost: ``k * (bits(dtype) + bits(index))`` bits per block.
    Properties: biased; contraction ``delta = k / d`` per block of ``d`` coordinates,
    reached when all magnitudes are equal; not linear; no randomness.
    Placement: stateless.

    Args:
      fraction: Share of each block to keep, in (0, 1], rounded up. Static.
      k: Coordinates to keep of each block, at least 1; a smaller leaf is sent whole.
        Static. Give exactly one of the two.
      block_size: Coordinates per block; ``None``: the whole leaf is one. Static.
      tile: Rows and columns of a block of a matrix, in place of ``block_size``. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If not exactly one of ``fraction`` and ``k`` is given, or one is out
        of range, ``k`` exceeds ``block_size`` or the tile, or both are given.

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
      Sarfi et al, `Communication Efficient LLM Pre-training with SparseLoCo
      <https://arxiv.org/abs/2508.15706>`_, 2025 (tiles)
    """
    if tile is not None:
        block_size = _area(tile, block_size)
    block_size = checks.block_size("top_k", block_size)
    checks.sparsity("top_k", fraction, k, block_size)
    return make(TopK(fraction=fraction, k=k, block_size=block_size, tile=tile))


def _area(tile: Any, block_size: Any) -> int:
    """The coordinates of a tile, or a reasoned error."""
    if not isinstance(tile, tuple) or len(tile) != 2:
        raise TypeError(
            "`top_k(tile=...)` must be two Python ints, such as `(64, 64)`; got "
            f"{tile!r}."
        )
    for side in tile:
        checks.static_int("top_k", "tile", side)
    if block_size is not None:
        raise ValueError(
            "`top_k` takes one of `block_size` and `tile`, got "
            f"{block_size=} and {tile=}."
        )
    return math.prod(tile)
