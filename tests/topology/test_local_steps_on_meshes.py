"""Local steps on meshes of two levels: gradients are taken where each worker is."""

import functools

import jax
import meshes
import numpy as np
import optax
import oracle_methods
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from workers_under_test import slow

import efopt

FLAT = meshes.Mesh()
CASES = {
    "auto": (FLAT, "global"),
    "auto-nested": (FLAT, "nested"),
    "explicit": (meshes.Mesh(kind="explicit"), "global"),
    "explicit-nested": (meshes.Mesh(kind="explicit"), "nested"),
    "odd": (meshes.Mesh(sizes=(3, 2)), "global"),
    "two slow axes": (
        meshes.Mesh((2, 2, 2), ("pod", "fsdp", "dcn"), ("pod", "dcn"), "explicit"),
        "global",
    ),
}
SHAPES = {"rows": ((8, 6), P("fsdp", None)), "whole": ((5,), P())}
STEPS = 8


def loss_fn(params, goals):
    """A quadratic of this worker's own; ``goals`` has a row for it."""
    return sum(((p - goals[k][0]) ** 2).sum() for k, p in params.items()) / 2


def make(mesh):
    mean = efopt.compress(efopt.compressors.identity(), axis_name=mesh.slow)
    return efopt.local_steps(
        optax.sgd(0.2, momentum=0.5),
        optax.chain(mean, optax.sgd(0.7, momentum=0.5, nesterov=True)),
        every=3,
        axis_name=mesh.slow,
    )


def by_hand(params, goals):
    """Parameters of all workers, and the common ones, after every step."""
    n = len(next(iter(goals[0].values())))
    common = {k: x.astype(np.float64) for k, x in params.items()}
    own = {k: np.stack([x] * n) for k, x in common.items()}
    inner = {k: np.zeros_like(x) for k, x in own.items()}
    outer = {k: np.zeros_like(x) for k, x in common.items()}
    for t, goal in enumerate(goals, 1):
        for k, x in own.items():
            inner[k] = 0.5 * inner[k] + x - goal[k]
            own[k] = x - 0.2 * inner[k]
            if t % 3 == 0:
                delta = common[k] - own[k].mean(0)
                outer[k] = 0.5 * outer[k] + delta
                common[k] = common[k] - 0.7 * (delta + 0.5 * outer[k])
                own[k] = np.stack([common[k]] * n)
        yield common, own


def train(case, tx_of):
    """Common parameters and those of all workers, after every step, on a mesh."""
    mesh, entrance = CASES[case]
    params, specs, goals = meshes.task(mesh, steps=STEPS, shapes=SHAPES)
    tx, on = tx_of(mesh), mesh.make()
    state = {"params": params, "opt": jax.jit(tx.init)(params)}
    state = efopt.distribute(state, on, specs)

    def update(state, grads):
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}

    def own_of(state):
        return efopt.local_params(state["params"], mesh.slow, state["opt"])

    def whole(state, goals):
        grad = efopt.value_and_grad(loss_fn, axis_name=mesh.slow)
        return update(state, grad(own_of(state), goals)[1])

    def mapped(state, goals):
        return update(state, jax.grad(loss_fn)(own_of(state), goals))

    if entrance == "nested":
        only = meshes.manual_specs(efopt.partition_specs(state, specs), mesh.slows)
        step = jax.shard_map(
            mapped,
            mesh=on,
            in_specs=(only, P(mesh.slow)),
            out_specs=only,
            axis_names=set(mesh.slows),
        )
    else:
        step = whole
    step = jax.jit(step)
    read = jax.jit(functools.partial(efopt.local_params, axis_name=mesh.slow))
    for goal in goals:
        placed = {
            k: jax.device_put(x, NamedSharding(on, P(mesh.slow, *specs[k])))
            for k, x in goal.items()
        }
        state = step(state, placed)
        yield state["params"], read(state["params"], state=state["opt"]).value
    meshes.copies_equal(state)


def follow(case, tx_of, by_hand):
    mesh, _ = CASES[case]
    params, _, goals = meshes.task(mesh, steps=STEPS, shapes=SHAPES)
    walked, expected = train(case, tx_of), by_hand(params, goals)
    for (got, there), (common, own) in zip(walked, expected, strict=True):
        for k in params:
            np.testing.assert_allclose(got[k], common[k], rtol=0, atol=1e-5)
            np.testing.assert_allclose(there[k], own[k], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", [slow(c, when=c not in ("auto", "explicit")) for c in CASES]
)
def test_each_worker_goes_its_own_way_and_all_meet(case):
    follow(case, make, by_hand)


def make_adam(mesh):
    """Nothing is lost: then shards change no number."""
    return efopt.optimizers.zero_one_adam(
        0.05,
        freeze=2,
        refresh=8,
        longest=3,
        doubling=1,
        eps=0.1,
        compressor=efopt.compressors.identity(),
        axis_name=mesh.slow,
    )


def adam_by_hand(params, goals):
    n, names = len(goals[0]["rows"]), sorted(params)

    def gradients(goal, own):
        return [
            [x - goal[k][i] for k, x in zip(names, mine, strict=True)]
            for i, mine in enumerate(own)
        ]

    common, own, *_ = oracle_methods.zero_one_adam(
        [params[k].astype(np.float64) for k in names],
        [functools.partial(gradients, goal) for goal in goals],
        n,
        lambda t: 0.05,
        lambda x: x,
        lambda t: t < 2,
        lambda t: t in (2, 3, 4, 7),  # then distances are three
        *(0.9, 0.999, 0.1),
    )
    for x, mine in zip(common, own, strict=True):
        stacked = [np.stack(leaf) for leaf in zip(*mine, strict=True)]
        yield tuple(dict(zip(names, xs, strict=True)) for xs in (x, stacked))


@pytest.mark.parametrize("case", [slow(c, when=c != "explicit") for c in CASES])
def test_zero_one_adam_walks_and_meets(case):
    follow(case, make_adam, adam_by_hand)
