"""1-bit Adam and 0/1 Adam: their papers, zeros, their bytes, and bad input."""

import jax
import numpy as np
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
B1, B2, EPS = 0.8, 0.95, 1e-3
BLOCKED = efopt.scaled_sign(16)
OPTIONS = dict(
    b1=B1, b2=B2, eps=EPS, compressor=BLOCKED, weight_decay=DECAY, axis_name=AXIS
)


def blocked(x):
    return oracle.scaled_sign(x, 16)


def small(t):
    return 0.1 * schedule(t)


def test_one_bit_adam_is_its_oracle():
    params, grads = problem(SHAPES)
    x0, lists = listed(params, grads)
    tx = efopt.optimizers.one_bit_adam(small, warmup=8, **OPTIONS)
    got, state = simulate(tx, params, grads)
    path, variance, owed = oracle_methods.frozen_adam(
        x0, lists, small, blocked, lambda t: t < 8, B1, B2, EPS, DECAY
    )
    follows(got, path)
    for x, v in zip(jax.tree.leaves(state[0].nu), variance, strict=True):
        np.testing.assert_allclose(x[-1, 0], v, rtol=0, atol=1e-5)
    for i in range(WORKERS):
        mine = [x[-1, i, 0] for x in jax.tree.leaves(state[0].residual.value)]
        for a, b in zip(mine, owed[i], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def refreshes(group, freeze, steps):
    """T_v of 2202.06009: the j-th and the next are 2^(j // group) apart."""
    out, step = [], 0
    for j in range(steps):
        step += 2 ** (j // group)
        out.append(step - 1)
    return {t for t in out if t < freeze}


def test_zero_one_adam_is_its_oracle():
    params, grads = problem(SHAPES, 1)
    x0, lists = listed(params, grads)
    tx = efopt.optimizers.zero_one_adam(small, freeze=30, refresh=3, **OPTIONS)
    got, _ = simulate(tx, params, grads)
    dense = refreshes(3, 30, len(lists))
    path, *_ = oracle_methods.frozen_adam(
        x0, lists, small, blocked, dense.__contains__, B1, B2, EPS, DECAY, scaled=True
    )
    follows(got, path)


@pytest.mark.parametrize("group", [1, 3, 16])
def test_refreshes_are_those_of_the_paper(group):
    from efopt.optimizers.zero_one_adam import _refreshed

    steps = np.arange(3000)
    got = jax.jit(jax.vmap(lambda t: _refreshed(t, group)))(steps)
    assert set(np.flatnonzero(got)) == refreshes(group, 3000, 3000)


@pytest.mark.slow
def test_in_the_warm_up_it_is_adam_on_averaged_gradients():
    params, grads = problem(SHAPES, 2, steps=10)
    tx = efopt.optimizers.one_bit_adam(small, warmup=10, axis_name=AXIS)
    got, state = simulate(tx, params, grads)
    x, m, v = params["w"].astype(np.float64), 0.0, 0.0
    for t in range(10):
        g = grads["w"][t].mean(axis=0, dtype=np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - small(t) * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(got["w"][-1, 0], x, rtol=0, atol=1e-5)
    assert not any(x.any() for x in jax.tree.leaves(state[0].residual))


@pytest.mark.parametrize("which", ["one_bit_adam", slow("zero_one_adam")])
def test_rows_without_gradient_stay_exactly_where_they_are(which):
    """In a block of their own and among others, for 200 steps of one bit."""
    params, grads = problem({"embed": (20, 8)}, 3, steps=200)
    dead = np.zeros((20, 1), bool)
    dead[[0, 1, 2, 7, 12]] = True  # two blocks of 16 and halves of two more
    grads["embed"] = np.where(dead, 0, grads["embed"])
    timing = {"warmup": 5} if which == "one_bit_adam" else {"freeze": 100}
    make = getattr(efopt.optimizers, which)
    tx = make(small, compressor=BLOCKED, axis_name=AXIS, **timing)
    got, state = simulate(tx, params, grads)
    still = np.broadcast_to(dead, (20, 8))
    for i in range(WORKERS):
        np.testing.assert_array_equal(
            got["embed"][-1, i][still], params["embed"][still]
        )
    assert not state[0].mu["embed"][..., still].any()
    assert not state[0].residual.value["embed"][..., still].any()
    owners = jax.tree.leaves(state[0].link.server)[0]
    assert np.abs(owners[-1]).max() < 10 * np.abs(owners[20:]).max()  # nor do owners
    assert (got["embed"][-1, 0] != params["embed"])[~still].all()


def test_a_gradient_that_comes_late_is_found_at_the_next_refresh():
    params, grads = problem({"w": (4, 4)}, 4, steps=30)
    grads["w"][:10, :, 0] = 0
    tx = efopt.optimizers.zero_one_adam(
        small, freeze=30, refresh=3, compressor=BLOCKED, axis_name=AXIS
    )
    got, _ = simulate(tx, params, grads)
    row = got["w"][:, 0, 0]
    found = min(t for t in refreshes(3, 30, 30) if t >= 10)
    np.testing.assert_array_equal(row[:found], row[:1].repeat(found, axis=0))
    assert (row[found] != row[0]).all() and np.isfinite(row).all()
    assert np.abs(np.diff(row, axis=0)).max() < 1  # no step is divided by eps alone


LAYERS = {"a": np.zeros((256, 128), np.float32), "b": np.zeros(8192, np.float32)}


# By default the three branches of 0/1 Adam stand for it.
@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 8])
def test_bytes_are_those_of_the_plans_of_both_branches(n):
    tx = efopt.optimizers.one_bit_adam(1e-3, warmup=100, axis_name=AXIS)
    measured = wire.measure(*compiled(tx, LAYERS, n))
    both = {"all-reduce": [], "all-to-all": [], "all-gather": []}
    for c in measured.collectives:
        both[c.operation].append(c.operand_bytes)
    options = dict(num_workers=n, platform="cpu")
    signs = wire.plan(efopt.scaled_sign(1024), LAYERS, exchange="two_phase", **options)
    dense = wire.plan(efopt.compressors.identity(), LAYERS, **options)
    assert sum(both["all-reduce"]) == dense.operand_bytes
    one_bit = sum(both["all-to-all"]) + sum(both["all-gather"])
    assert one_bit == signs.operand_bytes
    size = sum(x.size for x in LAYERS.values())
    assert sum(both["all-to-all"]) <= 1.04 * size / 8


@pytest.mark.parametrize(
    ("which", "options", "error", "words"),
    [
        ("one_bit_adam", {"warmup": 0}, ValueError, "must be at least 1, got 0"),
        ("one_bit_adam", {"warmup": 0.2}, TypeError, "must be a Python int"),
        ("zero_one_adam", {"freeze": 0}, ValueError, "must be at least 1, got 0"),
        ("zero_one_adam", {"freeze": 9, "refresh": 0}, ValueError, "at least 1, got 0"),
        ("one_bit_adam", {"warmup": 9, "b1": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ("one_bit_adam", {"warmup": 9, "b2": -1}, ValueError, r"in \[0, 1\), got -1"),
        ("one_bit_adam", {"warmup": 9, "eps": 0.0}, ValueError, "must be positive"),
        (
            "one_bit_adam",
            {
                "warmup": 9,
                "compressor": efopt.scaled_sign(),
                "axis_name": AXIS,
                "exchange": "two_phase",
            },
            ValueError,
            "give it a `block_size`",
        ),
    ],
)
def test_option_is_refused(which, options, error, words):
    with pytest.raises(error, match=words):
        getattr(efopt.optimizers, which)(0.1, **options)


def test_a_warm_up_is_required():
    with pytest.raises(TypeError, match="warmup"):
        efopt.optimizers.one_bit_adam(0.1)
