"""Distributed Lion and Lion Cub: their papers, their bytes, and bad input."""

import jax
import numpy as np
import optax
import oracle
import oracle_methods
import pytest
from methods_under_test import (
    DECAY,
    WORKERS,
    compiled,
    follows,
    listed,
    problem,
    schedule,
    simulate,
)
from workers_under_test import AXIS, slow

import efopt
from efopt import wire

SHAPES = {"b": (11,), "w": (12, 10)}
lion = efopt.optimizers.distributed_lion


def momenta_are(state, want):
    got = jax.tree.map(lambda x: x[-1, :, 0], state[0].momentum.value)
    for i in range(WORKERS):
        mine = [x[i] for x in jax.tree.leaves(got)]
        for a, b in zip(mine, want[i], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exchange", ["majority_vote", "all_gather"])
def test_distributed_lion_is_its_oracle(exchange):
    """Ties of four workers are coins; the oracle is told how they fell, no more."""
    params, grads = problem(SHAPES)
    x0, lists = listed(params, grads)
    tx = lion(schedule, weight_decay=DECAY, axis_name=AXIS, exchange=exchange)
    got, state = simulate(tx, params, grads)
    coins = []
    for t in range(len(lists)):
        before = x0 if t == 0 else [x[t - 1, 0] for x in jax.tree.leaves(got)]
        moved = [x[t, 0] - b for x, b in zip(jax.tree.leaves(got), before, strict=True)]
        coins.append(
            [
                np.sign(-m - schedule(t) * DECAY * b)
                for m, b in zip(moved, before, strict=True)
            ]
        )
    path, momenta = oracle_methods.distributed_lion(
        x0, lists, schedule, 0.9, 0.99, DECAY, exchange == "majority_vote", coins
    )
    follows(got, path)
    momenta_are(state, momenta)


def test_lion_cub_is_its_oracle():
    params, grads = problem(SHAPES, 1)
    x0, lists = listed(params, grads)
    tx = lion(
        schedule,
        compressor=efopt.scaled_sign(16),
        average_momentum=7,
        weight_decay=DECAY,
        axis_name=AXIS,
    )
    got, state = simulate(tx, params, grads)
    path, momenta = oracle_methods.distributed_lion(
        *(x0, lists, schedule, 0.9, 0.99, DECAY),
        compress=lambda x: oracle.scaled_sign(x, 16),
        average_every=7,
    )
    follows(got, path)
    momenta_are(state, momenta)


def test_one_worker_is_optax_lion():
    params, grads = problem(SHAPES, 2, steps=20, workers=1)
    got, _ = simulate(lion(schedule, weight_decay=DECAY), params, grads)
    want, _ = simulate(optax.lion(schedule, weight_decay=DECAY), params, grads)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_weight_decay_decides_no_bit():
    """Decay far above any gradient: inside the vote it would decide every bit."""
    params = {"w": np.float32([100.0, -100.0])}
    grads = {"w": np.tile(np.float32([-1.0, 1.0]), (1, WORKERS, 1))}
    tx = lion(0.5, weight_decay=0.1, axis_name=AXIS)
    got, _ = simulate(tx, params, grads)
    np.testing.assert_allclose(got["w"][0, 0], [95.5, -95.5], rtol=1e-6)


LAYERS = {"a": np.zeros((256, 128), np.float32), "b": np.zeros(8192, np.float32)}


@pytest.mark.parametrize("n", [slow(2), 8])
def test_bytes_are_those_of_the_plan_of_signs(n):
    measured = wire.measure(*compiled(lion(0.01, axis_name=AXIS), LAYERS, n))
    planned = wire.plan(
        efopt.sign(), LAYERS, num_workers=n, exchange="majority_vote", platform="cpu"
    )
    assert measured.operand_bytes == planned.operand_bytes
    assert measured.bytes_sent_per_worker == planned.bytes_sent_per_worker
    size = sum(x.size for x in LAYERS.values())
    assert measured.bytes_sent_per_worker <= 2 * size / 8


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"b1": 1.0}, ValueError, r"b1=\.\.\.\)` must be in \[0, 1\)"),
        ({"b2": -0.1}, ValueError, r"b2=\.\.\.\)` must be in \[0, 1\)"),
        ({"exchange": "two_phase", "axis_name": AXIS}, ValueError, "'two_phase'"),
        ({"average_momentum": 0, "axis_name": AXIS}, ValueError, "at least 1"),
        ({"average_momentum": 5}, ValueError, "nobody to average with"),
        ({"compressor": 4, "axis_name": AXIS}, TypeError, "`efopt.Compressor`"),
    ],
)
def test_option_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        lion(0.1, **options)
