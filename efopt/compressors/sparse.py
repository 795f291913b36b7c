"""Sparsifiers: a few coordinates, exact to the leaf's precision."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.compressors import bits, options
from efopt.compressors.base import Codec
from efopt.compressors.compressor import Compressor, make


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sparse(Codec):
    """Keeps ``k`` coordinates, or the fraction, of every block."""

    fraction: float | None = None
    k: int | None = None
    block_size: int | None = None  # type: ignore[misc]

    def _options(self):
        size = f"fraction={self.fraction}" if self.k is None else f"k={self.k}"
        return f"{size}, block_size={self.block_size}"

    def kept(self, size: int) -> int:
        return options.kept(self.fraction, self.k, size)

    def delta(self, shape):
        size = self.block_shape(shape)[1]
        return self.kept(size) / size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(_Sparse):
    """The coordinates of largest magnitude; ties go to the first."""

    def __repr__(self):
        return f"top_k({self._options()})"

    def encode(self, x, blocks, turn):
        del turn
        k = self.kept(blocks.size)
        if k == blocks.size:
            return {"values": bits.cast(x, blocks.dtype)}
        _, index = lax.top_k(jnp.abs(x), k)
        values = jnp.take_along_axis(x, index, axis=1)
        narrow = np.min_scalar_type(blocks.size - 1)
        return {
            "indices": index.astype(narrow),
            "values": bits.cast(values, blocks.dtype),
        }

    def decode(self, payload, blocks, turn):
        del turn
        values = payload["values"].astype(blocks.compute_dtype)
        if "indices" not in payload:
            return values
        return scatter(payload["indices"].astype(jnp.int32), values, blocks.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomK(_Sparse):
    """Coordinates drawn anew each step, the same on every worker."""

    seed: int = 0

    linear: ClassVar[bool] = True
    default_exchange: ClassVar[str] = "all_reduce"

    def __repr__(self):
        return f"random_k({self._options()}, seed={self.seed})"

    def _indices(self, blocks, turn):
        key = bits.hash_words(np.uint32(self.seed), turn.step, blocks.index)
        index = bits.sample_without_replacement(
            key, self.kept(blocks.size), blocks.size
        )
        return index.astype(jnp.int32)

    def encode(self, x, blocks, turn):
        if self.kept(blocks.size) < blocks.size:
            x = jnp.take_along_axis(x, self._indices(blocks, turn), axis=1)
        return {"values": bits.cast(x, blocks.dtype)}

    def decode(self, payload, blocks, turn):
        values = payload["values"].astype(blocks.compute_dtype)
        if self.kept(blocks.size) == blocks.size:
            return values
        return scatter(self._indices(blocks, turn), values, blocks.size)


def scatter(index, values, size):
    """Blocks ``(n, size)``, zero but for ``values`` at ``index``, both ``(n, k)``."""
    n, _ = values.shape
    row = jnp.arange(n, dtype=jnp.int32)[:, None]
    zeros = jnp.zeros((n, size), values.dtype)
    return zeros.at[row, index].set(
        values, unique_indices=True, mode="promise_in_bounds"
    )


def top_k(
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
    block_size = options.block_size("top_k", block_size)
    options.sparsity("top_k", fraction, k, block_size)
    return make(TopK(fraction=fraction, k=k, block_size=block_size))


def random_k(
    fraction: float | None = None,
    k: int | None = None,
    block_size: int | None = None,
    seed: int = 0,
) -> Compressor:
    r"""Sends coordinates drawn at random, the same ones on every worker.

    The mask follows from ``seed`` and the step, so no index is sent, and the payloads
    of all workers add up: an ordinary all-reduce of ``k`` numbers.

    .. math::  C(x)_j = x_j \, 1[j \in S_t], \quad |S_t| = k

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``k`` values in the leaf's dtype per block.
    Cost: ``k * bits(dtype)`` bits per block.
    Properties: biased (not scaled by ``d / k``); ``delta = k / d`` per block of ``d``
    coordinates, in expectation and with equality; linear; random, ``S_t`` uniform and
    shared by all workers.
    Placement: stateless; the step counter of the transformation advances the mask.

    Args:
      fraction: Share of each block to keep, in (0, 1], rounded up. Static.
      k: Coordinates to keep of each block, at least 1; a smaller leaf is sent whole.
        Static. Give exactly one of the two.
      block_size: Coordinates per block; ``None``: the whole leaf is one. Static.
      seed: Selects the sequence of masks, in [0, 2**32); the same on every worker.
        Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``).
      ValueError: If not exactly one of ``fraction`` and ``k`` is given, or one is out
        of range, or ``k`` exceeds ``block_size``.

    Examples:
      >>> import efopt
      >>> efopt.random_k(fraction=0.01).payload_bits((1000, 10))
      3200

    References:
      Stich et al, `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_,
      2018
    """
    block_size = options.block_size("random_k", block_size)
    options.sparsity("random_k", fraction, k, block_size)
    seed = options.seed("random_k", seed)
    return make(RandomK(fraction=fraction, k=k, block_size=block_size, seed=seed))
