"""Meshes of two and three axes, the slow one anywhere, and all ways to shard a leaf."""

import functools

import jax
import jax.numpy as jnp
import meshes
import ml_dtypes
import numpy as np
import optax
import pytest
from meshes import Mesh
from workers_under_test import slow

import efopt

THREE = (2, 2, 2)
MESHES = {
    str(m): m
    for kind in ("auto", "explicit")
    for m in (
        Mesh((2, 4), ("dcn", "fsdp"), "dcn", kind),
        Mesh((4, 2), ("dcn", "fsdp"), "dcn", kind),
        Mesh((2, 4), ("fsdp", "dcn"), "dcn", kind),
        Mesh((4, 2), ("fsdp", "dcn"), "dcn", kind),
        Mesh(THREE, ("dcn", "fsdp", "tensor"), "dcn", kind),
        Mesh(THREE, ("fsdp", "dcn", "tensor"), "dcn", kind),
        Mesh(THREE, ("fsdp", "tensor", "dcn"), "dcn", kind),
        Mesh(THREE, ("pod", "dcn", "fsdp"), ("pod", "dcn"), kind),
        Mesh(THREE, ("pod", "fsdp", "dcn"), ("pod", "dcn"), kind),
        Mesh(THREE, ("dcn", "fsdp", "pod"), ("pod", "dcn"), kind),
    )
}
COMPRESSORS = {
    "sign-two_phase": (efopt.scaled_sign(8), "two_phase"),
    "top_k-all_gather": (efopt.top_k(k=3), "all_gather"),
    "power_sgd-all_reduce": (efopt.power_sgd(1, per_shard=True), "all_reduce"),
    "random_block-two_phase": (
        efopt.random_block(fraction=0.3, block_size=16),
        "two_phase",
    ),
}
# The default lane covers: the slow axis first, in the middle, last and in two parts,
# both kinds of mesh, and each exchange in blocks; `pytest -m slow` takes the product.
DEFAULT = {
    ("dcn4xfsdp2-dcn-explicit", "sign-two_phase", "global"),
    ("pod2xdcn2xfsdp2-pod+dcn-auto", "random_block-two_phase", "nested"),
}
NIGHTLY = {
    ("fsdp2xdcn2xtensor2-dcn-auto", "sign-two_phase", "manual"),
    ("fsdp4xdcn2-dcn-auto", "top_k-all_gather", "global"),
}


def marks(case):
    if case in DEFAULT:
        return []
    return [meshes.NIGHTLY if case in NIGHTLY else pytest.mark.slow]


PRODUCT = [
    (mesh, compressor, entrance)
    for mesh in MESHES
    for compressor in COMPRESSORS
    for entrance in meshes.ENTRANCES
]
assert set(PRODUCT) >= DEFAULT


def made(mesh, compressor):
    compressor, exchange = COMPRESSORS[compressor]
    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name=mesh.slow, exchange=exchange),
        optax.sgd(meshes.RATE),
    )
    return compressor, tx


@functools.cache
def by_hand(mesh, compressor):
    params, specs, grads = meshes.task(mesh, steps=3)
    compressor, tx = made(mesh, compressor)
    cuts = meshes.parts(mesh, params, specs, compressor)
    return meshes.flat(tx, mesh, params, grads, cuts)[0]


@pytest.mark.parametrize(
    "mesh, compressor, entrance",
    [pytest.param(*case, marks=marks(case)) for case in PRODUCT],
)
def test_every_mesh_trains_as_its_shards_by_hand(mesh, compressor, entrance):
    mesh = MESHES[mesh]
    params, specs, grads = meshes.task(mesh, steps=3)
    tx = made(mesh, compressor)[1]
    # Kinds of axes change no number.
    expected = by_hand(Mesh(mesh.sizes, mesh.names, mesh.slow), compressor)
    state = meshes.run(entrance, tx, mesh, params, specs, grads)
    meshes.close(state["params"], expected)
    meshes.copies_equal(state)


