"""Contractive error feedback: what is owed is itself kept compressed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.codec import Message
from efopt.codecs.compressor import Compressor
from efopt.exchanges.link import Inbound, open_channel
from efopt.feedback.parts import applied, check_float_dtype, hold, rates, unpaid
from efopt.feedback.stored import open_store
from efopt.ground.barriers import zeros_after
from efopt.workers.node import unwrap, wrap

API = "contractive_error_feedback"


class ContractiveErrorFeedbackState(NamedTuple):
    """State of :func:`contractive_error_feedback`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      residual: What this worker still owes: the payload of ``memory`` for each leaf of
        the parameters, arrays with the block axis first. A :class:`efopt.PerWorker` if
        there is an axis.
      memory: The compressor's own state for each leaf, ``()`` if it has none. Equal on
        all workers.
      server: What the owners of ranges still owe, under ``exchange="two_phase"``: one
        :class:`efopt.PerWorker` per group of blocks, at least float32. Else ``()``.
      learning_rate: The last learning rate that was not zero, zero before the first
        step. shape=(), float32. ``()`` if no learning rate was given.
    """

    count: jax.typing.ArrayLike
    residual: Any
    memory: Any
    server: Any
    learning_rate: Any


def contractive_error_feedback(
    compressor: Compressor,
    memory: Compressor,
    axis_name: str | None = None,
    exchange: str | None = None,
    damping: float | None = None,
    form: str | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    memory_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Error feedback whose residual is stored compressed, in a fraction of the memory.

    The residual is the one thing that cannot be shared out over the workers, since it
    is each worker's own: beside sharded parameters and moments it is what is left.

    .. math::
      p_i = g_i + (1 - \beta) \tilde e_i, \quad
      u = \frac{1}{n} \sum_i C(p_i), \quad
      r_i = p_i - C(p_i)

    where ``e`` is what ``memory`` answers, ``C`` is ``compressor``, the only one of the
    two that is sent, and ``beta`` is ``damping``. A linear memory ``S``, such as a
    sketch, adds: ``S <- S + encode(r - (1 - beta) e)``. Any other is written anew,
    ``encode(r)``; so is a linear one that loses and damps nothing, for which both are
    the same. A sketch that is written anew multiplies its own noise at every step.

    ====================================  ==============================================
    2312.08538 and its code               here
    ====================================  ==============================================
    ConEF, count sketch                   ``memory=count_sketch(...), damping=0``
    the same, damped (iConEF in our       ``memory=count_sketch(...)``: damping 0.9
    reading; what the code runs)
    the same, float16 sketch              ``..., memory_dtype="float16"``
    its hash, not structured              ``count_sketch(..., hash="random")``
    ConEF, a quantised error              ``memory=quantize(8)`` or ``quantize(4)``
    hEFSGD, the largest errors only       ``memory=top_k(fraction=0.1)``
    EFSGD                                 ``memory=identity()``; or ``error_feedback``
    no feedback                           ``damping=1``; or ``compress``
    GRBS, 1-D tensors dense               ``compressor=random_block(0.1)``, and
                                          ``partition`` for the rest
    PowerSGD                              ``compressor=power_sgd(4)``
    ====================================  ==============================================

    *What is kept exact*, in at least float32: vectors of fewer than 65,536 coordinates
    and other leaves of fewer than 256, such as biases and norms, and leaves whose
    payload would be no smaller. :func:`efopt.memory_report` says what is left.

    *Which memory.* On an ill-conditioned quadratic of 1000 coordinates, of which a
    random block of 10 % is sent (3000 steps), the loss ended at 0.0156 with plain error
    feedback; at 0.0156 as well with eight or four bits rounded at random and with
    bfloat16; 5 % higher with eight bits to the nearest, which lose the small for good;
    at 0.2 with the largest tenth; at 2.3 to 2.5 with a sketch of a fifth; and at 2.7
    with no feedback. A memory that answers faithfully needs no damping, which only
    makes it forget (eight bits with damping 0.9: 2.4).

    *Where the learning rate stands*, and what stands around the transformation: as for
    :func:`efopt.error_feedback`.

    Shapes: any tree of floating-point leaves -> the same, dtypes kept.
    Cost: ``compressor.payload_bits`` per leaf, worker and step on the wire;
    ``memory.payload_bits(shape, dtype)`` per leaf in each worker's memory, with
    ``dtype`` float32 or ``memory_dtype``. A step of a leaf of more than a million
    coordinates takes the place of its gradient, and beside it a fifth of its size for
    the payloads that the example below sends.
    Properties: with a linear memory conservative in its payloads, for every damping:
    they are those of the sum of (updates - own payments). With any other the memory's
    error is lost, and nothing else at damping 0. The average is bit-identical on all
    workers. The memory's private random numbers differ between workers and steps, its
    shared ones, such as a hash, stand still.
    Placement: ``residual`` and ``server`` per worker, all else replicated.

    Args:
      compressor: What is sent: an :class:`efopt.Compressor`.
      memory: What stores the residual: an :class:`efopt.Compressor` with one message a
        step, or a partition of such. Never sent.
      axis_name: The mapped axis to average over; ``None`` for one worker.
      exchange: ``"all_reduce"``, ``"all_gather"``, ``"two_phase"`` or
        ``"majority_vote"``; ``None`` for the compressor's own.
      damping: The share of the residual that is not recalled, in [0, 1]. ``None``: 0.9
        for leaves whose memory is linear and declares no contraction, which is a sketch
        shorter than the leaf; else 0. Static.
      form: ``"increment"`` or ``"rewrite"``, which of the two updates above; ``None``:
        the one that is stable for the leaf's memory. Static.
      learning_rate: The rate or schedule that is applied *after* this transformation,
        to keep the residual's units under a schedule. ``None``: never rescale.
      memory_dtype: The dtype of what the memory stores unchanged: a sketch's sums, the
        values of a sparsifier. ``None``: float32, or the leaf's dtype where that is
        wider.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` or ``memory`` is no compressor, ``damping`` no Python
        number, or ``memory_dtype`` or a leaf not floating-point.
      ValueError: If the memory cannot keep a residual (it speaks in rounds or has
        state, or rounds to the nearest of few levels) or not in that ``form``,
        ``damping`` is not in [0, 1], or the exchange is unknown or cannot carry the
        compressor; at trace time as :func:`efopt.error_feedback`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.contractive_error_feedback(
      ...     efopt.random_block(fraction=0.1), memory=efopt.quantize(8))
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> sum(x.nbytes for x in jax.tree.leaves(state.residual))
      4128

    References:
      Li et al, `Contractive error feedback for gradient compression
      <https://arxiv.org/abs/2312.08538>`_, 2023
    """
    channel = open_channel(API, compressor, axis_name, exchange)
    check_float_dtype(API, "memory_dtype", memory_dtype)
    store = open_store(API, memory, damping, form, memory_dtype)

    def init_fn(params: Any) -> Any:
        own, server = channel.init(params)
        return ContractiveErrorFeedbackState(
            count=jnp.zeros([], jnp.int32),
            residual=wrap(store.init(params), axis_name),
            memory=own,
            server=server,
            learning_rate=() if learning_rate is None else jnp.zeros([], jnp.float32),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        del params, extra_args
        inbound = channel.receive(updates, state.count)
        residual = unwrap(channel.api, state.residual)
        store.check(residual, updates)
        layout, turn = store.layout(updates), inbound.turn
        old = inbound.treedef.flatten_up_to(residual)
        rate, last, ratio = rates(learning_rate, state)

        # p = g + (1 - damping) e
        full = store.recall(layout, old, inbound.arrays, turn, ratio)
        means, rests, own, server = channel.average(
            inbound, inbound.join(full), state.memory, state.server, ratio
        )
        left = unpaid(inbound, means, rests)
        parted = inbound.layout.part(left, turn.step, inbound.arrays)
        new = store.write(layout, old, parted, turn, ratio)
        out = applied(inbound, _decode_last(inbound, means, left, new))
        new = inbound.treedef.unflatten(new)
        if rate is not None:
            out, (new, own, server) = hold(
                rate, out, (new, own, server), (residual, state.memory, state.server)
            )
        return out, ContractiveErrorFeedbackState(
            count=optax.safe_increment(state.count),
            residual=wrap(new, axis_name),
            memory=own,
            server=server,
            learning_rate=last,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _decode_last(
    inbound: Inbound,
    means: Sequence[Message],
    left: Sequence[jax.Array],
    residual: Sequence[Any],
) -> list[jax.Array]:
    """The averages, each in the place of what was left, once that is stored."""
    averages = []
    for b, mean, x in zip(inbound.layout.buckets, means, left, strict=True):
        stored = jax.tree.leaves(residual[b.leaves[0]])
        zeros = zeros_after(stored[0], x)
        averages.append(mean.decode_in(zeros))
    return averages
