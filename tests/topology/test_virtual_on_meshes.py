"""The iterate that follows SGD, read from a state whose debts lie by shard."""

import functools

import jax
import meshes
import numpy as np
import optax
import pytest

import efopt

THREE = meshes.Mesh((2, 2, 2), ("fsdp", "dcn", "tensor"))
CASES = {
    "exact": {"exchange": "all_gather"},
    "owners": {"exchange": "two_phase"},
    "in flight": {"exchange": "two_phase", "delay": 1},
}
MESHES = [
    THREE,
    meshes.TWO_BY_FOUR,
    meshes.Mesh((2, 2, 2), ("a", "fsdp", "b"), ("a", "b"), "explicit"),
]
WHERE = ("outside", "jit", "nested", "manual")


@functools.cache
def ran(case, mesh, shapes):
    params, specs, grads = meshes.task(mesh, steps=3, shapes=dict(shapes))
    tx = efopt.error_feedback(efopt.scaled_sign(8), axis_name=mesh.slow, **CASES[case])
    tx = optax.chain(tx, optax.sgd(meshes.RATE))
    state = meshes.run("global", tx, mesh, params, specs, grads)
    sgd = {
        name: x - meshes.RATE * sum(g[name].mean(0, dtype=np.float64) for g in grads)
        for name, x in params.items()
    }
    return state, specs, sgd


@pytest.mark.parametrize(
    "where, case, mesh, shapes",
    [
        pytest.param(
            where,
            case,
            mesh,
            shapes,
            id=f"{where}-{case}-{mesh}-{name}",
            marks=[]
            if (mesh, name) == (THREE, "even")
            and (where, case) in {("jit", "owners"), ("nested", "in flight")}
            else [pytest.mark.slow],
        )
        for where in WHERE
        for case in CASES
        for mesh in MESHES
        for name, shapes in (("even", meshes.EVEN), ("uneven", meshes.UNEVEN))
    ],
)
def test_virtual_params_follow_sgd(where, case, mesh, shapes):
    state, specs, sgd = ran(case, mesh, tuple(shapes.items()))

    def virtual(state):
        return efopt.virtual_params(
            state["params"], state["opt"], learning_rate=meshes.RATE
        )

    read = virtual if where == "outside" else jax.jit(virtual)
    if where in ("nested", "manual"):
        placed, names = efopt.partition_specs(state, specs), mesh.names
        if where == "nested":
            placed, names = meshes.manual_specs(placed, mesh.slows), mesh.slows
        out = specs if where == "manual" else jax.P()
        read = jax.jit(
            jax.shard_map(
                virtual,
                mesh=mesh.make(),
                in_specs=(placed,),
                out_specs=out,
                axis_names=set(names),
            )
        )
    got = read(state)
    meshes.close(got, sgd, atol=2e-6)
    for name, x in got.items():
        assert x.sharding.is_equivalent_to(state["params"][name].sharding, x.ndim)
