"""What the tests of single methods share: data of four workers, runs, programs."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, FAST, make_mesh

import efopt

WORKERS, STEPS, DECAY = 4, 50, 0.01


def schedule(t):
    return 0.1 / (1.0 + 0.1 * t)


def problem(shapes, seed=0, steps=STEPS, workers=WORKERS):
    """Parameters and gradients `[t, worker, ...]`, other ones for every worker."""
    rng = np.random.default_rng(seed)
    draw = lambda *lead: {  # noqa: E731
        k: rng.standard_normal((*lead, *s), np.float32) for k, s in shapes.items()
    }
    return draw(), draw(steps, workers)


def listed(params, grads):
    """Both as `oracle.py` takes them: leaves in order, and `[t][worker][leaf]`."""
    steps, workers = jax.tree.leaves(grads)[0].shape[:2]
    wide = lambda t: [np.asarray(x, np.float64) for x in jax.tree.leaves(t)]  # noqa: E731
    flat = wide(grads)
    lists = [[[x[t, i] for x in flat] for i in range(workers)] for t in range(steps)]
    return wide(params), lists


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=FAST)
def _simulate(tx, params, grads, workers):
    state = efopt.stack_workers((params, tx.init(params)), workers)

    def step(carry, g):
        params, state = carry
        updates, state = jax.vmap(tx.update, axis_name=AXIS)(g, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.lax.scan(step, state, grads)[1]


def simulate(tx, params, grads):
    """Parameters and states after each step, `[t, worker, ...]`."""
    workers = jax.tree.leaves(grads)[0].shape[1]
    return jax.tree.map(np.asarray, _simulate(tx, params, grads, workers))


def follows(params, path, atol=1e-5):
    """Every worker holds the oracle's iterate after every step."""
    for got, *want in zip(jax.tree.leaves(params), *path[1:], strict=True):
        for i in range(got.shape[1]):
            np.testing.assert_allclose(got[:, i], np.stack(want), rtol=0, atol=atol)


def compiled(tx, params, n):
    """The step on `n` workers, its state and gradients, for shapes alone."""
    mesh = make_mesh("auto", n)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = efopt.distribute((params, jax.eval_shape(tx.init, params)), mesh)
    return stepped(tx, mesh, state, params)


def stepped(tx, mesh, state, params, **jit):
    """A step of `(params, state)` under `shard_map`, and gradients as structs."""
    specs, n = efopt.partition_specs(state), mesh.devices.size
    over = jax.NamedSharding(mesh, P(AXIS))
    grads = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype, sharding=over), params
    )

    def step(state, grads):
        params, own = state
        updates, own = tx.update(jax.tree.map(lambda g: g[0], grads), own, params)
        return optax.apply_updates(params, updates), own

    fn = jax.shard_map(step, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=specs)
    jit = jit or {"compiler_options": FAST}
    return jax.jit(fn, donate_argnums=0, **jit), state, grads
