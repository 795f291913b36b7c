"""Optimizers of Optax behind error feedback, and JAX's own strictest settings.

Behind the identity, which averages exactly, every optimizer must do what it does alone
with the gradient of the mean loss. Behind a compressor all workers must stay equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from registry import AXIS, COMPRESSORS
from workers_under_test import copies, make_mesh, slow

import efopt

WORKERS, STEPS = 3, 4
RNG = np.random.default_rng(0)
PARAMS = {
    "b": RNG.standard_normal(5, np.float32),
    "w": RNG.standard_normal((4, 6), np.float32),
}
OPTIMA = {
    k: RNG.standard_normal((WORKERS, *v.shape), np.float32) for k, v in PARAMS.items()
}  # noqa: E501


def schedule_free(before):
    rate = 0.1
    return optax.contrib.schedule_free(optax.chain(before, optax.sgd(rate)), rate)


def lookahead(before):
    fast = optax.chain(before, optax.sgd(0.1))
    return optax.lookahead(fast, sync_period=2, slow_step_size=0.5)


def behind(optimizer):
    return lambda before: optax.chain(before, optimizer)


OPTIMIZERS = {
    "adafactor": behind(optax.adafactor(0.1, min_dim_size_to_factor=4)),
    "adamw": behind(optax.adamw(0.1)),
    "lbfgs": behind(optax.lbfgs(0.1, memory_size=2, linesearch=None)),
    "lion": behind(optax.lion(0.1)),
    "lookahead": lookahead,
    "muon": behind(optax.contrib.muon(0.1)),
    "prodigy": behind(optax.contrib.prodigy(0.1, estim_lr0=0.01)),
    "schedule_free": schedule_free,
    "adaptive clipping": behind(
        optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1))
    ),
    "momentum, clipped, decayed": behind(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.add_decayed_weights(0.01),
            optax.sgd(0.1, momentum=0.9, nesterov=True),
        )
    ),
}
IN_PAIRS = {"lookahead"}  # parameters are a fast and a slow tree


def loss(params, optimum):
    bowl = lambda p, o: jnp.sum((p - o) ** 2) / 2  # noqa: E731
    return sum(jax.tree.leaves(jax.tree.map(bowl, params, optimum)))


def mean_loss(params, optima):
    return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, optima))


def step_of(tx, grad_fn, pairs, local=lambda params: params):
    def step(carry, data):
        params, state = carry
        grads = grad_fn(local(params.fast if pairs else params), data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def start(name, tx):
    params = optax.LookaheadParams.init_synced(PARAMS) if name in IN_PAIRS else PARAMS
    return jax.tree.map(np.asarray, jax.jit(lambda p: (p, tx.init(p)))(params))


def trained(name, tx):
    """Parameters after some steps on workers with data of their own."""
    mesh = make_mesh("auto", WORKERS)
    own = lambda params: efopt.local_params(params, AXIS)  # noqa: E731
    inside = step_of(tx, jax.grad(loss), name in IN_PAIRS, own)
    carry = efopt.distribute(start(name, tx), mesh)
    specs = efopt.partition_specs(carry)
    step = jax.jit(
        jax.shard_map(
            lambda c, o: inside(c, jax.tree.map(lambda x: x[0], o)),
            mesh=mesh,
            in_specs=(specs, P(AXIS)),
            out_specs=specs,
        )
    )
    optima = jax.device_put(OPTIMA, jax.NamedSharding(mesh, P(AXIS)))
    for _ in range(STEPS):
        carry = step(carry, optima)
    return carry[0]


@pytest.mark.parametrize(
    "name",
    [slow(n, when=n not in ("muon", "adafactor")) for n in OPTIMIZERS],
)
def test_behind_the_identity_an_optimizer_is_itself(name):
    make = OPTIMIZERS[name]
    exact = efopt.error_feedback(efopt.compressors.identity(), axis_name=AXIS)
    got = trained(name, make(exact))
    alone = make(optax.identity())
    step = jax.jit(step_of(alone, jax.grad(mean_loss), name in IN_PAIRS))
    carry = start(name, alone)
    for _ in range(STEPS):
        carry = step(carry, OPTIMA)
    moved = 0.0
    first = jax.tree.leaves(start(name, alone)[0])
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(carry[0]), first, strict=True)
    for a, b, before in leaves:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        moved = max(moved, float(np.max(np.abs(np.asarray(b) - before))))
    assert moved > 1e-4


@pytest.mark.parametrize(
    "name", [slow(n, when=n != "schedule_free") for n in OPTIMIZERS]
)
def test_behind_a_compressor_workers_stay_equal(name):
    signs = efopt.error_feedback(
        efopt.scaled_sign(8), axis_name=AXIS, exchange="two_phase"
    )
    for leaf in jax.tree.leaves(trained(name, OPTIMIZERS[name](signs))):
        assert np.all(np.isfinite(leaf))
        first, *others = copies(leaf, WORKERS)
        for other in others:
            np.testing.assert_array_equal(other, first)


def test_batch_norm_over_the_workers():
    """Statistics of all workers' batches: the gradient of the mean loss of all."""
    draws = np.random.default_rng(1)
    batch = draws.standard_normal((WORKERS, 4, 6), np.float32)
    targets = draws.standard_normal((WORKERS, 4), np.float32)
    weights = draws.standard_normal(6).astype(np.float32)

    def loss(w, x, y, mean):
        centre = mean(jnp.mean(x * w[None], axis=0, keepdims=True))
        spread = mean(jnp.mean((x * w[None] - centre) ** 2, axis=0, keepdims=True))
        normal = (x * w[None] - centre) / jnp.sqrt(spread + 1e-3)
        return jnp.mean((jnp.sum(normal**3, axis=-1) - y) ** 2)

    def here(x):
        return lax.pmean(x, AXIS)

    mesh = make_mesh("auto", WORKERS)
    tx = efopt.error_feedback(efopt.compressors.identity(), axis_name=AXIS)
    state = efopt.distribute(jax.jit(tx.init)(weights), mesh)
    specs = efopt.partition_specs(state)

    def inside(w, state, x, y):
        grads = jax.grad(loss)(efopt.local_params(w, AXIS), x[0], y[0], here)
        return tx.update(grads, state, w)

    step = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(P(), specs, P(AXIS), P(AXIS)),
        out_specs=(P(), specs),
    )
    got, _ = jax.jit(step)(weights, state, batch, targets)
    whole = (batch.reshape(-1, 6), targets.reshape(-1))
    want = jax.jit(jax.grad(lambda w: loss(w, *whole, lambda m: m)))(weights)
    largest = float(np.max(np.abs(want)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "row", [slow(r, when=r.slow or not r.kind, id=r.name) for r in COMPRESSORS]
)
def test_under_the_strictest_settings(row):
    """No implicit promotion of dtypes, no NaN on the way, no tracer that leaks."""
    tx = efopt.error_feedback(row.make())
    zeros = {k: np.zeros_like(v) for k, v in PARAMS.items()}
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.checking_leaks(),
    ):
        state = jax.jit(tx.init)(PARAMS)
        for grads in (PARAMS, zeros):
            updates, state = jax.jit(tx.update)(grads, state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))
