"""ECLK: acceleration and variance reduction behind error feedback."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import make
from efopt.compressors import Compressor, identity
from efopt.convex import coins, reference
from efopt.convex.ec_sgd import check_contractive
from efopt.exchanges.exchange import Exchange
from efopt.feedback import error_feedback
from efopt.ground import checks
from efopt.ground.dtypes import compute_dtype
from efopt.workers.axes import Axes, AxisName
from efopt.workers.node import unwrap, wrap

Prox = Callable[[Any, float], Any]  # of a tree of parameters and a step size
_Leaf = tuple[Codec, tuple[int, ...], Any]  # how it is written, its shape and dtype


class EclkState(NamedTuple):
    """State of :func:`eclk`; the parameters themselves are the iterate ``x``.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers, as all the rest but
        ``gradient`` and the residual.
      y: The iterate behind ``x``, shaped like the parameters, at least float32.
      z: The iterate of long steps.
      w: The reference point.
      gradient: The gradient of this worker's whole data at the reference point; out of
        date from the step that moves the point to the next, which evaluates it. A
        :class:`efopt.PerWorker` if there is an axis.
      mean: The mean of the workers' gradients there.
      feedback: The state of the error feedback: an
        :class:`efopt.feedback.ErrorFeedbackState`.
    """

    count: jax.typing.ArrayLike
    y: Any
    z: Any
    w: Any
    gradient: Any
    mean: Any
    feedback: Any


@checks.keyword_only
def eclk(
    compressor: Compressor,
    *,
    smoothness: float,
    strong_convexity: float,
    theta_1: float | None = None,
    theta_2: float | None = None,
    probability: float | None = None,
    prox: Prox | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Error-compensated loopless Katyusha, for convex problems and high precision.

    .. math::
      1.\quad g_i &= \nabla f_{ij}(x) - \nabla f_{ij}(w) \\
      2.\quad p_i &= \tfrac{\eta}{L_1} g_i + e_i, \quad
      e_i \leftarrow p_i - C(p_i) \\
      3.\quad z^+ &= \mathrm{prox}\Big( \frac{\eta\sigma x + z
      - \frac{1}{n} \sum_i C(p_i) - \frac{\eta}{L_1} \nabla f(w)}
      {1 + \eta\sigma} \Big) \\
      4.\quad y^+ &= x + \theta_1 (z^+ - z) \\
      5.\quad w^+ &= y \text{ with probability } p \\
      6.\quad x^+ &= \theta_1 z^+ + \theta_2 w^+ + (1 - \theta_1 - \theta_2) y^+

    with ``eta = 1 / (3 theta_1)`` and ``sigma = mu / (2 L_1)``. It wants two functions
    at every step, both of this worker's data only and without collectives, as
    :func:`efopt.convex.lsvrg` does::

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

    Acceleration and a coarse compressor bear one another only while the reference point
    moves no more often than residuals are paid. Where ``probability`` is ``r > 1``
    times its default, or times ``compressor.delta`` if that is more, ``L_1`` is
    therefore ``r`` times ``smoothness``: calm, and no faster than at the default, which
    is the probability to use. For more speed send more, by a finer compressor.

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
      exchange: How payloads meet; ``None`` for the compressor's own way.
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
      >>> tx = efopt.convex.eclk(
      ...     efopt.top_k(k=1), smoothness=1.0, strong_convexity=0.01)
      >>> x = jnp.zeros(3)
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
    _check_thetas("eclk", theta_1, theta_2)
    if probability is not None:
        probability = coins.probability("eclk", probability)
    checks.seed("eclk", seed)
    axes = Axes.maybe("eclk", axis_name)
    feedback = error_feedback(compressor, axis_name=axis_name, exchange=exchange)

    @functools.cache  # bits are counted by tracing
    def plan_for(leaves: tuple[_Leaf, ...]) -> "_Plan":
        share, delta = _contract(leaves)
        return _plan(smoothness, mu, theta_1, theta_2, probability, share, delta)

    def plan(params: Any) -> "_Plan":
        codecs = compressor.codec.assign(params)
        pairs = zip(codecs, jax.tree.leaves(params), strict=True)
        return plan_for(
            tuple(
                (c, jnp.shape(x), compute_dtype(jnp.result_type(x)))
                for c, x in pairs
                if math.prod(jnp.shape(x))
            )
        )

    def init_fn(params: Any) -> Any:
        check_contractive("eclk", compressor, params)
        plan(params)
        x = jax.tree.map(_wide, params)
        zeros = optax.tree.zeros_like(x)
        return EclkState(
            count=jnp.zeros([], jnp.int32),
            y=x,
            z=x,
            w=x,
            gradient=wrap(zeros, axes, "mean"),
            mean=zeros,
            feedback=feedback.init(x),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        grad_fn, full_grad_fn = reference.functions("eclk", params, extra_args)
        reference.check_own("eclk", axis_name, updates)
        theta_1, theta_2, p, step, pull = plan(params)
        shrink = 1 / (1 + pull)
        anchor = reference.Reference(p, seed, axis_name)
        w = jax.tree.map(lambda w, p: w.astype(p.dtype), state.w, params)

        # Line 5, its second half: where w was moved, all learn grad f(w), uncompressed.
        def learn(known):
            full = reference.gradient(full_grad_fn, w, known[0], axis_name)
            return full, full if axes is None else axes.pmean(full)

        full, mean = anchor.refresh(
            state.count, learn, (unwrap("`eclk`", state.gradient), state.mean)
        )
        # Line 1: g_i = grad f_ij(x) - grad f_ij(w)
        batch = full
        if grad_fn is not full_grad_fn:
            batch = reference.gradient(grad_fn, w, full, axis_name)
        change = jax.tree.map(
            lambda g, r: step * (g.astype(r.dtype) - r), updates, batch
        )
        # Line 2: p_i = (eta / L_1) g_i + e_i, q = mean_i C(p_i), e_i = p_i - C(p_i)
        q, residual = feedback.update(change, state.feedback)
        # Line 3: z+ = prox((eta sigma x + z - q - (eta / L_1) grad f(w)) / (1 + ...))
        x = jax.tree.map(_wide, params)
        z = jax.tree.map(
            lambda x, z, q, g: shrink * (pull * x + z - q - step * g),
            x,
            state.z,
            q,
            mean,
        )
        if prox is not None:
            z = prox(z, shrink * step)
        # Line 4: y+ = x + theta_1 (z+ - z)
        y = jax.tree.map(lambda x, new, z: x + theta_1 * (new - z), x, z, state.z)
        # Line 5: w+ = y with probability p, the y in front of this step
        count = optax.safe_increment(state.count)
        w = anchor.move(count, state.w, state.y)
        # Line 6: x+ = theta_1 z+ + theta_2 w+ + (1 - theta_1 - theta_2) y+, minus x
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
        full = wrap(full, axes, "mean")
        return out, EclkState(count, y, z, w, full, mean, residual)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@checks.keyword_only
def loopless_katyusha(
    *,
    smoothness: float,
    strong_convexity: float,
    probability: float,
    theta_1: float | None = None,
    theta_2: float | None = None,
    prox: Prox | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Loopless Katyusha: :func:`efopt.convex.eclk` without compression.

    The baseline of compressed acceleration, called as :func:`efopt.convex.eclk` is.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``1 + probability`` times the bits of the parameters per worker and step.
    Properties: accelerated; converges to the optimum with minibatch gradients.
    Placement: the residual, of rounding only, per worker; all else replicated.

    Args:
      smoothness: As of :func:`efopt.convex.eclk`.
      strong_convexity: ``mu``, in (0, smoothness].
      probability: Of the reference point to move, in (0, 1]; usually one over the
        number of a worker's minibatches.
      theta_1: Weight of ``z``. ``None``: ``theta_2 min(1, sqrt(mu / (L_1 p)))``.
      theta_2: Weight of the reference point. ``None``: 1/2.
      prox: As of :func:`efopt.convex.eclk`.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: As of :func:`efopt.convex.eclk`.
      seed: Of the coin.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If an option is of another type.
      ValueError: As :func:`efopt.convex.eclk`.

    Examples:
      >>> import efopt
      >>> tx = efopt.convex.loopless_katyusha(
      ...     smoothness=1.0, strong_convexity=0.01, probability=0.1, axis_name="data")

    References:
      Kovalev et al, `Don't Jump Through Hoops and Remove Those Loops
      <https://arxiv.org/abs/1901.08689>`_, 2019 (Algorithm 2)
    """
    probability = coins.probability("loopless_katyusha", probability)
    return eclk(
        identity(),
        smoothness=smoothness,
        strong_convexity=strong_convexity,
        theta_1=theta_1,
        theta_2=theta_2,
        probability=probability,
        prox=prox,
        axis_name=axis_name,
        exchange=exchange,
        seed=seed,
    )


