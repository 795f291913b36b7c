"""States keep their dtypes, whatever updates come in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import slow

import efopt

AXIS = "data"


def decaying(count):
    return 0.1 / (1 + count)


def feedback(compressor, **options):
    return lambda **more: efopt.error_feedback(
        compressor, axis_name=AXIS, **options, **more
    )


def stored(memory):
    return lambda **more: efopt.contractive_error_feedback(
        efopt.random_block(fraction=0.1), memory=memory, axis_name=AXIS, **more
    )


SCHEMES = {
    "exact": feedback(efopt.top_k(k=1)),
    "rate": feedback(efopt.scaled_sign(64), learning_rate=decaying),
    "two_phase": feedback(efopt.scaled_sign(64), exchange="two_phase"),
    "power_sgd": feedback(efopt.power_sgd(2)),
    "quantised": stored(efopt.quantize(8, stochastic=True)),
    "sketched": stored(efopt.compressors.count_sketch(fraction=0.2)),
    "damped": lambda **more: efopt.feedback.damped_error_feedback(
        efopt.quantize(4), alpha=0.5, beta=0.9, axis_name=AXIS, **more
    ),
}


def dtypes(tree):
    return [x.dtype.name for x in jax.tree.leaves(tree)]


def cast(state, dtype):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        state,
    )


def scanned(tx, state, grads):
    step = jax.vmap(tx.update, axis_name=AXIS)

    def body(state, g):
        updates, state = step(g, state)
        return state, updates

    return jax.lax.scan(body, state, grads)


CASES = {
    "wider": ("float64", None, 1),
    "cast": ("float32", "bfloat16", 1),
    "both": ("float64", "bfloat16", 0),
    "narrow": ("bfloat16", "bfloat16", 0),
}


@pytest.mark.parametrize(
    "name, given, kept, start",
    [
        slow(name, *case, when=i != j, id=f"{name}-{label}")
        for j, name in enumerate(SCHEMES)
        for i, (label, case) in enumerate(CASES.items())
    ],
)
def test_a_state_leaves_a_step_in_the_dtypes_it_came_in(name, given, kept, start):
    with jax.enable_x64(given == "float64"):
        params = {"w": jnp.zeros((20, 40), jnp.float32), "b": jnp.zeros(8, jnp.float32)}
        rng = np.random.default_rng(0)
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=(3, 2, *p.shape)), given), params
        )
        tx = SCHEMES[name](start=start)
        state = tx.init(params)
        state = state if kept is None else cast(state, kept)
        state = efopt.stack_workers(state, 2)
        after, updates = scanned(tx, state, grads)  # a loop refuses other dtypes
        assert dtypes(after) == dtypes(state)
        assert set(dtypes(updates)) == {given}
        for x in jax.tree.leaves((after, updates)):
            assert np.isfinite(np.asarray(x, np.float64)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "damped", "two_phase"])
def test_accumulate_takes_wider_gradients(name):
    with jax.enable_x64(True):
        tx = efopt.accumulate(SCHEMES[name](), every=2, axis_name=AXIS)
        params = jnp.zeros(256, jnp.float32)
        state = efopt.stack_workers(tx.init(params), 2)
        after, _ = scanned(tx, state, jnp.ones((4, 2, 256), jnp.float64))
        assert dtypes(after) == dtypes(state)


def test_a_residual_that_was_cast_is_still_what_is_owed():
    """Only its rounding is lost: 8 bits of what was owed."""
    tx = efopt.error_feedback(efopt.top_k(k=1))
    state = tx.init(jnp.zeros(4))
    state = state._replace(residual=jnp.asarray([1.0, 2.0, 3.0, 4.0], jnp.bfloat16))
    updates, state = jax.jit(tx.update)(jnp.full(4, 0.5), state)
    np.testing.assert_array_equal(updates, [0, 0, 0, 4.5])
    np.testing.assert_array_equal(
        state.residual.astype(jnp.float32), [1.5, 2.5, 3.5, 0]
    )


@pytest.mark.slow
def test_two_phase_says_that_dtypes_part_the_blocks_otherwise():
    params = {"w": jnp.zeros((32, 32), jnp.bfloat16), "norm": jnp.zeros(32)}
    tx = SCHEMES["two_phase"]()
    state = efopt.stack_workers(tx.init(params), 2)
    wide = jax.tree.map(lambda p: jnp.ones((2, *p.shape), jnp.float32), params)
    step = jax.vmap(tx.update, axis_name=AXIS)
    with pytest.raises(ValueError, match="must have the parameters' dtypes; cast them"):
        step(wide, state)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), wide, params)
    updates, _ = step(grads, state)
    np.testing.assert_array_equal(updates["w"].astype(jnp.float32), 1)
