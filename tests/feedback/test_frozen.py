"""Frozen groups inside shard_map with its checks on, and the wrappers around them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import efopt
from efopt import wire

AXIS = "data"
FROZEN = {"head": False, "body": True}


def trained():
    feedback = efopt.error_feedback(efopt.scaled_sign(), axis_name=AXIS)
    return optax.chain(feedback, optax.sgd(1.0))


def by_label():
    frozen = efopt.feedback.frozen()
    labels = {"head": "trained", "body": "frozen"}
    return optax.partition({"trained": trained(), "frozen": frozen}, labels)


def selective():
    return optax.chain(
        optax.selective_transform(trained(), freeze_mask=FROZEN),
        optax.masked(efopt.feedback.frozen(), FROZEN),
    )


def zeroed():
    return optax.chain(optax.freeze(FROZEN), trained())


WRAPPERS = {"partition": by_label, "selective_transform": selective, "freeze": zeroed}


def step_of(tx, mesh, params):
    state = efopt.distribute((params, tx.init(params)), mesh)
    specs = efopt.partition_specs(state)

    def step(state, grads):
        params, opt_state = state
        own = jax.tree.map(lambda g: g[0], grads)
        updates, opt_state = tx.update(own, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.shard_map(step, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=specs)
    return jax.jit(step), state


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "float32") for name in WRAPPERS]
    + [("partition", "bfloat16"), ("partition", "int32")],
)
def test_the_head_trains_and_the_body_stands_still(name, dtype, mesh):
    params = {"head": jnp.zeros(3), "body": jnp.ones(4096, dtype)}
    step, state = step_of(WRAPPERS[name](), mesh, params)
    grads = jax.tree.map(lambda p: jnp.ones((8, *p.shape), p.dtype), params)
    after, _ = step(state, grads)
    np.testing.assert_array_equal(after["head"], -1)
    np.testing.assert_array_equal(after["body"].astype(jnp.float32), 1)
    assert after["body"].dtype == dtype
    sent = wire.measure(step, state, grads).bytes_sent_per_worker
    # A byte of signs and a scale for the head, in words; 512 bytes for the body.
    assert (sent > 7 * 512) if name == "freeze" else (sent == 7 * 8)


def test_the_error_for_integers_points_to_it():
    tx = efopt.error_feedback(efopt.top_k(k=1))
    with pytest.raises(TypeError, match=r"`efopt.feedback.frozen\(\)`"):
        tx.init({"steps": jnp.zeros(3, jnp.int32)})


def test_gradients_of_integers_become_updates():
    params = {"n": jnp.ones(3, jnp.int32)}
    grads = jax.grad(lambda p: p["n"].sum() * 1.0, allow_int=True)(params)
    tx = efopt.feedback.frozen()
    updates, _ = tx.update(grads, tx.init(params))
    after = optax.apply_updates(params, updates)
    assert after["n"].dtype == jnp.int32
    np.testing.assert_array_equal(after["n"], 1)


# ---------------------------------------------------------------- two axes of workers


def two_levels(first, second):
    mesh = jax.make_mesh(
        (2, 4), ("slow", "fast"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    tx = optax.chain(first, second)
    params = jnp.zeros(64)
    state = efopt.distribute(tx.init(params), mesh)
    specs, data = efopt.partition_specs(state), P(("slow", "fast"))
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)

    def step(state, g):
        return tx.update(g[0], state, params)

    step = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, data), out_specs=(P(), specs)
    )
    return jax.jit(step), state, grads


def test_a_feedback_behind_an_exact_average_over_the_fast_axis():
    exact = efopt.compress(efopt.compressors.identity(), axis_name="fast")
    feedback = efopt.error_feedback(efopt.top_k(fraction=1.0), axis_name="slow")
    step, state, grads = two_levels(exact, feedback)
    updates, _ = step(state, grads)
    np.testing.assert_allclose(updates, grads.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("memory", [None, efopt.quantize(8, stochastic=True)])
def test_two_feedbacks_over_two_axes_are_refused_with_the_cure(memory):
    first = efopt.error_feedback(efopt.top_k(k=1), axis_name="fast", memory=memory)
    second = efopt.error_feedback(efopt.top_k(k=1), axis_name="slow")
    step, state, grads = two_levels(first, second)
    with pytest.raises(ValueError, match="differ along the mesh axes 'slow' too.*one"):
        step(state, grads)
