"""DIANA: workers learn what their gradients have of their own."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor
from efopt.exchanges.link import open_link
from efopt.ground import checks
from efopt.ground.dtypes import compute_dtype
from efopt.workers.node import unwrap, wrap


class DianaState(NamedTuple):
    """State of :func:`diana`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      shift: What this worker has learned of its gradient, shaped like the parameters,
        at least float32. A :class:`efopt.PerWorker` if there is an axis.
      mean: The mean of the workers' shifts. Equal on all workers.
      memory: The compressor's own state for each leaf, ``()`` if it has none. Equal on
        all workers.
    """

    count: jax.typing.ArrayLike
    shift: Any
    mean: Any
    memory: Any


def diana(
    compressor: Compressor,
    alpha: float | None = None,
    axis_name: str | None = None,
    force: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes from each worker's gradient what distinguishes it from the others'.

    .. math::
      u_i = g_i - h_i + \bar h, \qquad
      h_i \leftarrow h_i + \alpha Q(g_i - h_i), \qquad
      \bar h = \frac{1}{n} \sum_i h_i

    Workers with different data have gradients that do not vanish at the optimum, only
    their mean does, and compressing them costs accuracy for ever. The shift ``h_i``
    learns this worker's, from a second compressed message that everybody hears, so that
    what is left for the compressor behind it vanishes too. It stands in front of the
    feedback in a chain, behind :func:`efopt.lsvrg` if both are wanted. The mean of its
    updates is the mean of its inputs, always.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step, on top of what the
    feedback sends.
    Properties: the mean over workers is kept; shifts converge to the gradients at the
    optimum for any ``alpha <= 1 / (1 + omega)``.
    Placement: the shift per worker, all else replicated.

    Args:
      compressor: An unbiased :class:`efopt.Compressor`. If it is random, give it
        another seed than the feedback's.
      alpha: How fast shifts are learned. ``None``: ``1 / (1 + omega)``, of each leaf,
        which is also the most that is allowed.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      force: Whether to allow a larger ``alpha``, for which there is no theory, with a
        warning.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, ``alpha`` no number, ``force`` no bool,
        or a leaf is not floating-point.
      ValueError: If the compressor is biased or ``alpha`` not positive; from ``init``,
        if ``alpha`` is too large for a leaf; at trace time, if the axis is not bound,
        updates are already averaged or differ from what ``init`` saw, or the state was
        not placed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.diana(efopt.identity(), axis_name="data")
      >>> step = jax.vmap(tx.update, axis_name="data")
      >>> grads = jnp.array([[1.0, 4.0], [3.0, 0.0]])  # 2 workers
      >>> updates, state = step(grads, efopt.stack_workers(tx.init(grads[0]), 2))
      >>> updates, state = step(grads, state)
      >>> print(updates)  # all differences are learned
      [[2. 2.]
       [2. 2.]]

    References:
      Mishchenko et al, `Distributed Learning with Compressed Gradient Differences
      <https://arxiv.org/abs/1901.09269>`_, 2019 (Algorithm 1)
      Gorbunov et al, `Linearly Converging Error Compensated SGD
      <https://arxiv.org/abs/2010.12292>`_, 2020 (EC-SGD-DIANA)
    """
    channel = open_link("diana", compressor, axis_name, None)
    if not compressor.unbiased:
        raise ValueError(
            f"`diana({compressor!r})` needs an unbiased compressor, such as "
            "`efopt.random_k(k=1, unbiased=True)` or `efopt.qsgd(levels=1)`: of a "
            "biased one the shifts learn the bias."
        )
    if alpha is not None and checks.static_float("diana", "alpha", alpha) == 0:
        raise ValueError(
            "`diana(alpha=...)` must be positive: at 0 nothing is learned."
        )

    checks.static_bool("diana", "force", force)

    def init_fn(params: Any) -> Any:
        memory, _ = channel.init(params)
        bound = min(_bounds(channel.codec, params), default=1.0)
        if alpha is not None and alpha > bound * (1 + 1e-6):
            why = (
                f"`diana(alpha={alpha})` is above 1 / (1 + omega) = {bound:.6g}, the "
                f"most for which shifts are known to converge with {compressor!r}."
            )
            if not force:
                raise ValueError(f"{why} To use it nevertheless pass `force=True`.")
            warnings.warn(why, stacklevel=2)
        zeros = jax.tree.map(
            lambda p: jnp.zeros(jnp.shape(p), compute_dtype(jnp.result_type(p))), params
        )
        return DianaState(
            jnp.zeros([], jnp.int32), wrap(zeros, axis_name), zeros, memory
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        shift = unwrap("`diana`", state.shift)
        inbound = channel.receive(updates, state.count, shift)
        new = jax.tree.map(lambda g, h: g.astype(h.dtype) - h, updates, shift)
        told = inbound.join(jax.tree.leaves(new))
        means, rests, memory, _ = channel.average(inbound, told, state.memory, ())
        averages = [mean.decode() for mean in means]
        sent = [x - rest for x, rest in zip(told, rests, strict=True)]
        out = jax.tree.map(
            lambda d, m, g: (d + m).astype(g.dtype), new, state.mean, updates
        )
        rates = _bounds(channel.codec, updates)
        if alpha is not None:
            rates = [alpha] * len(rates)
        rates = inbound.treedef.unflatten(rates)
        like = jax.tree.leaves(shift)

        def learn(h, q, a):
            return h + a * q

        return out, DianaState(
            count=optax.safe_increment(state.count),
            shift=wrap(
                jax.tree.map(learn, shift, inbound.part(sent, like), rates), axis_name
            ),
            mean=jax.tree.map(learn, state.mean, inbound.part(averages, like), rates),
            memory=memory,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _bounds(codec: Codec, tree: Any) -> list[float]:
    """The largest ``alpha`` of every leaf, ``1 / (1 + omega)``."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
    pairs = zip(codec.assign(tree), shapes, strict=True)
    return [1 / (1 + (c.omega(s) or 0.0)) if math.prod(s) else 1.0 for c, s in pairs]
