"""Server residuals: what the owners of ranges of blocks owe, and where it lies."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efopt.codecs.layout import Bucket, Layout
from efopt.exchanges.groups import group_key, server_shapes
from efopt.ground import bits
from efopt.ground.dtypes import compute_dtype
from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker
from efopt.workers.ranges import range_size


def fresh(
    kept: Sequence[Bucket], axes: Axes, shards: tuple[str, ...] = ()
) -> PerWorker:
    """Residuals of zero, one array for each group of equal blocks.

    Args:
      kept: The buckets whose owners keep a residual.
      axes: The workers' axes; outside the mapped function one holds all ranges.
      shards: The mesh axes behind each worker, if every shard has its own.
    """
    n = axes.size() if axes.bound() else 1
    groups = server_shapes(kept)
    zeros = tuple(
        jnp.zeros((range_size(blocks, n), *block), dtype)
        for (blocks, *block), dtype in groups
    )
    splits = tuple(shape[0] for shape, _ in groups)
    return PerWorker.wrap(zeros, axes, splits, shards, rule="ranges")


def opened(
    api: str, kept: Sequence[Bucket], axes: Axes, server: Any
) -> tuple[jax.Array, ...]:
    """What this worker owes as an owner, one array per group of blocks, or an error.

    Args:
      api: The transformation, for errors.
      kept: As for :func:`fresh`.
      axes: The workers' axes.
      server: The residuals, marked.
    """
    if not server:
        return ()
    expected = server_shapes(kept)
    shapes = [shape for shape, _ in expected]
    pairs = zip(server.value, server.splits(), strict=True)
    known = [(split, *jnp.shape(x)[server.lead + 1 :]) for x, split in pairs]
    if known != shapes and _by_shape(known) == _by_shape(shapes):
        raise ValueError(
            f"{api} keeps a server residual for the blocks of each dtype apart, "
            f"{known} (blocks, block size) for the parameters given to `init`, and the "
            f"dtypes of the updates part them into {shapes}. Gradients must have the "
            "parameters' dtypes; cast them: "
            "`jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)`."
        )
    if known != shapes:
        raise ValueError(
            f"{api} keeps a server residual for the blocks that `init` saw, {known}, "
            f"and the updates make {shapes} (blocks, block size). Updates must have "
            "the structure, shapes and dtypes of the parameters given to `init`; if "
            "these are sharded over other mesh axes, or equal along them, place the "
            "state with `efopt.distribute(state, mesh, params_specs)`."
        )
    pairs = zip(server.local(api), expected, strict=True)
    return tuple(bits.cast(x, dtype) for x, (_, dtype) in pairs)


def closed(owed: Sequence[jax.Array], axes: Axes, server: Any) -> Any:
    """Inverse of :func:`opened`: marked as ``server``, which was opened."""
    if not server:
        return ()
    pairs = zip(owed, server.value, strict=True)
    same = tuple(bits.cast(x, before.dtype) for x, before in pairs)
    return server.rewrap(same)


def whole(api: str, layout: Layout, kept: Sequence[Bucket], server: Any) -> list[Any]:
    """What all owners owe of each bucket, one array ``(n, *block)`` a bucket.

    The residuals may be laid out in any way; inside the mapped function they are
    gathered.
    """
    wholes, axes, parts = {}, Axes.of(api, server.axis_name), server.value
    if axes.bound():
        parts = [axes.all_gather(x) for x in server.local(api)]
    keys = dict.fromkeys(map(group_key, kept))
    for x, split, key in zip(parts, server.splits(), keys, strict=True):
        wholes[key] = x.reshape(-1, *key[1])[:split]
    xs, ends = [], dict.fromkeys(wholes, 0)
    for b in layout.buckets:
        if b not in kept:
            xs.append(jnp.zeros(b.shape, compute_dtype(b.dtype)))
            continue
        key = group_key(b)
        start, ends[key] = ends[key], ends[key] + b.shape[0]
        xs.append(wholes[key][start : ends[key]])
    return xs


def _by_shape(groups: Sequence[tuple[int, ...]]) -> dict[Any, int]:
    """Blocks of each shape in groups ``(blocks, *block)``."""
    total: dict[Any, int] = {}
    for n, *block in groups:
        total[tuple(block)] = total.get(tuple(block), 0) + n
    return total
