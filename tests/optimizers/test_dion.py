"""Dion: its paper, its identity, shards, bytes, and what bad input gets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle_methods
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, FAST, make_mesh, slow

import efopt
from efopt import wire
from efopt.codecs.blocks import Turn
from efopt.feedback.orthonormal import Side, orthonormalise

WORKERS, STEPS, DECAY = 4, 50, 0.01
SHAPES = {"long": (24, 10), "wide": (10, 24), "square": (12, 12)}


def schedule(t):
    return 0.1 / (1.0 + 0.1 * t)


def problem(seed=0, steps=STEPS, workers=WORKERS, shapes=SHAPES):
    """Parameters and gradients `[t, worker, ...]`, other ones for every worker."""
    rng = np.random.default_rng(seed)
    draw = lambda *lead: {  # noqa: E731
        k: rng.standard_normal((*lead, *s), np.float32) for k, s in shapes.items()
    }
    return draw(), draw(steps, workers)


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


def first_q(tx, params, name):
    """The random start that all workers draw for one leaf at the first step."""
    link = tx.init(params)[0].link
    codec = dict(zip(sorted(params), link.home.link.codec.leaves, strict=True))[name]
    turn = Turn(jnp.uint32(0), jnp.uint32(0), link.home.link.stream)
    return np.asarray(codec._start(link.codec[name], turn)[0])


def test_dion_is_its_oracle():
    params, grads = problem()
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


def test_averaging_the_factors_is_dion_on_averaged_gradients():
    """To 1e-5 over 20 steps, with data that differ, dense where that is smaller."""
    shapes = {**SHAPES, "layers": (3, 14, 9), "small": (5, 4)}
    params, grads = problem(1, steps=20, shapes=shapes)
    every = lambda tree: jax.tree.map(lambda _: True, tree)  # noqa: E731
    make = functools.partial(
        efopt.optimizers.dion, schedule, rank=3, weight_decay=DECAY, matrices=every
    )
    got, state = simulate(make(axis_name=AXIS), params, grads)
    mean = jax.tree.map(lambda g: g.mean(axis=1, keepdims=True), grads)
    want, alone = simulate(make(), params, mean)
    for name in params:
        for i in range(WORKERS):
            np.testing.assert_allclose(
                got[name][:, i], want[name][:, 0], rtol=0, atol=1e-5, err_msg=name
            )
        momentum = state[0].momentum.value[name][:, :, 0]
        np.testing.assert_allclose(
            momentum.mean(axis=1), alone[0].momentum[name][:, 0], rtol=0, atol=1e-5
        )
        assert np.abs(momentum[-1] - momentum[-1, :1]).max() > 0.1  # workers differ
