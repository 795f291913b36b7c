"""Local steps: workers go their own ways, and meet every few steps."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr

from efopt.codecs.states import is_placeholder
from efopt.exchanges.home import Home
from efopt.ground import bits, checks
from efopt.workers.axes import Axes, AxisName, vary, varying
from efopt.workers.fragments import Fragments, Labels, read
from efopt.workers.local import require_common, walk
from efopt.workers.node import PerWorker, is_node, laid_out
from efopt.workers.per_worker import per_worker, spmd_name


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
    takes the sum: ``efopt.local_params(params, axis_name, opt_state)``. To evaluate,
    take the common ones.

    The outer transformation is any Optax chain with an exchange of efopt. It gets the
    *pseudo-gradient* :math:`\theta - \theta_i = -d_i` of each worker, in the dtype of
    the parameters, and its updates move the common parameters. Between meetings nothing
    crosses the axis: a meeting stands in a branch that all workers take together.
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
    Cost: that of ``outer``, once in ``every`` steps.
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
    for name, given in (("inner", inner), ("outer", outer)):
        if not isinstance(given, optax.GradientTransformation):
            raise TypeError(
                f"`{api}({name})` takes an Optax transformation, got {given!r}."
            )
    axes = Axes.maybe(api, axis_name)
    parts = read(api, every, start, fragments, delay)
    if checks.static_float(api, "alpha", alpha) >= 1:
        raise ValueError(
            f"`{api}(alpha=...)` is what a worker keeps of its own at a meeting, in "
            f"[0, 1), got {alpha}: at 1 workers would never come together."
        )
    meeting = _Meeting(
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
        if _homes(local):
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
            _, local = walker.update(updates, local, params, **extra_args)
            local = meeting.blend(now, local, outer, params)
            return out, LocalStepsState(now, local, outer)
        _, local = walker.update(updates, local, params, **extra_args)
        out, local, outer = meeting.hold(now, local, outer, params, is_node(updates))
        return out, LocalStepsState(now, local, outer)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """Where pseudo-gradients become common updates, fragment by fragment.

    Attributes:
      api: The transformation, for errors.
      outer: What does it.
      axes: The axes of the workers, or ``None``.
      parts: The fragments, and when they meet.
      alpha: What is left of a drift when its result is taken.
    """

    api: str
    outer: optax.GradientTransformationExtraArgs
    axes: Axes | None
    parts: Fragments
    alpha: float

    def init(self, params: Any) -> Any:
        """The state of the outer transformation, or of one for each fragment."""
        if is_placeholder(params):  # of which every fragment is one
            some = [params] * self.parts.number()
        else:
            labels = self.parts.labels(params)
            some = [self.parts.part(labels, params, j) for j in range(labels.number)]
        states = [self.outer.init(x) for x in some]
        met = {path for state in states for path in self._exchanged(state)}
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
            if self.axes is not None and keystr(path) not in met:
                raise ValueError(self._no_exchange(path))
        return states[0] if self.parts.given is None else tuple(states)

    def _exchanged(self, state: Any) -> set[str]:
        """The paths of the leaves that an outer state exchanges over the axis."""
        names = set(self.axes.names) if self.axes is not None else set()
        homes = [x for x in _homes(state) if set(x.link.axes.names) == names]
        return {path for home in homes for path in home.paths}

    def _labels(self, params: Any, outer: Any) -> Labels:
        """The fragment of every leaf, as ``init`` chose them by global shapes."""
        if self.parts.given is None or self.axes is None:
            return self.parts.labels(params)
        met = [self._exchanged(state) for state in outer]
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        of = [
            next((j for j, some in enumerate(met) if keystr(path) in some), 0)
            for path, _ in paths
        ]
        return Labels(tuple(of), len(met), treedef)

    def check(self, updates: Any, state: Any, params: Any) -> None:
        """Raises if a step cannot be taken with what it was given."""
        if params is None:
            raise ValueError(
                f"{self.api} needs the common parameters: `tx.update(grads, state, "
                "params)`."
            )
        if self.axes is None:
            if is_node(updates):
                raise ValueError(
                    f"{self.api} is of a single worker, and the gradients are stacked "
                    f"over {updates.axis_name!r}: pass "
                    f"`axis_name={updates.axis_name!r}`."
                )
            return
        if not is_node(updates):
            self.axes.require_bound(self.api, CURE.format(self.axes.key))
            self.axes.require_local(self.api, updates)
            state.local.local(self.api)
        require_common(self.api, self.axes, params)

    def hold(
        self, steps: Any, local: Any, outer: Any, params: Any, stacked: bool
    ) -> tuple[Any, Any, Any]:
        """The meetings at the end of a step: updates, and the state after them."""
        labels = self._labels(params, outer)
        own = local.value if is_node(local) else local
        states = [outer] if self.parts.given is None else list(outer)
        outs, drifts = [], []
        for j in range(labels.number):
            take, skip = self._branches(self.parts.part(labels, params, j), stacked)
            drift = self.parts.part(labels, own.drift, j)
            if self.parts.every == 1:
                out, drift, states[j] = take(drift, states[j])
            else:
                due = self.parts.due(steps, j, labels.number)
                out, drift, states[j] = lax.cond(
                    due, take, skip, drift, laid_out(states[j])
                )
            outs, drifts = [*outs, out], [*drifts, drift]
        local = _with_drift(local, self.parts.join(labels, drifts))
        after = states[0] if self.parts.given is None else tuple(states)
        return self.parts.join(labels, outs), local, after

    def _branches(self, params: Any, stacked: bool) -> tuple[Any, Any]:
        """What is done of some leaves where they meet, and where they do not."""

        def take(drift: Any, outer: Any) -> Any:
            # 2311.08105 Algorithm 1, lines 12 and 14, and the start of a new round
            minus: Any = jax.tree.map(
                lambda d, p: self._minus(d, p, stacked), drift, params
            )
            if stacked and self.axes is not None:
                minus = PerWorker(minus, self.axes.key)
            out, outer = self.outer.update(minus, outer, params)
            for path, u in jax.tree_util.tree_flatten_with_path(out)[0]:
                if self.axes is not None and set(self.axes.names) & varying(u):
                    raise ValueError(self._no_exchange(path))
            out = bits.cast_like(out, params)
            rest = lambda d, u, p: self._rest(d, u, p, stacked)  # noqa: E731
            return out, jax.tree.map(rest, drift, out, params), outer

        def skip(drift, outer):
            out = jax.eval_shape(take, drift, outer)[0]
            zeros = lambda u, p: vary(jnp.zeros_like(p), *varying(u))  # noqa: E731
            return jax.tree.map(zeros, out, params), drift, outer

        return take, skip

    def _minus(self, d: jax.Array, p: jax.Array, stacked: bool) -> jax.Array:
        """The pseudo-gradient: the common parameters minus a worker's."""
        minus = bits.cast(-d, jnp.result_type(p))
        return minus if self.axes is None or stacked else minus.reshape(d.shape[1:])

    def _rest(self, d: jax.Array, u: jax.Array, p: jax.Array, stacked: bool) -> Any:
        """What parts a worker from the new common parameters, or a share of it."""
        if not (self.alpha or self.parts.delay):
            return jnp.zeros_like(d)
        share = 1.0 if self.parts.delay else self.alpha

        def one(d):
            return (d - u.astype(d.dtype)) * share

        if self.axes is None:
            return one(d)
        return jax.vmap(one, spmd_axis_name=spmd_name(self.axes, p, stacked))(d)

    def blend(self, now: Any, local: Any, outer: Any, params: Any) -> Any:
        """2501.18512: where a delayed result is taken, a share of a drift is left."""
        labels = self._labels(params, outer)
        own = local.value if is_node(local) else local
        before, number = now - self.parts.delay, labels.number
        due = [self.parts.due(before, j, number) for j in range(number)]
        shares = [jnp.where(d, self.alpha, 1.0) for d in due]
        drifts = [
            d * shares[j].astype(d.dtype)
            for j, d in zip(labels.of, jax.tree.leaves(own.drift), strict=True)
        ]
        return _with_drift(local, labels.treedef.unflatten(drifts))

    def _no_exchange(self, path: Any) -> str:
        assert self.axes is not None
        return (
            "`local_steps(outer)` needs an exchange over "
            f"{self.axes.key!r} for every leaf, and has none at "
            f"{keystr(path) or 'the root'}: workers would drift apart. "
            "Put `efopt.error_feedback(compressor, axis_name=...)` in front of the "
            "outer optimizer, or uncompressed "
            "`efopt.compress(efopt.compressors.identity(), axis_name=...)`."
        )


CURE = (
    "; in a plain jitted step over global arrays take the gradients of "
    "`efopt.value_and_grad(..., axis_name={0!r})` at `efopt.local_params(params, "
    "{0!r}, state)` as they are; or pass `axis_name=None` for a single worker"
)


def _homes(state: Any) -> list[Home]:
    """Of all exchanges with other workers in a state."""
    is_home = lambda x: isinstance(x, Home)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_home) if is_home(x)]


def _with_drift(local: Any, drift: Any) -> Any:
    if not is_node(local):
        return local._replace(drift=drift)
    return local.with_value(local.value._replace(drift=drift))
