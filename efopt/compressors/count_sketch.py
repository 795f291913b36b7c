"""Count sketch: sums of random signs, from which every coordinate is estimated."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.blocks import Blocks
from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.ground import bits, checks
from efopt.ground.checks import keyword_only
from efopt.ground.randomness import hash_words
from efopt.ground.sums import block_sum

HASHES = ("structured", "random")
OFFSET = 0x5BD1E995  # tells what places are hashed to from their signs
UNROLLED = 16  # lines whose sums are one expression
LANE = 1 << 13  # coordinates of a leaf up to which lanes are not the slower


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountSketch(Codec):
    """Sums of coordinates with random signs, ``width`` of them a row.

    Under the structured hash two coordinates of one line never meet, two of different
    lines with probability ``1 / width``, and no sum has more terms than there are
    lines. A sum finds its terms: it is written once, and nothing is scattered.
    """

    width: int | None = None
    fraction: float | None = None
    rows: int = 1
    block_size: int | None = None  # type: ignore[misc]
    hash: str = "structured"
    seed: int = 0

    linear: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    def __repr__(self):
        size = "fraction" if self.width is None else "width"
        return (
            f"count_sketch({size}={getattr(self, size)}, rows={self.rows}, "
            f"block_size={self.block_size}, hash={self.hash!r}, seed={self.seed})"
        )

    def block_shape(self, shape):
        n, size = super().block_shape(shape)
        checks.numbered(repr(self), shape, size)
        return (n, size)

    def columns(self, size: int) -> int:
        """Sums in a row for a block of ``size`` coordinates."""
        return checks.kept(self.fraction, self.width, size)

    def lines(self, size: int) -> int:
        """The most terms that a sum has under the structured hash."""
        return -(-size // self.columns(size))

    def encode(self, x, blocks, turn):
        add = self._gather if self.hash == "structured" else self._scatter
        tables = [add(x, blocks, self._key(turn, row)) for row in range(self.rows)]
        return {"sums": bits.cast(jnp.stack(tables, axis=1), blocks.dtype)}

    def decode(self, payload, blocks, turn):
        sums, estimates = payload["sums"], []
        for row in range(self.rows):
            key = self._key(turn, row)
            everywhere = blocks.everywhere()
            place = everywhere.place()
            bucket = self._bucket(key, blocks)
            x = sums[:, row].at[:, bucket[0]].get(mode="promise_in_bounds")
            x = x.astype(blocks.compute_dtype)
            keep = _keeps(everywhere.of(_words(key, blocks)), place)
            estimates.append(jnp.where(keep, x, -x))
        if self.rows == 1:
            return estimates[0]
        stacked = jnp.stack(estimates, axis=2)
        total = block_sum(stacked.reshape(-1, self.rows))
        return total.reshape(stacked.shape[:2]) * (1 / self.rows)

    def increment(self, payload, x, recalled, ratio, blocks, turn):
        """A sum is recalled as often as it has terms."""
        if self.rows > 1 or self.hash != "structured" or blocks.count is not None:
            return super().increment(payload, x, recalled, ratio, blocks, turn)
        key, last = self._key(turn, 0), self.lines(blocks.size) - 1

        old = payload["sums"]
        # The last line may be short: its coordinates' sums follow one another.
        width = self.columns(blocks.size)
        begin = _offset(key, jnp.uint32(last), np.uint32(width))
        end = begin + np.uint32(blocks.size - last * width)
        bucket = jnp.arange(width, dtype=jnp.uint32)
        wrapped = jnp.maximum(end, np.uint32(width)) - np.uint32(width)
        full = (bucket >= begin) & (bucket < end) | (bucket < wrapped)
        terms = (last + full).astype(x.dtype)
        rest = old.astype(x.dtype) * (1 - recalled * terms)[None, None]
        rest = rest if ratio is None else rest * ratio.astype(rest.dtype)
        new = rest + self._gather(x, blocks, key)[:, None]
        return {"sums": bits.cast(new, old.dtype)}

    def _key(self, turn, row):
        return hash_words(np.uint32(self.seed), turn.draw, np.uint32(row))

    def _bucket(self, key, blocks):
        """The sum of a row to which each coordinate belongs: int32 ``(1, size)``."""
        widths, here = self._columns(blocks), blocks.everywhere()
        place, width = here.place(), here.number(widths)
        if self.hash == "random":
            word = hash_words(key ^ np.uint32(OFFSET), place)
            return (word % width).astype(jnp.int32)
        place = jnp.minimum(place, here.number([n - 1 for n in blocks.members]))
        lines = max(map(self.lines, blocks.members))
        if lines > UNROLLED:
            line = lax.div(*jnp.broadcast_arrays(place, jnp.asarray(width)))
            start, offset = line * width, _offset(key, line, width)
        else:
            start = jnp.uint32(0)
            offset = here.of(_offset(key, jnp.uint32(0), _numbers(widths)))
            for line in range(1, lines):
                beyond = place >= line * width
                start = jnp.where(beyond, line * width, start)
                more = here.of(_offset(key, jnp.uint32(line), _numbers(widths)))
                offset = jnp.where(beyond, more, offset)
        bucket = place - start + offset
        bucket = jnp.where(bucket < width, bucket, bucket - width)
        first = here.number(blocks.runs(widths).starts)
        return (bucket + first).astype(jnp.int32)

    def _columns(self, blocks):
        return [self.columns(size) for size in blocks.members]

    def _gather(self, x, blocks, key):
        """Sums, each of which collects its terms: ``(n, width)``."""
        widths, sizes = self._columns(blocks), blocks.members
        sums = blocks.runs(widths)
        bucket, width, size = sums.place(), sums.number(widths), sums.number(sizes)
        words = sums.of(_words(key, blocks))

        def add(line, total):
            line = line.astype(jnp.uint32)
            offset = sums.of(_offset(key, line, _numbers(widths)))
            column = bucket - offset  # of unsigned words, which wrap around
            column = jnp.where(bucket < offset, column + width, column)
            # The place in the line that belongs to each sum, past the end if none does.
            place = line * width + column
            inside = blocks.at(sums, jnp.minimum(place, size - np.uint32(1)))
            part = x.at[:, inside[0]].get(mode="promise_in_bounds")
            part = jnp.where(place < size, part, 0)
            return total + jnp.where(_keeps(words, place), part, -part)

        lines, total = max(map(self.lines, sizes)), add(jnp.int32(0), 0.0)
        if lines > UNROLLED:
            return lax.fori_loop(1, lines, add, total)
        for line in range(1, lines):
            total = add(jnp.int32(line), total)
        return total

    def _scatter(self, x, blocks, key):
        """Sums, to which each coordinate is added: ``(n, width)``."""
        place = jnp.arange(blocks.size, dtype=jnp.uint32)[None]
        signed = jnp.where(_keeps(_words(key, blocks)[:, None], place), x, -x)
        zeros = jnp.zeros_like(x, shape=(len(x), self.columns(blocks.size)))
        return zeros.at[:, self._bucket(key, blocks)[0]].add(signed)

    def lane(self, size):
        if self.block_size or self.hash != "structured" or size > LANE:
            return None
        return 8, self.lines(size).bit_length()  # all walk through the most lines

    def omega(self, shape):
        size = self.block_shape(shape)[1]
        if self.hash == "random":
            return (size - 1) / self.columns(size) / self.rows
        return (self.lines(size) - 1) / self.rows

    def delta(self, shape):
        omega = self.omega(shape)
        return 1 - omega if omega < 1 else None


def _words(key: jax.Array, blocks: Blocks) -> jax.Array:
    """What the signs of each block are drawn from: uint32 ``(n,)``."""
    return hash_words(key, blocks.index)


def _keeps(word: jax.Array, place: jax.Array) -> jax.Array:
    """Which coordinates keep their sign."""
    return hash_words(word, place) >= np.uint32(2**31)


def _numbers(values: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.asarray(values, np.uint32))


def _offset(
    key: jax.Array, line: jax.typing.ArrayLike, width: jax.typing.ArrayLike
) -> jax.Array:
    """How far a line is rotated: uint32 in ``[0, width)``."""
    return hash_words(key ^ np.uint32(OFFSET), line) % width


@keyword_only
def count_sketch(
    *,
    width: int | None = None,
    fraction: float | None = None,
    rows: int = 1,
    block_size: int | None = None,
    hash: str = "structured",
    seed: int = 0,
) -> Compressor:
    r"""Sends sums of coordinates with random signs, and estimates each from its sum.

    .. math::
      S_b = \sum_{h(j) = b} s_j x_j, \quad C(x)_j = s_j \, S_{h(j)}

    The hash ``h`` and the signs are the same on all workers and drawn anew each step,
    so sketches add up. Unbiased but noisy: every estimate carries what it shares its
    sum with. Meant for storing a residual in little memory, where the hash stands
    still (see :func:`efopt.contractive_error_feedback`), rather than for gradients
    under error feedback, where it can diverge.

    *The hash.* ``"structured"``: a block stands in lines of ``width`` coordinates, each
    line is rotated by a random offset. Two coordinates meet with a probability of at
    most ``1 / width``, as under the papers' hash, but every sum has equally many terms,
    and finds them without a scatter. ``"random"``, the papers': each coordinate draws
    its sum; some sums have several times more terms than others, and on a CPU it takes
    several times as long.

    With several rows an estimate is the mean over rows, not the median: the mean keeps
    the sketch linear.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: sums ``(rows, width)`` per block, in the leaf's dtype.
    Cost: ``rows * width * bits(dtype)`` bits per block.
    Properties: linear; unbiased over hashes, ``omega = (ceil(d / width) - 1) / rows``
    per block of ``d`` coordinates (``"random"``: ``(d - 1) / (width * rows)``); no
    contraction unless ``omega < 1``; random, the hash shared by all workers.
    Placement: stateless; the step counter of the transformation selects the hash.

    Args:
      width: Sums in a row for each block, at least 1; a smaller leaf is sent whole.
        Static.
      fraction: The same as a share of the block, in (0, 1], rounded up. Static. Give
        exactly one of the two.
      rows: Independent sketches, from 1 to 64: each is a part of the program. Static.
      block_size: Coordinates that share a sketch; ``None``: the whole leaf. Static.
      hash: ``"structured"`` or ``"random"``. Static.
      seed: Selects the hashes, in [0, 2**32); the same on every worker. Static. Two in
        one chain draw alike unless each has its own.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If not exactly one of ``width`` and ``fraction`` is given, an option
        is out of range or unknown, or ``width`` exceeds ``block_size``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> sketch = efopt.compressors.count_sketch(width=2)
      >>> a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0])
      >>> table = sketch.compress(a)["sums"] + sketch.compress(b)["sums"]
      >>> bool((table == sketch.compress(a + b)["sums"]).all())
      True

    References:
      Charikar et al, `Finding Frequent Items in Data Streams
      <https://doi.org/10.1007/3-540-45465-9_59>`_, 2002
      Li et al, `Contractive error feedback for gradient compression
      <https://arxiv.org/abs/2312.08538>`_, 2023 (for the residual)
    """
    block_size = checks.block_size("count_sketch", block_size)
    checks.sparsity("count_sketch", fraction, width, block_size, "width")
    checks.choice("count_sketch", "hash", hash, HASHES)
    return make(
        CountSketch(
            width=width,
            fraction=fraction,
            rows=checks.static_int("count_sketch", "rows", rows, below=65),
            block_size=block_size,
            hash=hash,
            seed=checks.seed("count_sketch", seed),
        )
    )
