"""The first steps uncompressed, in front of any feedback scheme."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.exchanges.exchange import mean
from efopt.feedback.compress import CompressState
from efopt.feedback.contractive import ContractiveErrorFeedbackState
from efopt.feedback.damped_error_feedback import DampedErrorFeedbackState
from efopt.feedback.error_feedback import ErrorFeedbackState
from efopt.ground import checks
from efopt.workers import axes
from efopt.workers.node import PerWorker, is_node

SCHEMES = (
    CompressState,
    ErrorFeedbackState,
    ContractiveErrorFeedbackState,
    DampedErrorFeedbackState,
)


def warm_up(
    scheme: optax.GradientTransformation, steps: int, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the first updates uncompressed, and leaves the later ones to a scheme.

    .. math::
      u_t = \begin{cases} \frac{1}{n} \sum_i g_i & t < T \\
      \text{the scheme's} & t \ge T \end{cases}

    While a network finds its scale, gradients are large and change quickly, and what is
    owed of them is soon wrong. The counter of the scheme decides, so that schedules go
    on and nothing is compiled anew; it is equal on all workers, which therefore meet in
    the same branch. Until then nothing is owed. The state is that of the scheme.

    Wrap the scheme itself, not a chain that holds it: ``chain(per_worker(...),
    warm_up(error_feedback(...), 1000, "data"), sgd(0.1))``.

    Shapes: those of the scheme.
    Cost: ``bits(dtype) * d`` bits per leaf of ``d`` coordinates in the first steps,
    then that of the scheme. The program holds both exchanges, each in a branch, and so
    does what :func:`efopt.hlo.measure` says of it.
    Properties: the average is bit-identical on all workers, first ``pmean``, then the
    scheme's.
    Placement: that of the scheme.

    Args:
      scheme: :func:`efopt.compress`, :func:`efopt.error_feedback`,
        :func:`efopt.contractive_error_feedback` or
        :func:`efopt.damped_error_feedback` over the same axis.
      steps: Updates that are averaged uncompressed, at least 1. Static.
      axis_name: The mapped axis to average over; ``None`` for one worker.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``steps`` is not a Python int (for example traced by
        ``optax.inject_hyperparams``); from ``init``, if ``scheme`` is none of these.
      ValueError: If ``steps < 1``; from ``init``, if the scheme works over another
        axis; at trace time as the scheme.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.warm_up(efopt.error_feedback(efopt.top_k(k=1)), steps=1)
      >>> grads = jnp.array([1.0, -3.0, 2.0])
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates, tx.update(grads, state)[0])
      [ 1. -3.  2.] [ 0. -3.  0.]

    References:
      Li et al, `Contractive error feedback for gradient compression
      <https://arxiv.org/abs/2312.08538>`_, 2023 (the code starts to compress after
      1000 steps)
    """
    checks.static_int("warm_up", "steps", steps)
    axes.check_axis_name("warm_up", axis_name)
    scheme = optax.with_extra_args_support(scheme)

    def init_fn(params: Any) -> Any:
        state = scheme.init(params)
        if not isinstance(state, SCHEMES):
            raise TypeError(
                "`warm_up(scheme)` takes `efopt.compress`, `efopt.error_feedback` or "
                "another scheme of efopt's itself, and no chain that holds one; got "
                f"a transformation with the state {type(state).__name__}."
            )
        nodes = [x for x in jax.tree.leaves(state, is_leaf=is_node) if is_node(x)]
        for node in nodes:
            if isinstance(node, PerWorker) and node.axis_name != axis_name:
                raise ValueError(
                    f"`warm_up(axis_name={axis_name!r})` must be the axis of its "
                    f"scheme, which works over {node.axis_name!r}."
                )
        return state

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        if axis_name is not None:
            axes.require_bound("`warm_up`", axis_name)
            axes.require_local("`warm_up`", axis_name, updates)

        def dense(updates, state):
            out = updates if axis_name is None else mean(updates, axis_name)
            return out, state._replace(count=optax.safe_increment(state.count))

        def compressed(updates, state):
            return scheme.update(updates, state, params, **extra_args)

        updates = jax.tree.map(jnp.asarray, updates)
        return lax.cond(state.count < steps, dense, compressed, updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
