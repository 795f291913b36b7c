"""The guard: a step that is not finite on one worker is taken by none."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efopt.exchanges.home import Home
from efopt.ground import checks
from efopt.workers import unreduced
from efopt.workers.axes import Axes, AxisName, vary_alike
from efopt.workers.branches import require_common
from efopt.workers.node import PerWorker, is_node


class SkipNotFiniteState(NamedTuple):
    """State of :func:`skip_not_finite`, equal on all workers but for ``inner``.

    Attributes:
      skipped: Steps skipped so far. shape=(), int32.
      streak: Steps skipped since the last one that was taken. shape=(), int32.
      exceeded: Whether ``max_consecutive`` steps in a row have ever been skipped.
        shape=(), bool.
      worker: Whose gradient it was, of the last step skipped; -1: several workers', or
        nobody's. shape=(), int32.
      leaf: Which leaf of the gradient it was, in the order of ``jax.tree.leaves``; -1:
        not known, or none. shape=(), int32.
      inner: The state of the inner transformation.
    """

    skipped: jax.Array
    streak: jax.Array
    exceeded: jax.Array
    worker: jax.Array
    leaf: jax.Array
    inner: Any


@checks.keyword_only
def skip_not_finite(
    inner: optax.GradientTransformation,
    *,
    axis_name: AxisName | None = None,
    max_consecutive: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """Takes no step, on any worker, when something on one worker is not finite.

    One NaN in one coordinate of one worker would stay in its residual for the rest of
    the run, and spread. With this around the whole chain, nothing happens in such a
    step: updates are zero and all inner state is as before, to the bit, on all workers.
    What is looked at is the gradient of every worker, and all that the step makes of
    it: finite gradients whose sum with a residual overflows are seen as well. Values
    that were not finite before, such as a best loss that starts at infinity, are
    nobody's fault.

    *It stands outermost.* State in front of it, such as momentum, would take the NaN,
    and momentum behind it would still move on an update of zero. Around
    :func:`efopt.accumulate` it looks at every mini-batch and drops that alone, for a
    message of 12 bytes each; inside of it, at the mean of all of them, and drops all.

    *What it costs.* Four float32 are summed over the workers. XLA merges them with a
    sum that is there anyway: that of the loss, or of a linear compressor's payloads.
    Both the old state and the new one are in memory for a moment.

    *Who notices.* ``skipped``, ``streak`` and ``exceeded`` are read from the state
    whenever the host likes; :func:`efopt.watch.require_finite` raises. A loss scale is
    lowered by ``streak > 0``, on all workers alike.

    Shapes: any tree -> the same, dtypes kept.
    Cost: 16 bytes a step.
    Properties: changes nothing, to the bit, as long as all is finite; a skipped step
    leaves parameters and state as they were, to the bit.
    Placement: its own fields are replicated, ``inner`` lies as without it.

    Args:
      inner: Any Optax transformation, usually the whole chain.
      axis_name: The mapped axis of the workers, or a tuple of all such axes that
        ``inner`` names; ``None`` for a single worker.
      max_consecutive: Skipped steps in a row from which ``exceeded`` is set, at least
        1. Nothing else happens then: such steps are skipped for ever. Static.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``inner`` is no transformation, ``axis_name`` names no axes or
        ``max_consecutive`` is no Python int.
      ValueError: If ``max_consecutive < 1``; from ``init``, if ``inner`` works over
        another axis or holds ``optax.apply_if_finite`` around an exchange; at trace
        time, if the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import efopt
      >>> chain = optax.chain(efopt.error_feedback(efopt.top_k(k=1)), optax.sgd(1.0))
      >>> tx = efopt.watch.skip_not_finite(chain)
      >>> state, update = jax.jit(tx.init)(jnp.zeros(3)), jax.jit(tx.update)
      >>> _, state = update(jnp.array([1.0, -3.0, 2.0]), state)
      >>> updates, state = update(jnp.array([1.0, jnp.nan, 2.0]), state)
      >>> print(updates, state.inner[0].residual, state.skipped)
      [-0. -0. -0.] [1. 0. 2.] 1

    References:
      Micikevicius et al, `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2018 (Section 3.2: skip the update)
    """
    api = "skip_not_finite"
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"`{api}(inner)` takes an `optax.GradientTransformation`; got {inner!r}."
        )
    axes = Axes.maybe(api, axis_name)
    checks.static_int(api, "max_consecutive", max_consecutive)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> SkipNotFiniteState:
        state = inner.init(params)
        require_common(f"`{api}`", state)
        _require_axes(api, axes, state)
        zero, none = jnp.zeros([], jnp.int32), jnp.full([], -1, jnp.int32)
        never = jnp.zeros([], jnp.bool_)
        return SkipNotFiniteState(zero, zero, never, none, none, state)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> Any:
        if axes is not None:
            updates = unreduced.stacked(f"`{api}`", axes, updates)
            if not is_node(updates):
                axes.require_bound(f"`{api}`")
        out, new = inner.update(updates, state.inner, params, **extra_args)
        made = zip(jax.tree.leaves(new), jax.tree.leaves(state.inner), strict=True)
        found = _found(axes, updates, jax.tree.leaves(out), list(made))
        finite = found.anything == 0

        def either(new, old):
            return jnp.where(finite, new, jnp.asarray(old, new.dtype))

        # p + (-0.0) is p for every p, also for p = -0.0; p + 0.0 is not.
        out = jax.tree.map(lambda u: either(u, -0.0), out)
        new = jax.tree.map(either, new, state.inner)
        one = found.workers == 1
        skipped = optax.safe_increment(state.skipped)
        streak = jnp.asarray(optax.safe_increment(state.streak))
        worker = jnp.where(one, found.worker, -1).astype(jnp.int32)
        leaf = jnp.where(one, found.leaf, -1).astype(jnp.int32)
        return out, SkipNotFiniteState(
            skipped=either(state.skipped, skipped),
            streak=either(jnp.zeros_like(streak), streak),
            exceeded=either(
                state.exceeded, state.exceeded | (streak >= max_consecutive)
            ),
            worker=either(state.worker, worker),
            leaf=either(state.leaf, leaf),
            inner=new,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def require_finite(state: Any, params: Any = None) -> None:
    """Raises if too many steps in a row were skipped. For the host: it reads the state.

    Reading waits for the step that made the state: call it where the loss is read.

    Args:
      state: A state of :func:`skip_not_finite`, or anything that holds one: a chain, a
        ``TrainState``; placed, or stacked for ``pmap`` or ``vmap``.
      params: The parameters, or a tree like the gradients, by which the leaf is named;
        ``None``: by its number.

    Raises:
      FloatingPointError: If ``max_consecutive`` steps in a row were skipped, now or
        earlier. It names the counts and, of the last step skipped, worker and leaf
        where they are known.
      ValueError: If there is no such state.

    Returns:
      Nothing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import efopt
      >>> tx = efopt.watch.skip_not_finite(optax.sgd(1.0), max_consecutive=1)
      >>> params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([jnp.inf, 0.0])}
      >>> _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params))
      >>> try:
      ...     efopt.watch.require_finite(state, params)
      ... except FloatingPointError as error:
      ...     print(str(error)[:72])
      1 steps were not finite and were skipped, the last 1 of them in a row; i
    """
    for guard in _guards(state):
        counts = guard.exceeded, guard.skipped, guard.streak, guard.worker, guard.leaf
        exceeded, skipped, streak, worker, leaf = (int(read(x)) for x in counts)
        if not exceeded:
            continue
        whose = f"the gradient of worker {worker}" if worker >= 0 else ""
        if whose and leaf >= 0:
            whose += f", at {_name(leaf, params)}"
        raise FloatingPointError(
            f"{skipped} steps were not finite and were skipped, the last {streak} of "
            "them in a row; in the last one it was "
            f"{whose or 'not that of one worker alone'}. Parameters and state are "
            "those before. Lower the learning rate or the loss scale, or look at what "
            "that worker was given."
        )


def _guards(state: Any) -> list[SkipNotFiniteState]:
    is_guard = lambda x: isinstance(x, SkipNotFiniteState)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_guard) if is_guard(x)]
    if not found:
        raise ValueError(
            "`require_finite(state)` looks for the state of "
            "`efopt.watch.skip_not_finite`, and there is none in it."
        )
    return found


def read(x: Any, ndim: int = 0) -> np.ndarray:
    """An array that is equal everywhere, also across processes or in a stack.

    Args:
      x: The array, placed or stacked.
      ndim: How many axes it has for one worker.
    """
    x = np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)
    return x.reshape(-1, *x.shape[x.ndim - ndim :])[0]


def _name(leaf: int, params: Any) -> str:
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    if leaf < len(paths):
        return jax.tree_util.keystr(paths[leaf][0]) or "the root"
    return f"leaf {leaf} of `jax.tree.leaves(gradients)`"


# ------------------------------------------------------------- what is not finite


class _Found(NamedTuple):
    """What a step has come upon, equal on all workers: float32, shape=().

    Attributes:
      anything: Above zero if anything is not finite, anywhere.
      workers: How many workers have a gradient that is not.
      worker: The sum of their numbers.
      leaf: The sum of the numbers of the first such leaf of each.
    """

    anything: jax.Array
    workers: jax.Array
    worker: jax.Array
    leaf: jax.Array


def _found(axes: Axes | None, updates: Any, out: Any, made: Any) -> _Found:
    """Looks at gradients, updates, and pairs of a new and an old leaf of the state."""
    if is_node(updates) and axes is not None and not axes.bound():
        return _found_stacked(updates, out, made)
    grads = [_count(g) for g in jax.tree.leaves(updates)]
    rest = [((u,), _count(u)) for u in out]
    rest += [(pair, _count(*pair)) for pair in made]
    if axes is None:
        bad, first = _first(jnp.stack([*grads, _total(())]))
        anything = bad + _total([n for _, n in rest])
        return _Found(anything, bad, jnp.zeros_like(bad), bad * first)
    # What all workers share they need not tell each other.
    mine = [n for (x, *_), n in rest if axes.may_differ(x)]
    ours = [n for (x, *_), n in rest if not axes.may_differ(x)]
    counts = axes.sum_behind(jnp.stack(vary_alike([*grads, _total(mine)])))
    bad, first = _first(counts.at[-1].set(0))
    index = axes.index().astype(jnp.float32)
    anything = bad + counts[-1]
    got = axes.sum(jnp.stack(vary_alike([anything, bad, bad * index, bad * first])))
    return _Found(got[0] + axes.sum_behind(_total(ours)), got[1], got[2], got[3])


def _found_stacked(updates: PerWorker, out: Any, made: Any) -> _Found:
    """The same over global arrays, whose gradients have one row a worker."""
    grads = [_count(g, rows=True) for g in jax.tree.leaves(updates.value)]
    inside = _total([*map(_count, out), *(_count(*pair) for pair in made)])
    if not grads:
        return _Found(inside, *(jnp.zeros_like(inside),) * 3)
    bad, first = _first(jnp.stack(grads, axis=-1))
    index = jnp.arange(bad.shape[0], dtype=jnp.float32)
    got = jnp.sum(jnp.stack([bad, bad * index, bad * first], axis=-1), axis=0)
    return _Found(got[0] + inside, got[0], got[1], got[2])


def _first(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether there is any, and the number of the first, of counts a leaf."""
    bad = counts > 0
    first = jnp.argmax(bad, axis=-1).astype(jnp.float32)
    return jnp.any(bad, axis=-1).astype(jnp.float32), first


def _count(new: Any, old: Any = None, rows: bool = False) -> jax.Array:
    """How many coordinates are not finite, and were before; float32."""
    axis = tuple(range(1, jnp.ndim(new))) if rows else None
    if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
        return jnp.zeros(jnp.shape(new)[:1] if rows else (), jnp.float32)
    bad = ~jnp.isfinite(new)
    if old is not None:
        bad &= jnp.isfinite(old)
    return jnp.sum(bad, axis=axis, dtype=jnp.float32)


def _total(counts: Sequence[jax.Array]) -> jax.Array:
    return sum(vary_alike(counts), jnp.zeros([], jnp.float32))


# --------------------------------------------------------------------- the axes


def _require_axes(api: str, axes: Axes | None, state: Any) -> None:
    """Raises if something inside works over axes that the guard does not know."""
    known = () if axes is None else axes.names
    for names in _axes_in(state):
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"`{api}(axis_name={None if axes is None else axes.key!r})` must name "
                f"the axes of all workers inside of it, and {missing[0]!r} is one: "
                f"else those would not skip together. Write "
                f"`axis_name={Axes((*known, *missing)).key!r}`."
            )


def _axes_in(state: Any) -> Iterable[tuple[str, ...]]:
    known = lambda x: is_node(x) or isinstance(x, Home)  # noqa: E731
    for x in jax.tree.leaves(state, is_leaf=known):
        if is_node(x):
            yield Axes.of("PerWorker", x.axis_name).names
        elif isinstance(x, Home):
            yield x.link.axes.names
