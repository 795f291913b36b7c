"""A step on two levels inside scan, remat and donation, with a model of two layers."""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax import NamedSharding, P
from workers_under_test import slow

import efopt

MESH = meshes.TWO_BY_FOUR
STEPS, BATCH, D, F = 4, 16, 16, 32
# `test_both_entrances_train_the_model_alike` takes both by default.
each_entrance = pytest.mark.parametrize("entrance", [slow("nested"), "global"])
SPECS = {"up": P("fsdp", None), "down": P(None, "fsdp"), "bias": P()}


@functools.cache
def task():
    draws = np.random.default_rng(0)
    params = {
        "up": draws.normal(size=(D, F)).astype(np.float32) / 4,
        "down": draws.normal(size=(F, D)).astype(np.float32) / 4,
        "bias": np.zeros(D, np.float32),
    }
    return params, draws.normal(size=(STEPS, BATCH, D)).astype(np.float32)


def loss(params, x):
    hidden = jax.nn.relu(x @ params["up"])
    return jnp.mean((hidden @ params["down"] + params["bias"][None] - x) ** 2)


def transformation():
    return optax.chain(
        efopt.per_worker(optax.trace(0.5), axis_name="dcn"),
        efopt.error_feedback(
            efopt.scaled_sign(16), axis_name="dcn", exchange="two_phase"
        ),
        optax.sgd(0.1),
    )


def made(entrance, tx, loss=loss):
    """The step, not jitted, its state, and all batches on the mesh."""
    mesh = MESH.make()
    params, batches = task()
    state = efopt.distribute({"params": params, "opt": tx.init(params)}, mesh, SPECS)

    def apply(state, grads):
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}

    if entrance == "global":

        def step(state, x):
            grad = efopt.value_and_grad(loss, axis_name="dcn")
            value, grads = grad(state["params"], x)
            return apply(state, grads), value

    else:

        def own(state, x):
            local = efopt.local_params(state["params"], "dcn")
            value, grads = jax.value_and_grad(loss)(local, x)
            return apply(state, grads), jax.lax.pmean(value, "dcn")

        only = meshes.manual_specs(efopt.partition_specs(state, SPECS), ("dcn",))
        step = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(only, P("dcn")),
            out_specs=(only, P()),
            axis_names={"dcn"},
        )
    place = NamedSharding(mesh, P(None, ("dcn", "fsdp")))
    return step, state, jax.device_put(batches, place)


@functools.cache
def plainly(entrance):
    step, state, batches = made(entrance, transformation())
    step, values = jax.jit(step), []
    for x in batches:
        state, value = step(state, x)
        values.append(float(value))
    return jax.tree.map(np.asarray, state["params"]), values


def test_both_entrances_train_the_model_alike():
    params, values = plainly("global")
    meshes.close(plainly("nested")[0], params)
    assert values[-1] < values[0]


@each_entrance
def test_steps_in_a_scan(entrance):
    step, state, batches = made(entrance, transformation())
    end, values = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(state, batches)
    expected = plainly(entrance)
    meshes.close(end["params"], expected[0])
    np.testing.assert_allclose(values, expected[1], rtol=1e-5)
    meshes.copies_equal(end)


@each_entrance
def test_a_remat_model_in_a_donated_step(entrance):
    step, state, batches = made(entrance, transformation(), jax.checkpoint(loss))
    # Else the compiler would lay out a new bias by `fsdp` in the nested step.
    layout = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
    first = state
    for x in batches:
        state, _ = step(state, x)
    meshes.close(state["params"], plainly(entrance)[0])
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    assert step._cache_size() == 1


@each_entrance
def test_microbatches_accumulated_in_a_scan_around_the_step(entrance):
    """Mini-steps meet nobody; the update is that of their mean gradient."""
    every = 2
    tx = efopt.accumulate(transformation(), every=every, axis_name="dcn")
    step, state, batches = made(entrance, tx)
    end, _ = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(state, batches)
    # The same with a loss that takes both mini-batches of a worker at once.
    plain, state, _ = made(entrance, transformation())
    plain = jax.jit(plain)
    n, size = MESH.workers, BATCH // MESH.workers
    _, xs = task()
    for pair in xs.reshape(STEPS // every, every, n, size, D):
        x = pair.transpose(1, 0, 2, 3).reshape(-1, D)
        x = jax.device_put(x, NamedSharding(MESH.make(), P(("dcn", "fsdp"))))
        state, _ = plain(state, x)
    meshes.close(end["params"], jax.tree.map(np.asarray, state["params"]), atol=1e-5)


@pytest.mark.parametrize(
    "entrance", [slow("nested"), pytest.param("global", marks=meshes.NIGHTLY)]
)
def test_a_scan_over_microbatches_inside_the_step(entrance):
    """The loss itself runs over microbatches: efopt meets once a step."""

    def scanned(params, x):
        parts = x.reshape(2, -1, D)

        def one(total, part):
            return total + loss(params, part) / 2, None

        zero = 0.0 * loss(params, parts[0][:1])  # of the type of the sum
        return jax.lax.scan(jax.checkpoint(one), zero, parts)[0]

    step, state, batches = made(entrance, transformation(), scanned)
    step = jax.jit(step)
    for x in batches:
        state, _ = step(state, x)
    meshes.close(state["params"], plainly(entrance)[0], atol=1e-5)
    over = efopt.wire.measure(step, state, batches[0]).over("dcn")
    assert all(c.executions == 1 for c in over.collectives), over


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_arguments_of_every_kind(kind):
    """A model, a configuration, a random key: what is no batch goes to every worker."""
    mesh = meshes.Mesh(kind=kind).make()
    draws = np.random.default_rng(0)
    x = draws.standard_normal((8, 16), np.float32)
    params = {"w": draws.standard_normal(16, np.float32)}
    config = {"scale": 3.0, "dtype": jnp.float32, "name": "linear"}

    def loss(model, config, batch, key, params):
        noise = jax.random.normal(key, (1, 16), config["dtype"])
        return jnp.mean(model(batch * noise, params["w"])) * config["scale"]

    def model(x, w):
        return (x @ w) ** 2

    def both(batch, key, params):
        found = efopt.value_and_grad(loss, axis_name="dcn", argnums=4, batch_argnums=2)
        return found(model, config, batch, key, params)

    placed = efopt.distribute(params, mesh, {"w": jax.P("fsdp")})
    rows = jax.device_put(x, jax.NamedSharding(mesh, jax.P("dcn")))
    key = jax.random.key(5)
    value, grads = jax.device_get(jax.jit(both)(rows, key, placed))

    def by_hand(part, worker, params):
        folded = jax.random.fold_in(key, worker)
        return jax.value_and_grad(loss, 4)(model, config, part, folded, params)

    each = [jax.jit(by_hand)(x[4 * i : 4 * i + 4], i, params) for i in range(2)]
    np.testing.assert_allclose(value, np.mean([v for v, _ in each]), rtol=1e-5)
    for i, (_, expected) in enumerate(each):
        np.testing.assert_allclose(grads.value["w"][i], expected["w"], rtol=1e-4)