UNEVEN = {
    "sign-two_phase": (efopt.scaled_sign(8), "two_phase"),
    "whole_sign-all_gather": (efopt.scaled_sign(), "all_gather"),
    "bits-two_phase": (efopt.quantize(8, block_size=16), "two_phase"),
    "top_k-all_gather": (efopt.top_k(k=1), "all_gather"),
}


@pytest.mark.parametrize(
    "case, entrance",
    [
        pytest.param(c, e, marks=[] if (c, e) in done else [pytest.mark.slow])
        for done in [
            {("sign-two_phase", "global")},
        ]
        for c in UNEVEN
        for e in meshes.ENTRANCES
    ],
)
def test_pieces_of_unequal_length(case, entrance):
    """Some devices have shorter pieces, or none, of what is smaller than the mesh."""
    mesh = meshes.TWO_BY_FOUR
    compressor, exchange = UNEVEN[case]
    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange),
        optax.sgd(meshes.RATE),
    )
    params, specs, grads = meshes.task(mesh, shapes=meshes.UNEVEN)
    cuts = meshes.parts(mesh, params, specs, compressor)
    expected, _ = meshes.flat(tx, mesh, params, grads, cuts)
    state = meshes.run(entrance, tx, mesh, params, specs, grads)
    meshes.close(state["params"], expected)
    meshes.copies_equal(state)


@pytest.mark.parametrize(
    "entrance",
    [slow("manual"), slow("nested"), pytest.param("global", marks=meshes.NIGHTLY)],
)
def test_bfloat16_parameters(entrance):
    """Payloads and averages in the leaves' dtype, residuals in float32."""
    mesh = meshes.TWO_BY_FOUR
    compressor = efopt.scaled_sign(8)
    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name="dcn", exchange="two_phase"),
        optax.sgd(meshes.RATE),
    )
    params, specs, grads = meshes.task(mesh, steps=3, dtype=ml_dtypes.bfloat16)
    cuts = meshes.parts(mesh, params, specs, compressor)
    expected, _ = meshes.flat(tx, mesh, params, grads, cuts)
    state = meshes.run(entrance, tx, mesh, params, specs, grads)
    for name, x in expected.items():
        assert state["params"][name].dtype == x.dtype == jnp.bfloat16
        assert state["opt"][0].residual.value[name].dtype == jnp.float32
    meshes.close(state["params"], expected, atol=0)
    meshes.copies_equal(state)


@pytest.mark.parametrize("kind", ["auto", slow("explicit")])
@pytest.mark.parametrize("entrance", [slow("manual"), slow("nested"), "global"])
def test_one_worker_is_the_single_worker(entrance, kind):
    """A slow axis of length 1 changes nothing but that shards are compressed apart."""
    mesh = Mesh((1, 8), ("dcn", "fsdp"), "dcn", kind)
    shapes = {
        "a": ((16, 8), jax.P("fsdp", None)),
        "b": ((6, 16), jax.P(None, "fsdp")),
    }
    params, specs, grads = meshes.task(mesh, steps=3, shapes=shapes)
    compressor = efopt.scaled_sign()
    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name="dcn"), optax.sgd(meshes.RATE)
    )
    state = meshes.run(entrance, tx, mesh, params, specs, grads)
    single = optax.chain(efopt.error_feedback(compressor), optax.sgd(meshes.RATE))
    step = jax.jit(single.update)
    cuts = meshes.parts(mesh, params, specs, compressor)
    ends = []
    for at in cuts["a"].devices():
        own = {name: cuts[name].take(x, at) for name, x in params.items()}
        opt = single.init(own)
        for g in grads:
            shard = {name: cuts[name].take(x[0], at) for name, x in g.items()}
            updates, opt = step(shard, opt)
            own = optax.apply_updates(own, updates)
        ends.append(jax.tree.map(np.asarray, own))
    expected = {name: cuts[name].join([e[name] for e in ends]) for name in params}
    meshes.close(state["params"], expected)
