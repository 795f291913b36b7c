"""LoCo: four bits on the wire, and a running mean of what they lose in eight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor
from efopt.compressors.quantize import quantize
from efopt.exchanges import table
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.link import open_link
from efopt.feedback.residual import open_residual, placed
from efopt.ground import checks
from efopt.ground.dtypes import wide, wide_zeros
from efopt.workers.axes import AxisName


class LoCoState(NamedTuple):
    """State of :func:`loco`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      residual: The running mean of what this worker's messages have lost: the payload
        of each leaf, arrays with the block axis first. A :class:`efopt.PerWorker` if
        there is an axis.
      link: The compressor's own state and the owners' residual, an
        :class:`efopt.exchanges.LinkState`.
    """

    count: jax.typing.ArrayLike
    residual: Any
    link: Any

    def placed(self, mesh: Any, spec_of: Any) -> "LoCoState":
        """The state laid out for a mesh: payloads are those of shards, made anew."""
        return placed(self, mesh, spec_of)


@checks.keyword_only
def loco(
    compressor: Compressor | None = None,
    *,
    beta: float = 0.8,
    reset: int | None = 1024,
    memory: Compressor | None = None,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = "two_phase",
    start: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates in four bits, corrected by a running mean of what is lost.

    .. math::
      h_i = g_i + e_i, \quad
      u = \frac{1}{n} \sum_i C(h_i), \quad
      e_i \leftarrow \beta e_i + (1 - \beta) (h_i - C(h_i)), \quad
      e_i \leftarrow 0 \text{ every so many steps}

    where what is kept of ``e_i`` is its eight bits. The same as
    :func:`efopt.contractive_error_feedback` but for the running mean and the reset,
    which keep errors of long ago from piling up, and quantisers of few bits from
    chasing their own noise.

    *What it breaks on purpose.* Of each step's loss only a share of ``1 - beta`` is
    said again, spread over the steps that follow, and what stands in ``e_i`` at a reset
    is dropped: nothing is conserved. With a quantiser that is unbiased, or nearly, that
    is no loss. Of what a sparse compressor leaves out, most would be gone for good:
    take :func:`efopt.error_feedback`.

    *The exchange.* In the paper an owner needs the mean of its own shard alone, and
    nothing comes back. Here updates are whole: with ``exchange="two_phase"`` the means
    come back in four bits as well, and owners keep what that loses, exactly.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step, each way; in memory
    ``memory.payload_bits`` per leaf, an eighth or a quarter of the parameters.
    Properties: not conservative; the average is bit-identical on all workers;
    ``beta=0`` without a reset is :func:`efopt.contractive_error_feedback`.
    Placement: ``residual`` and the link's ``server`` per worker, all else replicated.

    Args:
      compressor: An :class:`efopt.Compressor`; ``None``: ``quantize(4)``.
      beta: Decay of the running mean of errors, in [0, 1); DeepSpeed's ``err_beta``.
        Static.
      reset: After how many steps the error is forgotten, at least 1; ``None``: never.
        Static.
      memory: What stores the error: an :class:`efopt.Compressor` as for
        :func:`efopt.contractive_error_feedback`; ``None``: ``quantize(8)``.
      axis_name: As for :func:`efopt.error_feedback`.
      exchange: As there. Without effect over one worker.
      start: As there.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` or ``memory`` is none, ``beta`` no Python number, or
        a leaf not floating-point.
      ValueError: If ``beta`` or ``reset`` is out of range, the memory cannot keep a
        residual, or the exchange is unknown or cannot carry the compressor; at trace
        time as :func:`efopt.error_feedback`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.feedback.loco()
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> sum(x.nbytes for x in jax.tree.leaves(state.residual))
      4128

    References:
      Xie et al, `LoCo: Low-Bit Communication Adaptor for Large-scale Model Training
      <https://arxiv.org/abs/2407.04480>`_, 2024 (Algorithm 1)
    """
    api = "loco"
    if checks.static_float(api, "beta", beta) >= 1:
        raise ValueError(f"`{api}(beta=...)` must be in [0, 1), got {beta}.")
    if reset is not None:
        checks.static_int(api, "reset", reset)
    compressor = quantize(4) if compressor is None else compressor
    memory = quantize(8) if memory is None else memory
    way = table.read(api, exchange)
    way = None if axis_name is None else way  # one worker has nobody to meet
    link = open_link(api, compressor, axis_name=axis_name, exchange=way, start=start)
    store = open_residual(api, None, memory, None, None)

    def init_fn(params: Any) -> Any:
        residual = store.marked(link, params)
        return LoCoState(jnp.zeros([], jnp.int32), residual, link.init(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        owed, turn = link.unwrap(state.residual), link.turn(state.count)
        updates = store.receive(link, updates, owed)
        # 2407.04480 Algorithm 1: h = g + e, q = C(h),
        e = store.recall(wide_zeros(updates), owed, turn, None)
        say = jax.tree.map(lambda g, e: wide(g) + e, updates, e)
        got = link.average(say, state.link, state.count, like=updates)
        count = optax.safe_increment(state.count)
        # e <- beta e + (1 - beta) (h - q), and now and then zero
        keep = (
            1.0
            if reset is None
            else jnp.where(jnp.remainder(count, reset) == 0, 0.0, 1.0)
        )

        def mixed(lost, e):
            return jnp.asarray(keep, e.dtype) * (beta * e + (1 - beta) * lost)

        new = jax.tree.map(mixed, got.lost, e)
        keeper = store.keeper(updates, owed, turn, None) or (lambda lost: lost)
        residual = link.wrap(keeper(new), state.residual)
        return got.mean, LoCoState(count, residual, got.state)

    return optax.GradientTransformationExtraArgs(init_fn, link.entrance(update_fn))
