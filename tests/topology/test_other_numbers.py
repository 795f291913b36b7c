"""Slices that come and go, with parameters sharded behind each as they were."""

import jax
import meshes
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import efopt
from efopt.checkpoints import resize, target

AXIS, FSDP = "dcn", 2


def chained(memory=None):
    return optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS),
        efopt.error_feedback(
            efopt.compressors.partition(
                {"low": efopt.power_sgd(1, min_compression=0), "sign": SIGN},
                lambda tree: {k: "low" if k in LOW else "sign" for k in tree},
            ),
            axis_name=AXIS,
            exchange="two_phase",
            memory=memory,
        ),
        optax.sgd(0.1),
    )


SIGN, LOW = efopt.scaled_sign(8), ("a_rows", "b_columns")
MEMORY = efopt.quantize(8, block_size=4)
BIG = {  # shards of which are worth to be stored
    "a_rows": ((64, 32), jax.P("fsdp", None)),
    "b_columns": ((32, 64), jax.P(None, "fsdp")),
    "c_scale": ((32,), jax.P()),
}


def is_own(x):
    return isinstance(x, efopt.PerWorker)


def parts(tree):
    return jax.tree.leaves(tree, is_leaf=is_own)


def given(tx, slices, shapes=meshes.EVEN):
    """Parameters, their specs, and a state of so many slices, full of numbers."""
    params, specs, _ = meshes.task(meshes.Mesh((slices, FSDP)), steps=0, shapes=shapes)
    kinds = (AxisType.Auto,) * 2
    mesh = AbstractMesh((slices, FSDP), (AXIS, "fsdp"), kinds)
    structs = efopt.distribute(jax.eval_shape(tx.init, params), mesh, specs)
    rng = np.random.default_rng(0)

    def fill(x):
        if x.dtype == np.float32:
            return rng.standard_normal(x.shape).astype(x.dtype)
        return rng.integers(0, 100, x.shape).astype(x.dtype)

    # What is equal on all workers, as the state of PowerSGD, is no worker's own.
    def node(x):
        filled = jax.tree.map(fill, x)
        if is_own(x) and x.rule == "equal":
            return jax.tree.map(lambda a: np.repeat(a[:1], slices, 0), filled)
        return filled

    return params, specs, jax.tree.map(node, structs, is_leaf=is_own)


def whole(node):
    """Of every shard, all blocks of all owners."""
    for x, split in zip(jax.tree.leaves(node.value), node.splits(), strict=True):
        yield np.moveaxis(x, 1, 0).reshape(x.shape[1], -1, *x.shape[3:])[:, :split]


@pytest.mark.parametrize("n, m", [(3, 2), (2, 4)])
def test_every_shard_is_handed_over_as_it_would_be_alone(n, m):
    _, _, state = given(chained(), n)
    new, rules = resize(state, {AXIS: m, "fsdp": FSDP}), set()
    for x, y in zip(parts(state), parts(new), strict=True):
        if not is_own(x):
            np.testing.assert_array_equal(x, y)
            continue
        rules.add(x.rule)
        if x.rule == "ranges":
            for a, b in zip(whole(x), whole(y), strict=True):
                np.testing.assert_array_equal(a, b)
            continue
        for a, b in zip(*map(jax.tree.leaves, (x.value, y.value)), strict=True):
            assert b.shape == (m, *a.shape[1:])
            np.testing.assert_allclose(a.mean(0), b.mean(0), atol=1e-6)
            if x.rule == "equal":
                np.testing.assert_array_equal(b, np.repeat(a[:1], m, 0))
    assert rules == {"mean", "equal", "ranges"}


def owed(feedback):
    """The mean of what workers say is stored, read shard by shard as by a step."""
    home = feedback.link.home
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), home.shards())
    turn = efopt.codecs.blocks.Turn(np.uint32(0), np.uint32(0))
    store = parts(feedback.residual)[0].store
    read = jax.jit(jax.vmap(lambda x: store.recall(zeros, x, turn, None)))
    shards = []
    for d in range(FSDP):
        cut = lambda x, d=d: x[:, d] if x.ndim > 2 else x  # noqa: E731
        payload = {
            name: jax.tree.map(cut, node.value) if node.shards else node.value
            for name, node in feedback.residual.items()
        }
        shards.append(jax.tree.map(lambda x: np.mean(x, 0), read(payload)))
    return {
        "a_rows": np.concatenate([x["a_rows"] for x in shards], 0),
        "b_columns": np.concatenate([x["b_columns"] for x in shards], 1),
        "c_scale": shards[0]["c_scale"],
    }


def test_a_stored_residual_is_written_anew_shard_by_shard():
    """And what that loses is paid where the shard stands in the parameters."""
    params, specs, state = given(chained(MEMORY), 3, BIG)
    paid, new = resize(state, 2, params=params, learning_rate=0.5)
    before, after = owed(state[1]), owed(new[1])
    for name, p in params.items():
        old, now = p - 0.5 * before[name], paid[name] - 0.5 * after[name]
        scale = np.abs(before[name]).max()
        np.testing.assert_allclose(now, old, rtol=0, atol=3e-7 * scale)
        lost = np.abs(paid[name] - p)
        assert (lost.max() > 1e-3) == (name != "c_scale")
        assert np.abs(before[name]).max() > 0.1


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["exact", "stored"])
@pytest.mark.slow
def test_training_goes_on_with_fewer_slices(memory):
    tx = chained(memory)
    three, two = meshes.Mesh((3, FSDP)), meshes.Mesh((2, FSDP))
    shapes = BIG if memory else meshes.EVEN
    params, specs, grads = meshes.task(three, steps=3, shapes=shapes)
    state = meshes.run("global", tx, three, params, specs, grads)
    opt = resize(state["opt"], 2, params=state["params"], learning_rate=0.1)
    step, fresh, place = meshes.make("global", tx, two, params, specs)
    placed = efopt.distribute({"params": opt[0], "opt": opt[1]}, two.make(), specs)
    _, _, more = meshes.task(two, steps=3, seed=1, shapes=shapes)
    for g in more:
        fresh = step(fresh, place(g))
    programs = step._cache_size()
    for g in more:
        placed = step(placed, place(g))
    meshes.copies_equal(placed)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(placed["params"]))
    assert step._cache_size() == programs


def test_a_target_is_spread_over_all_devices_of_today():
    """No device, and no host, holds all that the old workers owed."""
    tx, mesh = chained(), meshes.Mesh((2, FSDP)).make()
    params, specs, state = given(tx, 3)
    structs = jax.eval_shape(tx.init, params)
    found = target(structs, mesh, specs, saved={AXIS: 3})
    node = found[1].residual.value["a_rows"]
    assert node.shape == (3, 16, 6)
    assert node.sharding.shard_shape(node.shape) in ((3, 4, 6), (3, 8, 3))
    restored = jax.tree.map(lambda s, x: jax.device_put(x, s.sharding), found, state)
    expected, new = resize(state, 2), resize(restored, 2)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    placed = efopt.distribute(new, mesh, specs)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)
    with pytest.raises(ValueError, match="the mesh has no axis 'data'"):
        target(structs, mesh, specs, saved={"data": 3})
