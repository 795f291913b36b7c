"""A state of some workers for another number of workers."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from efopt.checkpoints.arrays import by_columns, on_host
from efopt.feedback.landed import landed
from efopt.feedback.rewritten import rewritten
from efopt.ground.checks import keyword_only
from efopt.workers import moves
from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker, is_node
from efopt.workers.stacks import unstacked


@keyword_only
def resize(
    state: Any,
    num_workers: int | tuple[int, ...] | Mapping[str, int],
    *,
    params: Any = None,
    learning_rate: jax.typing.ArrayLike | None = None,
    stacked: bool | None = None,
) -> Any:
    r"""Makes the state of ``n`` workers one of ``m``, for slices that come and go.

    .. math::
      e'_j = \sum_i W_{ji} e_i, \qquad
      W_{ji} = m \left| [\tfrac{j}{m}, \tfrac{j+1}{m}] \cap
      [\tfrac{i}{n}, \tfrac{i+1}{n}] \right|

    What a step does depends on each worker's own values through their mean. That is
    kept, so that the run goes on as if nothing had happened: parameters minus rate
    times what is owed (:func:`efopt.virtual_params`) stay where they are, and the error
    of a converged run does not come back. No worker's residual gets larger than the
    largest was, and worker ``j`` takes over from those whose contiguous share of the
    data becomes its own.

    ============================  ======================================================
    residuals, momentum, shifts,  mixed as above: copies for ``m = k n``, and else the
    accumulated gradients         mean to half a unit in the last place of one worker,
                                  over ``m``
    server residuals              ranges of blocks cut anew, to the bit
    what all workers hold alike   as it is, to the bit; the mean of DIANA's shifts too
    reference points, with coins  mixed, and the gradients there evaluated in the next
    of each worker's own          step
    residuals stored compressed   mixed as they are where payloads may be summed; else
                                  read, mixed and written again, and what that loses is
                                  paid into ``params`` at once
    payloads in flight            read and owed instead: the next update is zero
    integers                      refused, unless all workers hold the same
    ============================  ======================================================

    A state says of itself which of these it is (``PerWorker.rule``); one that does not
    is refused. ``per_worker(optax.adam(...))`` is the one approximation among them: the
    mean of second moments is no second moment of the mean.

    The axes behind each worker stay: slices may come and go, and the shards inside one
    are what they were.

    Args:
      state: A state, a ``TrainState``, or anything that holds one: placed on a mesh,
        stacked for ``pmap`` or ``vmap``, or restored as host arrays or into what
        :func:`efopt.checkpoints.target` makes.
      num_workers: The number of workers to come; a tuple for workers along several
        axes; or the lengths of mesh axes by name, such as ``mesh.shape``.
      params: The parameters, if a residual is stored compressed by a memory whose
        payloads cannot be summed, and ``m`` is no multiple of ``n``.
      learning_rate: What such a residual is worth, as in :func:`efopt.virtual_params`.
      stacked: Whether the state is stacked for ``pmap`` or ``vmap``. ``None``: its
        arrays tell.

    Returns:
      The state, for :func:`efopt.distribute` or :func:`efopt.stack_workers`: what is
      each worker's own as host arrays ``(m, ...)``, or, where it spans processes, on
      the devices where it is. With ``params`` the pair of these, which have paid, and
      the state.

    Raises:
      TypeError: If ``num_workers`` is none of these.
      ValueError: If a number is below 1; if an axis of the state is not named; if
        workers hold different integers, or a part of the state has no rule, or is the
        share of one worker; if ``params`` or ``learning_rate`` is needed and missing;
        if it cannot be told whether the state is stacked.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.error_feedback(efopt.top_k(k=1), axis_name="data")
      >>> state = efopt.stack_workers(tx.init(jnp.zeros(2)), 4)
      >>> residual = state.residual.with_value(jnp.arange(8.0).reshape(4, 1, 2))
      >>> state = state._replace(residual=residual)
      >>> print(efopt.checkpoints.resize(state, 2).residual.value)
      [[1. 2.]
       [5. 6.]]
    """
    state = unstacked(state, stacked)
    sizes_of = _Sizes(num_workers, state)
    if _has_as_many(state, sizes_of):
        return state if params is None else (params, state)
    state = landed("`resize`", state)
    losses: list[tuple[Any, Any]] = []

    def one(path, x):
        where = jax.tree_util.keystr(path) or "the state"
        if is_node(x):
            return _moved(where, x, sizes_of(where, x.axis_name))
        if not _is_stored(x):
            return x
        # The residual by a rule of its own, all the rest like any other.
        rest = jax.tree_util.tree_map_with_path(
            lambda p, y: one((*path, *p), y), x._replace(residual=()), is_leaf=is_node
        )
        nodes = jax.tree.leaves(x.residual, is_leaf=is_node)
        sizes = sizes_of(f"{where}.residual", nodes[0].axis_name)
        for node in nodes:
            node.require_whole("`resize`")
        residual = jax.tree.map(on_host, x.residual)
        residual, lost = rewritten(residual, x.link.home, on_host(x.count), sizes)
        if lost is not None:
            losses.append((x, lost))
        return rest._replace(residual=residual)

    is_leaf = lambda x: is_node(x) or _is_stored(x)  # noqa: E731
    new = jax.tree_util.tree_map_with_path(one, state, is_leaf=is_leaf)
    if params is None:
        if losses:
            raise ValueError(
                "`resize(state, num_workers)` has to write anew a residual that is "
                f"stored by {losses[0][0].link.home.link.api}, and that loses some of "
                "it. Pass the parameters and the rate, `params, state = resize(state, "
                "num_workers, params=params, learning_rate=...)`: they pay it at once."
            )
        return new
    for feedback, lost in losses:
        params = _paid(params, lost, _worth(feedback, learning_rate))
    return params, new


def _has_as_many(state: Any, sizes_of: "_Sizes") -> bool:
    """Whether the state is of that many workers already: nothing of it changes."""
    same = []
    for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_node)[0]:
        if is_node(x):
            x.require_whole("`resize`")
            m = math.prod(sizes_of(jax.tree_util.keystr(path), x.axis_name))
            same += [y.shape[:1] == (m,) for y in jax.tree.leaves(x.value)]
            same.append(math.prod(x.sizes or (m,)) == m)
    return all(same)


def _is_stored(x: Any) -> bool:
    """Whether it is the state of a feedback whose residual is stored by a codec."""
    if is_node(x) or not {"count", "residual", "link"} <= {*getattr(x, "_fields", ())}:
        return False
    nodes = jax.tree.leaves(x.residual, is_leaf=is_node)
    return any(is_node(node) and node.rule == "stored" for node in nodes)


def _moved(where: str, node: PerWorker, sizes: tuple[int, ...]) -> PerWorker:
    """A node by its rule."""
    node.require_whole("`resize`")
    m, lead = math.prod(sizes), node.lead
    leaves, treedef = jax.tree_util.tree_flatten_with_path(node.value)
    new = []
    for (path, x), split in zip(leaves, node.splits(), strict=True):
        at = where + jax.tree_util.keystr(path)
        _check_workers(at, node, x)
        try:
            new.append(
                by_columns(
                    x,
                    lambda y, split=split: moves.moved(y, m, node.rule, split, lead),
                    lead + (split is not None),
                )
            )
        except ValueError as error:
            raise ValueError(
                f"`resize(state, {m})` cannot go on from {math.prod(x.shape[:1])} "
                f"workers: {at} {error}."
            ) from error
    return moves.laid_out(node, treedef.unflatten(new), sizes)


def _check_workers(where: str, node: PerWorker, x: Any) -> None:
    n = math.prod(node.sizes) if node.sizes is not None else None
    if n is not None and x.shape[:1] != (n,):
        raise ValueError(
            f"`resize` got a state that says it is laid out over {n} workers, and "
            f"{where} has an array of shape {x.shape}."
        )


class _Sizes:
    """How many workers are to come, along the axes of a node."""

    def __init__(self, given: Any, state: Any):
        self.given = given
        if isinstance(given, Mapping):
            numbers = tuple(given.values())
        elif isinstance(given, tuple):
            numbers = given
        else:
            numbers = (given,)
            keys = {
                x.axis_name
                for x in jax.tree.leaves(state, is_leaf=is_node)
                if is_node(x)
            }
            if len(keys) > 1:
                raise ValueError(
                    f"`resize(state, {given!r})` got a state over several axes, "
                    f"{sorted(map(str, keys))}: say how long each is, `resize(state, "
                    "mesh.shape)`."
                )
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | np.integer):
                raise TypeError(
                    "`resize(state, num_workers)` takes a Python int, a tuple of such, "
                    f"or a mapping from axes to such, got {given!r}."
                )
            if number < 1:
                raise ValueError(
                    f"`resize(state, num_workers)` needs at least 1, got {given!r}."
                )

    def __call__(self, where: str, axis_name: Any) -> tuple[int, ...]:
        names = Axes.of("resize", axis_name).names
        if isinstance(self.given, Mapping):
            for name in names:
                if name not in self.given:
                    raise ValueError(
                        f"`resize(state, num_workers)`: {where} is over the axis "
                        f"{name!r}, and lengths are given of {sorted(self.given)}."
                    )
            return tuple(int(self.given[name]) for name in names)
        if isinstance(self.given, tuple):
            if len(self.given) != len(names):
                raise ValueError(
                    f"`resize(state, {self.given})`: {where} is over {axis_name!r}."
                )
            return self.given
        return (self.given,)


def _worth(feedback: Any, learning_rate: Any) -> Any:
    known = getattr(feedback, "last_rate", ())
    rate = known if learning_rate is None else learning_rate
    if isinstance(rate, tuple):
        raise ValueError(
            "`resize(state, num_workers, params=...)` does not know what a stored "
            "residual is worth: the state has no learning rate. Pass "
            "`learning_rate=...`, the rate of the last step if it stands behind the "
            "feedback, or -1 if it stands in front."
        )
    return np.reshape(np.asarray(rate, np.float64), -1)[0]


def _paid(params: Any, lost: Any, rate: Any) -> Any:
    """Parameters that have paid what was lost, at once."""
    leaves = {
        tuple(path): x for path, x in jax.tree_util.tree_flatten_with_path(lost)[0]
    }

    def pay(path, p):
        x = leaves.get(tuple(path))
        if x is None or not x.any():
            return p
        host = np.asarray(p)
        lead = host.ndim - x.ndim  # stacked parameters have a worker axis
        return (
            host.astype(np.float64) - rate * x.reshape((1,) * lead + x.shape)
        ).astype(host.dtype)

    return jax.tree_util.tree_map_with_path(pay, params)
