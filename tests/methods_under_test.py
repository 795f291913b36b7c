"""What the tests of single methods share: data of four workers, runs, programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, FAST, make_mesh

import efopt

WORKERS, STEPS, DECAY = 4, 50, 0.01


def schedule(t):
    return 0.1 / (1.0 + 0.1 * t)


def problem(shapes, seed=0, steps=STEPS, workers=WORKERS, apart=0):
    """Parameters and gradients `[t, worker, ...]`, other ones for every worker.

    They lie about a mean of each worker's own, this far from that of others.
    """
    rng = np.random.default_rng(seed)
    draw = lambda *lead: {  # noqa: E731
        k: rng.standard_normal((*lead, *s), np.float32) for k, s in shapes.items()
    }
    params, grads = draw(), draw(steps, workers)
    if apart:
        grads = jax.tree.map(lambda m, g: apart * m + g, draw(1, workers), grads)
    return params, grads


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


def ends(feedback, apart, noise, rate, steps=2000, dim=(50,), behind=optax.sgd):
    """Mean loss over the last quarter, of three seeds: eight workers' quadratics.

    Their optima lie ``apart``; every gradient has noise of this deviation.
    """
    curvature = np.linspace(0.1, 1, np.prod(dim), dtype=np.float32).reshape(1, *dim)
    tx = optax.chain(feedback, behind(rate))

    def run(seed):
        key, keys = jax.random.split(jax.random.key(seed))
        optima = apart * jax.random.normal(key, (8, *dim))

        def step(carry, key):
            x, state = carry
            grads = curvature * (x - optima)
            grads = grads + noise * jax.random.normal(key, optima.shape)
            updates, state = jax.vmap(tx.update, axis_name=AXIS)(grads, state, x)
            x = optax.apply_updates(x, updates)
            gap = x[0] - optima.mean(axis=0)
            return (x, state), jnp.sum(curvature[0] * gap**2) / 2

        x = jnp.zeros(dim)
        start = efopt.stack_workers((x, tx.init(x)), 8)
        losses = jax.lax.scan(step, start, jax.random.split(keys, steps))[1]
        return jnp.mean(losses[-steps // 4 :])

    return np.asarray(jax.jit(jax.vmap(run))(np.arange(3)))
