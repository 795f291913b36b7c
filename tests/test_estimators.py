"""Estimators in front of error feedback, and ECLK, on a small convex problem.

Eight workers whose data differ, logistic regression in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from workers_under_test import AXIS

import efopt

N, M, D, BATCH = 8, 20, 20, 5
MU = 1e-3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def problem():
    """Features times labels, `(N, M, D)`, the smoothness, the optimum, the value."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((N, M, D)) + rng.standard_normal((N, 1, D))
    truth = rng.standard_normal(D)
    labels = np.sign(features @ truth + rng.standard_normal((N, M)))
    a = features * labels[..., None] / np.sqrt(D)
    largest = max(np.linalg.norm(x, 2) ** 2 / M for x in a)
    x = np.zeros(D)
    flat = a.reshape(-1, D)
    for _ in range(50):  # Newton
        s = 1 / (1 + np.exp(flat @ x))
        g = -(flat.T @ s) / len(flat) + MU * x
        h = (flat.T * (s * (1 - s))) @ flat / len(flat) + MU * np.eye(D)
        x = x - np.linalg.solve(h, g)
    return a, largest / 4 + MU, x, value(x, a)


def value(x, a):
    loss = np.logaddexp(0, -a.reshape(-1, D) @ x)
    return loss.mean() + MU / 2 * x @ x


def gradient(a, x):
    """Of the mean logistic loss over the rows of `a`, by hand."""
    return -(a.T @ jax.nn.sigmoid(-(a @ x))) / len(a) + MU * x


def local_loss(x, a):
    return jnp.mean(jnp.logaddexp(0, -(a @ x))) + MU / 2 * x @ x


def make_step(tx, batch):
    def step(x, state, a, k):
        own = efopt.local_params(x, AXIS)
        if batch is None:
            rows = a
        else:
            worker = jax.lax.axis_index(AXIS)
            key = jax.random.fold_in(jax.random.key(1), k * N + worker)
            rows = a[jax.random.randint(key, (batch,), 0, M)]
        # The workers' gradients as users write them, summed over workers if x were not
        # typed as their own.
        grad_fn = jax.grad(functools.partial(local_loss, a=rows))
        full_grad_fn = jax.grad(functools.partial(local_loss, a=a))
        updates, state = tx.update(
            grad_fn(own), state, x, grad_fn=grad_fn, full_grad_fn=full_grad_fn
        )
        return optax.apply_updates(x, updates), state

    return step


def is_own(x):
    return isinstance(x, efopt.PerWorker)


def stacked(state):
    """Per-worker state with a worker axis, and what `vmap` maps: all else is shared."""
    state = jax.tree.map(
        lambda x: efopt.stack_workers(x, N) if is_own(x) else x, state, is_leaf=is_own
    )
    axes = jax.tree.map(lambda x: 0 if is_own(x) else None, state, is_leaf=is_own)
    return state, axes


def run(tx, rounds, batch=None, every=1):
    """Iterates and states after every `every` rounds."""
    a = jnp.asarray(problem()[0])
    x = jnp.asarray(problem()[2]) + 1
    state, axes = stacked(tx.init(x))
    step = jax.vmap(
        make_step(tx, batch),
        in_axes=(None, axes, 0, None),
        out_axes=(None, axes),
        axis_name=AXIS,
    )

    def body(carry, k):
        return step(*carry, a, k), None

    def outer(carry, k):
        carry, _ = jax.lax.scan(body, carry, k)
        return carry, carry

    steps = jnp.arange(rounds).reshape(-1, every)
    return jax.jit(lambda c: jax.lax.scan(outer, c, steps)[1])((x, state))


def gap(xs):
    a, _, _, best = problem()
    return np.array([value(np.asarray(x), a) - best for x in xs])


def rate():
    return 1 / problem()[1]


def behind(*estimators, compressor=None, lr=None):
    c = efopt.top_k(k=1) if compressor is None else compressor
    return optax.chain(*estimators, efopt.ef_sgd(c, lr or rate(), axis_name=AXIS))


def reference_grads():
    a, _, best, _ = problem()
    return jnp.asarray(np.stack([gradient(rows, best) for rows in a]))


def shifts():
    return efopt.diana(efopt.random_k(k=2, unbiased=True, seed=5), axis_name=AXIS)


# ------------------------------------------------------------- where they converge


def test_ec_gd_stalls_and_star_and_diana_do_not():
    rounds = 12000
    plain = gap(run(behind(), rounds, every=2000)[0])
    star = gap(run(behind(efopt.star(reference_grads(), AXIS)), rounds, every=2000)[0])
    diana = gap(run(behind(shifts()), rounds, every=2000)[0])
    print(plain, star, diana)


def test_eclk():
    tx = efopt.eclk(efopt.top_k(k=1), problem()[1], MU, axis_name=AXIS)
    print(gap(run(tx, 4000, every=500)[0]))


def test_lsvrg():
    for est in (
        [],
        [efopt.lsvrg(0.25, AXIS)],
        [efopt.lsvrg(0.25, AXIS, "per_worker"), shifts()],
    ):
        print(gap(run(behind(*est, lr=rate() / 4), 12000, BATCH, every=2000)[0]))
