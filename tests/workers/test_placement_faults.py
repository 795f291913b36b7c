"""Whose values a node holds, and how what is in it is placed, under any wrapper."""

import subprocess
import sys
import textwrap
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from workers_under_test import slow

import efopt

AXIS, N, D = "data", 4, 64
RNG = np.random.default_rng(0)
# Workers far apart: what one of them owes is not what the mean owes.
APART = np.linspace(-3, 3, N, dtype=np.float32)[None, :, None]
GRADS = (RNG.normal(size=(8, N, D)) + APART).astype(np.float32)


def feedback(compressor=None, **kwargs):
    compressor = efopt.scaled_sign(block_size=16) if compressor is None else compressor
    return efopt.error_feedback(compressor, axis_name=AXIS, **kwargs)


def line(n=N):
    return jax.make_mesh((n,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:n])


def grid(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), (AXIS, "model"), (kind, kind))


def under_shard_map(tx, state, mesh):
    specs = efopt.partition_specs(state)
    update = jax.shard_map(
        lambda g, s: tx.update(g[0], s),
        mesh=mesh,
        in_specs=(P(AXIS), specs),
        out_specs=(P(), specs),
    )
    return jax.jit(update)


def under_pmap(tx):
    devices = jax.devices()[:N]
    return jax.pmap(lambda g, s: tx.update(g, s), axis_name=AXIS, devices=devices)


def first_shards(tree):
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


EXCHANGES = (slow("all_gather"), "two_phase")
SHARE = "share of one worker"


# A share of what several own.


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_share_is_not_replicated_for_pmap(exchange):
    tx = feedback(exchange=exchange)
    update, state = under_pmap(tx), efopt.stack_workers(tx.init(jnp.zeros(D)), N)
    for g in GRADS[:2]:  # compiled for the right state, and still not for the wrong
        _, state = update(g, state)
    share = jax_utils.unreplicate(state)
    with pytest.raises(ValueError, match=SHARE):
        update(GRADS[2], jax_utils.replicate(share, jax.devices()[:N]))
    with pytest.raises(ValueError, match=SHARE):
        efopt.stack_workers(share, N)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_first_shard_is_not_given_to_all(exchange):
    tx, mesh = feedback(exchange=exchange), line()
    state = efopt.distribute(tx.init(jnp.zeros(D)), mesh)
    _, state = under_shard_map(tx, state, mesh)(GRADS[0], state)
    for share in (first_shards(state), jax.device_get(first_shards(state))):
        for again in (
            lambda share=share: efopt.distribute(share, mesh),
            lambda share=share: efopt.distribute(jax.tree.map(jnp.copy, share), mesh),
            lambda share=share: efopt.distribute(jax.jit(lambda x: x)(share), mesh),
        ):
            with pytest.raises(ValueError, match=SHARE):
                again()


def test_a_share_is_known_after_bytes_too():
    tx, mesh = feedback(), line()
    state = efopt.distribute(tx.init(jnp.zeros(D)), mesh)
    data = flax.serialization.to_bytes(first_shards(state))
    restored = flax.serialization.from_bytes(tx.init(jnp.zeros(D)), data)
    with pytest.raises(ValueError, match=SHARE):
        efopt.distribute(restored, mesh)


def test_a_share_of_a_state_that_was_replicated_by_hand_is_one():
    # Zeros are the same for all: `replicate` of a fresh state is right, a share is not.
    for start in (0, 3):
        tx = feedback(start=start)
        update = under_pmap(tx)
        by_hand = jax_utils.replicate(tx.init(jnp.zeros(D)), jax.devices()[:N])
        stacked = efopt.stack_workers(tx.init(jnp.zeros(D)), N)
        for g in GRADS[:2]:
            want, stacked = update(g, stacked)
            got, by_hand = update(g, by_hand)
            np.testing.assert_array_equal(got, want)
        tx = feedback(start=start)
        _, state = under_pmap(tx)(
            GRADS[0], jax_utils.replicate(tx.init(jnp.zeros(D)), jax.devices()[:N])
        )
        with pytest.raises(ValueError, match=SHARE):
            efopt.stack_workers(jax_utils.unreplicate(state), N)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_shares_of_all_workers_are_the_whole(exchange):
    tx, mesh = feedback(exchange=exchange), line()
    state = efopt.distribute(tx.init(jnp.zeros(D)), mesh)
    step = under_shard_map(tx, state, mesh)
    _, state = step(GRADS[0], state)

    def share(i):
        own = lambda x: jax.tree.map(lambda x: np.asarray(x)[i : i + 1], x)  # noqa: E731
        is_node = lambda x: isinstance(x, efopt.PerWorker)  # noqa: E731
        return jax.tree.map(
            lambda x: own(x) if is_node(x) else x, state, is_leaf=is_node
        )

    def join(*xs):
        return np.concatenate(xs) if jnp.ndim(xs[0]) else xs[0]

    again = efopt.distribute(jax.tree.map(join, *map(share, range(N))), mesh)
    want, after = step(GRADS[1], state)
    got, resumed = step(GRADS[1], again)
    np.testing.assert_array_equal(got, want)
    assert jax.tree.structure(resumed) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, resumed, after)


