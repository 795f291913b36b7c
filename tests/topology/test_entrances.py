"""Every compressor and exchange, from every entrance, against shards cut by hand."""

import functools
import itertools

import jax
import meshes
import numpy as np
import optax
import pytest
from registry import COMPRESSORS
from workers_under_test import slow

import efopt
from efopt.codecs.compressor import make
from efopt.exchanges.owed import owed_by_owners

MESH = meshes.TWO_BY_FOUR
CASES = {
    f"{row.name}-{exchange}": (row, exchange)
    for row in COMPRESSORS
    for exchange in row.exchanges
}
# The default lane: of every kind the exchange that asks most.
DEFAULT = {
    "top_k_of_8_bits-all_gather",
    "scaled_sign_8-two_phase",
    "random_block_10pct-all_reduce",
    "power_sgd-all_reduce",
}
assert {name.split("-")[0] for name in DEFAULT} == {
    row.name for row in COMPRESSORS if row.kind
}
# By default every kind from one entrance, and every entrance.
ONCE = {
    (name, meshes.ENTRANCES[i % len(meshes.ENTRANCES)])
    for i, name in enumerate(sorted(DEFAULT))
}
each_way = pytest.mark.parametrize(
    "case, entrance",
    [
        slow(*case, when=case not in ONCE)
        for case in itertools.product(CASES, meshes.ENTRANCES)
    ],
)


def by_name(tree):
    matrices = "a_rows", "b_columns", "g_whole"
    return {name: "large" if name in matrices else "small" for name in tree}


def made(case):
    row, exchange = CASES[case]
    # Labels by name: pieces that are cut by hand have other sizes than their leaf.
    compressor = row.make(**({"labels": by_name} if "labels" in row.options else {}))
    compressor = make(meshes.per_shard(compressor.codec))
    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange),
        optax.sgd(meshes.RATE),
    )
    return compressor, tx


@functools.cache
def ran(case, entrance):
    params, specs, grads = meshes.task(MESH)
    return meshes.run(entrance, made(case)[1], MESH, params, specs, grads)


@functools.cache
def by_hand(case):
    params, specs, grads = meshes.task(MESH)
    compressor, tx = made(case)
    cuts = meshes.parts(MESH, params, specs, compressor)
    whole, states = meshes.flat(tx, MESH, params, grads, cuts)
    return whole, states, cuts


# Rounds magnify how quickly made code rounds: tests/topology/test_low_rank.py has them.
@pytest.mark.parametrize(
    "case, entrance",
    [
        slow(*case, when=case not in ONCE or not CASES[case[0]][0].one_message)
        for case in itertools.product(CASES, meshes.ENTRANCES)
    ],
)
def test_parameters_are_those_of_shards_compressed_by_hand(case, entrance):
    whole, _, _ = by_hand(case)
    meshes.close(ran(case, entrance)["params"], whole)


@each_way
def test_state_by_shard_is_that_of_each_device(case, entrance):
    """What owners owe, and what PowerSGD remembers, device by device."""
    _, states, _ = by_hand(case)
    got = ran(case, entrance)["opt"][0].link
    if got.server != ():
        assert got.server.shards == MESH.inner
        for i, own in enumerate(got.server.value):
            for d, state in enumerate(states):
                x = state[0].link.server.value[i]
                np.testing.assert_allclose(own[:, d], x[:, 0], rtol=0, atol=1e-5)
    if got.codec == ():
        return
    for name, node in got.codec.items():
        if not isinstance(node, efopt.PerWorker):
            continue
        for d, state in enumerate(states):
            pairs = zip(
                jax.tree.leaves(node.value),
                jax.tree.leaves(state[0].link.codec[name]),
                strict=True,
            )
            for x, expected in pairs:
                for own in x:
                    np.testing.assert_allclose(own[d], expected[0], rtol=0, atol=1e-5)


@each_way
def test_nothing_is_lost_on_any_shard(case, entrance):
    """What came in is applied, or owed by a worker or by an owner, coordinatewise."""
    params, specs, grads = meshes.task(MESH)
    _, _, cuts = by_hand(case)
    state = ran(case, entrance)
    feedback = state["opt"][0]
    owed = owners_debts(feedback.link, params, cuts)
    for name, x in params.items():
        came = np.sum([g[name].astype(np.float64) for g in grads], axis=0).mean(0)
        applied = (
            x.astype(np.float64) - np.asarray(state["params"][name])
        ) / meshes.RATE
        residual = np.asarray(feedback.residual.value[name], np.float64).mean(0)
        assert residual.shape == x.shape
        np.testing.assert_allclose(
            applied + residual + owed[name], came, rtol=0, atol=2e-5, err_msg=name
        )


@each_way
def test_whoever_holds_the_same_holds_the_same_bits(case, entrance):
    meshes.copies_equal(ran(case, entrance))


@pytest.mark.parametrize(
    "case", [slow(c, when=(c, "global") not in ONCE) for c in sorted(DEFAULT)]
)
def test_residuals_lie_with_their_parameters(case):
    """The leaf's global shape behind the workers, sharded like the leaf."""
    params, specs, _ = meshes.task(MESH)
    residual = ran(case, "global")["opt"][0].residual.value
    for name, x in params.items():
        assert residual[name].shape == (2, *x.shape)
        if not x.size:
            continue
        sharding = jax.NamedSharding(MESH.make(), jax.P("dcn", *specs[name]))
        assert residual[name].sharding.is_equivalent_to(sharding, x.ndim + 1), name


def owners_debts(link, params, cuts):
    """Whole leaves of what owners owe, put together from every device's ranges."""
    if link.server == ():
        return {name: np.zeros(x.shape) for name, x in params.items()}
    debts = []
    for d, at in enumerate(next(iter(cuts.values())).devices()):
        local = {n: cuts[n].take(x, at, padded=True) for n, x in params.items()}
        value = tuple(np.asarray(x[:, d]) for x in link.server.value)
        own = efopt.PerWorker(value, link.server.axis_name, link.server.split)
        debts.append(owed_by_owners(link.home.link, local, own))
    return {
        name: cuts[name].join([np.asarray(debt[name]) for debt in debts])
        for name in params
    }
