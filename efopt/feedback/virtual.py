"""The iterate that error feedback follows behind the scenes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.compressor import Compressor
from efopt.exchanges import regions
from efopt.exchanges.opening import open_link
from efopt.exchanges.owed import owed_by_owners, owed_here, owed_in_flight
from efopt.feedback.econtrol import EControlState
from efopt.feedback.error_feedback import ErrorFeedbackState
from efopt.feedback.landed import in_flight
from efopt.ground.checks import keyword_only
from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker


@keyword_only
def virtual_params(
    params: optax.Params,
    state: Any,
    *,
    learning_rate: jax.typing.ArrayLike | None = None,
    compressor: Compressor | None = None,
) -> Any:
    r"""Parameters minus what the workers still owe: the iterate that follows SGD.

    .. math::  \tilde x = x - \gamma \Big( \tilde e + \frac{1}{n} \sum_i e_i \Big)

    With error feedback, and with :func:`efopt.feedback.econtrol`, the parameters lag
    behind by the residuals, and by what is in flight, and this iterate walks the path
    that the same gradients give without compression. Evaluate it beside the parameters,
    above all at the end of training.

    The feedback may stand anywhere in ``state``: in a chain, under ``optax.partition``,
    ``inject_hyperparams`` or :func:`efopt.accumulate`. It may be placed on a mesh,
    stacked for ``vmap`` or ``pmap``, or be this worker's own inside the mapped
    function, where the residuals are averaged uncompressed: not for every step.

    *Units.* A residual in units of gradients is worth the learning rate that stands
    behind it. The state knows that rate if ``error_feedback(learning_rate=...)`` was
    given it, as :func:`efopt.ef_sgd` and :func:`efopt.dist_ef_sgd` do. Otherwise say
    it: the rate of the last step, or ``-1`` if the rate stands in front of the feedback
    and nothing behind.

    Args:
      params: The parameters, placed or stacked as the state is.
      state: An optimizer's state, or anything that holds one.
      learning_rate: The rate of the last step; ``None``: as the state knows it.
      compressor: The compressor of the feedback; needed under
        ``exchange="two_phase"`` alone, where it tells which blocks of the server's
        residual belong to which leaf, and not on a mesh with axes behind each worker,
        whose state knows it. For ``dist_ef_sgd`` by default
        ``scaled_sign(block_size=1024)``.

    Returns:
      A tree like ``params``, dtypes kept.

    Raises:
      ValueError: If the state holds no :class:`efopt.feedback.ErrorFeedbackState` or
        :class:`efopt.feedback.EControlState`, or does not fit the parameters; if a rate
        or the compressor is needed and missing; if EControl's mean is compressed; if
        momentum stands behind the feedback: then SGD's iterate depends on all past
        residuals, and the state does not know it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import efopt
      >>> tx = optax.chain(efopt.error_feedback(efopt.top_k(k=1)), optax.sgd(0.5))
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.array([2.0, -3.0]), tx.init(params))
      >>> params = optax.apply_updates(params, updates)
      >>> print(params, efopt.virtual_params(params, state, learning_rate=0.5))
      [0.  1.5] [-1.   1.5]

    References:
      Karimireddy et al, `Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes <https://arxiv.org/abs/1901.09847>`_, 2019 (proof of Theorem II)
    """
    found = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_feedback)[0]
    feedbacks = [(path, x) for path, x in found if _is_feedback(x)]
    if not feedbacks:
        raise ValueError(
            "`virtual_params(params, state)` needs a state that holds an "
            "`efopt.feedback.ErrorFeedbackState`, and finds none: nothing is owed, or "
            "the residual is stored compressed."
        )
    for path, feedback in feedbacks:
        _refuse_momentum(path, found, params)
        rate = feedback.last_rate if learning_rate is None else learning_rate
        if isinstance(rate, tuple):
            raise ValueError(
                "`virtual_params(params, state)` does not know what the residual is "
                "worth: the state has no learning rate. Pass `learning_rate=...`, the "
                "rate of the last step if it stands behind the feedback, or -1 if it "
                "stands in front; or make the feedback with "
                "`error_feedback(learning_rate=...)`."
            )
        rate = jnp.reshape(rate, -1)[0]  # stacked: one a worker, all equal

        def pay(owed, p, rate=rate):
            return p if _is_masked(owed) else (p - rate * owed).astype(p.dtype)

        owed = _owed(params, feedback, compressor)
        if feedback.link.flight and not _lies_by_shard(feedback):
            flying = _in_flight(owed, params, feedback, compressor)
            owed = jax.tree.map(lambda e, f: e + f.reshape(e.shape), owed, flying)
        params = jax.tree.map(pay, owed, params, is_leaf=_is_masked)
    return params


def _is_feedback(x: Any) -> bool:
    return type(x) in (ErrorFeedbackState, EControlState)  # not stored compressed


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _refuse_momentum(path: Any, found: Any, params: Any) -> None:
    """Raises if a later part of the same chain remembers something like parameters."""
    sizes = {jnp.size(p) for p in jax.tree.leaves(params)} - {1}
    for other, x in found:
        if _is_feedback(x) or not _stands_behind(other, path):
            continue
        if jnp.size(x) in sizes and jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                "`virtual_params(params, state)` cannot know the iterate of SGD with "
                "momentum behind the feedback, as at "
                f"{jax.tree_util.keystr(other)}: it depends on all past residuals. Put "
                "momentum in front, `per_worker(optax.trace(0.9), axis_name=...)`."
            )


def _stands_behind(path: Any, other: Any) -> bool:
    """Whether ``path`` parts from ``other`` at a later place of a chain."""
    for mine, theirs in zip(path, other, strict=False):
        if mine != theirs:
            return isinstance(mine, jax.tree_util.SequenceKey) and mine.idx > theirs.idx
    return False


def _owed(
    params: Any, feedback: ErrorFeedbackState | EControlState, compressor: Any
) -> Any:
    """What workers and owners owe together, averaged, without any worker axis.

    Stacked parameters have one, of which a mean keeps the rest: ``(1, ...)``.
    """
    node = feedback.residual
    if not isinstance(node, PerWorker):
        return node
    axes = Axes.of("virtual_params", node.axis_name)
    if feedback.link.server and isinstance(feedback, EControlState):
        raise ValueError(
            "`virtual_params(params, state)` cannot know the iterate of `econtrol` "
            "with an exchange that compresses the mean again: what that loses acts on "
            "every later step, and is in no worker's error. Use another `exchange`, or "
            "`error_feedback`."
        )
    by_shard = _lies_by_shard(feedback)
    if by_shard:
        owed = regions.read("virtual_params", axes, feedback, _owed_here)
    elif axes.bound():
        owed = axes.pmean(node.local("`virtual_params`"))
    else:
        owed = jax.tree.map(lambda e: jnp.mean(e, axis=0), node.value)
    # The parameters of this feedback alone: `optax.partition` leaves out the others.
    own = jax.tree.map(
        lambda e, p: e if _is_masked(e) else p, owed, params, is_leaf=_is_masked
    )
    for e, p in zip(jax.tree.leaves(owed), jax.tree.leaves(own), strict=True):
        if e.ndim != p.ndim or e.shape not in (p.shape, (1, *p.shape[1:])):
            raise ValueError(
                "`virtual_params(params, state)` needs parameters that are placed or "
                f"stacked as the state is, got parameters of shape {p.shape} where a "
                f"worker's residual has shape {e.shape}."
            )
    if by_shard or not feedback.link.server:
        return owed
    if compressor is None:
        raise ValueError(
            "`virtual_params(params, state)` needs `compressor=...` for a state of "
            '`exchange="two_phase"`, to tell which part of the server\'s residual '
            "belongs to which leaf."
        )
    link = open_link(
        "virtual_params", compressor, axis_name=node.axis_name, exchange="two_phase"
    )
    unstacked = jax.tree.map(_unstacked, owed, own)
    server = owed_by_owners(link, unstacked, feedback.link.server)
    return jax.tree.map(lambda e, s: e + s.reshape(e.shape), owed, server)


def _lies_by_shard(feedback: Any) -> bool:
    """Whether what is owed is to be read device by device."""
    node, link = feedback.residual, feedback.link
    if link.home == () or link.home.specs is None or not link.home.inner:
        return False
    bound = Axes.of("virtual_params", node.axis_name).bound()
    return bound or bool(link.server) or bool(link.flight)


def _owed_here(feedback: Any) -> Any:
    """The same on a mesh, of what one device holds."""
    residual = feedback.residual.local("`virtual_params`")
    return owed_here(feedback.link.home.link, residual, feedback.link)


def _in_flight(owed: Any, params: Any, feedback: Any, compressor: Any) -> Any:
    """What workers have written and not exchanged yet, averaged: a tree like ``owed``.

    A worker's axis that is stacked in ``params`` is left out.
    """
    payloads, made = feedback.link.flight
    if not isinstance(payloads, PerWorker):
        if compressor is None:
            raise ValueError(
                "`virtual_params(params, state)` needs `compressor=...` for a state of "
                "`delay=1` and a single worker, to read the payloads in flight."
            )
        link = open_link("virtual_params", compressor, delay=1)
        return owed_in_flight(link, params, payloads, made)
    axes = Axes.of("virtual_params", payloads.axis_name)
    own = jax.tree.map(
        lambda e, p: e if _is_masked(e) else p, owed, params, is_leaf=_is_masked
    )
    structs = jax.tree.map(_unstacked, owed, own)
    if axes.bound():
        link, mine = feedback.link.home.link, payloads.local("`virtual_params`")
        return axes.pmean(owed_in_flight(link, structs, mine, made))
    sent = in_flight("`virtual_params(params, state)`", feedback, structs)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), sent)


def _unstacked(e: jax.Array, p: jax.Array) -> jax.ShapeDtypeStruct:
    """One worker's copy of ``p``, as a struct."""
    shape = e.shape if e.shape == p.shape else p.shape[1:]
    return jax.ShapeDtypeStruct(shape, p.dtype)
