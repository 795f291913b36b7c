"""Adam's momenta, and the coordinates that have one."""

from typing import Any

import jax
import jax.numpy as jnp


def mixed(decay: Any, old: Any, new: Any) -> Any:
    """``decay * old + (1 - decay) * new``, in the dtypes of ``old``."""

    def mix(m, g):
        share = jnp.asarray(decay, m.dtype)
        return share * m + (1 - share) * g.astype(m.dtype)

    return jax.tree.map(mix, old, new)


def alive(tree: Any, nu: Any) -> Any:
    """Zero where there has never been a gradient, by the variance."""
    return jax.tree.map(lambda x, v: jnp.where(v > 0, x, 0), tree, nu)
