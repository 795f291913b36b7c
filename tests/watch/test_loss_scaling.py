"""Gradients that come scaled: the two ways that are right, and the one that is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import AXIS, WORKERS
from workers_under_test import FAST, slow

import efopt

RATE, STEPS, SIZE = 0.1, 24, 40
# Powers of two, as all loss scales: up after good steps, down after an overflow.
SCALES = np.repeat(2.0 ** np.array([15, 16, 13, 17]), STEPS // 4).astype(np.float32)


def feedback(compressor, exchange, rate=None):
    return efopt.error_feedback(
        compressor, axis_name=AXIS, exchange=exchange, learning_rate=rate
    )


def first(inner, scale):
    """Unscaled in float32, before anything is owed."""
    return optax.chain(optax.scale(1 / scale), inner(None), optax.scale(-RATE))


def by_rate(inner, scale):
    """The feedback works on what is scaled, and is told the rate that is left."""
    return optax.chain(inner(RATE / scale), optax.scale(-RATE / scale))


def neither(inner, scale):
    return optax.chain(inner(None), optax.scale(-RATE / scale))


def missed(way, compressor, exchange):
    """How far parameters less what is owed are off SGD's path, at most."""
    grads = np.random.default_rng(0).standard_normal((STEPS, WORKERS, SIZE), np.float32)
    inner = functools.partial(feedback, compressor, exchange)

    def step(carry, g, scale):
        tx = way(inner, scale)  # built inside the step: the scale is traced
        updates, state = tx.update(g * scale, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    init = jax.jit(way(inner, np.float32(1)).init)
    params = np.zeros(SIZE, np.float32)
    carry = efopt.stack_workers((params, init(params)), WORKERS)
    step = jax.vmap(step, (0, 0, None), axis_name=AXIS)
    step = jax.jit(step, compiler_options=FAST)
    path, worst = np.zeros(SIZE), 0.0
    for g, scale in zip(grads, SCALES, strict=True):
        carry = step(carry, g, scale)
        path -= RATE * g.mean(axis=0, dtype=np.float64)
        state = carry[1][1] if way is first else carry[1][0]
        owed = np.asarray(state.residual.value, np.float64).mean(axis=(0, 1))
        if state.link.server != ():
            (server,) = state.link.server.value
            owed = owed + np.asarray(server, np.float64).reshape(-1)[:SIZE]
        unit = 1 if way is first else scale
        x = np.asarray(carry[0], np.float64)[0] - RATE / unit * owed
        worst = max(worst, np.abs(x - path).max())
    return worst


@pytest.mark.parametrize(
    ("compressor", "exchange"),
    [
        (efopt.top_k(fraction=0.1), "all_gather"),
        slow(efopt.scaled_sign(8), "two_phase"),
        slow(efopt.quantize(4, block_size=8), "two_phase"),
    ],
)
def test_unscaled_first_or_with_the_rate_that_is_left_and_never_with_neither(
    compressor, exchange
):
    assert missed(first, compressor, exchange) < 2e-6
    assert missed(by_rate, compressor, exchange) < 2e-6
    assert missed(neither, compressor, exchange) > 1e-2


def test_all_workers_lower_the_scale_together_by_the_flag_of_the_guard():
    """The gradient of one worker alone overflows in float16."""
    tx = efopt.watch.skip_not_finite(
        first(functools.partial(feedback, efopt.top_k(k=4), None), 1.0), axis_name=AXIS
    )
    grads = np.ones((WORKERS, SIZE), np.float32)
    grads[1, 7] = 10.0

    def step(carry, g):
        params, state, scale = carry
        scaled = (g * scale).astype(jnp.float16)
        unscaled = scaled.astype(jnp.float32) / scale
        updates, state = tx.update(unscaled, state, params)
        scale = jnp.where(state.streak > 0, scale / 2, scale)
        return optax.apply_updates(params, updates), state, scale

    step = jax.jit(jax.vmap(step, axis_name=AXIS), compiler_options=FAST)
    params = np.zeros(SIZE, np.float32)
    carry = params, jax.jit(tx.init)(params), np.float32(2**15)
    carry = efopt.stack_workers(carry, WORKERS)
    scales = []
    for _ in range(5):
        carry = step(carry, grads)
        scales.append(np.asarray(carry[2]).tolist())
    # 10 times 2^12 is the first that float16 holds.
    assert scales == [[2.0**n] * WORKERS for n in (14, 13, 12, 12, 12)]
    params, state, _ = carry
    assert np.asarray(state.skipped).tolist() == [3] * WORKERS
    assert np.asarray(params).any() and np.isfinite(params).all()
    assert len({row.tobytes() for row in np.asarray(params)}) == 1
