"""What several estimators are made of: coins, gradients elsewhere, own state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.ground import checks, randomness
from efopt.workers import axes

GradFn = Callable[[Any], Any]  # from parameters to gradients
NOBODY = np.uint32(2**32 - 1)


def probability(api: str, value: Any) -> float:
    """A probability of a coin: a Python number in (0, 1]."""
    value = checks.static_float(api, "probability", value)
    if not 0 < value <= 1:
        raise ValueError(f"`{api}(probability=...)` must lie in (0, 1], got {value}.")
    return value


def coin(probability: float, seed: int, step: Any, worker: Any = NOBODY) -> jax.Array:
    """Whether the coin of this step, and of this worker, fell: bool, shape=().

    A hash of its arguments, so that whoever knows them need not be told. The default
    ``worker`` is nobody: a coin that all workers see alike.
    """
    if probability == 1:
        return jnp.ones_like(step, bool)
    threshold = max(1, int(probability * 2**32))
    return randomness.hash_words(np.uint32(seed), worker, step) < jnp.uint32(threshold)


def this_worker(axis_name: str | None) -> Any:
    """The number of this worker, 0 if there is one only."""
    return 0 if axis_name is None else lax.axis_index(axis_name)


def receive(api: str, axis_name: str | None, updates: Any) -> None:
    """Raises unless ``updates`` are a worker's own, inside the mapped function."""
    if axis_name is not None:
        alone = ", or pass `axis_name=None` for a single worker"
        axes.require_bound(f"`{api}`", axis_name, alone)
        axes.require_local(f"`{api}`", axis_name, updates)


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


def gradient(function: GradFn, at: Any, like: Any, axis_name: str | None) -> Any:
    """This worker's gradient at ``at``, of the dtypes of ``like``."""
    names = () if axis_name is None else (axis_name,)
    # Parameters typed as this worker's own: else `jax.grad` sums over the workers.
    found = axes.vary(function(axes.vary(at, *names)), *names)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), found, like)
