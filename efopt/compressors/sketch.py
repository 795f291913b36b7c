"""Sketches: linear maps to fewer numbers, from which every coordinate is estimated."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.compressors import bits, options
from efopt.compressors.base import Codec, block_sum
from efopt.compressors.compressor import Compressor, make


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountSketch(Codec):
    """Sums of coordinates with random signs, ``width`` of them a row.

    The hash is structured: a block stands in lines of ``width`` coordinates, and each
    line is rotated by a random offset. Two coordinates of one line never meet, two of
    different lines with probability ``1 / width``, and every sum has equally many.
    """

    width: int | None = None
    fraction: float | None = None
    rows: int = 1
    block_size: int | None = None  # type: ignore[misc]
    seed: int = 0

    linear: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True
    default_exchange: ClassVar[str] = "all_reduce"

    def __repr__(self):
        size = f"fraction={self.fraction}" if self.width is None else f"{self.width}"
        return (
            f"count_sketch({size}, rows={self.rows}, block_size={self.block_size}, "
            f"seed={self.seed})"
        )

    def columns(self, size: int) -> int:
        """Sums in a row for a block of ``size`` coordinates."""
        return options.kept(self.fraction, self.width, size)

    def encode(self, x, blocks, turn):
        width = self.columns(blocks.size)
        lines = -(-blocks.size // width)
        padding = lines * width - blocks.size
        tables = []
        for row in range(self.rows):
            key = self._key(turn, row)
            signed = jnp.where(_signs(key, blocks), x, -x)
            signed = jnp.pad(signed, ((0, 0), (0, padding))).reshape(-1, lines, width)

            def add(line, total, key=key, signed=signed):
                part = lax.dynamic_index_in_dim(signed, line, 1, keepdims=False)
                return total + jnp.roll(part, _offset(key, line, width), axis=1)

            first = jnp.roll(signed[:, 0], _offset(key, jnp.int32(0), width), axis=1)
            tables.append(lax.fori_loop(1, lines, add, first))
        return {"sums": bits.cast(jnp.stack(tables, axis=1), blocks.dtype)}

    def decode(self, payload, blocks, turn):
        sums = payload["sums"].astype(blocks.compute_dtype)
        width = self.columns(blocks.size)
        lines = -(-blocks.size // width)
        estimates = []
        for row in range(self.rows):
            key, table = self._key(turn, row), sums[:, row]

            def put(line, out, key=key, table=table):
                part = jnp.roll(table, -_offset(key, line, width), axis=1)
                return lax.dynamic_update_index_in_dim(out, part, line, 1)

            out = jnp.broadcast_to(table[:, None], (len(table), lines, width))
            out = lax.fori_loop(0, lines, put, out)
            out = out.reshape(-1, lines * width)[:, : blocks.size]
            estimates.append(jnp.where(_signs(key, blocks), out, -out))
        if self.rows == 1:
            return estimates[0]
        n = len(sums)
        stacked = jnp.stack(estimates, axis=2).reshape(-1, self.rows)
        return block_sum(stacked).reshape(n, -1) * (1 / self.rows)

    def _key(self, turn, row):
        return bits.hash_words(np.uint32(self.seed), turn.step, np.uint32(row))

    def omega(self, shape):
        size = self.block_shape(shape)[1]
        return (-(-size // self.columns(size)) - 1) / self.rows

    def delta(self, shape):
        omega = self.omega(shape)
        return 1 - omega if omega < 1 else None


def _signs(key: jax.Array, blocks) -> jax.Array:
    """Which coordinates keep their sign: bool ``(n, size)``."""
    word = bits.hash_words(key, blocks.index)
    place = jnp.arange(blocks.size, dtype=jnp.uint32)[None, :]
    return bits.hash_words(word[:, None], place) >= np.uint32(2**31)


def _offset(key: jax.Array, line: jax.Array, width: int) -> jax.Array:
    """How far a line is rotated: int32 in ``[0, width)``."""
    word = bits.hash_words(key ^ np.uint32(0x5BD1E995), line)
    return (word % np.uint32(width)).astype(jnp.int32)


def count_sketch(
    width: int | None = None,
    fraction: float | None = None,
    rows: int = 1,
    block_size: int | None = None,
    seed: int = 0,
) -> Compressor:
    r"""Sends sums of coordinates with random signs, and estimates each from its sum.

    .. math::
      S_b = \sum_{h(j) = b} s_j x_j, \quad C(x)_j = s_j \, S_{h(j)}

    The hash ``h`` and the signs are the same on all workers and drawn anew each step,
    so sketches add up. Unbiased but noisy: every estimate carries what it shares its
    sum with. Meant for storing a residual in little memory, where the hash stands
    still, rather than for gradients under error feedback, where it can diverge.

    With several rows an estimate is the mean over rows, not the median: the mean keeps
    the sketch linear.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: sums ``(rows, width)`` per block, in the leaf's dtype.
    Cost: ``rows * width * bits(dtype)`` bits per block.
    Properties: linear; unbiased over hashes, ``omega = (ceil(d / width) - 1) / rows``
    per block of ``d`` coordinates; no contraction unless ``omega < 1``; random, the
    hash shared by all workers.
    Placement: stateless; the step counter of the transformation selects the hash.

    Args:
      width: Sums in a row for each block, at least 1; a smaller leaf is sent whole.
        Static.
      fraction: The same as a share of the block, in (0, 1], rounded up. Static. Give
        exactly one of the two.
      rows: Independent sketches, at least 1. Static.
      block_size: Coordinates that share a sketch; ``None``: the whole leaf. Static.
      seed: Selects the hashes, in [0, 2**32); the same on every worker. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If not exactly one of ``width`` and ``fraction`` is given, or an
        option is out of range, or ``width`` exceeds ``block_size``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> sketch = efopt.count_sketch(width=2)
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
    block_size = options.block_size("count_sketch", block_size)
    options.sparsity("count_sketch", fraction, width, block_size, "width")
    return make(
        CountSketch(
            width=width,
            fraction=fraction,
            rows=options.static_int("count_sketch", "rows", rows),
            block_size=block_size,
            seed=options.seed("count_sketch", seed),
        )
    )
