"""The reference point of variance reduction: when it moves, and the gradients there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from efopt.convex import coins
from efopt.workers.axes import Axes, AxisName

GradFn = Callable[[Any], Any]  # from parameters to gradients


@dataclasses.dataclass(frozen=True)
class Reference:
    """A point that a coin moves at the end of a step.

    Attributes:
      probability: Of a move.
      seed: Of the coins.
      axis_name: The mapped axis of the workers; ``None`` for one worker.
      shared: Whether all workers see the same coin.
    """

    probability: float
    seed: int
    axis_name: AxisName | None
    shared: bool = True

    def moves(self, step: Any) -> jax.Array:
        """Whether the point moves at the end of the step before ``step``."""
        worker = coins.NOBODY if self.shared else this_worker(self.axis_name)
        return coins.coin(self.probability, self.seed, step, worker)

    def refresh(
        self,
        count: Any,
        evaluate: Callable[[Any], Any],
        known: Any,
        stale: Any = False,
    ) -> Any:
        """``known``, or what ``evaluate(known)`` finds if the point is a new one.

        Args:
          count: The step.
          evaluate: Finds the gradient at the point.
          known: What was found last.
          stale: Whether the point is new for another reason than a coin.
        """
        new = (count == 0) | self.moves(count) | stale
        return lax.cond(new, evaluate, lambda known: known, known)

    def move(self, step: Any, point: Any, to: Any) -> Any:
        """The point of step ``step``: ``to`` if the coin fell."""
        moves = self.moves(step)
        return jax.tree.map(lambda w, x: jnp.where(moves, x, w), point, to)


def this_worker(axis_name: AxisName | None) -> Any:
    """The number of this worker, 0 if there is one only."""
    return 0 if axis_name is None else Axes.of("axis_name", axis_name).index()


def check_own(api: str, axis_name: AxisName | None, updates: Any) -> None:
    """Raises unless ``updates`` are a worker's own, inside the mapped function."""
    if axis_name is not None:
        alone = ", or pass `axis_name=None` for a single worker"
        axes = Axes.of(api, axis_name)
        axes.require_bound(f"`{api}`", alone)
        axes.require_local(f"`{api}`", updates)


def functions(api: str, params: Any, extra_args: dict[str, Any]) -> list[GradFn]:
    """The extra arguments ``grad_fn`` and ``full_grad_fn``, or an error."""
    names = ("grad_fn", "full_grad_fn")
    call = ", ".join(f"{name}={name}" for name in names)
    call = f"`tx.update(grads, state, params, {call})`"
    if params is None:
        raise ValueError(f"`{api}` needs the parameters: call {call}.")
    for name in names:
        if not callable(extra_args.get(name)):
            raise ValueError(
                f"`{api}` needs `{name}`, a function from parameters to this worker's "
                f"gradient, and got {extra_args.get(name)!r}: call {call}."
            )
    return [extra_args[name] for name in names]


def gradient(
    function: GradFn, point: Any, like: Any, axis_name: AxisName | None
) -> Any:
    """This worker's gradient at ``point``, of the dtypes of ``like``."""
    # Parameters typed as this worker's own: else `jax.grad` sums over the workers.
    if axis_name is None:
        found = function(point)
    else:
        axes = Axes.of("axis_name", axis_name)
        found = axes.vary(function(axes.vary(point)))
    return jax.tree.map(lambda g, x: g.astype(x.dtype), found, like)
