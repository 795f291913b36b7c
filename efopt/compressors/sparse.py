"""Sparsifiers: a few coordinates of every block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from efopt.codecs import nested
from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.compressors.identity import Identity
from efopt.ground import checks, randomness


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Codec):
    """Keeps ``k`` coordinates, or the fraction, of every block.

    A subclass selects them; ``values`` writes them.
    """

    fraction: float | None = None
    k: int | None = None
    block_size: int | None = None  # type: ignore[misc]
    values: Codec = Identity()

    def options(self) -> str:
        size = f"fraction={self.fraction}" if self.k is None else f"k={self.k}"
        return f"{size}, block_size={self.block_size}"

    def kept(self, size: int) -> int:
        return checks.kept(self.fraction, self.k, size)

    def with_values(self, values):
        return dataclasses.replace(self, values=values)

    def select(
        self, x: jax.Array, blocks: Blocks, turn: Turn
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The kept values ``(n, k)``, and what a receiver needs to place them."""
        raise TypeError("`Sparse.select` is for subclasses to implement.")

    def places(self, payload: Any, blocks: Blocks, turn: Turn) -> jax.Array:
        """Where the values stand: int32 ``(n, k)``."""
        raise TypeError("`Sparse.places` is for subclasses to implement.")

    def encode(self, x, blocks, turn):
        values, found = self.select(x, blocks, turn)
        return {"values": nested.write(self.values, values, blocks, turn), **found}

    def decode(self, payload, blocks, turn):
        values = self.read(payload, blocks, turn)
        shape = len(blocks.index), blocks.size
        # Like the values: a loop's start has to vary over the workers as they do.
        zeros = jnp.zeros_like(values, shape=shape, dtype=blocks.compute_dtype)
        return self.filled(zeros, values, payload, blocks, turn)

    def decode_in(self, zeros, payload, blocks, turn):
        values = self.read(payload, blocks, turn)
        return self.filled(zeros, values, payload, blocks, turn)

    def filled(self, zeros, values, payload, blocks, turn):
        """Zeros with the values in their places; all of them, if none was left out."""
        if values.shape[1] == blocks.size:
            return values
        return self.add(zeros, values, payload, blocks, turn)

    def rest(self, x, payload, blocks, turn):
        values = self.read(payload, blocks, turn)
        if values.shape[1] == blocks.size:
            return x - values
        return self.add(x, -values, payload, blocks, turn)

    def add(
        self, x: jax.Array, values: jax.Array, payload: Any, blocks: Blocks, turn: Turn
    ) -> jax.Array:
        """Blocks ``x (n, size)`` with values ``(n, k)`` added in their places."""
        row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
        at = x.at[row, self.places(payload, blocks, turn)]
        return at.add(values, unique_indices=True, mode="promise_in_bounds")

    def read(self, payload: Any, blocks: Blocks, turn: Turn) -> jax.Array:
        """The values ``(n, k)`` of a payload."""
        k = self.kept(blocks.size)
        return nested.read(self.values, payload["values"], (k,), blocks, turn)

    def delta(self, shape):
        """What the values keep of the share that is kept."""
        size = self.block_shape(shape)[1]
        k = self.kept(size)
        values = self.values.delta((k,))
        return None if values is None else values * k / size


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Sparse):
    """The coordinates of largest magnitude; ties go to the first."""

    def __repr__(self):
        return checks.composed(f"top_k({self.options()})", self.values)

    def select(self, x, blocks, turn):
        del turn
        k = self.kept(blocks.size)
        if k == blocks.size:
            return x, {}
        _, index = lax.top_k(jnp.abs(x), k)
        narrow = np.min_scalar_type(blocks.size - 1)
        values = jnp.take_along_axis(x, index, axis=1)
        return values, {"indices": index.astype(narrow)}

    def places(self, payload, blocks, turn):
        del blocks, turn
        return payload["indices"].astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(TopK):
    """Of those coordinates, the ones whose magnitude reaches a threshold."""

    threshold: checks.Scalar

    def __repr__(self):
        text = f"threshold({self.threshold!r}, {self.options()})"
        return checks.composed(text, self.values)

    def select(self, x, blocks, turn):
        values, found = super().select(x, blocks, turn)
        threshold = self.threshold.at(turn.step).astype(x.dtype)
        return jnp.where(jnp.abs(values) < threshold, 0, values), found

    def delta(self, shape):
        del shape
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shared(Sparse):
    """Coordinates drawn anew each step, the same on every worker."""

    rescaled: bool = False
    seed: int = 0

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return self.values.linear

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.rescaled and self.values.unbiased

    def options(self):
        return f"{super().options()}, unbiased={self.rescaled}, seed={self.seed}"

    def key(self, blocks: Blocks, turn: Turn) -> jax.Array:
        """One word for every block, the same on every worker: uint32 ``(n,)``."""
        return randomness.hash_words(np.uint32(self.seed), turn.step, blocks.index)

    def select(self, x, blocks, turn):
        k = self.kept(blocks.size)
        if k == blocks.size:
            return x, {}
        values = jnp.take_along_axis(x, self.places({}, blocks, turn), axis=1)
        if self.rescaled:
            largest = float(jnp.finfo(x.dtype).max)
            scaled = jnp.clip(values * (blocks.size / k), -largest, largest)
            values = jnp.where(jnp.isfinite(values), scaled, values)
        return values, {}

    def delta(self, shape):
        if not self.rescaled:
            return super().delta(shape)
        omega = self.omega(shape)
        return None if omega is None or omega >= 1 else 1 - omega

    def omega(self, shape):
        size = self.block_shape(shape)[1]
        values = self.values.omega((self.kept(size),))
        if not self.unbiased or values is None:
            return None
        return size / self.kept(size) * (1 + values) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomK(_Shared):
    """One coordinate of each of ``k`` strata, which are rotated at random."""

    def __repr__(self):
        return checks.composed(f"random_k({self.options()})", self.values)

    def places(self, payload, blocks, turn):
        del payload
        k, size = self.kept(blocks.size), blocks.size
        return randomness.stratified_sample(self.key(blocks, turn), k, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomBlock(_Shared):
    """Neighbours, from a start that is drawn anew; the first follows the last."""

    def __repr__(self):
        return checks.composed(f"random_block({self.options()})", self.values)

    def add(self, x, values, payload, blocks, turn):
        """A single block takes them as two slices: from the start, and from zero on.

        In a loop, whose array the compiler changes in its place.
        """
        if len(x) > 1:
            return super().add(x, values, payload, blocks, turn)
        size, k = x.shape[1], values.shape[1]
        start = (self.key(blocks, turn)[0] % np.uint32(size)).astype(jnp.int32)
        values = values.reshape(-1)

        def add(wraps, x):
            first = jnp.where(wraps == 1, 0, jnp.minimum(start, size - k))
            place = jnp.arange(k, dtype=jnp.int32) + first
            which = place - start + size * wraps
            mine = (which < k) & ((place < start) == (wraps == 1))
            which = jnp.clip(which, 0, k - 1)
            new = jnp.where(mine, values.at[which].get(mode="promise_in_bounds"), 0)
            old = lax.dynamic_slice(x, (first,), (k,))
            return lax.dynamic_update_slice(x, old + new, (first,))

        return lax.fori_loop(0, 2, add, x.reshape(-1)).reshape(x.shape)

    def places(self, payload, blocks, turn):
        del payload
        start = self.key(blocks, turn) % np.uint32(blocks.size)
        place = jnp.arange(self.kept(blocks.size), dtype=jnp.uint32)
        place = start[:, None] + place[None, :]
        size = np.uint32(blocks.size)
        return jnp.where(place < size, place, place - size).astype(jnp.int32)


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
    block_size = checks.block_size("top_k", block_size)
    checks.sparsity("top_k", fraction, k, block_size)
    return make(TopK(fraction=fraction, k=k, block_size=block_size))


def random_k(
    fraction: float | None = None,
    k: int | None = None,
    block_size: int | None = None,
    unbiased: bool = False,
    seed: int = 0,
) -> Compressor:
    r"""Sends coordinates drawn at random, the same ones on every worker.

    The mask follows from ``seed`` and the step, so no index is sent, and the payloads
    of all workers add up: an ordinary all-reduce of ``k`` numbers.

    .. math::  C(x)_j = x_j \, 1[j \in S_t], \quad |S_t| = k

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``k`` values in the leaf's dtype per block.
    Cost: ``k * bits(dtype)`` bits per block.
    Properties: biased, ``delta = k / d`` per block of ``d`` coordinates, in expectation
    and with equality; with ``unbiased`` scaled by ``d / k``, ``omega = d / k - 1``, and
    a contraction only if ``omega < 1``; linear; random, every coordinate equally often
    in ``S_t``, which is stratified: one of each ``d / k`` neighbours, from a random
    offset. Shared by all workers.
    Placement: stateless; the step counter of the transformation advances the mask.

    Args:
      fraction: Share of each block to keep, in (0, 1], rounded up. Static.
      k: Coordinates to keep of each block, at least 1; a smaller leaf is sent whole.
        Static. Give exactly one of the two.
      block_size: Coordinates per block; ``None``: the whole leaf is one. Static.
      unbiased: Whether to scale what is sent by ``d / k``: right without feedback,
        wrong with it. Static.
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
    return make(_shared(RandomK, "random_k", fraction, k, block_size, unbiased, seed))


def random_block(
    fraction: float | None = None,
    k: int | None = None,
    block_size: int | None = None,
    unbiased: bool = False,
    seed: int = 0,
) -> Compressor:
    r"""Sends neighbouring coordinates from a random start, the same on every worker.

    Cheaper than :func:`random_k`, whose coordinates lie scattered over memory, and as
    contractive; correlated neighbours are sent or left together.

    .. math::  C(x)_j = x_j \, 1[(j - s_t) \bmod d < k], \quad s_t \text{ uniform}

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``k`` values in the leaf's dtype per block.
    Cost: ``k * bits(dtype)`` bits per block.
    Properties: biased, ``delta = k / d`` per block of ``d`` coordinates, in expectation
    and with equality; with ``unbiased`` scaled by ``d / k``, ``omega = d / k - 1``, and
    a contraction only if ``omega < 1``; linear; random, the start shared by all
    workers.
    Placement: stateless; the step counter of the transformation moves the block.

    Args:
      fraction: Share of each block to send, in (0, 1], rounded up. Static.
      k: Coordinates to send of each block, at least 1; a smaller leaf is sent whole.
        Static. Give exactly one of the two.
      block_size: Coordinates from which one start is drawn; ``None``: the whole leaf.
        Static.
      unbiased: Whether to scale what is sent by ``d / k``: right without feedback,
        wrong with it. Static.
      seed: Selects the sequence of starts, in [0, 2**32); the same on every worker.
        Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If an option is not a Python number (for example traced by
        ``optax.inject_hyperparams``), or ``unbiased`` no bool.
      ValueError: If not exactly one of ``fraction`` and ``k`` is given, or one is out
        of range, or ``k`` exceeds ``block_size``.

    Examples:
      >>> import efopt
      >>> efopt.random_block(fraction=0.1).payload_bits((1000, 10))
      32000

    References:
      Xie et al, `CSER: Communication-efficient SGD with Error Reset
      <https://arxiv.org/abs/2007.13221>`_, 2020 (section 3.3, GRBS)
    """
    codec = RandomBlock
    return make(_shared(codec, "random_block", fraction, k, block_size, unbiased, seed))


def threshold(
    threshold: optax.ScalarOrSchedule,
    fraction: float | None = None,
    k: int | None = None,
    block_size: int | None = None,
) -> Compressor:
    r"""Sends the coordinates whose magnitude reaches a threshold, as many as fit.

    With error feedback a fixed threshold spends its coordinates where they matter:
    none while little is owed, many after a large gradient. Arrays have static shapes
    under ``jit``, so the payload has a fixed capacity, the largest coordinates first;
    what does not fit stays owed, and places left over are sent as zeros.

    .. math::  C(x)_j = x_j \, 1[|x_j| \ge \lambda_t] \, 1[j \in \mathrm{top}_k(|x|)]

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: ``k`` values in the leaf's dtype and ``k`` indices per block, uint8, uint16
    or uint32, the narrowest that fits the block.
    Cost: ``k * (bits(dtype) + bits(index))`` bits per block, however few are sent.
    Properties: biased; no contraction factor, but an absolute error: at most ``d
    lambda^2`` per block of ``d`` coordinates as long as the capacity suffices; not
    linear; no randomness.
    Placement: stateless; the step counter of the transformation drives a schedule.

    Args:
      threshold: The smallest magnitude that is sent; a number, a schedule of the step,
        or a traced value, as ``optax.inject_hyperparams`` gives it.
      fraction: Capacity as a share of each block, in (0, 1], rounded up. Static.
      k: Capacity in coordinates of each block, at least 1. Static. Give exactly one of
        the two.
      block_size: Coordinates per block; ``None``: the whole leaf is one. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If a static option is not a Python number, or ``threshold`` is neither
        a scalar nor a schedule.
      ValueError: If ``threshold`` is negative or not finite, not exactly one of
        ``fraction`` and ``k`` is given, or one is out of range, or ``k`` exceeds
        ``block_size``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.threshold(1.5, k=2)
      >>> updates, _ = tx.update(jnp.array([1.0, -3.0, 2.0]), tx.init(jnp.zeros(3)))
      >>> print(updates)
      [ 0. -3.  2.]

    References:
      Sahu et al, `Rethinking gradient sparsification as total error minimization
      <https://arxiv.org/abs/2108.00951>`_, 2021 (hard threshold)
    """
    scalar = checks.scalar("threshold", "threshold", threshold)
    block_size = checks.block_size("threshold", block_size)
    checks.sparsity("threshold", fraction, k, block_size)
    return make(
        Threshold(threshold=scalar, fraction=fraction, k=k, block_size=block_size)
    )


def _shared(
    codec: type[_Shared],
    api: str,
    fraction: Any,
    k: Any,
    block_size: Any,
    unbiased: Any,
    seed: Any,
) -> Codec:
    block_size = checks.block_size(api, block_size)
    checks.sparsity(api, fraction, k, block_size)
    return codec(
        fraction=fraction,
        k=k,
        block_size=block_size,
        rescaled=checks.static_bool(api, "unbiased", unbiased),
        seed=checks.seed(api, seed),
    )
