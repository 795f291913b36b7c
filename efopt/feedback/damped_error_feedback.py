"""Error feedback that forgets, and pays in part: that of ECQ-SGD."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.codec import compute_dtype
from efopt.codecs.compressor import Compressor
from efopt.exchanges.link import open_channel
from efopt.feedback.parts import applied
from efopt.ground import checks
from efopt.workers.node import unwrap, wrap


class DampedErrorFeedbackState(NamedTuple):
    """State of :func:`damped_error_feedback`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      error: The decayed sum of what compression lost of this worker's updates, shaped
        like the parameters, at least float32. A :class:`efopt.PerWorker` if there is an
        axis.
      memory: The compressor's own state for each leaf, ``()`` if it has none. Equal on
        all workers.
    """

    count: jax.typing.ArrayLike
    error: Any
    memory: Any


def damped_error_feedback(
    compressor: Compressor,
    alpha: float,
    beta: float,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages updates over workers, compressed, and owes a part of what was lost.

    .. math::
      q_i = Q(g_i + \alpha h_i), \quad
      u = \frac{1}{n} \sum_i q_i, \quad
      h_i \leftarrow \beta h_i + g_i - q_i

    The feedback of ECQ-SGD, for unbiased quantisers: they lose nothing in the mean, so
    that what feedback gains is variance, and damping keeps that of the feedback itself
    small. For biased compressors take :func:`efopt.error_feedback`, to which
    ``alpha = beta = 1`` is equal.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step.
    Properties: not conservative unless both factors are 1; the average is bit-identical
    on all workers.
    Placement: ``error`` per worker, all else replicated.

    Args:
      compressor: An :class:`efopt.Compressor`.
      alpha: The part of the error that is paid, in [0, 1].
      beta: The part of the error that is remembered, in [0, 1].
      axis_name: The mapped axis to average over; ``None`` for one worker.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` is not one, a factor is no number, or a leaf is not
        floating-point.
      ValueError: If a factor is out of range; at trace time, if the axis is not bound,
        updates are already averaged or differ from what ``init`` saw, or the state was
        not placed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.damped_error_feedback(efopt.top_k(k=1), alpha=0.5, beta=1.0)
      >>> grads = jnp.array([1.0, -3.0])
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(state.error)
      [1. 0.]
      >>> print(tx.update(jnp.zeros(2), state)[0])  # half of what was lost
      [0.5 0. ]

    References:
      Wu et al, `Error Compensated Quantized SGD and its Applications to Large-scale
      Distributed Optimization <https://arxiv.org/abs/1806.08054>`_, 2018
    """
    api = "damped_error_feedback"
    for name, factor in (("alpha", alpha), ("beta", beta)):
        if checks.static_float(api, name, factor) > 1:
            raise ValueError(f"`{api}({name}=...)` must be in [0, 1], got {factor}.")
    channel = open_channel(api, compressor, axis_name, None)

    def init_fn(params: Any) -> Any:
        memory, _ = channel.init(params)
        zeros = jax.tree.map(
            lambda p: jnp.zeros(jnp.shape(p), compute_dtype(jnp.result_type(p))), params
        )
        count = jnp.zeros([], jnp.int32)
        return DampedErrorFeedbackState(count, wrap(zeros, axis_name), memory)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        error = unwrap(channel.api, state.error)
        inbound = channel.receive(updates, state.count, error)
        given, old = inbound.join(inbound.arrays), inbound.join(jax.tree.leaves(error))
        full = [g + alpha * h for g, h in zip(given, old, strict=True)]
        means, rests, memory, _ = channel.average(inbound, full, state.memory, ())
        averages = [mean.decode() for mean in means]
        # beta h + g - q, of which g + alpha h - q is what is left
        new = [rest + (beta - alpha) * h for rest, h in zip(rests, old, strict=True)]
        new = inbound.part(new, jax.tree.leaves(error))
        count = optax.safe_increment(state.count)
        state = DampedErrorFeedbackState(count, wrap(new, axis_name), memory)
        return applied(inbound, averages), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
