"""Contractive error feedback: what is owed is itself kept compressed."""

import jax
import optax

from efopt.codecs.compressor import Compressor
from efopt.exchanges.exchange import Exchange
from efopt.feedback.error_feedback import feedback_through
from efopt.ground.checks import keyword_only
from efopt.workers.axes import AxisName


@keyword_only
def contractive_error_feedback(
    compressor: Compressor,
    *,
    memory: Compressor,
    axis_name: AxisName | None = None,
    exchange: Exchange | str | None = None,
    damping: float | None = None,
    form: str | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    residual_dtype: jax.typing.DTypeLike | None = None,
    start: int = 0,
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
    the same, float16 sketch              ``..., residual_dtype="float16"``
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
    ``dtype`` float32 or ``residual_dtype``. A step of a leaf of more than a million
    coordinates takes the place of its gradient, and beside it a fifth of its size for
    the payloads that the example below sends.
    Properties: with a linear memory conservative in its payloads, for every damping:
    they are those of the sum of (updates - own payments). With any other the memory's
    error is lost, and nothing else at damping 0. The average is bit-identical on all
    workers. The memory's private random numbers differ between workers and steps, its
    shared ones, such as a hash, stand still.
    Placement: ``residual`` and the link's ``server`` per worker, all else replicated.

    Args:
      compressor: What is sent: an :class:`efopt.Compressor`.
      memory: What stores the residual: an :class:`efopt.Compressor` with one message a
        step, or a partition of such. Never sent.
      axis_name: As for :func:`efopt.error_feedback`.
      exchange: As there.
      damping: The share of the residual that is not recalled, in [0, 1]. ``None``: 0.9
        for leaves whose memory is linear and declares no contraction, which is a sketch
        shorter than the leaf; else 0. Static.
      form: ``"increment"`` or ``"rewrite"``, which of the two updates above; ``None``:
        the one that is stable for the leaf's memory. Static.
      learning_rate: As there.
      residual_dtype: The dtype of what the memory stores unchanged: a sketch's sums,
        the values of a sparsifier. ``None``: float32, or the leaf's dtype where that is
        wider.
      start: As there.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: If ``compressor`` or ``memory`` is no compressor, ``damping`` no Python
        number, or ``residual_dtype`` or a leaf not floating-point.
      ValueError: If the memory cannot keep a residual (it speaks in rounds or has
        state, or rounds to the nearest of few levels) or not in that ``form``,
        ``damping`` is not in [0, 1], or the exchange is unknown or cannot carry the
        compressor; at trace time as :func:`efopt.error_feedback`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.contractive_error_feedback(
      ...     efopt.random_block(fraction=0.1),
      ...     memory=efopt.quantize(8, stochastic=True))
      >>> state = tx.init(jnp.zeros((64, 64)))
      >>> sum(x.nbytes for x in jax.tree.leaves(state.residual))
      4128

    References:
      Li et al, `Contractive error feedback for gradient compression
      <https://arxiv.org/abs/2312.08538>`_, 2023
    """
    api = "contractive_error_feedback"
    if memory is None:
        raise TypeError(
            f"`{api}(memory=...)` takes an `efopt.Compressor`; for an exact residual "
            "use `efopt.error_feedback`."
        )
    return feedback_through(
        api,
        compressor,
        axis_name=axis_name,
        exchange=exchange,
        learning_rate=learning_rate,
        residual_dtype=residual_dtype,
        memory=memory,
        damping=damping,
        form=form,
        start=start,
    )
