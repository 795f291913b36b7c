"""Payloads in flight: one step late, nothing lost, and nothing to wait for."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, slow

import efopt
from efopt.hlo.inputs import inputs_of_collectives, inputs_of_results

PARAMS = {"b": np.zeros(7, np.float32), "w": np.zeros((33, 20), np.float32)}
SIGNS = efopt.scaled_sign(8)


def gradients(n, steps=4, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {k: rng.standard_normal((n, *x.shape), np.float32) for k, x in PARAMS.items()}
        for _ in range(steps)
    ]


def started(tx, n, kind=AxisType.Auto):
    """A placed state, and a jitted step of stacked gradients."""
    devices = jax.devices()[:n]
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(kind,), devices=devices)
    state = efopt.distribute(tx.init(PARAMS), mesh)
    specs = efopt.partition_specs(state)

    def step(grads, state):
        return tx.update(jax.tree.map(lambda g: g[0], grads), state)

    step = jax.shard_map(
        step, mesh=mesh, in_specs=(P(AXIS), specs), out_specs=(P(), specs)
    )
    over = jax.NamedSharding(mesh, P(AXIS))
    return state, jax.jit(lambda g, s: step(jax.device_put(g, over), s)), mesh


@pytest.mark.parametrize(
    "n, kind", [(3, AxisType.Auto), slow(2, AxisType.Auto), slow(4, AxisType.Explicit)]
)
def test_identity_is_the_mean_of_the_step_before(n, kind):
    tx = efopt.error_feedback(efopt.compressors.identity(), axis_name=AXIS, delay=1)
    now = efopt.error_feedback(efopt.compressors.identity(), axis_name=AXIS)
    (state, step, _), (other, plain, _) = started(tx, n, kind), started(now, n, kind)
    late = {k: np.zeros_like(x) for k, x in PARAMS.items()}
    for grads in gradients(n):
        updates, state = step(grads, state)
        for k in PARAMS:
            np.testing.assert_array_equal(updates[k], late[k])
        late, other = plain(grads, other)


RATES = optax.exponential_decay(0.5, 1, 0.5)


@pytest.mark.parametrize(
    "compressor, exchange, rate",
    [
        (SIGNS, "two_phase", RATES),
        slow(efopt.sign(), "majority_vote", None),
        slow(SIGNS, "all_gather", None),
        slow(efopt.random_k(k=5), "all_reduce", RATES),
        slow(efopt.quantize(4), "two_phase", None),
    ],
    ids=lambda x: "schedule" if callable(x) else str(x),
)
def test_parameters_less_all_that_is_owed_follow_sgd(compressor, exchange, rate):
    n = 3
    tx = efopt.error_feedback(
        compressor, axis_name=AXIS, exchange=exchange, learning_rate=rate, delay=1
    )
    state, step, _ = started(tx, n)

    @jax.jit
    def owed(state):
        options = {"learning_rate": -1.0, "compressor": compressor}
        return efopt.virtual_params(PARAMS, state, **options)

    total = {k: 0.0 for k in PARAMS}
    expected = {k: 0.0 for k in PARAMS}
    for t, grads in enumerate(gradients(n)):
        updates, state = step(grads, state)
        gamma = 1.0 if rate is None else float(rate(t))
        left = owed(state)
        for k in PARAMS:
            total[k] = total[k] + gamma * np.asarray(updates[k])
            expected[k] = expected[k] + gamma * grads[k].mean(axis=0)
            whole = total[k] + gamma * np.asarray(left[k])
            np.testing.assert_allclose(whole, expected[k], rtol=0, atol=2e-6)


def trained(delay, exchange, compressor, mesh_shape=(4,)):
    """What each collective of a training step waits for, by name of the argument."""
    tx = efopt.error_feedback(
        compressor, axis_name=AXIS, exchange=exchange, delay=delay
    )
    n = mesh_shape[0]
    names = (AXIS, "inner")[: len(mesh_shape)]
    mesh = jax.make_mesh(
        mesh_shape,
        names,
        axis_types=(AxisType.Auto,) * len(names),
        devices=jax.devices()[: int(np.prod(mesh_shape))],
    )
    params = {"w": jnp.zeros((32, 20)), "b": jnp.zeros(20)}
    sharded = {"w": P(*names[1:] or (None,)), "b": P()}
    placed = {
        k: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.NamedSharding(mesh, sharded[k])
        )
        for k, x in params.items()
    }
    state = efopt.distribute(tx.init(params), mesh, sharded)
    over = jax.NamedSharding(mesh, P(AXIS))
    x = jax.ShapeDtypeStruct((8 * n, 32), jnp.float32, sharding=over)

    def loss(params, x):
        return jnp.mean(jnp.square(x @ params["w"] + params["b"][None]))

    def step(params, state, x):
        _, grads = efopt.value_and_grad(loss, axis_name=AXIS)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, keep_unused=True).lower(placed, state, x).compile()
    kinds = [
        name
        for name, tree in (("params", params), ("state", state), ("data", x))
        for _ in jax.tree.leaves(tree)
    ]
    report = efopt.wire.measure(compiled, mesh=mesh)
    slow_ones = {  # not the loss, a scalar
        c.name
        for c in report.collectives
        if c.axes and AXIS in c.axes and c.operand_bytes > 8
    }
    text = compiled.as_text()
    found = inputs_of_collectives(text)
    new = inputs_of_results(text)[: len(params)]
    return (
        [{kinds[i] for i in found[name]} for name in slow_ones],
        [{kinds[i] for i in some} for some in new],
    )


@pytest.mark.parametrize(
    "exchange, compressor, shape",
    [
        ("two_phase", SIGNS, (4,)),
        slow("all_gather", SIGNS, (4,)),
        slow("majority_vote", efopt.sign(), (4,)),
        slow("all_reduce", efopt.random_block(fraction=0.1), (4,)),
        slow("all_gather", SIGNS, (2, 2)),
        slow("two_phase", SIGNS, (2, 2)),
    ],
    ids=str,
)
def test_the_exchange_waits_for_nothing_of_the_step(exchange, compressor, shape):
    late, params = trained(1, exchange, compressor, shape)
    assert late and all(waits == {"state"} for waits in late), late
    # Nor does the forward pass for it, as in a kernel with what becomes of parameters.
    assert all("data" in waits for waits in params), params
    now, _ = trained(0, exchange, compressor, shape)
    assert all({"params", "data"} <= waits for waits in now), now


def test_a_checkpoint_carries_what_is_in_flight():
    tx = efopt.error_feedback(SIGNS, axis_name=AXIS, exchange="two_phase", delay=1)
    state, step, mesh = started(tx, 3)
    grads = gradients(3)
    for g in grads[:2]:
        _, state = step(g, state)
    stored = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(state, stored)
    restored = efopt.distribute(restored, mesh)
    lost = state._replace(link=state.link._replace(flight=tx.init(PARAMS).link.flight))
    lost = efopt.distribute(lost, mesh)
    (kept, _), (again, _) = step(grads[2], state), step(grads[2], restored)
    for k in PARAMS:
        np.testing.assert_array_equal(kept[k], again[k])
    assert not np.any(np.asarray(step(grads[2], lost)[0]["w"]))
    assert np.any(np.asarray(kept["w"]))


def test_a_rate_of_zero_holds_what_is_in_flight():
    rate = lambda t: jnp.where(t == 1, 0.0, 0.5)  # noqa: E731
    tx = efopt.error_feedback(efopt.random_k(k=5), learning_rate=rate, delay=1)
    update, grads = (
        jax.jit(tx.update),
        [{k: g[0] for k, g in tree.items()} for tree in gradients(1)],
    )
    state = tx.init(PARAMS)
    _, state = update(grads[0], state)
    held, state = update(grads[1], state)
    updates, _ = update(grads[2], state)
    assert not np.any(np.asarray(held["w"]))
    sent = np.flatnonzero(np.asarray(updates["w"]))
    assert len(sent) == 5  # of the coordinates that step 0 drew
    values = np.asarray(updates["w"]).reshape(-1)[sent]
    np.testing.assert_array_equal(values, grads[0]["w"].reshape(-1)[sent])


@pytest.mark.parametrize(
    "options, match",
    [
        ({"compressor": efopt.power_sgd(1)}, "speaks in rounds"),
        ({"compressor": SIGNS, "start": 2}, "hide nothing"),
        ({"compressor": SIGNS, "delay": 2}, "below 2"),
    ],
)
def test_what_cannot_be_in_flight_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        efopt.error_feedback(**{"delay": 1, **options})


def test_another_number_of_workers_owes_what_was_in_flight():
    tx = efopt.error_feedback(SIGNS, axis_name=AXIS, delay=1)
    state, step, _ = started(tx, 3)
    for g in gradients(3)[:2]:
        _, state = step(g, state)
    worth = jax.jit(lambda s: efopt.virtual_params(PARAMS, s, learning_rate=-1.0))
    before = worth(state)
    moved = efopt.checkpoints.resize(state, 2)
    after = worth(moved)
    for k in PARAMS:
        np.testing.assert_allclose(after[k], before[k], rtol=0, atol=1e-6)
    _, again, mesh = started(tx, 2)
    moved = efopt.distribute(moved, mesh)
    first, moved = again(gradients(2, seed=1)[0], moved)
    assert not np.any(np.asarray(first["w"]))
    second, _ = again(gradients(2, seed=2)[0], moved)
    assert np.any(np.asarray(second["w"]))
