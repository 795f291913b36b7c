"""Dion's exchange: orthonormalised momentum of low rank, whose error stays in it."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import make
from efopt.compressors.identity import Identity
from efopt.exchanges.home import Home
from efopt.exchanges.opening import open_link
from efopt.feedback.low_rank import LowRank, PerLeaf
from efopt.feedback.orthonormal import Side
from efopt.ground import bits, checks
from efopt.ground.dtypes import compute_dtype
from efopt.workers.axes import AxisName

Matrices = Any  # a tree of booleans, or a function from parameters to one


class ScaleByDionState(NamedTuple):
    """State of :func:`scale_by_dion`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      momentum: The momentum of each matrix, and of nothing else: a
        :class:`efopt.PerWorker` if there is an axis. The workers' mean is the momentum
        of Dion on averaged gradients.
      link: With the right factor ``Q`` of each matrix, an
        :class:`efopt.exchanges.LinkState`. Equal on all workers.
    """

    count: jax.typing.ArrayLike
    momentum: Any
    link: Any


@checks.keyword_only
def scale_by_dion(
    *,
    rank: int | None = None,
    fraction: float | None = None,
    momentum: jax.typing.ArrayLike = 0.95,
    matrices: Matrices | None = None,
    axis_name: AxisName | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction in which Dion moves matrices; all else is averaged and passed on.

    .. math::
      M_i &\leftarrow M_i + G_i, \quad
      P = \operatorname{orth}\Big( \frac{1}{n} \sum_i M_i Q \Big), \quad
      R = \frac{1}{n} \sum_i M_i^T P \\
      M_i &\leftarrow M_i - (1 - \mu) P R^T, \quad
      Q \leftarrow \text{columns of } R \text{ at length } 1, \quad
      u = \sqrt{d_{out} / d_{in}} \, P Q^T

    Momentum stays with the worker, and is its own error memory: what the factors do not
    say of it is said later. Up to the orthonormalisation all is linear, and all workers
    subtract the same product, so that the mean of the ``M_i`` is the momentum of a
    single worker on averaged gradients: ``r (m + n)`` numbers travel in place of ``m
    n`` without any change of the result but rounding.

    The last axis of a leaf is its output, the one before it its input, as in Flax; axes
    before these are a batch of matrices, such as the layers of a ``scan``. The shorter
    side has the orthonormal factor. A matrix whose factors would be no smaller than it
    is sent as it is, unless its longer side is sharded. Where the rank of what came so
    far is lower than ``rank``, columns without content stay zero, and their ``Q`` is
    drawn anew.

    *Shards.* On a mesh with axes behind each worker the matrix is factorised whole,
    whichever of its sides is sharded: shards meet on the fast axes, in sums of factors
    and of small squares, and over the workers' axis each device sends the part of the
    factors that is its own.

    What is not finite in a gradient empties the momentum at that place; other leaves
    pass it on.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``32 * rank * (rows + columns)`` bits per matrix, in two all-reduces for the
    whole tree; other leaves in their own dtype, in the first of them.
    Properties: directions are biased and of one length; nothing is lost, the error
    stays in the momentum; the result is that of averaged gradients.
    Placement: ``momentum`` per worker, ``Q`` replicated, or sharded with its side.

    Args:
      rank: Columns of a factor, at least 1 and at most the shorter side. Static.
      fraction: Or the rank as a share of the shorter side, in (0, 1]. Static. Without
        both, 1/4.
      momentum: The share of what was applied that stays, in [0, 1).
      matrices: The leaves to be orthonormalised, of two axes or more: a tree of
        booleans (or a prefix of one) or a function of the parameters that returns it;
        ``None``: all leaves of two axes.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      seed: Selects random starts and sketches, in [0, 2**32); the same on every worker.
        Static.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``rank``, ``fraction`` or ``seed`` is not a Python number.
      ValueError: If both are given, or a number is out of range; from ``init``, if
        ``rank`` exceeds the shorter side of a matrix, or a leaf that ``matrices`` names
        has fewer than two axes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.feedback.scale_by_dion(rank=1)
      >>> grads = jnp.array([[0.0, 3.0], [0.0, 4.0]])
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(grads))
      >>> print(updates.round(3))  # of length one, whatever the gradient's
      [[0.  0.6]
       [0.  0.8]]

    References:
      Ahn et al, `Dion: Distributed Orthonormalized Updates
      <https://arxiv.org/abs/2504.05295>`_, 2025 (Algorithm 1)
    """
    return direction(
        "scale_by_dion",
        rank=rank,
        fraction=fraction,
        momentum=momentum,
        matrices=matrices,
        axis_name=axis_name,
        seed=seed,
    )


