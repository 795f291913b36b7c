"""Dion on two levels: a matrix that is sharded inside is factorised whole."""

import functools

import jax
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import efopt

SHAPES = {
    "a_rows": ((16, 6), P("fsdp", None)),
    "b_columns": ((12, 16), P(None, "fsdp")),
    "c_long": ((24, 8), P(None, "fsdp")),
    "d_whole": ((9, 12), P()),
    "e_bias": ((30,), P()),
    "f_layers": ((4, 10, 7), P("fsdp", None, None)),
    "g_small": ((4, 4), P("fsdp", None)),  # smaller than its factors
    "h_small": ((5, 3), P()),
}
BOTH = {"i_both": ((8, 12), P("fsdp", "tensor"))}
BOTH |= {"j_joined": ((16, 6), P(("fsdp", "tensor"), None))}
THREE = meshes.Mesh((2, 2, 2), ("dcn", "fsdp", "tensor"))
MESHES = {
    "two_by_four": meshes.TWO_BY_FOUR,
    "explicit": meshes.Mesh(kind="explicit"),
    "three": THREE,
}


def make(axis_name=None):
    def matrices(tree):
        return jax.tree.map(lambda x: len(x.shape) > 1, tree)

    return efopt.optimizers.dion(
        optax.exponential_decay(0.1, 2, 0.5),
        rank=3,
        weight_decay=0.01,
        matrices=matrices,
        fallback=optax.sgd(0.1, momentum=0.9),
        axis_name=axis_name,
    )


def task(mesh):
    shapes = SHAPES | (BOTH if "tensor" in mesh.names else {})
    draws = np.random.default_rng(0)
    draw = lambda *s: draws.standard_normal(s).astype(np.float32)  # noqa: E731
    params = {name: draw(*s) for name, (s, _) in shapes.items()}
    grads = [
        {name: draw(mesh.workers, *s) for name, (s, _) in shapes.items()}
        for _ in range(4)
    ]
    return params, {name: spec for name, (_, spec) in shapes.items()}, grads


@functools.cache
def alone(name):
    """One worker on one device, on averaged gradients."""
    params, _, grads = task(MESHES[name])
    tx = make()

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for g in grads:
        mean = jax.tree.map(lambda x: x.mean(axis=0), g)
        params, state = step(params, state, mean)
    return jax.tree.map(np.asarray, params)


DEFAULT = {("two_by_four", "global")}


@pytest.mark.parametrize(
    ("name", "entrance"),
    [
        pytest.param(m, e, marks=[] if (m, e) in DEFAULT else [pytest.mark.slow])
        for m in MESHES
        for e in meshes.ENTRANCES
    ],
)
def test_shards_train_as_the_whole_matrix_does(name, entrance):
    mesh = MESHES[name]
    params, specs, grads = task(mesh)
    state = meshes.run(entrance, make("dcn"), mesh, params, specs, grads)
    meshes.close(state["params"], alone(name), atol=1e-5)
    meshes.copies_equal(state)


def test_over_the_slow_axis_each_device_sends_its_part_of_the_factors():
    """And no more: what is equal on several devices is cut in pieces."""
    mesh = meshes.TWO_BY_FOUR
    params, specs, grads = task(mesh)
    step, state, place = meshes.make("global", make("dcn"), mesh, params, specs)
    report = efopt.wire.measure(step, state, place(grads[0]))
    numbers = 0
    for name, (shape, _) in SHAPES.items():
        if len(shape) == 1:
            numbers += -(-shape[0] // 4)  # the bias
        elif len(shape) == 3:
            numbers += 3 * (shape[1] + shape[2])  # each device has a layer of its own
        elif name == "h_small":  # as it is
            numbers += -(-shape[0] * shape[1] // 4)
        else:
            numbers += sum(-(-3 * side // 4) for side in shape)
    assert report.bytes_over("dcn").operand == 4 * numbers
