"""Random-block sparsification (GRBS): neighbours from a start drawn at random."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.sparse import SharedCoordinates
from efopt.compressors.identity import Identity
from efopt.ground import checks
from efopt.ground.checks import keyword_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomBlock(SharedCoordinates):
    """Neighbours, from a start that is drawn anew; the first follows the last."""

    values: Codec = Identity()

    def __repr__(self):
        return checks.composed(f"random_block({self.arguments()})", self.values)

    def put(self, zeros, values, payload, blocks, turn):
        return self.add(zeros, values, payload, blocks, turn)

    def add(self, x, values, payload, blocks, turn):
        """A single block takes them as two slices: from the start, and from zero on.

        In a loop, whose array the compiler changes in its place. A GPU reads for every
        coordinate what is added to it: that joins the pass that computes ``x``.
        """
        if len(blocks.index) > 1:
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

        def looped(x):
            return lax.fori_loop(0, 2, add, x)

        def in_one_pass(x):
            place = jnp.arange(size, dtype=jnp.int32)
            which = place - start
            which = jnp.where(which < 0, which + size, which)
            near = jnp.minimum(which, k - 1)
            new = values.at[near].get(mode="promise_in_bounds")
            return jnp.where(which < k, x + new, x)

        x = lax.platform_dependent(
            x.reshape(-1), cuda=in_one_pass, rocm=in_one_pass, default=looped
        )
        return x[None]

    def places(self, payload, blocks, turn):
        del payload
        # GRBS of 2007.13221, section 3.3: k neighbours from a uniform start.
        sizes, key = blocks.members, self.key(blocks, turn)
        drawn = blocks.runs([self.kept(size) for size in sizes])
        start = key % jnp.asarray(np.asarray(sizes, np.uint32))
        place, size = drawn.of(start) + drawn.place(), drawn.number(sizes)
        return blocks.at(drawn, jnp.where(place < size, place, place - size))


@keyword_only
def random_block(
    *,
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
        Static. Two in one chain draw alike unless each has its own.

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
    block_size = checks.block_size("random_block", block_size)
    checks.sparsity("random_block", fraction, k, block_size)
    return make(
        RandomBlock(
            fraction=fraction,
            k=k,
            block_size=block_size,
            rescaled=checks.static_bool("random_block", "unbiased", unbiased),
            seed=checks.seed("random_block", seed),
        )
    )