def test_a_state_has_one_structure_wherever_it_lives():
    tx = optax.chain(efopt.per_worker(optax.trace(0.9), axis_name=AXIS), feedback())
    fresh = tx.init(jnp.zeros(D))
    placed, stacked = efopt.distribute(fresh, line()), efopt.stack_workers(fresh, N)
    made = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((N, D)))
    structures = {jax.tree.structure(x) for x in (fresh, placed, stacked, made)}
    structures.add(jax.tree.structure(jax.eval_shape(tx.init, jnp.zeros(D))))
    structures.add(jax.tree.structure(efopt.partition_specs(fresh)))
    assert len(structures) == 1
    assert jax.tree.structure(first_shards(placed)) not in structures
    # One worker's share of one is the whole.
    alone = efopt.distribute(fresh, line(1))
    efopt.distribute(first_shards(alone), line(1))


def test_a_whole_state_restored_into_a_fresh_one_is_placed():
    tx, mesh = feedback(exchange="two_phase"), line()
    state = efopt.distribute(tx.init(jnp.zeros(D)), mesh)
    _, state = under_shard_map(tx, state, mesh)(GRADS[0], state)
    data = flax.serialization.to_bytes(state)
    again = flax.serialization.from_bytes(tx.init(jnp.zeros(D)), data)
    again = efopt.distribute(again, mesh)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize("name", ["two_phase", "stored"])
def test_what_was_saved_without_inner_axes_is_not_made_anew_for_them(name):
    tx, mesh = FACTORED[name](), line()
    params = {"w": jnp.zeros((64, 64))}
    state = efopt.distribute(tx.init(params), mesh)
    with pytest.raises(ValueError, match="placed for another mesh"):
        efopt.distribute(state, grid(), {"w": P("model")})
    data = flax.serialization.to_bytes(state)
    again = flax.serialization.from_bytes(tx.init(params), data)
    with pytest.raises(ValueError, match="laid out over workers, but not over"):
        efopt.distribute(again, grid(), {"w": P("model")})


# Specs by path and shape.


PARAMS = {"b": jnp.ones(8), "w": jnp.ones((8, 6))}
SPECS = {"b": P("model"), "w": P("model")}


def labels(params):
    del params
    return {"b": "v", "w": "m"}


def dense(**kwargs):
    return feedback(efopt.compressors.identity(), **kwargs)


WRAPPED = {
    "chain": lambda: optax.chain(dense(), optax.adam(1.0)),
    "partition": lambda: optax.partition(
        {
            "m": optax.chain(dense(), optax.adam(1.0)),
            "v": optax.chain(dense(), optax.trace(0.9)),
        },
        labels,
    ),
    "masked": lambda: optax.chain(
        dense(), optax.masked(optax.trace(0.9), {"b": False, "w": True})
    ),
    "inject_hyperparams": lambda: optax.chain(
        dense(), optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1.0), 2),
    "per_worker": lambda: optax.chain(
        efopt.per_worker(optax.adam(1.0), axis_name=AXIS), dense()
    ),
    "accumulate": lambda: efopt.accumulate(dense(), every=2, axis_name=AXIS),
}


def per_worker_axes(tree):
    """Shape and spec behind the worker axis, of every array not laid out by shard."""
    is_node = lambda x: isinstance(x, efopt.PerWorker)  # noqa: E731
    for x in jax.tree.leaves(tree, is_leaf=is_node):
        lead = 1 if is_node(x) else 0
        if lead and (x.shards or x.axis_name != AXIS):
            continue
        for y in jax.tree.leaves(x):
            spec = (*y.sharding.spec, *[None] * y.ndim)[: y.ndim]
            assert not lead or spec[0] == AXIS
            yield y.shape[lead:], spec[lead:]


