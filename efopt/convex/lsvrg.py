"""L-SVRG: minibatch gradients without their noise, by a reference point."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.convex import coins, reference
from efopt.ground import checks
from efopt.workers.axes import Axes, AxisName
from efopt.workers.node import unwrap, wrap


class LsvrgState(NamedTuple):
    """State of :func:`lsvrg`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      reference: The reference point ``w``, shaped like the parameters. A
        :class:`efopt.PerWorker` if workers toss coins of their own.
      gradient: The gradient of this worker's whole data at the reference point; out of
        date from the step that moves the point to the next, which evaluates it. A
        :class:`efopt.PerWorker` if there is an axis.
      stale: Whether the next step evaluates that gradient whatever the coin says, as
        on another number of workers, whose points and data are others. shape=(), bool.
        A :class:`efopt.PerWorker` if workers toss coins of their own; ``()`` if not:
        what is then kept is the mean of gradients at one point.
    """

    count: jax.typing.ArrayLike
    reference: Any
    gradient: Any
    stale: Any = ()


@checks.keyword_only
def lsvrg(
    probability: float,
    *,
    axis_name: AxisName | None = None,
    coin: str = "shared",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces a minibatch gradient by one of far less variance.

    .. math::
      u_i = \nabla f_{ij}(x) - \nabla f_{ij}(w_i) + \nabla f_i(w_i), \qquad
      w_i \leftarrow x \text{ with probability } p

    ``u`` has the mean of the gradient, and its variance vanishes as ``x`` and ``w``
    reach the optimum: at a constant rate SGD then converges to the last digit. It
    stands in front of the feedback in a chain and wants two functions at every step::

      tx = optax.chain(lsvrg(1 / batches, axis_name="data"), ef_sgd(c, lr, ...))
      tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)

    where ``grads`` is ``grad_fn(params)``, on the current minibatch, and
    ``full_grad_fn`` takes the worker's whole data. Both see this worker's data only,
    without collectives, and parameters that are typed as the worker's own. The second
    is evaluated in the first step and in the step after the coin fell, in a branch of
    ``lax.cond``. (Under ``vmap`` over a stacked step count a branch becomes a
    selection, and the full gradient is evaluated always; keep the count unstacked.)

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: nothing is sent. ``2 + p * batches`` minibatch gradients a step.
    Properties: unbiased over the choice of the minibatch; coins are a hash of seed and
    step, and of the worker under ``coin="per_worker"``.
    Placement: the gradient per worker; the reference point too under
    ``coin="per_worker"``; all else replicated.

    Args:
      probability: Of the reference point to move, in (0, 1]; usually one over the
        number of minibatches.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      coin: ``"shared"``: all workers move at once, so there is one point, and nobody
        waits for the full gradient of another. ``"per_worker"``: each on its own.
      seed: Of the coins.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If an option is of another type.
      ValueError: If the probability is outside (0, 1] or the kind of coin unknown; at
        trace time, if the parameters, ``grad_fn`` or ``full_grad_fn`` are missing, the
        axis is not bound, updates are already averaged or the state is not placed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> data = jnp.array([1.0, 2.0, 6.0])
      >>> full = jax.grad(lambda x: jnp.mean((x - data) ** 2))
      >>> one = jax.grad(lambda x: (x - data[2]) ** 2)
      >>> tx, x = efopt.convex.lsvrg(0.5), jnp.array(0.0)
      >>> update, state = tx.update(
      ...     one(x), tx.init(x), x, grad_fn=one, full_grad_fn=full)
      >>> print(one(x), update)
      -12.0 -6.0

    References:
      Kovalev et al, `Don't Jump Through Hoops and Remove Those Loops
      <https://arxiv.org/abs/1901.08689>`_, 2019 (Algorithm 1)
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-LSVRG)
    """
    probability = coins.probability("lsvrg", probability)
    checks.choice("lsvrg", "coin", coin, ("shared", "per_worker"))
    checks.seed("lsvrg", seed)
    axes = Axes.maybe("lsvrg", axis_name)
    shared = coin == "shared"
    point_axes = None if shared else axes
    anchor = reference.Reference(probability, seed, axis_name, shared)

    def init_fn(params: Any) -> Any:
        return LsvrgState(
            count=jnp.zeros([], jnp.int32),
            reference=wrap(jax.tree.map(jnp.asarray, params), point_axes, "mean"),
            gradient=wrap(jax.tree.map(jnp.zeros_like, params), axes, "mean"),
            stale=marked(jnp.zeros([], bool)),
        )

    def marked(stale: Any) -> Any:
        return () if point_axes is None else wrap(stale, point_axes, "true")

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        grad_fn, full_grad_fn = reference.functions("lsvrg", params, extra_args)
        reference.check_own("lsvrg", axis_name, updates)
        point = unwrap("`lsvrg`", state.reference)

        # 1901.08689 Algorithm 1: grad f(w), where w was moved at the end of a step.
        full = anchor.refresh(
            state.count,
            lambda known: reference.gradient(full_grad_fn, point, known, axis_name),
            unwrap("`lsvrg`", state.gradient),
            False if point_axes is None else unwrap("`lsvrg`", state.stale),
        )
        # grad f_j(w), on the minibatch of the updates
        batch = reference.gradient(grad_fn, point, updates, axis_name)
        # u = grad f_j(x) - grad f_j(w) + grad f(w)
        updates = jax.tree.map(
            lambda g, r, f: g - r + f.astype(g.dtype), updates, batch, full
        )
        # w = x with probability p, the x in front of this step
        count = optax.safe_increment(state.count)
        point = anchor.move(count, point, params)
        return updates, LsvrgState(
            count,
            wrap(point, point_axes, "mean"),
            wrap(full, axes, "mean"),
            marked(jnp.zeros([], bool)),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
