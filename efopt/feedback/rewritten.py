"""A stored residual on another number of workers: read, mixed, and written anew."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Turn
from efopt.codecs.layout import Bucket, Layout
from efopt.exchanges.home import Home
from efopt.feedback.stored import still
from efopt.workers import moves
from efopt.workers.node import is_node


def rewritten(
    residual: Any, home: Home, count: Any, sizes: tuple[int, ...]
) -> tuple[Any, Any]:
    """The residual of other workers, of the same mean but for what is lost.

    Copies, payloads that may be summed and leaves that are kept exact lose nothing but
    rounding. All others are read, mixed and written again.

    Args:
      residual: The payloads, marked, on the host: one node, or one for each leaf where
        they are laid out by shard.
      home: Where the parameters live.
      count: The step, for the random numbers of writing.
      sizes: How many workers are to come, along each of their axes.

    Returns:
      The new residual, and what writing lost in the mean over workers: a tree like the
      parameters, or ``None`` if that is nothing.
    """
    m, count = math.prod(sizes), np.uint32(np.asarray(count))
    if is_node(residual):
        structs = map(jax.ShapeDtypeStruct, home.shapes, home.dtypes)
        layout = residual.store.layout(home.treedef.unflatten(structs))
        payloads = home.treedef.flatten_up_to(residual.value)
        payloads, lost = _rewritten(layout, payloads, count, m)
        value = home.treedef.unflatten(payloads)
        return moves.laid_out(residual, value, sizes), _whole(home, [({}, lost)])
    nodes = home.treedef.flatten_up_to(residual)
    layout, found = nodes[0].store.layout(home.pieces()), []
    new: list[Any] = [None] * len(nodes)
    for at in _devices(home):
        shards = [home.number(i, at) for i in range(len(nodes))]
        pairs = list(zip(nodes, shards, strict=True))
        payloads, lost = _rewritten(layout, [_cut(*p) for p in pairs], count, m)
        found.append((at, lost))
        for i, ((node, shard), payload) in enumerate(zip(pairs, payloads, strict=True)):
            new[i] = _put(node, new[i], payload, shard)
    marked = map(functools.partial(moves.laid_out, sizes=sizes), nodes, new)
    return home.treedef.unflatten(marked), _whole(home, found)


def _rewritten(
    layout: Layout, payloads: Sequence[Any], count: np.uint32, m: int
) -> tuple[list[Any], list[Any]]:
    """The same for what one device of each worker holds, without marks.

    Returns:
      The payload of every leaf, and what it lost: an array, or ``None``.
    """
    lost: list[Any] = [None] * len(payloads)
    n = next((x.shape[0] for x in jax.tree.leaves(payloads)), m)
    linear = [m % n == 0 or b.codec.linear for b in layout.buckets]
    out = list(
        jax.tree.map(lambda x: np.empty((m, *x.shape[1:]), x.dtype), list(payloads))
    )
    for b, plain in zip(layout.buckets, linear, strict=True):
        if plain:
            for i in b.leaves:
                out[i] = jax.tree.map(lambda x: moves.mean(x, m), payloads[i])
            continue
        one = lambda j: [jax.tree.map(lambda x: x[j], payloads[i]) for i in b.leaves]  # noqa: B023, E731
        joined = [
            jax.tree.map(lambda *xs: np.concatenate(xs), *one(j)) for j in range(n)
        ]
        mixed = moves.mean(np.stack([np.asarray(_read(b, x)) for x in joined]), m)
        rest = np.zeros(b.shape, np.float64)
        for j, x in enumerate(mixed):
            payload = _write(b, x, count, np.uint32(j))
            rest += x.astype(np.float64) - np.asarray(_read(b, payload), np.float64)
            end = 0
            for i, blocks in zip(b.leaves, b.num_blocks, strict=True):
                start, end = end, end + blocks
                pairs = zip(
                    jax.tree.leaves(out[i]), jax.tree.leaves(payload), strict=True
                )
                for to, given in pairs:
                    to[j] = np.asarray(given)[start:end]
        flat = (rest / m).reshape(-1)
        for i, size, start in zip(b.leaves, b.sizes, b.starts(), strict=True):
            lost[i] = flat[start : start + size].reshape(layout.shapes[i])
    return out, lost


@functools.partial(jax.jit, static_argnums=0)
def _read(b: Bucket, payload: Any) -> jax.Array:
    turn = Turn(jnp.uint32(0), jnp.uint32(0))
    return b.codec.decode(payload, b.blocks(), still(turn)).reshape(b.shape)


@functools.partial(jax.jit, static_argnums=0)
def _write(b: Bucket, x: jax.Array, step: jax.Array, worker: jax.Array) -> Any:
    return b.codec.encode(x, b.blocks(), still(Turn(step, worker)))


def _devices(home: Home) -> Iterator[dict[str, int]]:
    """The position of every device behind a worker."""
    for at in np.ndindex(*(size for _, size in home.inner)):
        yield dict(zip(home.inner_names, at, strict=True))


def _cut(node: Any, shard: int) -> Any:
    """The payload of one shard of all workers."""
    return jax.tree.map(lambda x: x[:, shard] if node.shards else x, node.value)


def _put(node: Any, into: Any, payload: Any, shard: int) -> Any:
    """Inverse of :func:`_cut`, in place."""
    if not node.shards:
        return payload
    if into is None:
        into = jax.tree.map(
            lambda x, old: np.empty((x.shape[0], *old.shape[1:]), x.dtype),
            payload,
            node.value,
        )
    for to, x in zip(jax.tree.leaves(into), jax.tree.leaves(payload), strict=True):
        to[:, shard] = x
    return into


def _whole(home: Home, found: Sequence[tuple[dict[str, int], list[Any]]]) -> Any:
    """What all devices lost, as a tree like the parameters."""
    if all(x is None for _, lost in found for x in lost):
        return None
    out = [np.zeros(shape, np.float64) for shape in home.shapes]
    for at, lost in found:
        for i, x in enumerate(lost):
            if x is not None:
                out[i][home.window(i, at)] = x
    return home.treedef.unflatten(out)