@pytest.mark.parametrize("beside", [True, False], ids=["with params", "state alone"])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_shaped_like_a_parameter_is_sharded_like_it(name, beside):
    state = WRAPPED[name]().init(PARAMS)
    tree = {"params": PARAMS, "opt": state} if beside else state
    got = list(per_worker_axes(efopt.distribute(tree, grid(), SPECS)))
    assert {shape for shape, _ in got} >= {(8, 6)}
    for shape, spec in got:
        if shape in ((8,), (8, 6)):
            assert spec == ("model", *[None] * (len(shape) - 1))
        else:
            assert set(spec) <= {None}
    specs = efopt.partition_specs(tree, SPECS)
    assert jax.tree.structure(specs) == jax.tree.structure(tree)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_partitioned_step_runs_fully_manual(kind):
    ef = lambda: optax.chain(dense(), optax.sgd(1.0))  # noqa: E731
    tx, mesh = optax.partition({"m": ef(), "v": ef()}, labels), grid(kind)
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    state = efopt.distribute({"p": params, "o": tx.init(params)}, mesh, SPECS)
    specs = efopt.partition_specs(state, SPECS)

    def step(s, g):
        own = jax.tree.map(lambda x: x[0], g)
        updates, opt = tx.update(own, s["o"], s["p"])
        return {"p": optax.apply_updates(s["p"], updates), "o": opt}

    batch = {"b": P(AXIS, "model"), "w": P(AXIS, "model")}
    grads = jax.tree.map(lambda p: np.ones((4, *p.shape), np.float32), params)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), batch)
    step = jax.shard_map(step, mesh=mesh, in_specs=(specs, batch), out_specs=specs)
    out = jax.jit(step)(state, jax.device_put(grads, shardings))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, -1), out["p"])


FACTORED = {
    "adafactor behind": lambda: optax.chain(dense(), optax.adafactor(0.1)),
    "adafactor alone": lambda: optax.adafactor(0.1),
    "power_sgd": lambda: feedback(efopt.power_sgd(4)),
    "stored": lambda: efopt.contractive_error_feedback(
        efopt.random_block(fraction=0.5), memory=efopt.quantize(8), axis_name=AXIS
    ),
    "two_phase": lambda: feedback(exchange="two_phase"),
}


@pytest.mark.parametrize(
    "beside", [pytest.param(True, id="with params"), slow(False, id="state alone")]
)
@pytest.mark.parametrize("name", FACTORED)
def test_states_of_other_shapes_are_placed_by_their_own_rule(name, beside):
    params = {"a": jnp.ones((256, 96)), "b": jnp.ones((96, 256)), "c": jnp.ones(6)}
    specs = {"a": P(None, "model"), "b": P("model"), "c": P()}
    state = FACTORED[name]().init(params)
    tree = (params, state) if beside else state
    known = {} if beside else {"params": params}
    placed = efopt.distribute(tree, grid(), specs, **known)
    if name == "stored":  # a payload is no parameter, whatever its shape
        residual = placed[1].residual if beside else placed.residual
        specs = {name: residual[name].value for name in params}
        axes = {
            k: {x.sharding.spec[:2] for x in jax.tree.leaves(v)}
            for k, v in specs.items()
        }
        assert axes == {"a": {(AXIS, "model")}, "b": {(AXIS, "model")}, "c": {(AXIS,)}}
        return
    for shape, spec in per_worker_axes(placed):
        want = {(256, 96): (None, "model"), (96, 256): ("model", None)}
        assert spec == want.get(shape, (None,) * len(shape))
    efopt.distribute(tree, grid(), specs)  # and without being told


def test_the_longest_path_wins_and_structs_do_as_well_as_arrays():
    params = {"w": jnp.ones((8, 6)), "layer": {"w": jnp.ones((8, 6))}}
    specs = {"w": P(), "layer": {"w": P(None, "model")}}
    state = dense().init(params)
    for tree in (state, jax.eval_shape(lambda: state)):
        residual = efopt.partition_specs(tree, specs).residual.value
        assert residual == {"w": P(AXIS), "layer": {"w": P(AXIS, None, "model")}}


