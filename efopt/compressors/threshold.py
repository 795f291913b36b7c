"""Hard threshold: the coordinates whose magnitude reaches it."""

import dataclasses

import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor, make
from efopt.compressors.top_k import TopK
from efopt.ground import checks
from efopt.ground.checks import keyword_only


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(TopK):
    """Of those coordinates, the ones whose magnitude reaches a threshold."""

    threshold: checks.Scalar

    def __repr__(self):
        text = f"threshold({self.threshold!r}, {self.arguments()})"
        return checks.composed(text, self.values)

    def select(self, x, blocks, turn):
        values, found = super().select(x, blocks, turn)
        threshold = self.threshold.at(turn.step).astype(x.dtype)
        return jnp.where(jnp.abs(values) < threshold, 0, values), found

    def told(self, payload, blocks, turn):
        x, marks = super().told(payload, blocks, turn)
        return x, jnp.where(x == 0, 0, marks)  # places are left over

    def delta(self, shape):
        del shape
        return None


@keyword_only
def threshold(
    threshold: optax.ScalarOrSchedule,
    *,
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
      >>> tx = efopt.compressors.threshold(1.5, k=2)
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
