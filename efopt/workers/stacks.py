"""States that are stacked for ``pmap`` or ``vmap``, told from those that are placed."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from efopt.workers.node import PerWorker, is_node


def unstacked(state: Any, stacked: bool | None) -> Any:
    """A state with one leading axis of workers where it is their own, and else none.

    Args:
      state: Stacked, placed, or fresh.
      stacked: Whether it is stacked; ``None``: its arrays tell.

    Raises:
      ValueError: If they do not, or if what is stacked differs where it must not.
    """
    if stacked is None:
        stacked = is_stacked(state)
    if stacked is None:
        raise ValueError(
            "`resize(state, num_workers)` cannot tell whether this state is stacked "
            "for `pmap` or `vmap`: its arrays would suit both. Say `stacked=True` or "
            "`stacked=False`."
        )
    if not stacked:
        return state
    sizes = next(x.sizes for x in _nodes(state) if x.sizes)

    def one(path, x):
        if is_node(x):
            value = jax.tree.map(lambda y: _joined(y, len(x.sizes or sizes)), x.value)
            return dataclasses.replace(x, value=value, share=0)
        return _first(jax.tree_util.keystr(path), x, sizes)

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_node)


def is_stacked(state: Any) -> bool | None:
    """Whether a state is stacked for ``pmap`` or ``vmap``; ``None``: both may be.

    Then an axis of length 1 stands in every node, behind those of the mapping. So it
    may in a placed one, of parameters whose first axis is 1.
    """
    nodes = [x for x in _nodes(state) if math.prod(x.sizes or ()) > 1]
    if not nodes or not all(map(_looks_stacked, nodes)):
        return False
    sizes = nodes[0].sizes or ()
    rest = [x for x in jax.tree.leaves(state, is_leaf=is_node) if not is_node(x)]
    if rest and all(np.shape(x)[: len(sizes)] == sizes for x in rest):
        return True
    is_home = lambda x: hasattr(x, "places")  # noqa: E731
    homes = [x for x in jax.tree.leaves(state, is_leaf=is_home) if is_home(x)]
    told = {shape for home in homes for shape in home.places().values()}
    shapes = [np.shape(y) for x in nodes for y in jax.tree.leaves(x.value)]
    fits = [told >= {s[lead:] for s in shapes} for lead in (1, len(sizes) + 1)]
    if fits[0] != fits[1]:
        return fits[1]
    return False if rest else None  # a counter, of which there is one


def _nodes(state: Any) -> list[PerWorker]:
    return [x for x in jax.tree.leaves(state, is_leaf=is_node) if is_node(x)]


def _looks_stacked(node: PerWorker) -> bool:
    """Whether a worker axis of length 1 stands behind those of the mapping."""
    expected = (*(node.sizes or ()), 1)
    return all(
        np.shape(x)[: len(expected)] == expected for x in jax.tree.leaves(node.value)
    )


def _joined(x: Any, axes: int) -> np.ndarray:
    """``(a, b, 1, ...)`` to ``(a b, ...)``, on the host."""
    x = np.asarray(x)
    return x.reshape(math.prod(x.shape[:axes]), *x.shape[axes + 1 :])


def _first(where: str, x: Any, sizes: tuple[int, ...]) -> Any:
    """What all workers hold alike."""
    if np.shape(x)[: len(sizes)] != sizes:
        return x  # kept unstacked
    host = np.asarray(x)
    rows = host.reshape(math.prod(sizes), *host.shape[len(sizes) :])
    first = rows[0].tobytes()
    for i, row in enumerate(rows):
        if row.tobytes() != first:
            raise ValueError(
                f"`resize` got a stacked state of which {where} differs between worker "
                f"0 and worker {i}, and must be equal on all: {rows[0]} and {row}."
            )
    return np.asarray(rows[0])