@pytest.mark.parametrize(
    "specs, words",
    [
        ({"b": P(), "w": P("expert")}, "no axis 'expert'"),
        ({"b": P(), "w": P(AXIS)}, "an axis of the workers"),
        ({"b": P(None, "model"), "w": P()}, "more entries than"),
        ({"b": P(), "w": P(None, "data_model")}, "no axis"),
        ({"c": P("model")}, "of which the tree has none"),
        ({"b": P("model"), "w": P(None, ("model",))}, None),
        ({"b": P("model"), "w": P(None, "model")}, None),
        (P("model"), None),
    ],
    ids=str,
)
def test_specs_that_do_not_fit_are_refused_by_name(specs, words):
    tree = (PARAMS, dense().init(PARAMS))
    if words is None:
        efopt.distribute(tree, grid(), specs)
        return
    with pytest.raises(ValueError, match=words):
        efopt.distribute(tree, grid(), specs)


def test_a_parameter_that_does_not_divide_is_named():
    params = {"w": jnp.ones((7, 6))}
    with pytest.raises(ValueError, match="w of shape .7, 6.*7 does not divide by 2"):
        efopt.distribute((params, dense().init(params)), grid(), {"w": P("model")})
    with pytest.raises(TypeError, match="PartitionSpec"):
        efopt.partition_specs(params, {"w": "model"})
    with pytest.raises(ValueError, match="structure"):
        efopt.partition_specs(params, {"v": P("model")}, params=params)


# What is allocated.


def held_on_one_device(monkeypatch, place):
    """Bytes of the largest part of an array on one device, while ``place`` works."""
    put, seen = jax.device_put, []

    def spy(x, *args, **kwargs):
        out = put(x, *args, **kwargs)
        for y in (x, out):
            if isinstance(y, jax.Array):
                seen.extend(s.data.nbytes for s in y.addressable_shards)
        return out

    monkeypatch.setattr(jax, "device_put", spy)
    jax.block_until_ready(place())
    monkeypatch.undo()
    return max(seen)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_device_never_holds_more_than_a_copy(monkeypatch, exchange):
    params = jnp.zeros(1 << 16)
    tx, mesh = feedback(exchange=exchange), line(8)
    carry = (params, tx.init(params))
    held = held_on_one_device(monkeypatch, lambda: efopt.distribute(carry, mesh))
    assert held == params.nbytes
    placed = efopt.distribute(carry, mesh)
    for x in jax.tree.leaves(placed):
        assert len(x.sharding.device_set) == 8
    held = held_on_one_device(monkeypatch, lambda: efopt.distribute(placed, mesh))
    assert held == params.nbytes
    stack = lambda: efopt.stack_workers(carry, 8, devices=jax.devices())  # noqa: E731
    assert held_on_one_device(monkeypatch, stack) == params.nbytes


