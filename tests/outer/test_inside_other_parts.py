"""Local steps inside and around other transformations; what a message loses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efopt

AXIS = "data"
WORKERS = 4
PARAMS = {"w": np.ones((6, 7), np.float32)}
MULTI = optax.MultiSteps(optax.sgd(0.1), 2)
MEAN = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)


def drawn(steps, seed=1):
    shape = (WORKERS, *PARAMS["w"].shape)
    rng = np.random.default_rng(seed)
    return [{"w": rng.standard_normal(shape, np.float32)} for _ in range(steps)]


def run(tx, grads, params=PARAMS, at=None):
    """Common parameters after each step; gradients are given, or of a function."""

    def step(carry, g):
        params, state = carry
        own = efopt.local_params(params, AXIS, state)
        g = g if at is None else at(own, g)
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    carry = jax.jit(lambda: efopt.stack_workers((params, tx.init(params)), WORKERS))()
    fn = jax.jit(jax.vmap(step, axis_name=AXIS))
    out = []
    for g in grads:
        carry = fn(carry, g)
        out.append(jax.tree.map(lambda x: np.asarray(x[0]), carry[0]))
    return out, carry[1]


def local_sgd(inner, every=2, outer=None, **options):
    outer = optax.sgd(1.0) if outer is None else outer
    return efopt.local_steps(
        inner, optax.chain(MEAN, outer), every=every, axis_name=AXIS, **options
    )


def test_mini_batches_are_gathered_around_and_inside():
    """Two to a step, two steps to a round: by either accumulator the same path."""
    grads = drawn(8)
    inside = local_sgd(MULTI.gradient_transformation(), every=4)
    around = efopt.accumulate(
        local_sgd(optax.sgd(0.1), every=2), every=2, axis_name=AXIS
    )
    got, other = run(inside, grads)[0], run(around, grads)[0]
    means = np.stack([g["w"] for g in grads]).mean(1)
    for t in range(8):
        whole = t + 1 - (t + 1) % 4  # after whole rounds: half of all, at rate 0.1
        expected = PARAMS["w"] - 0.05 * means[:whole].sum(0)
        np.testing.assert_allclose(got[t]["w"], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(other[t]["w"], expected, rtol=0, atol=1e-6)


def test_schedules_inside_count_steps_and_outside_meetings():
    inner = lambda t: 0.1 * (t + 1)  # noqa: E731
    outer = lambda t: 1.0 / (t + 1)  # noqa: E731
    tx = local_sgd(optax.sgd(inner), every=3, outer=optax.sgd(outer))
    grads = drawn(6)
    got, _ = run(tx, grads)
    means, w = np.stack([g["w"] for g in grads]).mean(1), PARAMS["w"]
    for r in range(2):
        delta = sum(0.1 * (t + 1) * means[t] for t in range(3 * r, 3 * r + 3))
        w = w - delta / (r + 1)
        np.testing.assert_allclose(got[3 * r + 2]["w"], w, rtol=0, atol=1e-5)


def test_injected_rates_are_found_on_both_sides():
    inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    outer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.7)
    tx = local_sgd(inner, outer=outer)
    state = jax.tree.map(np.asarray, jax.jit(tx.init)(PARAMS))
    rates = optax.tree.get_all_with_path(state, "learning_rate")
    assert sorted(float(np.ravel(rate)[0]) for _, rate in rates) == pytest.approx(
        [0.1, 0.7]
    )
    got, _ = run(tx, drawn(2))
    assert (got[1]["w"] != PARAMS["w"]).any()


def test_parameters_in_half_precision_drift_in_float32():
    """Steps too small for bfloat16 one by one are not lost before they meet."""
    params = {"w": jnp.ones((6, 7), jnp.bfloat16)}
    small = [{"w": jnp.full((WORKERS, 6, 7), 2.0**-10, jnp.bfloat16)}] * 8
    got, state = run(local_sgd(optax.sgd(1.0), every=8), small, params)
    assert state.local.value.drift["w"].dtype == jnp.float32
    assert got[-1]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(got[-1]["w"]), 1 - 2.0**-7)


# ------------------------------------------------------------- what messages lose

TWO_BITS = efopt.compose(efopt.top_k(k=12, block_size=192), efopt.quantize(2))
FEATURES, ROUNDS, EVERY = 192, 60, 5


def fading(compressor):
    return efopt.feedback.damped_error_feedback(
        compressor, alpha=0.95, beta=0.95, axis_name=AXIS
    )


@functools.cache
def losses():
    """Of noisy least squares, each worker with data of its own, after 60 meetings."""
    rng = np.random.default_rng(3)
    scales = np.linspace(0.2, 1, FEATURES).astype(np.float32)
    truth = rng.standard_normal(FEATURES).astype(np.float32)
    x = rng.standard_normal((ROUNDS * EVERY, WORKERS, 32, FEATURES)).astype(np.float32)
    x *= scales
    y = x @ truth + 0.5 * rng.standard_normal(x.shape[:-1]).astype(np.float32)
    schemes = {
        "average": MEAN,
        "sign": fading(efopt.scaled_sign()),
        "sparse": fading(TWO_BITS),
        "none": efopt.compress(TWO_BITS, axis_name=AXIS),
    }
    out = {}
    for name, scheme in schemes.items():
        rate = optax.cosine_decay_schedule(0.05, ROUNDS * EVERY)
        tx = efopt.local_steps(
            optax.adam(rate),
            optax.chain(scheme, optax.scale(-1.0)),
            every=EVERY,
            axis_name=AXIS,
        )

        def step(carry, xy, tx=tx):
            params, state = carry
            own = efopt.local_params(params, AXIS, state)
            loss = lambda w: jnp.mean((xy[0] @ w - xy[1]) ** 2) / 2  # noqa: E731
            updates, state = tx.update(jax.grad(loss)(own), state, params)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def train(x, y, tx=tx, step=step):
            start = jnp.zeros(FEATURES)
            carry = efopt.stack_workers((start, tx.init(start)), WORKERS)
            workers = jax.vmap(step, axis_name=AXIS)
            body = lambda c, xy: (workers(c, xy), None)  # noqa: E731
            return jax.lax.scan(body, carry, (x, y))[0][0][0]

        error = (np.asarray(train(x, y)) - truth) * scales
        out[name] = float((error**2).sum() + 0.25) / 2
    return out


@pytest.mark.slow
def test_with_feedback_little_is_lost_and_without_it_nearly_all():
    loss = losses()
    for name in ("sign", "sparse"):
        assert loss["average"] < loss[name] < 1.5 * loss["average"] < loss["none"] / 10