def direction(
    api: str,
    *,
    rank: int | None,
    fraction: float | None,
    momentum: jax.typing.ArrayLike,
    matrices: Matrices | None,
    axis_name: AxisName | None,
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    """:func:`scale_by_dion`, of this name in errors."""
    sizes = _Sizes(api, rank, fraction)
    seed = checks.seed(api, seed)
    checks.decay(api, "momentum", momentum)
    said = f"rank={rank}" if rank is not None else f"fraction={sizes.fraction}"
    link = open_link(api, make(PerLeaf((), said)), axis_name=axis_name, role="dion")

    def codec_of(leaf: Any, marked: bool, name: str) -> Any:
        return sizes.codec(jnp.shape(leaf), name, seed) if marked else Identity()

    def init_fn(params: Any) -> Any:
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        marks = marked(matrices, params)
        leaves = [
            codec_of(x, m, jax.tree_util.keystr(path) or "the leaf")
            for (path, x), m in zip(paths, jax.tree.leaves(marks), strict=True)
        ]
        own = dataclasses.replace(link, codec=PerLeaf(tuple(leaves), said))
        zeros = jax.tree.map(_zeros, params, marks)
        return ScaleByDionState(
            jnp.zeros([], jnp.int32), own.wrap(zeros, rule="mean"), own.init(params)
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        kept, treedef = link.unwrap(state.momentum), jax.tree.structure(updates)
        try:
            kept = treedef.flatten_up_to(kept)
        except ValueError:
            link.receive(updates, like=kept)  # says in which way they differ
            raise
        arrays = jax.tree.leaves(updates)
        like = [x if _absent(m) else m for m, x in zip(kept, arrays, strict=True)]
        grads = link.receive(updates, like=treedef.unflatten(like))
        given = jax.tree.leaves(grads)
        # Algorithm 1: M_i = M_i + G_i
        sums = [
            g if _absent(m) else _sum(m, g) for m, g in zip(kept, given, strict=True)
        ]
        home = state.link.home
        if isinstance(home, Home):  # knows the leaves whole, and how they are sharded
            codec = home.link.codec
        else:
            pairs = zip(given, kept, strict=True)
            leaves = [codec_of(g, not _absent(m), "a leaf") for g, m in pairs]
            codec = PerLeaf(tuple(leaves), said)
        got = dataclasses.replace(link, codec=codec).average(
            treedef.unflatten(sums), state.link, state.count, like=grads, wide=True
        )
        # M_i = M_i - (1 - mu) P R^T
        share = 1 - jnp.asarray(momentum, jnp.float32)
        parts = jax.tree.leaves(got.lost)
        new = [
            m if _absent(m) else bits.cast(x - share.astype(x.dtype) * part, m.dtype)
            for m, x, part in zip(kept, sums, parts, strict=True)
        ]
        out = jax.tree.map(lambda x, g: bits.cast(x, g.dtype), got.mean, grads)
        return out, ScaleByDionState(
            optax.safe_increment(state.count),
            link.wrap(treedef.unflatten(new), state.momentum),
            got.state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))


def marked(matrices: Matrices | None, params: Any) -> Any:
    """Which leaves are matrices: a tree of booleans like the parameters."""
    if matrices is None:
        return jax.tree.map(lambda x: len(jnp.shape(x)) == 2 and _size(x) > 0, params)
    marks = matrices(params) if callable(matrices) else matrices
    spread = lambda mark, part: jax.tree.map(  # noqa: E731
        lambda x: bool(mark) and _size(x) > 0, part
    )
    return jax.tree.map(spread, marks, params)


class _Sizes:
    """The rank of a matrix of any shape."""

    def __init__(self, api: str, rank: Any, fraction: Any):
        self.api, self.rank = api, rank
        if rank is None and fraction is None:
            fraction = 0.25
        checks.sparsity(api, fraction, rank, None, "rank")
        self.fraction = fraction

    def codec(self, shape: tuple[int, ...], name: str, seed: int) -> LowRank:
        """What is said of a leaf, whole on this device."""
        if len(shape) < 2:
            raise ValueError(
                f"`{self.api}(matrices=...)` names {name} of shape {shape}, which is "
                "no matrix: leave it to another optimizer, the `fallback` of "
                "`efopt.optimizers.dion`."
            )
        rows, columns = shape[-2:]
        short = min(rows, columns)
        if self.rank is not None and self.rank > short:
            raise ValueError(
                f"`{self.api}(rank={self.rank})` must not exceed the shorter side of a "
                f"matrix, and {name} has shape {shape}. Give a `fraction` of it, or "
                "leave this leaf out of `matrices`."
            )
        turned = columns <= rows
        return LowRank(
            rank=checks.kept(self.fraction, self.rank, short),
            short=Side(columns if turned else rows),
            long=Side(rows if turned else columns),
            turned=turned,
            scale=math.sqrt(columns / rows),
            seed=seed,
        )


def _absent(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _zeros(x: Any, mark: bool) -> Any:
    if not mark:
        return optax.MaskedNode()
    return jnp.zeros(jnp.shape(x), compute_dtype(jnp.result_type(x)))


def _sum(m: jax.Array, g: jax.Array) -> jax.Array:
    total = m + g.astype(m.dtype)
    return jnp.where(jnp.isfinite(total), total, 0)


def _size(x: Any) -> int:
    return math.prod(jnp.shape(x))
