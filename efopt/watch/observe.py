"""Telemetry as state: what compression costs a run, read whenever the host likes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from efopt.exchanges.home import LinkState
from efopt.exchanges.watched import Watched, watching
from efopt.ground.tables import table
from efopt.watch.skip_not_finite import SkipNotFiniteState, read


def observe(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps in the state what compression loses and what workers owe, step by step.

    Every part of ``inner`` that compresses keeps an :class:`efopt.watch.Watched` beside
    its own state, a few numbers a leaf that are equal on all workers: how much a worker
    owes over the size of a gradient, and the part that was sent. They are found by
    name, ``optax.tree.get(state, "residual_ratio")``, and printed by
    :func:`efopt.watch.report`. Nothing calls back to the host, and updates are the same
    as without, to the rounding of another program.

    It changes what ``init`` makes, and nothing else: whether a run is observed is told
    by its state.

    Shapes: any tree -> the same, dtypes kept.
    Cost: 12 bytes a leaf and step, 16 where owners of ranges owe something, in a sum
    over the workers that XLA merges with that of a linear compressor's payloads.
    Properties: updates of ``inner``; sums of squares, of which no number is kept that
    is not finite.
    Placement: what it adds is replicated, all else lies as without it.

    Args:
      inner: Any Optax transformation with something of efopt's inside that compresses.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`; extra arguments are passed on.

    Raises:
      TypeError: If ``inner`` is no transformation.
      ValueError: From ``init``, if nothing inside compresses.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.watch.observe(efopt.error_feedback(efopt.top_k(k=1)))
      >>> params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([4.0, 3.0])}
      >>> _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params))
      >>> print(efopt.watch.report(state, params))
      leaf   owes  sent  mean sent  owners owe
      ['w']  0.60  0.64       0.64           -
      total  0.60  0.64       0.64           -

    References:
      Karimireddy et al, `Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes <https://arxiv.org/abs/1901.09847>`_, 2019 (Figure 2: the part that is
      sent, measured in training)
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"`observe(inner)` takes an `optax.GradientTransformation`; got {inner!r}."
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> Any:
        with watching():
            state = inner.init(params)
        if not any(link.watched != () for link in _links(state)):
            raise ValueError(
                "`observe(inner)` found nothing that compresses in the state of "
                f"{inner!r}: put it around the chain that holds `efopt.error_feedback` "
                "or another scheme."
            )
        return state

    return optax.GradientTransformationExtraArgs(init_fn, inner.update)


@dataclasses.dataclass(frozen=True)
class WatchRow:
    """One leaf, or all leaves of one part of a chain together.

    Attributes:
      name: The leaf's path; of the last row of a part, ``"total"``.
      residual_ratio: What a worker owes, over the size of a gradient.
      delta: The part that was sent in the last step.
      mean_delta: The mean of that over the last steps.
      server_ratio: What owners of ranges owe, over the size of a gradient; ``None``:
        there are none.
    """

    name: str
    residual_ratio: float
    delta: float
    mean_delta: float
    server_ratio: float | None


@dataclasses.dataclass(frozen=True)
class WatchReport:
    """What a state tells of its run. Printed, it is a table.

    Attributes:
      parts: The rows of every part that compresses, in order.
      skipped: Steps that were skipped; ``None``: there is no guard.
      streak: Of these the last ones in a row.
    """

    parts: tuple[tuple[WatchRow, ...], ...]
    skipped: int | None = None
    streak: int | None = None

    def __str__(self) -> str:
        lines = [["leaf", "owes", "sent", "mean sent", "owners owe"]]
        for row in (row for part in self.parts for row in part):
            owners = "-" if row.server_ratio is None else _short(row.server_ratio)
            sent = f"{row.delta:.2f}", f"{row.mean_delta:.2f}"
            lines.append([row.name, _short(row.residual_ratio), *sent, owners])
        text = table(lines, "<>>>>")
        if self.skipped is not None:
            text.append(f"skipped steps: {self.skipped}, in a row: {self.streak}")
        return "\n".join(text)


def report(state: Any, params: Any = None) -> WatchReport:
    """Reads what :func:`observe` and a guard have kept. For the host.

    Reading waits for the step that made the state.

    Args:
      state: An observed state, or anything that holds one: a ``TrainState``, a placed
        or a stacked state.
      params: The parameters, or a tree like them, whose paths name the leaves of a
        single worker. With an axis the state knows them.

    Returns:
      A :class:`WatchReport`. Printed, it is a table: what a worker owes and what owners
      of ranges do, in sizes of a gradient; and the part of what was given to the
      compressor that was sent, in the last step and in the mean of about a hundred.

    Raises:
      ValueError: If nothing in the state was observed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.watch.observe(efopt.compress(efopt.sign()))
      >>> grads = jnp.array([1.0, -2.0])
      >>> _, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(grads))
      >>> efopt.watch.report(state).parts[0][0].delta
      0.8
    """
    parts = tuple(
        tuple(_rows(link, params)) for link in _links(state) if link.watched != ()
    )
    if not parts:
        raise ValueError(
            "`report(state)` found nothing that was observed: make the state with "
            "`efopt.watch.observe(tx).init(params)`."
        )
    is_guard = lambda x: isinstance(x, SkipNotFiniteState)  # noqa: E731
    for x in jax.tree.leaves(state, is_leaf=is_guard):
        if is_guard(x):
            return WatchReport(parts, int(read(x.skipped)), int(read(x.streak)))
    return WatchReport(parts)


def _links(state: Any) -> list[LinkState]:
    is_link = lambda x: isinstance(x, LinkState)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_link) if is_link(x)]


def _rows(link: LinkState, params: Any) -> Iterator[WatchRow]:
    seen: Watched = link.watched
    columns = [read(x, 1) for x in (seen.residual_ratio, seen.delta, seen.mean_delta)]
    leaves = len(columns[0]) - 1
    names = [f"leaf {i}" for i in range(leaves)]
    if link.home != ():
        names = list(link.home.paths)
    elif params is not None:
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        if len(paths) == leaves:
            names = [jax.tree_util.keystr(path) for path, _ in paths]
    columns = [[_rounded(x) for x in column] for column in columns]
    server: list[float | None] = [None] * (leaves + 1)
    if not isinstance(seen.server_ratio, tuple):
        server = [_rounded(x) for x in read(seen.server_ratio, 1)]
    names = [*(name or "the root" for name in names), "total"]
    for name, *numbers in zip(names, *columns, server, strict=True):
        yield WatchRow(name, *numbers)


def _rounded(x: np.float32) -> float:
    """A float32 as one reads it."""
    return float(np.format_float_positional(x))


def _short(x: float) -> str:
    return f"{x:.2f}" if x < 1000 else f"{x:.3g}"
