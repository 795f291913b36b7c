"""Momentum of every worker's own, in front of the exchange, or of all behind it."""

from typing import Any

import optax

from efopt.ground import checks
from efopt.workers import per_worker
from efopt.workers.axes import AxisName


def trace_of(
    api: str, decay: Any, *, nesterov: bool = False, dtype: Any = None
) -> optax.GradientTransformation:
    """Heavy-ball or Nesterov momentum, or nothing for a decay of ``None``."""
    if decay is None:
        return optax.identity()
    checks.decay(api, "momentum", decay)
    return optax.trace(decay, nesterov, dtype)


def on_workers(
    inner: optax.GradientTransformation, axis_name: AxisName | None
) -> optax.GradientTransformation:
    """``inner`` in front of the exchange: with a state of its own on each worker."""
    return inner if axis_name is None else per_worker(inner, axis_name=axis_name)
