"""What updates must be on their way in, or the error that says so."""

from typing import Any

import jax
import jax.numpy as jnp

from efopt.workers import node, unreduced
from efopt.workers.axes import Axes, varying


def require_kept(api: str, axes: Axes, paths: Any, like: Any) -> None:
    """Raises if types say that updates differ where what is kept of them does not.

    Args:
      api: The transformation, for errors.
      axes: The axes of the workers.
      paths: The updates, with their paths.
      like: A tree of this worker's state, an array for each.
    """
    for (path, x), e in zip(paths, jax.tree.leaves(like), strict=True):
        more = varying(x) - varying(e)
        if not more:
            continue
        names = ", ".join(map(repr, sorted(more)))
        raise ValueError(
            f"{api} got updates that differ along the mesh axes {names} too, "
            f"at {jax.tree_util.keystr(path) or 'the root'}, where what it keeps "
            f"of them is one for each worker along {axes.key!r}. If all of "
            "these are axes of workers, name them all, `axis_name=(..., ...)`, or "
            "average over the others first, uncompressed: "
            "`optax.chain(efopt.compress(efopt.compressors.identity(), "
            "axis_name=...), ...)`; two feedbacks in one chain would need a state "
            "that differs along both. If parameters are sharded along it, pass "
            "their specs to `efopt.distribute` and `efopt.partition_specs`."
        )


def check_single(api: str, updates: Any) -> None:
    """Raises if a single worker is given the gradients of several."""
    if node.is_node(updates):
        raise ValueError(
            f"{api} has `axis_name=None`, a single worker, and the gradients are "
            f"stacked over {updates.axis_name!r}: pass "
            f"`axis_name={updates.axis_name!r}`."
        )
    for path, x in jax.tree_util.tree_flatten_with_path(updates)[0]:
        terms = sorted(unreduced.axes_of(x))
        if terms:
            name = terms[0] if len(terms) == 1 else tuple(terms)
            raise ValueError(
                f"{api} has `axis_name=None`, a single worker, and the gradient at "
                f"{jax.tree_util.keystr(path) or 'the root'} is unreduced over "
                f"{terms}: pass `axis_name={name!r}`."
            )


def check_like(api: str, paths: Any, treedef: Any, like: Any) -> None:
    """Raises unless updates have the structure and shapes that `init` saw."""
    expected = jax.tree.structure(like)
    if treedef != expected:
        raise ValueError(
            f"{api} got updates of another structure than the parameters given to "
            f"`init`:\n  got      {treedef}\n  expected {expected}"
        )
    for (path, x), e in zip(paths, jax.tree.leaves(like), strict=True):
        if jnp.shape(x) != e.shape:
            raise ValueError(
                f"{api} got updates of shape {jnp.shape(x)} at "
                f"{jax.tree_util.keystr(path) or 'the root'}, where `init` saw "
                f"{e.shape}."
            )
