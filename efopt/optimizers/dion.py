"""Dion: orthonormal steps of low rank for matrices, any optimizer for the rest."""

from typing import Any

import jax
import optax

from efopt.feedback.dion import Matrices, direction, marked
from efopt.ground import checks
from efopt.optimizers.weight_decay import Mask, add_decay
from efopt.workers.axes import AxisName


@checks.keyword_only
def dion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | None = None,
    fraction: float | None = None,
    momentum: jax.typing.ArrayLike = 0.95,
    fallback: optax.GradientTransformation | None = None,
    matrices: Matrices | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Moves matrices along orthonormalised momentum of low rank.

    .. math::
      M_i &\leftarrow M_i + G_i, \quad
      P = \operatorname{orth}\Big( \frac{1}{n} \sum_i M_i Q \Big), \quad
      R = \frac{1}{n} \sum_i M_i^T P, \quad
      M_i \leftarrow M_i - (1 - \mu) P R^T \\
      Q &\leftarrow \text{columns of } R \text{ at length } 1, \quad
      X \leftarrow (1 - \gamma \lambda) X
      - \gamma \sqrt{d_{out} / d_{in}} \, P Q^T

    Of a matrix of ``m`` by ``n``, ``r (m + n)`` numbers travel, and the result is that
    of the same method on averaged gradients: see
    :func:`efopt.feedback.scale_by_dion`, which is all of it but rate, decay and the
    other leaves.

    *Rates.* A step has singular values of one, times the square root of outputs over
    inputs, so that one rate serves matrices of every size: 0.01 in the authors' code,
    as for Muon; ``fallback`` has its own.

    *The other leaves.* Biases, norms and whatever ``matrices`` leaves out is averaged
    uncompressed and given to ``fallback``, with its own rate and decay. Embeddings and
    the head are matrices by shape, not by nature: name them in ``matrices`` as false,
    as in the example.

    Known faults: a rank that is too small for the gradients' spectrum slows training
    (the paper takes 1/2 to 1/16 of the shorter side, less the larger the model); the
    step costs two products of the size of ``M Q`` and a QR; momentum takes a copy of
    the matrices in float32 on each worker.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``32 * rank * (rows + columns)`` bits per matrix in two all-reduces; other
    leaves dense.
    Properties: the step of averaged gradients; nothing is lost.
    Placement: momentum per worker, ``Q`` replicated, the state of ``fallback`` too.

    Args:
      learning_rate: A float or a schedule, for matrices.
      rank: As of :func:`efopt.feedback.scale_by_dion`, and so the two below. Static.
      fraction: As there. Static.
      momentum: As there; 0.95 is the paper's.
      fallback: An Optax optimizer for all other leaves, behind their average; ``None``:
        there are none.
      matrices: As there.
      weight_decay: Strength of the weight decay of matrices; 0.01 in the authors' code.
      mask: The matrices that decay, a tree of booleans (or a prefix of one) or a
        function of the parameters that returns it; ``None``: all.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      seed: As there. Static.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: As :func:`efopt.feedback.scale_by_dion`.
      ValueError: As there; if ``fallback`` is no Optax transformation; from ``init``,
        if there are other leaves and no ``fallback``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import efopt
      >>> params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4)), "b": jnp.ones(4)}
      >>> tx = efopt.optimizers.dion(
      ...     0.01, rank=2, fallback=optax.adamw(1e-3), axis_name="data",
      ...     matrices={"embed": False, "w": True, "b": False})
      >>> state = tx.init(params)

    References:
      Ahn et al, `Dion: Distributed Orthonormalized Updates
      <https://arxiv.org/abs/2504.05295>`_, 2025 (Algorithm 1)
    """
    exchange = direction(
        "dion",
        rank=rank,
        fraction=fraction,
        momentum=momentum,
        matrices=matrices,
        axis_name=axis_name,
        seed=seed,
    )
    step = optax.chain(
        add_decay(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)
    )

    def labels(tree: Any) -> Any:
        marks = marked(matrices, tree)
        _require(fallback is not None or all(jax.tree.leaves(marks)), marks)
        return jax.tree.map(lambda m: "matrix" if m else "other", marks)

    others = optax.set_to_zero() if fallback is None else fallback
    return optax.chain(
        exchange, optax.partition({"matrix": step, "other": others}, labels)
    )


def _require(complete: bool, marks: Any) -> None:
    if complete:
        return
    paths = jax.tree_util.tree_flatten_with_path(marks)[0]
    names = [jax.tree_util.keystr(path) or "the leaf" for path, m in paths if not m]
    raise ValueError(
        "`dion` moves matrices alone, and these leaves are none, or are left out of "
        f"`matrices`: {', '.join(names)}. Give them an optimizer: "
        "`dion(..., fallback=optax.adamw(1e-3))`."
    )
