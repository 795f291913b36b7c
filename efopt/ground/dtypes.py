"""Floating-point dtypes: which can be compressed, and what is computed in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")


def compute_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """float32, or the dtype itself where it is wider: what efopt computes in."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: Any) -> jax.Array:
    """``x`` in its compute dtype."""
    x = jnp.asarray(x)
    return x.astype(compute_dtype(x.dtype))


def wide_zeros(tree: Any) -> Any:
    """Zeros of the shapes of a tree of arrays or structs, in the compute dtypes."""
    return jax.tree.map(
        lambda x: jnp.zeros(jnp.shape(x), compute_dtype(jnp.result_type(x))), tree
    )


def check_float(path: Any, leaf: Any, api: str) -> np.dtype:
    """The dtype of a leaf that can be compressed, or a TypeError that names it."""
    dtype = jnp.result_type(leaf)
    if dtype.name not in FLOATS:
        name = jax.tree_util.keystr(path) or "the array"
        raise TypeError(
            f"{api} takes real floating-point leaves ({', '.join(FLOATS)}), got "
            f"{dtype.name} at {name}. Leave such leaves out: `optax.partition`, with "
            "`efopt.feedback.frozen()` as their transformation."
        )
    return dtype


def check_float_dtype(api: str, name: str, dtype: Any) -> None:
    """Raises unless ``dtype`` is ``None`` or a floating-point dtype."""
    try:
        usable = dtype is None or jnp.dtype(dtype).name in FLOATS
    except TypeError:
        usable = False
    if not usable:
        raise TypeError(
            f"`{api}({name}=...)` must be a floating-point dtype "
            f"({', '.join(FLOATS)}), got {dtype!r}."
        )
