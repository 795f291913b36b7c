"""What a step on a mesh of two levels refuses, and what it says to do instead."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax import P

import efopt

MESH = meshes.TWO_BY_FOUR
SHAPES = {
    "w": ((16, 6), P("fsdp", None)),
    "b": ((32,), P()),
}


def tx_of(axis="dcn", exchange="two_phase"):
    tx = efopt.error_feedback(efopt.scaled_sign(8), axis_name=axis, exchange=exchange)
    return optax.chain(tx, optax.sgd(0.1))


def task(mesh=MESH):
    params, specs, grads = meshes.task(mesh, steps=1, shapes=SHAPES)
    return params, specs, grads[0]


def fresh(tx=None, mesh=MESH):
    params, specs, _ = task(mesh)
    return {"params": params, "opt": (tx or tx_of()).init(params)}


def placed(tx=None, mesh=MESH):
    return efopt.distribute(fresh(tx), mesh.make(), task()[1])


def stepped(state, batch, tx=None, axis="dcn", change=lambda g: g):
    """One global step, traced only."""
    tx = tx or tx_of()

    def step(state, batch):
        grad = efopt.value_and_grad(meshes.loss, axis_name=axis)
        grads = change(grad(state["params"], batch)[1])
        return tx.update(grads, state["opt"], state["params"])

    return jax.eval_shape(jax.jit(step), state, batch)


# ------------------------------------------------------------------------- placement


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param({"w": P("tensor")}, "tensor", id="no_such_axis"),
        pytest.param({"w": P("dcn")}, "dcn", id="slow_axis"),
        pytest.param({"w": P(("dcn", "fsdp"))}, "dcn", id="slow_axis_in_a_tuple"),
        pytest.param({"w": P(None, "fsdp")}, "divide", id="does_not_divide"),
        pytest.param({"b": P(None, "fsdp")}, "(b|rank)", id="too_long"),
        pytest.param({"more": P("fsdp")}, "more", id="one_too_many"),
        pytest.param({"w": None, "v": P("fsdp")}, "'?[wv]'?", id="renamed"),
    ],
)
def test_specs_that_do_not_fit(change, words):
    specs = {k: v for k, v in {**task()[1], **change}.items() if v is not None}
    with pytest.raises(ValueError, match=rf"spec.*{words}"):
        efopt.distribute(fresh(), MESH.make(), specs)


def test_a_mesh_without_the_workers_axis():
    mesh = jax.make_mesh((2, 4), ("pod", "fsdp"))
    with pytest.raises(ValueError, match="needs a mesh with the axis 'dcn'"):
        efopt.distribute(fresh(), mesh, task()[1])


def test_a_state_that_is_placed_for_another_mesh_already():
    with pytest.raises(ValueError, match=r"placed for another mesh.*start from"):
        efopt.distribute(placed(), meshes.Mesh((4, 2)).make(), task()[1])
    with pytest.raises(ValueError, match=r"other specs.*start from"):
        specs = {**task()[1], "w": P()}
        efopt.distribute(placed(), MESH.make(), specs)


# ----------------------------------------------------------------- the global entrance


def test_a_state_that_is_not_placed():
    params, specs, grads = task()
    state = fresh()
    state["params"] = efopt.distribute(params, MESH.make(), specs)
    with pytest.raises(ValueError, match=r"Place it with `efopt.distribute\(state,"):
        stepped(state, grads)


def test_a_state_in_front_of_the_exchange_that_is_not_placed():
    params, specs, grads = task()
    tx = efopt.per_worker(optax.trace(0.9), axis_name="dcn")
    stacked = efopt.PerWorker({k: np.asarray(g) for k, g in grads.items()}, "dcn")
    with pytest.raises(ValueError, match=r"of 2 workers.*efopt.distribute\(state,"):
        jax.eval_shape(tx.update, stacked, jax.eval_shape(tx.init, params))


def test_a_state_of_another_mesh():
    params, specs, grads = task()
    other = meshes.Mesh((2, 2, 2), ("dcn", "fsdp", "tensor"))
    state = placed(mesh=other)
    state["params"] = efopt.distribute(params, MESH.make(), specs)
    with pytest.raises(ValueError, match=r"placed for a mesh with.*efopt.distribute"):
        stepped(state, grads)


def test_a_batch_that_does_not_divide():
    batch = {name: np.concatenate([g, g[:1]]) for name, g in task()[2].items()}
    with pytest.raises(ValueError, match=r"into 2 parts.*got shape \(3, .*\['b'\]"):
        stepped(placed(), batch)
    with pytest.raises(ValueError, match=r"into 2 parts.*got shape \(\)"):
        stepped(placed(), {"w": np.float32(1), "b": np.float32(1)})


def test_gradients_stacked_over_another_axis():
    batch = {name: np.concatenate([g, g]) for name, g in task()[2].items()}
    with pytest.raises(ValueError, match=r"stacked over 'fsdp'.*same `axis_name`"):
        stepped(placed(), batch, axis="fsdp")


def test_an_axis_that_no_argument_lies_on():
    with pytest.raises(ValueError, match=r"must name axes of the mesh.*distribute"):
        stepped(placed(), task()[2], axis="pod")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda g: jax.tree.map(lambda x: x.mean(0), g.value), id="averaged"
        ),
        pytest.param(lambda g: g.value, id="unmarked"),
    ],
)
def test_gradients_that_are_averaged_or_unmarked(change):
    with pytest.raises(ValueError, match=r"in a plain jitted step.*value_and_grad"):
        stepped(placed(), task()[2], change=change)


def test_rows_of_some_workers_only():
    with pytest.raises(ValueError, match=r"one row for each of the 2 workers"):
        stepped(placed(), task()[2], change=lambda g: jax.tree.map(lambda x: x[:1], g))


def test_stacked_gradients_of_a_single_worker():
    tx = tx_of(axis=None, exchange=None)
    state = efopt.distribute(fresh(tx), MESH.make(), task()[1])
    with pytest.raises(ValueError, match=r"pass `axis_name='dcn'`"):
        stepped(state, task()[2], tx=tx)


# ------------------------------------------------------- the nested and the manual one


def mapped(entrance, own, state, batch):
    """One step ``own(state, batch)``, mapped over the slow or over all axes."""
    mesh = MESH.make()
    specs = efopt.partition_specs(state, task()[1])
    if entrance == "nested":
        specs = meshes.manual_specs(specs, MESH.slows)
    names = {"dcn"} if entrance == "nested" else set(MESH.names)
    step = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(specs, P("dcn")),
        out_specs=(specs["params"], specs["opt"]),
        axis_names=names,
    )
    return jax.eval_shape(jax.jit(step), state, batch)


def test_an_auto_mesh_without_a_placed_state():
    """A link that keeps nothing by shard: no type and no shape would tell."""
    tx = tx_of(exchange=None)
    state = fresh(tx)
    residual = jax.tree.map(lambda x: jnp.concatenate([x, x]), state["opt"][0].residual)
    state["opt"] = (state["opt"][0]._replace(residual=residual), *state["opt"][1:])

    def own(state, batch):
        grads = jax.tree.map(lambda g: g[0], batch)
        return tx.update(grads, state["opt"], state["params"])

    with pytest.raises(ValueError, match=r"left to the compiler.*Place it with"):
        mapped("nested", own, state, task()[2])


@pytest.mark.parametrize("entrance", ["nested", "manual"])
def test_gradients_that_are_reduced_already(entrance):
    tx = tx_of()

    def own(state, batch):
        grads = jax.tree.map(lambda p: 2 * p, state["params"])
        return tx.update(grads, state["opt"], state["params"])

    with pytest.raises(ValueError, match=r"already equal on all workers.*local_params"):
        mapped(entrance, own, placed(), task()[2])


@pytest.mark.parametrize("scheme", [efopt.error_feedback, efopt.compress])
def test_a_state_placed_by_other_specs_than_those_of_the_step(scheme):
    tx = scheme(efopt.scaled_sign(8), axis_name="dcn")
    params, specs, grads = task()
    state = efopt.distribute(tx.init(params), MESH.make())
    placed = efopt.partition_specs(state)
    step = jax.shard_map(
        lambda state, g: tx.update(jax.tree.map(lambda x: x[0], g), state),
        mesh=MESH.make(),
        in_specs=(placed, jax.tree.map(lambda s: P("dcn", *s), specs)),
        out_specs=(specs, placed),
    )
    with pytest.raises(ValueError, match=r"\(4, 6\) at \['w'\].*shards of shape \(16,"):
        jax.eval_shape(jax.jit(step), state, grads)


def test_stacked_gradients_in_a_mapped_step():
    def own(state, batch):
        efopt.value_and_grad(meshes.loss, axis_name="dcn")(state["params"], batch)

    with pytest.raises(ValueError, match=r"mapped over 'dcn' already.*local_params"):
        mapped("nested", own, placed(), task()[2])