def test_what_is_sharded_behind_a_worker_is_never_whole_on_a_device(monkeypatch):
    params = {"w": np.zeros((1 << 8, 1 << 8), np.float32)}
    state = dense().init(params)
    place = lambda: efopt.distribute(  # noqa: E731
        (params, state.residual), grid(), {"w": P("model")}
    )
    put, seen = jax.device_put, []

    def spy(x, *args, **kwargs):
        seen.append(put(x, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(jax, "device_put", spy)
    place()
    parts = {s.data.nbytes for x in seen for s in x.addressable_shards}
    assert max(parts) == params["w"].nbytes // 2


def test_stacking_over_devices_is_stacking():
    tx = optax.chain(feedback(exchange="two_phase"), optax.adam(1.0))
    tree = {"step": 0, "state": tx.init(jnp.zeros(D))}
    devices = jax.devices()[:N]
    spread = efopt.stack_workers(tree, N, devices=devices)
    stacked = efopt.stack_workers(tree, N)
    assert jax.tree.structure(spread) == jax.tree.structure(stacked)
    jax.tree.map(np.testing.assert_array_equal, spread, stacked)
    for x in jax.tree.leaves(spread):
        assert [s.data.shape[0] for s in x.addressable_shards] == [1] * N
    update, g = under_pmap(tx), GRADS[0]
    got, want = update(g, spread["state"]), update(g, stacked["state"])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match="one device a worker"):
        efopt.stack_workers(tree, N + 1, devices=devices)


# Specs the Optax way.


MAPPED = {
    "error_feedback": lambda: feedback(),
    "two_phase": lambda: feedback(exchange="two_phase"),
    "power_sgd": lambda: feedback(efopt.power_sgd(4)),
    "stored": lambda: efopt.contractive_error_feedback(
        efopt.random_block(fraction=0.5), memory=efopt.quantize(8), axis_name=AXIS
    ),
    "accumulate": lambda: efopt.accumulate(
        optax.chain(feedback(), optax.adam(1.0)), every=2, axis_name=AXIS
    ),
    "per_worker": lambda: efopt.per_worker(optax.trace(0.9), axis_name=AXIS),
    "no axis": lambda: efopt.error_feedback(efopt.power_sgd(4)),
}


@pytest.mark.parametrize("where", ["fresh", "placed"])
@pytest.mark.parametrize("name", MAPPED)
def test_optax_maps_specs_over_a_state(name, where):
    params = {"b": jnp.zeros(64), "w": jnp.zeros((64, 64))}
    specs = {"b": P(), "w": P("model")}
    tx, mesh = MAPPED[name](), grid()
    if name in ("two_phase", "stored") and where == "placed":  # not by shard
        mesh, specs = line(), {"b": P(), "w": P()}
    state = tx.init(params)
    if where == "placed":
        state = efopt.distribute(state, mesh)
    named = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    for made in (lambda spec: spec, named):
        got = optax.tree.map_params(
            tx,
            lambda _, spec: spec,
            state,
            jax.tree.map(made, specs),
            transform_non_params=lambda _, made=made: made(P()),
        )
        want = jax.tree.map(made, efopt.partition_specs(state, specs, params=params))
        # A spec may stand for several arrays that are placed alike.
        got = jax.tree.broadcast(got, state)
        for a, b, x in zip(*map(jax.tree.leaves, (got, want, state)), strict=True):
            assert named(a) if made is not named else a.mesh == mesh
            pair = [named(s) if made is not named else s for s in (a, b)]
            assert pair[0].is_equivalent_to(pair[1], x.ndim)


# Random keys.


def private(key):
    return optax.contrib.differentially_private_aggregate(1.0, 1.0, key)


class RawState(NamedTuple):
    rngs: list


def raw_noise(key):
    """Noise from raw keys, several of them."""

    def init(params):
        del params
        return RawState(rngs=[jax.random.key_data(key), jnp.ones((3, 2), jnp.uint32)])

    def update(updates, state, params=None):
        del params
        new, now = jax.random.split(state.rngs[0])
        noise = jax.tree.map(lambda u: u + jax.random.normal(now, u.shape), updates)
        return noise, RawState(rngs=[new, state.rngs[1]])

    return optax.GradientTransformation(init, update)


NOISE = {
    "raw keys": (raw_noise, (N, 20000)),
    "add_noise": (lambda key: optax.add_noise(1.0, 0.0, key), (N, 20000)),
    "differential privacy": (private, (N, 1, 20000)),
}


def noise(inner, shape, steps=1, n=N, state=None, **options):
    tx = optax.chain(
        efopt.per_worker(inner, axis_name=AXIS, **options),
        efopt.compress(efopt.compressors.identity(), axis_name=AXIS),
    )
    update, out = jax.jit(jax.vmap(tx.update, axis_name=AXIS)), []
    if state is None:
        state = efopt.stack_workers(tx.init(jnp.zeros(shape[-1])), n)
    for _ in range(steps):
        mean, state = update(jnp.zeros(shape), state)
        out.append(np.asarray(mean[0]))
    return out, state


@pytest.mark.parametrize("name", [slow(n, when=n != "add_noise") for n in NOISE])
def test_workers_draw_noise_of_their_own(name):
    make, shape = NOISE[name]
    (mean,), _ = noise(make(jax.random.key(0)), shape)
    np.testing.assert_allclose(mean.std(), 0.5, rtol=0.05)  # of four of deviation 1
    (mean,), _ = noise(make(jax.random.key(0)), shape, fold_keys=False)
    np.testing.assert_allclose(mean.std(), 1.0, rtol=0.05)


def test_a_worker_draws_as_from_the_key_folded_with_its_index():
    inner = optax.add_noise(1.0, 0.0, jax.random.key(3))
    tx = efopt.per_worker(inner, axis_name=AXIS)
    state = efopt.stack_workers(tx.init(jnp.zeros(D)), N)
    alone = inner.init(jnp.zeros(D))
    update = jax.vmap(tx.update, axis_name=AXIS)
    for _ in range(3):
        got, state = update(jnp.zeros((N, D)), state)
        for i in range(N):
            own = alone._replace(rng_key=jax.random.fold_in(alone.rng_key, i))
            np.testing.assert_array_equal(got[i], inner.update(jnp.zeros(D), own)[0])
        _, alone = inner.update(jnp.zeros(D), alone)
        # What is kept is what `inner` alone keeps, on every worker.
        kept = jax.random.key_data(state.value.rng_key)
        want = jax.random.key_data(alone.rng_key)
        np.testing.assert_array_equal(kept, np.broadcast_to(want, kept.shape))


@pytest.mark.parametrize("name", [slow(n, when=n != "add_noise") for n in NOISE])
def test_noise_resumes_where_it_stood(name):
    make, shape = NOISE[name]
    whole, _ = noise(make(jax.random.key(0)), shape, steps=4)
    head, state = noise(make(jax.random.key(0)), shape, steps=2)
    copy = jax.tree.map(jnp.copy, state)
    tail, _ = noise(make(jax.random.key(0)), shape, steps=2, state=copy)
    np.testing.assert_array_equal(head + tail, whole)
    assert len({x.tobytes() for x in whole}) == 4


def test_keys_are_folded_under_shard_map_and_when_made_inside():
    inner = optax.add_noise(1.0, 0.0, jax.random.key(0))
    tx, mesh = efopt.per_worker(inner, axis_name=AXIS), line()
    state = efopt.distribute(tx.init(jnp.zeros(D)), mesh)
    specs = efopt.partition_specs(state)
    zeros = np.zeros((N, D), np.float32)

    def step(g, s):
        return tx.update(g, s)

    def made(g, s):
        del s
        return tx.update(g, tx.init(g))

    want = jax.jit(jax.vmap(tx.update, axis_name=AXIS))(
        zeros, efopt.stack_workers(tx.init(jnp.zeros(D)), N)
    )[0]
    for f in (step, made):
        f = jax.shard_map(
            f, mesh=mesh, in_specs=(P(AXIS), specs), out_specs=(P(AXIS), specs)
        )
        got, _ = jax.jit(f)(zeros, state)
        np.testing.assert_array_equal(np.ravel(got), np.ravel(want))


def test_keys_are_folded_for_stacked_gradients():
    inner = optax.add_noise(1.0, 0.0, jax.random.key(0))
    tx, mesh = efopt.per_worker(inner, axis_name=AXIS), line()
    state = efopt.distribute(tx.init(jnp.zeros(D)), mesh)
    zeros = jax.device_put(np.zeros((N, D), np.float32), NamedSharding(mesh, P(AXIS)))
    got, after = jax.jit(tx.update)(efopt.PerWorker(zeros, AXIS), state)
    stacked = efopt.stack_workers(tx.init(jnp.zeros(D)), N)
    want, _ = jax.vmap(tx.update, axis_name=AXIS)(zeros, stacked)
    np.testing.assert_array_equal(got.value, want)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_fold_keys_is_a_bool():
    with pytest.raises(TypeError, match="fold_keys"):
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS, fold_keys=1)


