"""What an option of a name may be, wherever in the library it stands.

The same name is the same thing everywhere, so that one table says what is refused, and
in which words. What depends on other options is checked where they meet.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check(api: str, name: str, value: Any, default: Any) -> None:
    """Raises if an option called ``name`` can never be ``value``.

    ``None`` is fine where it is the default. Names without a rule pass.
    """
    rule = _RULES.get(name)
    if rule is None or (value is None and default is None):
        return
    wanted, holds = rule
    if not holds(value):
        kind = TypeError if not _is_number(value) else ValueError
        raise kind(f"`{api}({name}=...)` must be {wanted}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """What came, in few words."""
    if isinstance(value, int):
        big = abs(value) > 2**64
        return f"an int of {value.bit_length()} bits" if big else repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """A finite real number, or an array of one, traced or not."""
    if _is_number(value):
        try:
            return math.isfinite(float(value))
        except OverflowError:
            return False
    if not hasattr(value, "dtype") or jnp.shape(value) != ():
        return False
    if not (jnp.issubdtype(value.dtype, jnp.number)) or jnp.iscomplexobj(value):
        return False
    try:
        return bool(np.isfinite(np.asarray(value)))
    except jax.errors.TracerArrayConversionError:  # from optax.inject_hyperparams
        return True


def _is_decay(value: Any) -> bool:
    return value is None or _is_finite(value)


def _is_rate(value: Any) -> bool:
    return callable(value) or _is_finite(value)


def _is_transformation(value: Any) -> bool:
    return callable(getattr(value, "init", None)) and callable(
        getattr(value, "update", None)
    )


def _is_compressor(value: Any) -> bool:
    return hasattr(value, "codec")


def _is_mask(value: Any) -> bool:
    def leaf(x: Any) -> bool:
        return isinstance(x, bool | np.bool_) or (
            hasattr(x, "dtype") and x.dtype == np.bool_
        )

    return callable(value) or all(map(leaf, jax.tree.leaves(value)))


def _is_dtype(value: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        return False


def _are_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(x, "dtype") or _is_finite(x) for x in leaves)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


_RATE = "a finite number, a schedule or a scalar array", _is_rate
_NUMBER = "a finite number or a scalar array", _is_finite
_MASK = "a tree of booleans or a function of the parameters that returns one", _is_mask
_TRANSFORMATION = (
    "an Optax gradient transformation, such as `optax.sgd(0.1)`",
    _is_transformation,
)
_DTYPE = "a floating-point dtype, or None for that of the parameters", _is_dtype
_COMPRESSOR = "an `efopt.Compressor`, such as `efopt.scaled_sign()`", _is_compressor
_SWITCH = "a Python bool, because it chooses the program", _is_bool

_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "accumulator_dtype": _DTYPE,
    "api": ("the name of a scheme", _is_text),
    "b1": _NUMBER,
    "b2": _NUMBER,
    "beta": _NUMBER,
    "decay": _NUMBER,
    "eps": _NUMBER,
    "fallback": _TRANSFORMATION,
    "inner": _TRANSFORMATION,
    "inner_learning_rate": _RATE,
    "learning_rate": _RATE,
    "mask": _MASK,
    "matrices": _MASK,
    "momentum": ("a finite number, a scalar array or None for none", _is_decay),
    "nesterov": _SWITCH,
    "outer": _TRANSFORMATION,
    "outer_learning_rate": _RATE,
    "prox": ("a function of a tree and a step size, or None", callable),
    "reference_grads": ("a tree of arrays", _are_arrays),
    "role": ("a word", _is_text),
    "scheme": _TRANSFORMATION,
    "shift_compressor": _COMPRESSOR,
    "tx": _TRANSFORMATION,
    "weight_decay": _NUMBER,
}
