"""Logistic regression on workers whose data differ, for JAX and for the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, make_mesh

import efopt

ROWS, D, BATCH, MU = 20, 20, 2, 1e-3


class Problem:
    """Features times labels `(n, ROWS, D)`; minibatches of every step; the optimum."""

    def __init__(self, n, rounds=0):
        rng = np.random.default_rng(n)
        features = rng.standard_normal((n, ROWS, D)) + rng.standard_normal((n, 1, D))
        truth = rng.standard_normal(D)
        labels = np.sign(features @ truth + rng.standard_normal((n, ROWS)))
        self.a = features * labels[..., None] / np.sqrt(D)
        self.n = n
        self.picks = rng.integers(0, ROWS, (rounds, n, BATCH))
        self.smoothness = MU + max(np.linalg.norm(x, 2) ** 2 for x in self.a) / 4 / ROWS
        self.optimum = self._solve()
        self.start = self.optimum + 1

    def _solve(self):
        flat, x = self.a.reshape(-1, D), np.zeros(D)
        for _ in range(50):  # Newton
            s = 1 / (1 + np.exp(flat @ x))
            slope = (flat.T * (s * (1 - s))) @ flat / len(flat) + MU * np.eye(D)
            x = x - np.linalg.solve(slope, MU * x - flat.T @ s / len(flat))
        return x

    def gap(self, x):
        """f(x) - f*."""
        flat = self.a.reshape(-1, D)
        losses = np.logaddexp(0, -flat @ x) - np.logaddexp(0, -flat @ self.optimum)
        return losses.mean() + MU / 2 * (x - self.optimum) @ (x + self.optimum)

    def full(self, x, i):
        return gradient(x, self.a[i])

    def grads(self, t, x, i):
        return gradient(x, self.a[i][self.picks[t, i]])

    def reference(self):
        """The workers' gradients at the optimum."""
        return np.stack([self.full(self.optimum, i) for i in range(self.n)])


def gradient(x, rows):
    """Of the mean loss of some rows, by hand."""
    return MU * x - rows.T @ (1 / (1 + np.exp(rows @ x))) / len(rows)


def loss(x, rows):
    return jnp.mean(jnp.logaddexp(0, -(rows @ x))) + MU / 2 * x @ x


def make_step(tx, batch, axis_name=AXIS):
    """As users write it: summed over workers, were `x` not typed as their own."""

    def step(carry, a, picks):
        x, state = carry
        full = jax.grad(functools.partial(loss, rows=a))
        grad_fn = jax.grad(functools.partial(loss, rows=a[picks])) if batch else full
        own = x if axis_name is None else efopt.local_params(x, axis_name)
        updates, state = tx.update(
            grad_fn(own), state, x, grad_fn=grad_fn, full_grad_fn=full
        )
        return optax.apply_updates(x, updates), state

    return step


def is_own(x):
    return isinstance(x, efopt.PerWorker)


def run(tx, problem, rounds, batch=False, how="vmap", every=1):
    """Parameters and state after every `every` rounds, stacked, as NumPy.

    Under `vmap` only what differs between the workers has a worker axis; `alone` is a
    single worker without an axis.
    """
    carry = jnp.asarray(problem.start), tx.init(jnp.asarray(problem.start))
    a, picks = jnp.asarray(problem.a), jnp.asarray(problem.picks[:rounds])
    step = make_step(tx, batch, None if how == "alone" else AXIS)
    if not batch:
        picks = jnp.zeros((rounds, problem.n, 1), int)
    if how == "alone":

        def mapped(carry, a, picks):
            return step(carry, a[0], picks[0])

    elif how == "vmap":
        carry = jax.tree.map(
            lambda x: efopt.stack_workers(x, problem.n) if is_own(x) else x,
            carry,
            is_leaf=is_own,
        )
        axes = jax.tree.map(lambda x: 0 if is_own(x) else None, carry, is_leaf=is_own)
        mapped = jax.vmap(step, in_axes=(axes, 0, 0), out_axes=axes, axis_name=AXIS)
    else:
        mesh = make_mesh(how, problem.n)
        carry = efopt.distribute(carry, mesh)
        specs = efopt.partition_specs(carry)

        def local(carry, a, picks):
            return step(carry, a[0], picks[0])

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(specs, P(AXIS), P(AXIS)), out_specs=specs
        )

    def one(carry, picks):
        return mapped(carry, a, picks), None

    def several(carry, picks):
        carry, _ = jax.lax.scan(one, carry, picks)
        return carry, carry

    picks = picks.reshape(-1, every, *picks.shape[1:])
    history = jax.jit(lambda c: jax.lax.scan(several, c, picks)[1])(carry)
    return jax.tree.map(np.asarray, history)
