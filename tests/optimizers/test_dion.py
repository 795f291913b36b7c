"""Dion: its paper, its identity, shards, bytes, and what bad input gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle_methods
import pytest
from methods_under_test import (
    DECAY,
    WORKERS,
    compiled,
    problem,
    schedule,
    simulate,
)
from workers_under_test import AXIS, FAST, slow

import efopt
from efopt import wire
from efopt.codecs.blocks import Turn
from efopt.feedback.orthonormal import Side, orthonormalise

SHAPES = {"long": (24, 10), "wide": (10, 24), "square": (12, 12)}


def first_q(tx, params, name):
    """The random start that all workers draw for one leaf at the first step."""
    link = jax.jit(tx.init)(params)[0].link
    codec = dict(zip(sorted(params), link.home.link.codec.leaves, strict=True))[name]
    turn = Turn(jnp.uint32(0), jnp.uint32(0), link.home.link.stream)
    return np.asarray(jax.jit(lambda q: codec._start(q, turn)[0])(link.codec[name]))


def test_dion_is_its_oracle():
    params, grads = problem(SHAPES)
    tx = efopt.optimizers.dion(
        schedule, rank=4, weight_decay=DECAY, axis_name=AXIS, momentum=0.9
    )
    got, state = simulate(tx, params, grads)
    for name, x in params.items():
        mine = [[g for g in step] for step in grads[name]]
        start = first_q(tx, params, name)
        path, momenta = oracle_methods.dion(x, mine, schedule, start, 0.9, DECAY)
        for i in range(WORKERS):
            np.testing.assert_allclose(got[name][:, i], path[1:], rtol=0, atol=1e-4)
        mean = state[0].momentum.value[name].mean(axis=1)[:, 0]
        np.testing.assert_allclose(mean, momenta[1:], rtol=0, atol=2e-4)


# By default tests/topology/test_sharded_dion.py stands for it.
@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, WORKERS])
def test_averaging_the_factors_is_dion_on_averaged_gradients(workers):
    """To 1e-5 over 20 steps, with data that differ, dense where that is smaller."""
    shapes = {"long": (24, 10), "layers": (3, 10, 24), "small": (5, 4)}
    params, grads = problem(shapes, 1, steps=20, workers=workers)
    every = lambda tree: jax.tree.map(lambda _: True, tree)  # noqa: E731
    make = functools.partial(
        efopt.optimizers.dion, schedule, rank=3, weight_decay=DECAY, matrices=every
    )
    got, state = simulate(make(axis_name=AXIS), params, grads)
    mean = jax.tree.map(lambda g: g.mean(axis=1, keepdims=True), grads)
    want, alone = simulate(make(), params, mean)
    for name in params:
        for i in range(workers):
            np.testing.assert_allclose(
                got[name][:, i], want[name][:, 0], rtol=0, atol=1e-5, err_msg=name
            )
        momentum = state[0].momentum.value[name][:, :, 0]
        np.testing.assert_allclose(
            momentum.mean(axis=1), alone[0].momentum[name][:, 0], rtol=0, atol=1e-5
        )
        assert np.abs(momentum[-1] - momentum[-1, :1]).max() > 0.1  # workers differ


# ------------------------------------------------------------------- the factors


@functools.partial(jax.jit, static_argnums=1, compiler_options=FAST)
def orthonormal(p, seed=0):
    return orthonormalise(p, Side(p.shape[1]), np.uint32(seed))


def lengths(q):
    return np.linalg.norm(np.asarray(q, np.float64), axis=1)


@pytest.mark.parametrize("rows", [30, 400])  # below and above the sketch's height
def test_columns_are_orthonormal_and_those_of_gram_schmidt(rows):
    """Also where they differ in size by sixty orders of magnitude."""
    p = np.random.default_rng(0).standard_normal((2, rows, 12)).astype(np.float32)
    p[1] *= np.float32(10.0) ** np.linspace(-30, 30, 12, dtype=np.float32)
    for given, got in zip(p, np.asarray(orthonormal(p)), strict=True):
        np.testing.assert_allclose(got.T @ got, np.eye(12), rtol=0, atol=2e-6)
        length = np.linalg.norm(given.astype(np.float64), axis=0)
        want = oracle_methods.orthonormal(given / length)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [30, 400])
def test_zero_dependent_and_non_finite_columns_become_zero_and_harm_no_other(rows):
    p = np.random.default_rng(1).standard_normal((1, rows, 8)).astype(np.float32)
    clean = np.delete(p[0], [1, 3, 6], axis=1)
    p[0, :, 1], p[0, :, 3], p[0, :, 6] = 0, 2 * p[0, :, 0] - p[0, :, 2], np.nan
    got = np.asarray(orthonormal(p))[0]
    np.testing.assert_array_equal(got[:, [1, 3, 6]], 0)
    want = oracle_methods.orthonormal(clean)
    np.testing.assert_allclose(
        np.delete(got, [1, 3, 6], axis=1), want, rtol=0, atol=2e-6
    )


def step_of(tx):
    return jax.jit(lambda g, s: tx.update(g, s), compiler_options=FAST)


@pytest.mark.parametrize("magnitude", [1e-25, 1.0, 1e25])
def test_a_matrix_of_lower_rank_moves_along_what_it_has(magnitude):
    """Of rank one: the direction has one singular value, and the rest is zero."""
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal(9), rng.standard_normal(7)
    grads = (magnitude * np.outer(left, right)).astype(np.float32)
    tx = efopt.feedback.scale_by_dion(rank=3, momentum=0.5)
    step, state = step_of(tx), jax.jit(tx.init)(grads)
    for _ in range(3):
        updates, state = step(grads, state)
        values = np.linalg.svd(np.asarray(updates, np.float64))[1]
        want = [np.sqrt(7 / 9), *np.zeros(6)]
        np.testing.assert_allclose(values, want, rtol=0, atol=1e-5)


def test_zeros_move_nothing_and_what_comes_later_does():
    tx = efopt.feedback.scale_by_dion(rank=2)
    zeros = np.zeros((6, 5), np.float32)
    step, state = step_of(tx), jax.jit(tx.init)(zeros)
    updates, state = step(zeros, state)
    np.testing.assert_array_equal(updates, 0)
    grads = np.random.default_rng(3).standard_normal((6, 5)).astype(np.float32)
    updates, state = step(grads, state)
    values = np.linalg.svd(np.asarray(updates, np.float64))[1]
    assert np.isfinite(values).all() and (values[:2] > 0.1).all()


def test_what_is_not_finite_is_forgotten_where_it_stands():
    tx = efopt.feedback.scale_by_dion(rank=2)
    grads = np.random.default_rng(4).standard_normal((6, 5)).astype(np.float32)
    step, state = step_of(tx), jax.jit(tx.init)(grads)
    poisoned = grads.copy()
    poisoned[2, 3], poisoned[0, 0] = np.nan, np.inf
    for g in (poisoned, grads, grads):
        updates, state = step(g, state)
        assert np.isfinite(updates).all() and np.isfinite(state.momentum).all()
        assert np.abs(updates).max() > 0.1


# ----------------------------------------------------------------------- the wire


LAYERS = {
    "a": np.zeros((96, 64), np.float32),
    "b": np.zeros((96, 64), np.float32),
    "small": np.zeros((4, 4), np.float32),  # 16 numbers, and its factors would be 32
    "vector": np.zeros(33, np.float32),
}


@pytest.mark.parametrize("n", [slow(2), 8])
def test_bytes_are_those_of_a_plan_with_factors_of_the_same_rank(n):
    tx = efopt.optimizers.dion(0.01, rank=4, fallback=optax.adam(1e-3), axis_name=AXIS)
    measured = wire.measure(*compiled(tx, LAYERS, n))
    numbers = 2 * 4 * (96 + 64) + 16 + 33
    assert measured.operand_bytes == 4 * numbers
    compressor = efopt.power_sgd(rank=4, min_compression=1)
    planned = wire.plan(compressor, LAYERS, num_workers=n, platform="cpu")
    assert measured.operand_bytes == planned.operand_bytes
    assert measured.bytes_sent_per_worker == planned.bytes_sent_per_worker
    assert len(measured.collectives) == 2


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": 2, "fraction": 0.5}, ValueError, "exactly one of `fraction`"),
        ({"rank": 0}, ValueError, "must be at least 1"),
        ({"rank": 2.0}, TypeError, "must be a Python int"),
        ({"fraction": 1.5}, ValueError, "must lie in"),
        ({"momentum": 1.0}, ValueError, r"must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, ValueError, r"must be in \[0, 1\)"),
        ({"seed": -1}, ValueError, "seed"),
        ({"fallback": 0.1}, ValueError, r"an Optax gradient .*, got 0.1"),
    ],
)
def test_option_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        efopt.optimizers.dion(0.1, **options)


def test_leaves_that_are_no_matrices_ask_for_a_fallback():
    params = {"w": np.zeros((4, 4), np.float32), "bias": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match=r"are none.*\['bias'\].*fallback=optax.adamw"):
        jax.eval_shape(efopt.optimizers.dion(0.1, rank=2).init, params)


def test_a_rank_above_the_shorter_side_is_refused_with_the_leaf():
    params = {"w": np.zeros((9, 3), np.float32)}
    with pytest.raises(ValueError, match=r"rank=4.*shorter side.*\['w'\].*\(9, 3\)"):
        jax.eval_shape(efopt.optimizers.dion(0.1, rank=4).init, params)


def test_a_vector_that_is_called_a_matrix_is_refused():
    params = {"b": np.zeros(3, np.float32)}
    tx = efopt.optimizers.dion(0.1, rank=1, matrices={"b": True})
    with pytest.raises(ValueError, match=r"names \['b'\] of shape \(3,\), which is no"):
        jax.eval_shape(tx.init, params)


def test_updates_of_another_structure_are_refused():
    tx = efopt.optimizers.dion(0.1, rank=1)
    params = {"w": np.zeros((3, 3), np.float32)}
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="another structure|of shape"):
        jax.eval_shape(tx.update, {"v": params["w"]}, state, params)
    with pytest.raises(ValueError, match="of shape"):
        jax.eval_shape(tx.update, {"w": np.zeros((3, 4), np.float32)}, state, params)
