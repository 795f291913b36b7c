"""Random-k sparsification: coordinates drawn at random, the same on every worker."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.sparse import SharedCoordinates
from efopt.compressors.identity import Identity
from efopt.ground import checks
from efopt.ground.checks import keyword_only
from efopt.ground.randomness import one_of_each_stratum, rotation


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomK(SharedCoordinates):
    """One coordinate of each of ``k`` strata, which are rotated at random."""

    values: Codec = Identity()

    def __repr__(self):
        return checks.composed(f"random_k({self.arguments()})", self.values)

    def places(self, payload, blocks, turn):
        del payload
        sizes, key = blocks.members, self.key(blocks, turn)
        kept = [self.kept(size) for size in sizes]
        offset = rotation(key, jnp.asarray(np.asarray(sizes, np.uint32)))
        drawn = blocks.runs(kept)
        place = one_of_each_stratum(
            drawn.of(key),
            drawn.place(),
            drawn.of(offset),
            short=drawn.number([n // k for n, k in zip(sizes, kept, strict=True)]),
            longer=drawn.number([n % k for n, k in zip(sizes, kept, strict=True)]),
            size=drawn.number(sizes),
        )
        return blocks.at(drawn, place)


@keyword_only
def random_k(
    *,
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
        Static. Two in one chain draw alike unless each has its own.

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
    block_size = checks.block_size("random_k", block_size)
    checks.sparsity("random_k", fraction, k, block_size)
    return make(
        RandomK(
            fraction=fraction,
            k=k,
            block_size=block_size,
            rescaled=checks.static_bool("random_k", "unbiased", unbiased),
            seed=checks.seed("random_k", seed),
        )
    )
