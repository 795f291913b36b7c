"""What of Optax cannot stand around an exchange, or in front of one: said in words."""

from collections.abc import Iterator
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


def require_marked(api: str, tree: Any) -> None:
    """Raises if what Optax measures differs from worker to worker, unmarked.

    Args:
      api: The caller, for the error.
      tree: A state, or anything that holds one.
    """
    chain = lambda x: isinstance(x, tuple) and not hasattr(x, "_fields")  # noqa: E731
    whole = lambda x: is_node(x) or isinstance(x, optax.SnapshotState)  # noqa: E731
    for part in _subtrees(tree, chain):
        behind = False
        for x in reversed(part):
            inside = jax.tree.leaves(x, is_leaf=whole)
            if behind and any(isinstance(y, optax.SnapshotState) for y in inside):
                raise ValueError(
                    f"{api} got `optax.snapshot` in front of what meets other workers: "
                    "what it measures differs from worker to worker. Mark it, "
                    "`efopt.per_worker(optax.snapshot(...), axis_name=...)`, or put it "
                    "behind; what compression loses is kept by `efopt.watch.observe`."
                )
            behind = behind or meets(x)


def require_one_structure(api: str, tree: Any) -> None:
    """Raises if a state will have another structure after its first update.

    Args:
      api: The caller, for the error.
      tree: A state, or anything that holds one.
    """
    monitor = lambda x: isinstance(x, optax.MonitorState)  # noqa: E731
    for x in jax.tree.leaves(tree, is_leaf=monitor):
        if monitor(x) and not x.measurements:
            raise ValueError(
                f"{api} got a fresh state of `optax.monitor`, which has another "
                "structure after its first update; `jax.shard_map` needs one for both. "
                "Measure with `optax.snapshot` behind the exchange, or with "
                "`efopt.per_worker(optax.snapshot(...), axis_name=...)` in front; what "
                "compression loses is kept by `efopt.watch.observe`."
            )


def _subtrees(tree: Any, wanted: Any) -> Iterator[Any]:
    """All subtrees of a kind, the innermost too."""
    for x in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree and wanted(x)):
        if wanted(x):
            yield from _subtrees(x, wanted)
    if wanted(tree):
        yield tree


def meets(state: Any) -> bool:
    """Whether a state is of several workers: it differs, or a link says so."""
    of_workers = lambda x: is_node(x) or hasattr(x, "places")  # noqa: E731
    return any(map(of_workers, jax.tree.leaves(state, is_leaf=of_workers)))
