"""What is known of the mapped axis at trace time: is it bound, are its types on?

Under ``shard_map`` with its default checks an array's type says over which axes its
value varies. Under ``pmap``, ``vmap`` and without the checks, types say nothing. All
questions about that are asked here and nowhere else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def check_axis_name(api: str, axis_name: Any) -> None:
    """Raises unless ``axis_name`` is ``None`` or a string."""
    if axis_name is not None and not isinstance(axis_name, str):
        raise TypeError(
            f"`{api}(axis_name=...)` must be None or the name of one mapped axis, got "
            f"{axis_name!r}."
        )


def is_bound(axis_name: str) -> bool:
    """Whether the trace is inside a function mapped over ``axis_name``."""
    try:
        lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def need_axis_name(api: str, axis_name: Any) -> None:
    """Raises unless ``axis_name`` is a string."""
    if not isinstance(axis_name, str):
        raise TypeError(
            f"`{api}(axis_name=...)` must be the name of a mapped axis, got "
            f"{axis_name!r}."
        )


def require_bound(api: str, axis_name: str, cure: str = "") -> None:
    """Raises unless the axis is bound."""
    if not is_bound(axis_name):
        raise ValueError(
            f"{api} works over the mapped axis {axis_name!r}, and none of that name is "
            "bound here. Call it inside `jax.shard_map`, `jax.pmap` or "
            f"`jax.vmap(..., axis_name={axis_name!r})`{cure}."
        )


def require_local(api: str, axis_name: str, updates: Any) -> None:
    """Raises if types say that updates are already equal on all workers."""
    if not is_typed(axis_name):
        return
    for path, x in jax.tree_util.tree_flatten_with_path(updates)[0]:
        if axis_name not in varying(x):
            raise ValueError(
                f"{api} got updates that are already equal on all workers along "
                f"{axis_name!r}, at {jax.tree_util.keystr(path) or 'the root'}: there "
                "is nothing left to compress. Inside `jax.shard_map`, `jax.grad` sums "
                "over workers when parameters are replicated; differentiate with "
                f"respect to `efopt.local_params(params, {axis_name!r})`. To gather "
                "several mini-batches, use `efopt.accumulate` in place of "
                "`optax.MultiSteps`."
            )


def varying(x: Any) -> frozenset[str]:
    """The mapped axes over which the type of ``x``, array or struct, says it varies."""
    kind = getattr(x, "manual_axis_type", None)
    if kind is None:
        kind = getattr(jax.typeof(x), "mat", None)
    return frozenset(kind.varying) if kind is not None else frozenset()


def is_typed(axis_name: str) -> bool:
    """Whether the axis is bound and types tell which arrays vary over it."""
    return is_bound(axis_name) and axis_name in varying(lax.axis_index(axis_name))


def vary(tree: Any, *axis_names: str) -> Any:
    """Casts every leaf to varying over the axes, where types are on."""

    def cast(x):
        missing = tuple(a for a in axis_names if a not in varying(x) and is_typed(a))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def zeros_like(x: Any) -> jax.Array:
    """Zeros that vary over the same axes as ``x``, array or struct: a loop's start."""
    return vary(jnp.zeros(x.shape, x.dtype), *varying(x))


def local_params(params: Any, axis_name: str) -> Any:
    """Marks parameters as this worker's own, so that gradients stay local.

    Inside ``shard_map``, ``jax.grad`` with respect to replicated parameters returns the
    gradient already summed over workers: an uncompressed all-reduce, and nothing left
    to compress. Differentiate with respect to ``local_params(params, axis_name)``
    instead. Under ``pmap``, ``vmap`` and without checks this changes nothing.

    Args:
      params: Any pytree of arrays.
      axis_name: The mapped axis over which the workers are laid out.

    Returns:
      The same values, typed as varying over ``axis_name``.

    Raises:
      TypeError: If ``axis_name`` is not a string.
      ValueError: If the axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> jax.vmap(lambda x: efopt.local_params(x, "data"), axis_name="data")(
      ...     jnp.arange(2.0))
      Array([0., 1.], dtype=float32)
    """
    need_axis_name("local_params", axis_name)
    require_bound("`local_params`", axis_name)
    return vary(params, axis_name)
