"""DIANA: workers learn what their gradients have of their own."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.compressors import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.opening import open_link
from efopt.ground import checks
from efopt.workers.axes import AxisName


class DianaState(NamedTuple):
    """State of :func:`diana`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      shift: What this worker has learned of its gradient, shaped like the parameters,
        at least float32. A :class:`efopt.PerWorker` if there is an axis.
      mean: The mean of the workers' shifts. Equal on all workers.
      link: The state of the compressor and the exchange.
    """

    count: jax.typing.ArrayLike
    shift: Any
    mean: Any
    link: Any


@checks.keyword_only
def diana(
    compressor: Compressor,
    *,
    alpha: float | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
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
    feedback in a chain, behind :func:`efopt.convex.lsvrg` if both are wanted. The mean
    of its updates is the mean of its inputs, always.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step, on top of what the
    feedback sends.
    Properties: the mean over workers is kept; shifts converge to the gradients at the
    optimum for any ``alpha <= 1 / (1 + omega)``.
    Placement: the shift per worker, all else replicated.

    Args:
      compressor: An unbiased :class:`efopt.Compressor`.
      alpha: How fast shifts are learned. ``None``: ``1 / (1 + omega)``, of each leaf,
        which is also the most that is allowed.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      exchange: How messages meet; ``None`` for the compressor's own way.
      force: Whether to allow a larger ``alpha``, for which there is no theory, with a
        warning.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, ``alpha`` no number, ``force`` no bool,
        or a leaf is not floating-point.
      ValueError: If the compressor is biased, ``alpha`` not positive or the exchange
        unknown; from ``init``, if ``alpha`` is too large for a leaf or the exchange
        keeps a residual of its own (``"two_phase"``); at trace time, if the axis is not
        bound, updates are already averaged or differ from what ``init`` saw, or the
        state was not placed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.convex.diana(efopt.compressors.identity(), axis_name="data")
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
    link = open_link(
        "diana", compressor, axis_name=axis_name, exchange=exchange, role="shifts"
    )
    if not compressor.unbiased:
        raise ValueError(
            f"`diana({compressor!r})` needs an unbiased compressor, such as "
            "`efopt.random_k(k=1, unbiased=True)` or "
            "`efopt.compressors.qsgd(levels=1)`: of a biased one the shifts learn the "
            "bias."
        )
    if alpha is not None and checks.static_float("diana", "alpha", alpha) == 0:
        raise ValueError(
            "`diana(alpha=...)` must be positive: at 0 nothing is learned."
        )
    checks.static_bool("diana", "force", force)

    def most(tree: Any) -> list[float]:
        """The largest ``alpha`` of every leaf, ``1 / (1 + omega)``."""
        shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
        pairs = zip(link.codecs(tree), shapes, strict=True)
        return [
            1 / (1 + (c.omega(s) or 0.0)) if math.prod(s) else 1.0 for c, s in pairs
        ]

    def init_fn(params: Any) -> Any:
        if any(route.keeps for route in link.routes(params)):
            raise ValueError(
                f"`diana(exchange={exchange!r})` cannot work: a residual stays with "
                "the owners of ranges, so that what all hear is not the mean of what "
                'the shifts learn. Take `None` or `"all_gather"`.'
            )
        state = link.init(params)
        bound = min(most(params), default=1.0)
        if alpha is not None and alpha > bound * (1 + 1e-6):
            why = (
                f"`diana(alpha={alpha})` is above 1 / (1 + omega) = {bound:.6g}, the "
                f"most for which shifts are known to converge with {compressor!r}."
            )
            if not force:
                raise ValueError(f"{why} To use it nevertheless pass `force=True`.")
            warnings.warn(why, stacklevel=2)
        zeros = link.zeros(params)
        shift = link.wrap(zeros, rule="mean")
        return DianaState(jnp.zeros([], jnp.int32), shift, zeros, state)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        shift = link.unwrap(state.shift)
        updates = link.receive(updates, like=shift)
        alphas = most(updates) if alpha is None else [alpha] * len(link.codecs(updates))
        alphas = jax.tree.unflatten(jax.tree.structure(updates), alphas)

        # 1901.09269 Algorithm 1: d_i = g_i - h_i, of which Q(d_i) is sent
        new = jax.tree.map(lambda g, h: g.astype(h.dtype) - h, updates, shift)
        got = link.average(new, state.link, state.count, like=updates, wide=True)
        sent = optax.tree.sub(new, got.lost)
        # u_i = g_i - h_i + mean_j h_j: what the feedback behind compresses
        out = jax.tree.map(
            lambda d, m, g: (d + m).astype(g.dtype), new, state.mean, updates
        )

        def learn(h, q, a):  # h = h + alpha Q(d), of each worker and of their mean
            return h + a * q

        return out, DianaState(
            count=optax.safe_increment(state.count),
            shift=link.wrap(jax.tree.map(learn, shift, sent, alphas), state.shift),
            mean=jax.tree.map(learn, state.mean, got.mean, alphas),
            link=got.state,
        )

    return optax.GradientTransformationExtraArgs(
        init_fn, link.entrance(update_fn, own=True)
    )