# Flax.


@pytest.mark.slow
@pytest.mark.parametrize("how", ["from flax import serialization", "import flax"])
def test_flax_may_be_imported_at_any_time(how):
    program = f"""
        import jax.numpy as jnp, efopt
        tx = efopt.error_feedback(efopt.top_k(k=1), axis_name="data")
        state = tx.init(jnp.zeros(4))
        {how}
        import flax.serialization as serialization
        data = serialization.to_bytes(state)
        assert isinstance(data, bytes)
        print(type(serialization.from_bytes(state, data).residual).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PerWorker", done.stderr[-500:]


def half_frozen():
    return {"base": {"w": jnp.zeros((8, 8))}, "head": {"w": jnp.zeros((8, 4))}}


HALF = {"base": {"w": P("model")}, "head": {"w": P("model")}}


@pytest.mark.parametrize("how", ["partition", "masked"])
def test_specs_of_what_a_mask_left_out_are_no_mistake(how):
    """Of a state alone, which holds nothing of these parameters."""
    tx = efopt.error_feedback(efopt.scaled_sign(8), axis_name="data")
    labels = {"base": "frozen", "head": "trained"}
    if how == "partition":
        inner = {"trained": tx, "frozen": efopt.feedback.frozen()}
        tx = optax.partition(inner, labels)
    else:
        tx = optax.masked(tx, {"base": False, "head": True})
    state = jax.eval_shape(tx.init, half_frozen())
    specs = efopt.partition_specs(state, HALF)
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    assert P("data", "model") in leaves
    with pytest.raises(ValueError, match="has no spec of head/w"):
        efopt.partition_specs(state, {"base": HALF["base"]})
    with pytest.raises(ValueError, match="none: tail/w"):
        efopt.partition_specs(state, {**HALF, "tail": {"w": P()}})
