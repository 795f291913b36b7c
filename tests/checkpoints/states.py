"""States full of numbers, of as many workers as one likes, without a step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType
from registry import AXIS, SHAPES

import efopt

PARAMS = {
    name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for name, shape in SHAPES.items()
}


def is_own(x):
    return isinstance(x, efopt.PerWorker)


def parts(tree):
    """Nodes, and the leaves beside them."""
    return jax.tree.leaves(tree, is_leaf=is_own)


def filled(structs, seed=0):
    """Random numbers for structs; integers that workers share."""
    rng = np.random.default_rng(seed)

    def one(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return rng.standard_normal(x.shape).astype(x.dtype)
        return np.full(x.shape, 0 if x.dtype == bool else 3, x.dtype)

    return jax.tree.map(one, structs)


def of_workers(tx, n, params=PARAMS, *, mesh=None, specs=None, seed=0):
    """A state of ``n`` workers on the host, as a checkpoint would be."""
    if mesh is None:
        mesh = AbstractMesh((n,), (AXIS,), (AxisType.Auto,))
    structs = efopt.distribute(jax.eval_shape(tx.init, params), mesh, specs)
    return filled(structs, seed)


def make(row, **changes):
    if "learning_rate" in row.parameters and row.rate is not None:
        changes = {"learning_rate": 0.1, **changes}
    return row.make(AXIS, **changes)
