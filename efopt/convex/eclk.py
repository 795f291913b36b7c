"""ECLK: acceleration and variance reduction behind error feedback."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efopt.compressors import Compressor, identity
from efopt.convex import coins
from efopt.convex.ec_sgd import check_contractive
from efopt.exchanges import exchange
from efopt.feedback import error_feedback
from efopt.ground import checks
from efopt.ground.dtypes import compute_dtype
from efopt.workers.node import unwrap, wrap

Prox = Callable[[Any, float], Any]  # of a tree of parameters and a step size


class EclkState(NamedTuple):
    """State of :func:`eclk`; the parameters themselves are the iterate ``x``.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers, as all the rest but
        ``own`` and the residual.
      y: The iterate behind ``x``, shaped like the parameters, at least float32.
      z: The iterate of long steps.
      w: The reference point.
      own: The gradient of this worker's whole data at the reference point; out of date
        from the step that moves the point to the next, which evaluates it. A
        :class:`efopt.PerWorker` if there is an axis.
      gradient: The workers' mean of it.
      feedback: The state of the error feedback: an :class:`efopt.ErrorFeedbackState`.
    """

    count: jax.typing.ArrayLike
    y: Any
    z: Any
    w: Any
    own: Any
    gradient: Any
    feedback: Any


def eclk(
    compressor: Compressor,
    smoothness: float,
    strong_convexity: float,
    theta_1: float | None = None,
    theta_2: float | None = None,
    probability: float | None = None,
    prox: Prox | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Error-compensated loopless Katyusha, for convex problems and high precision.

    .. math::
      p_i &= \tfrac{\eta}{L_1} (\nabla f_{ij}(x) - \nabla f_{ij}(w)) + e_i, \quad
      e_i \leftarrow p_i - C(p_i) \\
      z^+ &= \mathrm{prox}\Big( \frac{\eta\sigma x + z - \frac{1}{n} \sum_i C(p_i)
      - \frac{\eta}{L_1} \nabla f(w)}{1 + \eta\sigma} \Big), \quad
      y^+ = x + \theta_1 (z^+ - z) \\
      w^+ &= y \text{ with probability } p, \quad
      x^+ = \theta_1 z^+ + \theta_2 w^+ + (1 - \theta_1 - \theta_2) y^+

    with ``eta = 1 / (3 theta_1)`` and ``sigma = mu / (2 L_1)``. It wants two functions
    at every step, both of this worker's data only and without collectives, as
    :func:`efopt.lsvrg` does::

      tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)

    with ``grads = grad_fn(params)`` on the current minibatch. For full gradients pass
    the same function twice: the gradient at the reference point is then remembered, not
    evaluated again. When that point moves, for which all workers toss the same coin,
    the workers' gradients of their whole data there are averaged uncompressed, in the
    next step. Apply the updates as they are: there is no learning rate.

    What it accelerates is problems with ``smoothness`` far above ``strong_convexity``.
    ``L_1`` is a third of ``smoothness``, so that ``y`` makes steps of gradient descent,
    ``1 / smoothness``. The paper's are a third as long, and its theory wants shorter
    ones with coarse compressors; but on real data these need half the rounds. Should it
    diverge, as error feedback with long steps may where coordinates hardly interact or
    minibatches are small, pass three times the smoothness, or more.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: in bits per worker and step, ``compressor.payload_bits`` and, in the mean,
    ``probability`` times the bits of the parameters, one way. By default the second is
    twice the first.
    Properties: ``z`` minus the mean residual over ``1 + eta sigma`` follows the
    uncompressed recursion exactly, if ``prox`` is ``None``; with the identity it is
    loopless Katyusha.
    Placement: the residual and the gradient at the reference point per worker, all else
    replicated.

    Args:
      compressor: A contractive :class:`efopt.Compressor`.
      smoothness: The Lipschitz constant of the gradient: of the whole objective for
        full gradients, of the largest term for minibatches.
      strong_convexity: ``mu``, in (0, smoothness].
      theta_1: Weight of ``z``. ``None``: ``theta_2 min(1, sqrt(mu / (L_1 p)))``.
      theta_2: Weight of the reference point. ``None``: 1/2.
      probability: Of the reference point to move, in (0, 1]. ``None``: twice the bits
        of the payload over the bits of the parameters, at most 1.
      prox: Maps parameters and a step size ``s`` to the minimum over ``u`` of
        ``psi(u) + |u - x|^2 / (2 s)``, for a second term ``psi`` of the objective. For
        a constraint it is a projection, such as ``lambda x, s:
        optax.projections.projection_non_negative(x)``. ``None``: no such term.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      seed: Of the coin.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one or an option is of another type.
      ValueError: If an option is out of range; from ``init``, if the compressor is not
        contractive for a leaf; at trace time, if the parameters, ``grad_fn`` or
        ``full_grad_fn`` are missing, the axis is not bound, updates are already
        averaged or the state is not placed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> curvature = jnp.array([1.0, 0.1, 0.01])
      >>> grad = lambda x: curvature * (x - 1)
      >>> tx, x = efopt.eclk(efopt.top_k(k=1), 1.0, 0.01), jnp.zeros(3)
      >>> def step(carry, _):
      ...     x, state = carry
      ...     updates, state = tx.update(
      ...         grad(x), state, x, grad_fn=grad, full_grad_fn=grad)
      ...     return (x + updates, state), None
      >>> (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=400)
      >>> bool(jnp.abs(x - 1).max() < 1e-5)
      True

    References:
      Qian et al, `Error Compensated Distributed SGD Can Be Accelerated
      <https://arxiv.org/abs/2010.00091>`_, 2021 (Algorithm 1)
    """
    smoothness, mu = _check_constants("eclk", smoothness, strong_convexity)
    l_1 = smoothness / 3
    thetas = _check_thetas("eclk", theta_1, theta_2)
    if probability is not None:
        probability = coins.probability("eclk", probability)
    checks.seed("eclk", seed)
    feedback = error_feedback(compressor, axis_name=axis_name)

    def constants(params):
        """theta_1, theta_2 and the probability: Python numbers."""
        p = probability
        if p is None:
            p = min(1.0, 2 * _ratio(compressor, params))
        second = 0.5 if thetas[1] is None else thetas[1]
        first = thetas[0]
        if first is None:
            first = second * min(1.0, math.sqrt(mu / (l_1 * p)))
        if first + second > 1:
            raise ValueError(
                "`eclk(theta_1=..., theta_2=...)` must sum to at most 1, got "
                f"{first} and {second}."
            )
        return first, second, p

    def init_fn(params: Any) -> Any:
        check_contractive("eclk", compressor, params)
        constants(params)
        wide = jax.tree.map(_wide, params)
        return EclkState(
            count=jnp.zeros([], jnp.int32),
            y=wide,
            z=wide,
            w=wide,
            own=wrap(jax.tree.map(jnp.zeros_like, wide), axis_name),
            gradient=jax.tree.map(jnp.zeros_like, wide),
            feedback=feedback.init(wide),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        grad_fn, full_grad_fn = coins.functions("eclk", params, extra_args)
        coins.receive("eclk", axis_name, updates)
        theta_1, theta_2, p = constants(params)
        eta, sigma = 1 / (3 * theta_1), mu / (2 * l_1)
        step, shrink = eta / l_1, 1 / (1 + eta * sigma)
        at = jax.tree.map(lambda w, p: w.astype(p.dtype), state.w, params)

        def refresh(old):
            own = coins.gradient(full_grad_fn, at, old[0], axis_name)
            return own, own if axis_name is None else exchange.mean(own, axis_name)

        # The coin of this step fell at the end of the last one, and moved the point.
        own, gradient = lax.cond(
            (state.count == 0) | coins.coin(p, seed, state.count),
            refresh,
            lambda old: old,
            (unwrap("`eclk`", state.own), state.gradient),
        )
        there = own
        if grad_fn is not full_grad_fn:
            there = coins.gradient(grad_fn, at, own, axis_name)
        change = jax.tree.map(
            lambda g, r: step * (g.astype(r.dtype) - r), updates, there
        )
        average, owed = feedback.update(change, state.feedback)

        x = jax.tree.map(_wide, params)
        z = jax.tree.map(
            lambda x, z, q, g: shrink * (eta * sigma * x + z - q - step * g),
            x,
            state.z,
            average,
            gradient,
        )
        if prox is not None:
            z = prox(z, shrink * step)
        y = jax.tree.map(lambda x, new, z: x + theta_1 * (new - z), x, z, state.z)
        count = optax.safe_increment(state.count)
        moves = coins.coin(p, seed, count)
        w = jax.tree.map(lambda w, y: jnp.where(moves, y, w), state.w, state.y)
        out = jax.tree.map(
            lambda x, y, z, w, p: (
                theta_1 * (z - x)
                + theta_2 * (w - x)
                + (1 - theta_1 - theta_2) * (y - x)
            ).astype(p.dtype),
            x,
            y,
            z,
            w,
            params,
        )
        return out, EclkState(count, y, z, w, wrap(own, axis_name), gradient, owed)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def loopless_katyusha(
    smoothness: float,
    strong_convexity: float,
    probability: float,
    theta_1: float | None = None,
    theta_2: float | None = None,
    prox: Prox | None = None,
    axis_name: str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Loopless Katyusha: :func:`efopt.eclk` without compression.

    The baseline of compressed acceleration. It is called as :func:`efopt.eclk` is.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``1 + probability`` times the bits of the parameters per worker and step.
    Properties: accelerated; converges to the optimum with minibatch gradients.
    Placement: the residual, of rounding only, per worker; all else replicated.

    Args:
      smoothness: As of :func:`efopt.eclk`.
      strong_convexity: ``mu``, in (0, smoothness].
      probability: Of the reference point to move, in (0, 1]; usually one over the
        number of a worker's minibatches.
      theta_1: Weight of ``z``. ``None``: ``theta_2 min(1, sqrt(mu / (L_1 p)))``.
      theta_2: Weight of the reference point. ``None``: 1/2.
      prox: As of :func:`efopt.eclk`.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      seed: Of the coin.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If an option is of another type.
      ValueError: As :func:`efopt.eclk`.

    Examples:
      >>> import efopt
      >>> tx = efopt.loopless_katyusha(1.0, 0.01, probability=0.1, axis_name="data")

    References:
      Kovalev et al, `Don't Jump Through Hoops and Remove Those Loops
      <https://arxiv.org/abs/1901.08689>`_, 2019 (Algorithm 2)
    """
    probability = coins.probability("loopless_katyusha", probability)
    return eclk(
        identity(),
        smoothness,
        strong_convexity,
        theta_1,
        theta_2,
        probability,
        prox,
        axis_name,
        seed,
    )


def _wide(p: Any) -> jax.Array:
    return jnp.asarray(p).astype(compute_dtype(jnp.result_type(p)))


def _check_constants(api: str, smoothness: Any, mu: Any) -> tuple[float, float]:
    smoothness = checks.static_float(api, "smoothness", smoothness)
    mu = checks.static_float(api, "strong_convexity", mu)
    if not 0 < mu <= smoothness:
        raise ValueError(
            f"`{api}` needs 0 < strong_convexity <= smoothness, got "
            f"strong_convexity={mu} and smoothness={smoothness}."
        )
    return smoothness, mu


def _check_thetas(api: str, *thetas: Any) -> tuple[float | None, ...]:
    for i, theta in enumerate(thetas, 1):
        name = f"theta_{i}"
        if theta is not None and not 0 < checks.static_float(api, name, theta) < 1:
            raise ValueError(f"`{api}({name}=...)` must lie in (0, 1), got {theta}.")
    return thetas


def _ratio(compressor: Compressor, params: Any) -> float:
    """Bits of the payload over bits of the parameters."""
    leaves = [x for x in jax.tree.leaves(params) if jnp.size(x)]
    kinds = [(jnp.shape(x), compute_dtype(jnp.result_type(x))) for x in leaves]
    dense = sum(8 * math.prod(s) * d.itemsize for s, d in kinds)
    sent = sum(compressor.payload_bits(s, d) for s, d in kinds)
    return sent / dense if dense else 1.0
