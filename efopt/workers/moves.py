"""To another number of workers: what becomes of each worker's values, on the host.

What is averaged over workers depends on them through a mean alone. Worker ``j`` of
``m`` takes over from the old ones whose contiguous share of the data it takes over, by
the overlap of ``[j/m, (j+1)/m]`` with ``[i/n, (i+1)/n]``: every new value is a convex
combination of old ones, and the mean over workers stays.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from efopt.workers.node import PerWorker
from efopt.workers.ranges import range_size

CHUNK = 1 << 18  # coordinates that are mixed at once


def weights(n: int, m: int) -> np.ndarray:
    """How many ``n``-ths of each old worker a new one is made of: int64 ``(m, n)``.

    Rows sum to ``n``, columns to ``m``.
    """
    new, old = np.arange(m)[:, None], np.arange(n)[None, :]
    ends = np.minimum((new + 1) * n, (old + 1) * m)
    return np.maximum(ends - np.maximum(new * n, old * m), 0)


def mean(x: np.ndarray, m: int) -> np.ndarray:
    """Values ``(n, ...)`` to ``(m, ...)`` of the same mean.

    To a multiple of the workers these are copies, else the mean is kept to half a unit
    in the last place of the largest value, over ``m``: what rounding takes from one
    worker is given to the next larger in magnitude, so that no sign is lost.

    Raises:
      ValueError: If what is no floating-point number differs between workers.
    """
    n = x.shape[0]
    if m % n == 0:
        return np.repeat(x, m // n, axis=0)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return equal(x, m)
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    shares, flat = weights(n, m), x.reshape(n, -1)
    out = np.empty((m, flat.shape[1]), x.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, flat.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            old = flat[:, part].astype(wide)
            # Not a product of matrices, in which nothing times infinity is no number.
            y = [
                sum(k * x for k, x in zip(row, old, strict=True) if k) for row in shares
            ]
            _round(np.stack(y) / n, out[:, part])
    return out.reshape(m, *x.shape[1:])


def _round(y: np.ndarray, out: np.ndarray) -> None:
    """Writes ``y`` in the dtype of ``out``, their sums over rows the same."""
    carry = np.zeros_like(y[:1])
    for row in np.argsort(np.abs(y), axis=0)[:, None]:
        exact = np.take_along_axis(y, row, 0) + carry
        rounded = exact.astype(out.dtype)
        carry = exact - rounded.astype(y.dtype)
        carry = np.where(np.isfinite(carry), carry, 0)
        np.put_along_axis(out, row, rounded, 0)


def equal(x: np.ndarray, m: int) -> np.ndarray:
    """What all workers hold alike, one copy a worker.

    Raises:
      ValueError: If they do not.
    """
    first = np.ascontiguousarray(x[:1])
    if any(row.tobytes() != first.tobytes() for row in x[1:]):
        raise ValueError(
            "holds values that differ between workers and cannot be averaged, dtype "
            f"{x.dtype}, such as {_two_that_differ(x)}"
        )
    return np.repeat(first, m, axis=0)


def _two_that_differ(x: np.ndarray) -> str:
    other = next(i for i in range(len(x)) if x[i].tobytes() != x[0].tobytes())
    at = np.argmax(x[0].reshape(-1) != x[other].reshape(-1))
    values = x[0].reshape(-1)[at], x[other].reshape(-1)[at]
    return f"{values[0]} of worker 0 and {values[1]} of worker {other}"


def ranges(x: np.ndarray, m: int, split: int, lead: int) -> np.ndarray:
    """Ranges of ``split`` blocks, cut for ``m`` owners.

    Args:
      x: ``(n, [shards,] rows, *block)``.
      m: The number of owners.
      split: The number of blocks.
      lead: How many axes stand in front of the rows.
    """
    block = x.shape[lead + 1 :]
    x = x.reshape(x.shape[0], -1, x.shape[lead], *block)
    joined = np.moveaxis(x, 0, 1)
    joined = joined.reshape(joined.shape[0], -1, *block)[:, :split]
    rows = range_size(split, m)
    padding = [(0, 0), (0, rows * m - split)] + [(0, 0)] * len(block)
    cut = np.pad(joined, padding).reshape(joined.shape[0], m, rows, *block)
    cut = np.moveaxis(cut, 1, 0)
    return cut if lead == 2 else cut.reshape(m, rows, *block)


def moved(x: np.ndarray, m: int, rule: str | None, split: int | None, lead: int) -> Any:
    """An array ``(n, ...)`` by the rule of its node, ``(m, ...)``.

    Raises:
      ValueError: If there is no rule, or the values do not suit it.
    """
    if rule == "ranges" and split is not None:
        return ranges(x, m, split, lead)
    if rule == "true":
        return np.ones((m, *x.shape[1:]), x.dtype)
    by_name = {"mean": mean, "equal": equal}
    if rule not in by_name:
        raise ValueError(
            "does not say what becomes of its values on another number of workers: "
            'mark it with a rule, `link.wrap(tree, rule="mean")` if all that counts of '
            "them is their mean"
        )
    return by_name[rule](x, m)


def laid_out(node: PerWorker, value: Any, sizes: tuple[int, ...]) -> PerWorker:
    """A node around values of other workers, as many as ``sizes`` says."""
    return dataclasses.replace(node, value=value, sizes=sizes, share=0)
