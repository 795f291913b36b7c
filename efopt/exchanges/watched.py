"""What a link sees of its own work, kept in its state where that has a place for it.

Sums of squares, of which a few numbers a leaf are added up over the workers. Off, a
state has no place for them, and nothing is computed.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs import lanes
from efopt.codecs.layout import Bucket, Layout
from efopt.exchanges.groups import group_key
from efopt.exchanges.trip import Trip
from efopt.ground.dtypes import wide
from efopt.workers.axes import Axes, manual_axes, vary, varying

WINDOW = 100  # steps over which a mean runs
LARGEST = float(np.finfo(np.float32).max)

_asked = contextvars.ContextVar("efopt_watching", default=False)


class Watched(NamedTuple):
    """What a link saw in its last step, equal on all workers.

    All but ``steps`` are float32 ``(leaves + 1,)``: one number a leaf, in the order of
    ``jax.tree.leaves``, and in the end that of all leaves together. Norms are root mean
    squares over the workers.

    Attributes:
      steps: Steps seen. shape=(), int32.
      residual_ratio: The norm of what compression lost in this step, over that of the
        updates that came in: of how many steps a worker owes the gradient.
      delta: The part that was sent, ``1 - |lost|^2 / |given|^2``, of what was given to
        the compressor; at least its declared ``delta``, where it has one.
      mean_delta: The mean of that over the last steps, about a hundred.
      server_ratio: The norm of what the owners of ranges owed before this step, over
        that of the updates. ``()`` where there are none.
    """

    steps: jax.Array
    residual_ratio: jax.Array
    delta: jax.Array
    mean_delta: jax.Array
    server_ratio: Any


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """States that are made in here have a place for what their link sees."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def fresh(leaves: int, keeps: bool) -> Any:
    """The place for what a link sees; ``()`` unless somebody asked for it."""
    if not _asked.get():
        return ()
    zeros = jnp.zeros([leaves + 1], jnp.float32)
    steps = jnp.zeros([], jnp.int32)
    return Watched(steps, zeros, zeros, zeros, zeros if keeps else ())


def seen(
    before: Watched,
    trip: Trip,
    updates: Sequence[jax.Array],
    lost: Sequence[jax.Array],
    server: Any,
) -> Watched:
    """What a link saw in this step.

    Args:
      before: What it saw until then.
      trip: What was given to the compressor.
      updates: What came in, one array a leaf.
      lost: What the message did not say of what was given, one array a bucket.
      server: What the owners owed, marked; ``()`` if there are none.
    """
    axes, layout = trip.axes, trip.layout
    keeps = not isinstance(before.server_ratio, tuple)
    sums = [
        _behind([_square(x) for x in updates], updates, axes),
        _by_leaf(layout, trip.xs, axes),
        _by_leaf(layout, lost, axes),
    ]
    if keeps:
        sums.append(_server_squares(trip, server.local(trip.api) if server else ()))
    total = jnp.stack(sums)
    if axes is not None:
        total = axes.sum(total)
        # The owners' ranges make one residual; of all else there is one a worker.
        total = total.at[:3].divide(axes.size())
    total = jnp.concatenate([total, jnp.sum(total, axis=1, keepdims=True)], axis=1)
    came, sent, left = total[0], total[1], total[2]
    steps = before.steps + (before.steps < np.iinfo(np.int32).max)
    delta = 1 - _ratio(left, sent)
    weight = 1 / jnp.minimum(steps, WINDOW).astype(jnp.float32)
    mean = before.mean_delta + weight * (delta - before.mean_delta)
    server = jnp.sqrt(_ratio(total[3], came)) if keeps else ()
    return Watched(steps, jnp.sqrt(_ratio(left, came)), delta, mean, server)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Zero of zero, and never anything that is not finite."""
    ratio = jnp.where(part == 0, 0, part / jnp.where(whole == 0, 1, whole))
    ratio = jnp.where((whole == 0) & (part > 0), LARGEST, ratio)
    return jnp.where(ratio <= LARGEST, ratio, LARGEST)


def _square(x: jax.Array, axis: Any = None) -> jax.Array:
    return jnp.sum(jnp.square(wide(x)), axis=axis, dtype=jnp.float32)


def _by_leaf(layout: Layout, xs: Sequence[jax.Array], axes: Any) -> jax.Array:
    """The sum of squares of each leaf, from one array a bucket."""
    squares: list[Any] = [jnp.zeros([], jnp.float32)] * len(layout.shapes)
    like: list[Any] = list(squares)
    for b, x in zip(layout.buckets, xs, strict=True):
        if len(b.leaves) == 1:
            found = [_square(x)]
        else:
            if b.rows:
                inside = jnp.asarray(lanes.inside(b.sizes, b.rows))
                x = jnp.where(inside, x.reshape(b.rows, -1), 0)
                rows, lengths = _square(x, axis=0), b.lengths()
            else:
                rows, lengths = _square(x, axis=tuple(range(1, x.ndim))), b.num_blocks
            places = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            found = _segments(rows, places, len(lengths))
        for i, square in zip(b.leaves, found, strict=True):
            squares[i], like[i] = square, x
    return _behind(squares, like, axes)


def _places(b: Bucket, numbers: Any) -> np.ndarray:
    """To which leaf each block of a bucket belongs."""
    return np.repeat(np.asarray(numbers, np.int32), b.num_blocks)


def _segments(rows: jax.Array, places: Any, number: int) -> list[jax.Array]:
    """Sums of the rows that belong to each of a number of places."""
    zeros = vary(jnp.zeros([number], jnp.float32), *varying(rows))
    found = zeros.at[places].add(rows, mode="drop")
    return [found[i] for i in range(number)]


def _behind(squares: Sequence[Any], like: Sequence[Any], axes: Any) -> jax.Array:
    """One number a leaf, summed over the devices behind this worker.

    Of what is equal on several of them each brings its part.
    """
    if axes is None:
        return jnp.stack([*squares])
    names = tuple(a for a in manual_axes() if a not in axes.names)
    out = []
    for square, x in zip(squares, like, strict=True):
        if axes.typed():
            same = tuple(a for a in names if a not in varying(x))
            square = square / (Axes(same).size() if same else 1)
        out.append(vary(axes.vary(square), *names))
    total = jnp.stack(out)
    return Axes(names).sum(total) if names else total


def _server_squares(trip: Trip, owed: Sequence[jax.Array]) -> jax.Array:
    """The squares of what the owners owe, by the leaf whose blocks they are of."""
    axes, n = trip.axes, len(trip.layout.shapes)
    assert axes is not None
    total, like = [jnp.zeros([], jnp.float32)] * n, None
    groups: dict[Any, list[Bucket]] = {}
    for b in trip.kept():
        groups.setdefault(group_key(b), []).append(b)
    for x, members in zip(owed, groups.values(), strict=True):
        places = np.concatenate([_places(b, b.leaves) for b in members])
        padding = x.shape[0] * axes.size() - len(places)
        places = np.concatenate([places, np.full(padding, n, np.int32)])
        mine = jax.lax.dynamic_slice_in_dim(
            jnp.asarray(places), axes.index() * x.shape[0], x.shape[0]
        )
        rows = _square(x, axis=tuple(range(1, x.ndim)))
        found = _segments(rows, mine, n)
        total = [t + f for t, f in zip(total, found, strict=True)]
        like = x
    return _behind(total, total if like is None else [like] * n, axes)
