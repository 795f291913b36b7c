"""One factorisation of a matrix that is sharded behind its worker."""

import functools

import meshes
import numpy as np
import optax
import oracle
import pytest
from jax import P

import efopt
from efopt import wire

FACTORS = efopt.power_sgd(2, min_compression=0)
SHAPES = {
    "a_rows": ((16, 6), P("fsdp", None)),
    "b_columns": ((5, 16), P(None, "fsdp")),
    "c_scale": ((32,), P()),
    "d_middle": ((4, 8, 6), P(None, "fsdp", None)),  # rows of which every other is here
    "g_whole": ((6, 12), P()),
}
BOTH = {
    "a_both": ((8, 12), P("fsdp", "tensor")),
    "b_joined": ((32, 6), P(("tensor", "fsdp"))),
    "c_rows": ((16, 6), P("fsdp", None)),
}
MESHES = {
    "two": (meshes.TWO_BY_FOUR, SHAPES),
    "explicit": (meshes.Mesh(kind="explicit"), SHAPES),
    "three": (meshes.Mesh((2, 2, 2), ("dcn", "fsdp", "tensor")), BOTH),
    "slow_last": (meshes.Mesh((2, 2, 2), ("fsdp", "tensor", "dcn")), BOTH),
}


def chained(compressor, **options):
    feedback = efopt.error_feedback(compressor, axis_name="dcn", **options)
    return optax.chain(feedback, optax.sgd(meshes.RATE))


def task(mesh, shapes):
    """Without the leaves that a third axis adds by itself."""
    params, specs, grads = meshes.task(mesh, steps=4, shapes=shapes)
    only = lambda tree: {name: tree[name] for name in shapes}  # noqa: E731
    return only(params), specs, [only(g) for g in grads]


@functools.cache
def ran(name, entrance):
    mesh, shapes = MESHES[name]
    params, specs, grads = task(mesh, shapes)
    return meshes.run(entrance, chained(FACTORS), mesh, params, specs, grads)


@pytest.mark.parametrize(
    "name, entrance",
    [
        pytest.param(
            n, e, marks=[] if (n, e) == ("two", "global") else [pytest.mark.slow]
        )
        for n in MESHES
        for e in meshes.ENTRANCES
    ],
)
def test_a_sharded_matrix_trains_as_the_whole_one(name, entrance):
    mesh, shapes = MESHES[name]
    params, _, grads = task(mesh, shapes)
    state = ran(name, entrance)
    expected = meshes.whole(chained(FACTORS), mesh, params, grads)
    meshes.close(state["params"], expected, atol=5e-6)
    meshes.copies_equal(state)


def test_one_round_is_that_of_numpy():
    """The first average, from the columns that the state then has."""
    mesh, shapes = MESHES["two"]
    params, specs, grads = task(mesh, shapes)
    step, state, place = meshes.make("global", chained(FACTORS), mesh, params, specs)
    first = step(state, place(grads[0]))
    second = step(first, place(grads[1]))
    node = first["opt"][0].link.codec["b_columns"]
    assert node.shards == ("fsdp",) and node.value.shape == (2, 4, 1, 4, 2)
    q = np.asarray(node.value, np.float64)[0].reshape(16, 2)
    residual = np.asarray(first["opt"][0].residual.value["b_columns"], np.float64)
    mats = residual + grads[1]["b_columns"].astype(np.float64)
    average, *_ = oracle.power_sgd_round(list(mats), q)
    moved = first["params"]["b_columns"] - second["params"]["b_columns"]
    np.testing.assert_allclose(moved / meshes.RATE, average, rtol=0, atol=2e-5)


# By default tests/plan/test_plan_mesh.py stands for it.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("two", marks=meshes.NIGHTLY),
        pytest.param("three", marks=pytest.mark.slow),
    ],
)
def test_bytes_by_axis_are_those_of_the_plan(name):
    mesh, shapes = MESHES[name]
    params, specs, grads = task(mesh, shapes)
    case = meshes.make("nested", chained(FACTORS), mesh, params, specs)
    report = wire.measure(case[0], case[1], case[2](grads[0]))
    plan = wire.plan(
        FACTORS,
        params,
        mesh=dict(zip(mesh.names, mesh.sizes, strict=True)),
        axis_name="dcn",
        params_specs=specs,
        platform="cpu",
    )
    for axis in mesh.names:
        sent = report.bytes_over(axis).link
        assert sent == plan.report.bytes_over(axis).link > 0, report


def test_a_device_sends_its_part_of_both_factors():
    shapes = {"w": ((256, 512), P("fsdp", None))}
    mesh = meshes.TWO_BY_FOUR
    params, specs, grads = task(mesh, shapes)
    sent = {}
    for apart in (False, True):
        compressor = efopt.power_sgd(4, per_shard=apart)
        case = meshes.make("global", chained(compressor), mesh, params, specs)
        report = wire.measure(case[0], case[1], case[2](grads[0]))
        sent[apart] = report.bytes_over("dcn").link
        assert (report.bytes_over("fsdp").link == 0) == apart
    assert sent[False] == 4 * 4 * (256 + 512) / 4
    assert sent[True] == 4 * 4 * (256 / 4 + 512)
