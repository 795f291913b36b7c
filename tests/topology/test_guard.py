"""The guard on meshes of two levels: every scheme, every entrance, any device's NaN."""

import jax
import meshes
import numpy as np
import optax
import pytest
from test_schemes import SCHEMES, chained, given

import efopt

TYPES = [
    meshes.Mesh(),
    meshes.Mesh((2, 2, 2), ("dcn", "fsdp", "tensor")),
    meshes.Mesh((3, 2)),
    meshes.Mesh(kind="explicit"),
    meshes.Mesh((2, 2, 2), ("slow", "fast", "fsdp"), ("slow", "fast")),
]
DEFAULT = {("start", "nested")}


def poisoned(grads):
    """Clean steps and bad ones: at the first step, in a row, and at the last.

    The NaN is in a shard of one device, or in what many hold alike.
    """
    leaves = list(grads[0])
    bad = [
        (leaves[0], (1, -1, -1), np.nan),
        (leaves[1], (0, 0, 0), np.inf),
        (leaves[-1], (1, 0, 0), -np.inf),
    ]
    out = []
    for i, g in enumerate(grads):
        name, place, value = bad[i % len(bad)]
        worse = {k: np.array(x) for k, x in g.items()}
        worse[name][place] = value
        out += [worse, worse, g] if i == 1 else [worse, g]
    return [*out, out[0]], len(grads) + 2


def check(entrance, mesh, make, params, specs, grads, exact=True):
    tx = efopt.watch.skip_not_finite(make(), axis_name=mesh.slow)
    step, start, place = meshes.make(entrance, tx, mesh, params, specs)
    bad, number = poisoned(grads)
    got, clean = start, start
    for g in bad:
        got = step(got, place(g))
    for g in grads:
        clean = step(clean, place(g))
    guard = got["opt"]
    assert int(guard.skipped) == number and int(guard.streak) == 1
    assert (int(guard.worker), int(guard.leaf)) == (1, 0)
    meshes.copies_equal(got)
    same(got["params"], clean["params"])
    same(guard.inner, clean["opt"].inner)
    plain = meshes.run(entrance, make(), mesh, params, specs, grads)
    if exact:
        same(got["params"], plain["params"])
        same(guard.inner, plain["opt"])
    else:  # another program rounds its long sums otherwise
        meshes.close(got["params"], plain["params"])


def same(got, expected):
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    "scheme, entrance",
    [
        pytest.param(s, e, marks=[] if (s, e) in DEFAULT else [pytest.mark.slow])
        for s in SCHEMES
        for e in meshes.ENTRANCES
    ],
)
def test_a_step_that_is_not_finite_on_one_device_never_was(scheme, entrance):
    """Also in the middle of accumulation, in a warm-up, with momentum in front."""
    make, exact = SCHEMES[scheme], "power" not in scheme
    check(entrance, meshes.TWO_BY_FOUR, make, *given(scheme), exact=exact)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", TYPES[1:], ids=str)
@pytest.mark.parametrize("entrance", meshes.ENTRANCES)
def test_nor_was_it_on_other_meshes(mesh, entrance):
    def make():
        return chained(
            efopt.per_worker(optax.trace(0.9), axis_name=mesh.slow),
            efopt.error_feedback(
                efopt.scaled_sign(8), axis_name=mesh.slow, exchange="two_phase"
            ),
        )

    check(entrance, mesh, make, *meshes.task(mesh, steps=4))
