"""What several of the optimizers are made of."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from efopt.compressors import Compressor
from efopt.feedback import error_feedback
from efopt.workers import per_worker

Mask = Any  # a tree of booleans, or a function from parameters to one


def local(
    inner: optax.GradientTransformation, axis_name: str | None
) -> optax.GradientTransformation:
    """``inner`` in front of the exchange: with a state of its own on each worker."""
    return inner if axis_name is None else per_worker(inner, axis_name)


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


def check_contractive(api: str, compressor: Compressor, params: Any) -> None:
    """Raises if residuals of some leaf would grow."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for codec, (path, x) in zip(compressor.codec.assign(params), leaves, strict=True):
        if jnp.size(x) and codec.delta(jnp.shape(x)) is None:
            raise ValueError(
                f"`{api}({compressor!r})` needs a contractive compressor, such as "
                "`efopt.top_k(k=1)`; for the shape "
                f"{jnp.shape(x)} of {jax.tree_util.keystr(path) or 'the parameters'} "
                "it is none, and residuals would grow."
            )


def error_compensated(
    api: str,
    compressor: Compressor,
    learning_rate: optax.ScalarOrSchedule,
    axis_name: str | None,
    exchange: str | None,
    *estimators: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """EC-SGD's template: what estimators say of the gradient, with error feedback."""
    # A rate of minus one: what follows the feedback adds updates as they are.
    feedback = error_feedback(compressor, axis_name, exchange, learning_rate=-1.0)

    def init_fn(params: Any) -> Any:
        check_contractive(api, compressor, params)
        return feedback.init(params)

    return optax.chain(
        *estimators,
        optax.scale_by_learning_rate(learning_rate),
        optax.GradientTransformationExtraArgs(init_fn, feedback.update),
    )
