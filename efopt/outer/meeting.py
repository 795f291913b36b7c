"""The meeting of a round: pseudo-gradients in, common updates out, by fragments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr

from efopt.codecs.states import is_placeholder
from efopt.exchanges.home import Home
from efopt.ground import bits
from efopt.ground.dtypes import wide
from efopt.workers.axes import Axes, vary, varying
from efopt.workers.fragments import Fragments, Labels
from efopt.workers.local import moved, require_common
from efopt.workers.node import PerWorker, is_node, laid_out
from efopt.workers.per_worker import spmd_name


@dataclasses.dataclass(frozen=True)
class Meeting:
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
        ours = [x for x in homes(state) if set(x.link.axes.names) == names]
        return {path for home in ours for path in home.paths}

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
            common = self.parts.part(labels, params, j)
            meet = self._meeting(common, stacked)
            args = self.parts.part(labels, own.drift, j), states[j]
            if self.parts.every == 1:
                out, drift, states[j] = meet(*args)
            else:
                due = self.parts.due(steps, j, labels.number)
                out, drift, states[j] = _if(due, meet, *args, common)
            outs, drifts = [*outs, out], [*drifts, drift]
        local = _with_drift(local, self.parts.join(labels, drifts))
        after = states[0] if self.parts.given is None else tuple(states)
        return self.parts.join(labels, outs), local, after

    def _meeting(self, params: Any, stacked: bool) -> Any:
        """What is done of some leaves where they meet."""

        def meet(drift: Any, outer: Any) -> Any:
            # 2311.08105 Algorithm 1, lines 12 and 14
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

        return meet

    def _minus(self, d: jax.Array, p: jax.Array, stacked: bool) -> jax.Array:
        """The pseudo-gradient: the common parameters minus a worker's."""
        minus = bits.cast(-d, jnp.result_type(p))
        return minus if self.axes is None or stacked else minus.reshape(d.shape[1:])

    def _rest(self, d: jax.Array, u: jax.Array, p: jax.Array, stacked: bool) -> Any:
        """What parts a worker from the new common parameters, or a share of it."""
        if not (self.alpha or self.parts.delay):  # a new round starts, line 3
            return jnp.zeros_like(d)
        share = 1.0 if self.parts.delay else self.alpha
        by = wide(moved(p, u)) - wide(p)  # in the dtype of the parameters

        def one(d):
            return (d - by) * share

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
    ", at `efopt.local_params(params, {0!r}, state)`; or pass `axis_name=None` for a "
    "single worker"
)


def homes(state: Any) -> list[Home]:
    """Of all exchanges with other workers in a state."""
    is_home = lambda x: isinstance(x, Home)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_home) if is_home(x)]


def _if(due: jax.Array, meet: Any, drift: Any, outer: Any, params: Any) -> Any:
    """A meeting if it is due; else updates of zero, and drift and state as they are.

    A loop of one turn or none: what it holds stays in its place. What passes through a
    branch a compiler may copy at every step, on the way in and on the way out.
    """
    outer = laid_out(outer)
    out = jax.eval_shape(meet, drift, outer)[0]
    zeros = lambda u, p: vary(jnp.zeros_like(p), *varying(u))  # noqa: E731
    start = jax.tree.map(zeros, out, params), drift, outer

    def turn(carry):
        due, (_, drift, outer) = carry
        return jnp.zeros_like(due), meet(drift, outer)

    return lax.while_loop(lambda carry: carry[0], turn, (due, start))[1]


def _with_drift(local: Any, drift: Any) -> Any:
    if not is_node(local):
        return local._replace(drift=drift)
    return local.with_value(local.value._replace(drift=drift))
