"""Branches that workers might not take together, where an exchange stands in one."""

from typing import Any

import jax
import optax

from efopt.workers.node import is_node


def require_common(api: str, tree: Any) -> None:
    """Raises if each worker would decide by itself whether it meets the others.

    Args:
      api: The caller, for the error.
      tree: A state, or anything that holds one.
    """
    branching = lambda x: isinstance(x, optax.ApplyIfFiniteState)  # noqa: E731
    for x in jax.tree.leaves(tree, is_leaf=branching):
        if branching(x) and meets(x.inner_state):
            raise ValueError(
                f"{api} got `optax.apply_if_finite` around what meets other workers. "
                "Each worker would decide by its own gradients whether it comes to "
                "the exchange, and the others would wait for it for ever, or part from "
                "it. Put `efopt.watch.skip_not_finite(..., axis_name=...)` in its "
                "place: there all workers skip a step together."
            )


def meets(state: Any) -> bool:
    """Whether a state is of several workers: it differs, or a link says so."""
    of_workers = lambda x: is_node(x) or hasattr(x, "places")  # noqa: E731
    return any(map(of_workers, jax.tree.leaves(state, is_leaf=of_workers)))