class _Plan(NamedTuple):
    """The constants of a run: Python numbers.

    Attributes:
      theta_1: Weight of ``z``.
      theta_2: Weight of ``w``.
      probability: Of ``w`` to move.
      step: ``eta / L_1``, the length of a step of ``z``.
      pull: ``eta sigma``, how strongly ``x`` pulls ``z``.
    """

    theta_1: float
    theta_2: float
    probability: float
    step: float
    pull: float


def _plan(
    smoothness: float,
    mu: float,
    theta_1: float | None,
    theta_2: float | None,
    probability: float | None,
    share: float,
    delta: float,
) -> _Plan:
    default = min(1.0, 2 * share)
    p = default if probability is None else probability
    # Residuals lag, by at most about 1 / delta steps. Linearised, the compressed part
    # of the gradient, late by t steps, no longer damps a mode of curvature l but drives
    # it once sqrt(p l / L_1) t exceeds a constant. So L_1 has to grow like p: from the
    # paper's own where p is the default, up to which a third of that is seen to do.
    excess = p / max(default, delta)
    l_1 = smoothness / 3 if excess < 1 + 1e-9 else smoothness * excess
    if theta_2 is None:
        theta_2 = 0.5
    if theta_1 is None:
        theta_1 = theta_2 * min(1.0, math.sqrt(mu / (l_1 * p)))
    if theta_1 + theta_2 > 1:
        raise ValueError(
            "`eclk(theta_1=..., theta_2=...)` must sum to at most 1, got "
            f"{theta_1} and {theta_2}."
        )
    eta, sigma = 1 / (3 * theta_1), mu / (2 * l_1)
    return _Plan(theta_1, theta_2, p, step=eta / l_1, pull=eta * sigma)


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


def _check_thetas(api: str, *thetas: Any) -> None:
    for i, theta in enumerate(thetas, 1):
        name = f"theta_{i}"
        if theta is not None and not 0 < checks.static_float(api, name, theta) < 1:
            raise ValueError(f"`{api}({name}=...)` must lie in (0, 1), got {theta}.")


def _contract(leaves: tuple[_Leaf, ...]) -> tuple[float, float]:
    """Bits of the payload over bits of the parameters, and the smallest ``delta``."""
    dense = sum(8 * math.prod(s) * d.itemsize for _, s, d in leaves)
    sent = sum(make(c).payload_bits(s, d) for c, s, d in leaves)
    delta = min((c.delta(s) or 0.0 for c, s, _ in leaves), default=1.0)
    return sent / dense if dense else 1.0, delta
