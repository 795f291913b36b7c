"""A run that has converged stays converged on another number of workers.

The same rows of data throughout, in contiguous shares. Between 8 workers and 4 or 16
shifts and reference gradients keep what they know: DIANA's mean is that of the shifts
of the mixed data. On 3 workers shares are new mixtures, and there is a real transient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import AXIS

import efopt
from efopt.checkpoints import resize

from .convex import D, Problem, make_step

CONVERGED, MORE = 6000, 400
TOP_1 = efopt.top_k(k=1)
SHIFTS = efopt.random_k(k=2, unbiased=True, seed=5)
problem = Problem(8)


def diana(rate):
    return efopt.convex.ec_sgd_diana(
        TOP_1, rate, shift_compressor=SHIFTS, axis_name=AXIS
    )


def shifted(rate):
    return efopt.convex.ec_lsvrg_shifted(TOP_1, rate, probability=0.1, axis_name=AXIS)


def coins_of_their_own(rate):
    return efopt.convex.ec_lsvrg_diana(
        TOP_1,
        rate,
        probability=0.1,
        shift_compressor=SHIFTS,
        axis_name=AXIS,
        coin="per_worker",
    )


def is_own(x):
    return isinstance(x, efopt.PerWorker)


def train(tx, carry, n, rounds):
    """The last state, stacked where workers differ, and f - f* after every round."""
    data = jnp.asarray(problem.a.reshape(n, -1, D))
    carry = jax.tree.map(
        lambda x: efopt.stack_workers(x, n) if is_own(x) else x, carry, is_leaf=is_own
    )
    axes = jax.tree.map(lambda x: 0 if is_own(x) else None, carry, is_leaf=is_own)
    step = make_step(tx, batch=False)
    mapped = jax.vmap(step, in_axes=(axes, 0, None), out_axes=axes, axis_name=AXIS)

    def one(carry, _):
        carry = mapped(carry, data, None)
        return carry, carry[0]

    last, path = jax.jit(lambda c: jax.lax.scan(one, c, length=rounds))(carry)
    return last, np.array([problem.gap(x) for x in np.asarray(path)])


def zeroed(state):
    """What a restart from parameters alone knows of each worker: nothing."""
    return jax.tree.map(
        lambda x: jax.tree.map(np.zeros_like, x) if is_own(x) else x,
        state,
        is_leaf=is_own,
    )


@pytest.mark.parametrize("make", [diana, shifted, coins_of_their_own])
def test_a_converged_run_stays_converged(make):
    tx = make(0.5 / problem.smoothness)
    start = jnp.asarray(problem.start)
    (x, state), gap = train(tx, (start, tx.init(start)), 8, CONVERGED)
    reached = np.abs(gap[-20:]).max()
    assert reached < 1e-10
    for m in (4, 16):
        new = resize(state, m, stacked=True)
        _, after = train(tx, (x, new), m, MORE)
        assert np.abs(after).max() < 2 * reached + 1e-11, m
        _, worse = train(tx, (x, zeroed(new)), m, MORE)
        assert np.abs(worse).max() > 1e-5


def test_without_a_new_gradient_points_of_their_own_fall_back():
    """What `stale` is for: a mixed gradient is none of the mixed point."""
    tx = coins_of_their_own(0.5 / problem.smoothness)
    start = jnp.asarray(problem.start)
    (x, state), _ = train(tx, (start, tx.init(start)), 8, CONVERGED)

    def fresh(x):
        known = is_own(x) and x.rule == "true"
        return dataclasses.replace(x, value=np.zeros_like(x.value)) if known else x

    new = jax.tree.map(fresh, resize(state, 16, stacked=True), is_leaf=is_own)
    _, after = train(tx, (x, new), 16, MORE)
    assert np.abs(after).max() > 1e-6
