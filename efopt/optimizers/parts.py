"""What several of the optimizers are made of."""

from typing import Any

import optax

from efopt.workers import per_worker

Mask = Any  # a tree of booleans, or a function from parameters to one


def local(
    inner: optax.GradientTransformation, axis_name: str | None
) -> optax.GradientTransformation:
    """``inner`` in front of the exchange: with a state of its own on each worker."""
    return inner if axis_name is None else per_worker(inner, axis_name=axis_name)


def momentum(
    api: str, decay: Any, nesterov: bool = False, dtype: Any = None, name="momentum"
) -> optax.GradientTransformation:
    """Heavy-ball or Nesterov momentum, or nothing for a decay of ``None``."""
    if decay is None:
        return optax.identity()
    check_decay(api, name, decay)
    return optax.trace(decay, nesterov, dtype)


def check_decay(api: str, name: str, decay: Any) -> None:
    """Raises unless a momentum is in [0, 1); what is traced cannot be asked."""
    if decay is None or (isinstance(decay, int | float) and not 0 <= decay < 1):
        raise ValueError(f"`{api}({name}=...)` must be in [0, 1), got {decay}.")


def weight_decay(rate: Any, mask: Mask) -> optax.GradientTransformation:
    """Adds ``rate`` times the parameters; needs none of them for a plain zero."""
    if isinstance(rate, int | float) and rate == 0:
        return optax.identity()
    return optax.add_decayed_weights(rate, mask)
