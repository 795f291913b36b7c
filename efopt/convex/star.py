"""The shift that DIANA learns, given: for diagnosis."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from efopt.convex import reference
from efopt.ground import checks
from efopt.workers.axes import Axes, AxisName


@checks.keyword_only
def star(
    reference_grads: Any, *, axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Takes from each worker's gradient its own at the optimum, which must be known.

    .. math::  u_i = g_i - \nabla f_i(x^*) + \frac{1}{n} \sum_j \nabla f_j(x^*)

    Nobody knows it before the problem is solved. It tells, once that was done, whether
    a stall of error feedback comes from workers that differ: with ``star`` in front of
    it that cause is gone, and what remains is noise. The last term is zero at an exact
    optimum; it keeps the mean of updates whatever the reference.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: nothing is sent.
    Properties: the mean over workers is kept; at the optimum, with full gradients,
    every worker's update is the same small number, the gradient of the mean.
    Placement: stateless. ``reference_grads`` of all workers is part of the program.

    Args:
      reference_grads: Every worker's gradient at the reference point, a tree like the
        parameters with a leading worker axis; without one if ``axis_name`` is ``None``.
      axis_name: The mapped axis of the workers; ``None`` for one worker.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``axis_name`` is not a string or ``None``.
      ValueError: At trace time, if the axis is not bound, updates are already averaged,
        or there is not one reference gradient per worker.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> at_optimum = jnp.array([[1.0, 4.0], [-1.0, -4.0]])
      >>> tx = efopt.convex.star(at_optimum, axis_name="data")
      >>> step = jax.vmap(tx.update, axis_name="data")
      >>> state = efopt.stack_workers(tx.init(jnp.zeros(2)), 2)
      >>> print(step(jnp.array([[1.5, 4.0], [0.5, -4.0]]), state)[0])
      [[0.5 0. ]
       [1.5 0. ]]

    References:
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-GD-star)
    """
    axes = Axes.maybe("star", axis_name)

    def init_fn(params: Any) -> Any:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        if axes is None:
            return updates, state  # the worker's own gradient is the mean
        reference.check_own("star", axis_name, updates)
        worker, n = axes.index(), axes.size()

        def shifted(g, optimal):
            if jnp.shape(optimal) != (n, *g.shape):
                raise ValueError(
                    "`star(reference_grads)` takes one gradient per worker, here of "
                    f"shape {(n, *g.shape)}, and got {jnp.shape(optimal)}."
                )
            optimal = jnp.asarray(optimal)
            # u_i = g_i - grad f_i(x*) + mean_j grad f_j(x*)
            shift = optimal[worker] - jnp.mean(optimal, axis=0)
            return g - shift.astype(g.dtype)

        return jax.tree.map(shifted, updates, reference_grads), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
