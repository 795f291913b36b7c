"""Local steps: workers go their own ways, and meet every few steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.ground import checks
from efopt.outer.meeting import Meeting, homes
from efopt.workers.axes import Axes, AxisName
from efopt.workers.fragments import read
from efopt.workers.local import walk
from efopt.workers.node import is_node
from efopt.workers.per_worker import per_worker


class LocalStepsState(NamedTuple):
    """State of :func:`local_steps`.

    Attributes:
      count: Steps taken. shape=(), int32. Equal on all workers.
      local: What each worker keeps between meetings: its drift from the common
        parameters, and the state of its inner optimizer. A :class:`efopt.PerWorker` if
        there is an axis.
      outer: The state of the outer transformation; a tuple of one for each fragment if
        there are several.
    """

    count: jax.typing.ArrayLike
    local: Any
    outer: Any


@checks.keyword_only
def local_steps(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    *,
    every: int,
    axis_name: AxisName | None = None,
    start: int = 0,
    fragments: Any = None,
    delay: int = 0,
    alpha: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets every worker take steps of its own, and meets every few of them.

    .. math::
      d_i \leftarrow d_i + \mathrm{inner}(\nabla f_i(\theta + d_i)), \quad
      \text{and every } H \text{ steps} \quad
      \theta \leftarrow \theta + \mathrm{outer}(-d_i), \quad d_i \leftarrow 0

    The parameters in the train state are the common ones, equal on all workers; they
    stand still between meetings, and a checkpoint of them and of this state goes on in
    the middle of a round. A worker's drift from them is in the state. The forward pass
    takes the sum: ``efopt.local_params(params, axis_name, opt_state)``; a gradient that
    was taken at the common ones looks the same, and no error tells the two apart. To
    evaluate, take the common ones.

    The outer transformation is any Optax chain with an exchange of efopt. It gets the
    *pseudo-gradient* :math:`\theta - \theta_i = -d_i` of each worker, in the dtype of
    the parameters, and its updates move the common parameters. Between meetings nothing
    crosses the axis: a meeting is a loop of one turn or none, all workers alike.
    States of the inner optimizer remain each worker's own and are never averaged.

    *Fragments.* The leaves may be parted; then each part has a meeting of its own every
    ``every`` steps, and these are spread evenly over the round: fragment ``j`` of ``P``
    meets ``floor((j + 1) every / P)`` steps into it.

    *Delay.* With ``delay`` a fragment is exchanged at the beginning of the step after,
    from what the state holds: the exchange does not wait for the gradients of that
    step, nor they for it, and a compiler may hide one behind the other. The common
    parameters then move, and workers stay where they are until ``delay`` steps after
    the meeting.

    *Blending.* There, each keeps the share ``alpha`` of what parts it from the new
    common parameters: ``0`` takes these, ``1`` never does.

    Shapes: any tree of floating-point leaves -> the same, in the parameters' dtypes.
    Cost: that of ``outer``, once in ``every`` steps. In memory the drift, and while
    gradients are taken the sum, a copy of the parameters.
    Properties: with ``every=1``, the identity, ``sgd(a)`` inside and ``sgd(1)`` outside
    it is ``sgd(a)``; after a meeting without ``alpha`` and ``delay`` no worker has a
    drift.
    Placement: drift and inner states per worker; of the outer state what ``outer``
    marks; all else replicated.

    Args:
      inner: Each worker's optimizer, learning rate included; without an exchange.
      outer: What makes of the pseudo-gradients the common updates; with one, over the
        same axis. ``efopt.error_feedback(...)`` or another scheme, then ``optax.sgd``.
      every: Steps of a round, at least 1. Static.
      axis_name: The mapped axis of the workers, or a tuple of axes; ``None`` for a
        single worker.
      start: Steps at whose end all meet, before rounds begin, at least 0. Static.
      fragments: ``None``: one. An int: so many, of leaves that follow one another in
        the natural order of their paths, of nearly equal size. Else labels, a tree like
        the parameters or a function that makes one of them: leaves of one label meet
        together, fragments in the order of sorted labels.
      delay: Steps after which a worker takes the new value, below ``every``. Static.
      alpha: What it keeps of its own then, in [0, 1). Static.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on
      to ``inner``. Its ``update`` needs the common parameters.

    Raises:
      TypeError: If an option is of another type, or not static.
      ValueError: If one is out of range; in ``init``, if ``outer`` has no exchange over
        the axis for some leaf, ``inner`` has one, or labels leave leaves out; at trace
        time, if the axis is not bound, updates are already averaged, parameters are
        missing or not the common ones, or the state is not placed.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import efopt
      >>> tx = efopt.local_steps(
      ...     optax.sgd(0.5),
      ...     optax.chain(efopt.error_feedback(efopt.top_k(k=1)), optax.sgd(1.0)),
      ...     every=2)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     own = efopt.local_params(params, None, state)
      ...     updates, state = tx.update(own - jnp.array([1.0, 4.0]), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params)
      [0. 3.]

    References:
      Stich, `Local SGD Converges Fast and Communicates Little
      <https://arxiv.org/abs/1805.09767>`_, 2018
      Douillard et al, `DiLoCo: Distributed Low-Communication Training of Language
      Models <https://arxiv.org/abs/2311.08105>`_, 2023 (Algorithm 1)
      Douillard et al, `Streaming DiLoCo with overlapping communication
      <https://arxiv.org/abs/2501.18512>`_, 2025 (fragments, delay and blending)
    """
    api = "local_steps"
    axes = Axes.maybe(api, axis_name)
    parts = read(api, every, start, fragments, delay)
    if checks.static_float(api, "alpha", alpha) >= 1:
        raise ValueError(
            f"`{api}(alpha=...)` is what a worker keeps of its own at a meeting, in "
            f"[0, 1), got {alpha}: at 1 workers would never come together."
        )
    meeting = Meeting(
        f"`{api}(axis_name={axis_name!r})`",
        optax.with_extra_args_support(outer),
        axes,
        parts,
        alpha,
    )
    walker = walk(inner)
    if axes is not None:
        walker = per_worker(walker, axis_name=axes.key)

    def init_fn(params: Any) -> LocalStepsState:
        local = walker.init(params)
        if homes(local):
            raise ValueError(
                f"`{api}(inner)` is each worker's own, and holds an exchange with the "
                "others. Put it in `outer`; one over a fast axis in front of all: "
                "`optax.chain(efopt.compress(efopt.compressors.identity(), "
                f"axis_name=...), efopt.{api}(...))`."
            )
        return LocalStepsState(jnp.zeros([], jnp.int32), local, meeting.init(params))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        meeting.check(updates, state, params)
        now = optax.safe_increment(state.count)
        local, outer = state.local, state.outer
        if delay:  # of nothing that this step's gradients have a part in
            out, local, outer = meeting.hold(
                state.count, local, outer, params, is_node(updates)
            )
            moved = optax.apply_updates(params, out)
            _, local = walker.update(updates, local, moved, **extra_args)
            local = meeting.blend(now, local, outer, params)
            return out, LocalStepsState(now, local, outer)
        _, local = walker.update(updates, local, params, **extra_args)
        out, local, outer = meeting.hold(now, local, outer, params, is_node(updates))
        return out, LocalStepsState(now, local, outer)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
