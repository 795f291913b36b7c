"""Whether workers agree: one flipped bit on one of them is found, and named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, make_mesh, slow

import efopt
from efopt.watch import require_agreement, workers_agree

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int32", "uint8", "bool", "complex64")


def state(dtype="float32"):
    draws = np.random.default_rng(0)
    ones = jnp.dtype(dtype).type
    w = draws.integers(0, 2, (6, 5)).astype(ones)
    tx = efopt.error_feedback(efopt.top_k(k=2), axis_name=AXIS)
    opt = jax.tree.map(np.asarray, jax.jit(tx.init)({"w": np.zeros((6, 5), "f")}))
    return {"params": {"w": w, "b": np.zeros((), ones)}, "opt": opt}


def flipped(x, device, bit=0, at=-1):
    """The same array, with one bit changed in the memory of one device."""
    parts = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            raw = data.reshape(-1).view(np.uint8)
            raw[at] ^= np.uint8(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def inside(mesh, tree, axis_name=AXIS):
    specs = efopt.partition_specs(tree)
    ask = lambda tree: workers_agree(tree, axis_name=axis_name)  # noqa: E731
    return jax.jit(jax.shard_map(ask, mesh=mesh, in_specs=(specs,), out_specs=P()))


@pytest.mark.parametrize("dtype", [*DTYPES[:2], *map(slow, DTYPES[2:])])
@pytest.mark.parametrize("how", ["explicit", slow("auto"), slow("two_d")])
def test_one_flipped_bit_on_one_device_is_found_and_named(how, dtype):
    mesh = make_mesh(how, 4)
    tree = efopt.distribute(state(dtype), mesh)
    ask = inside(mesh, tree)
    require_agreement(tree)
    assert bool(ask(tree))
    for leaf, device, bit in (("w", 3, 0), ("b", 0, 0), ("w", 1, 7)):
        if dtype == "bool" and bit:
            continue
        x = flipped(tree["params"][leaf], device, bit)
        worse = {**tree, "params": {**tree["params"], leaf: x}}
        with pytest.raises(RuntimeError) as seen:
            require_agreement(worse)
        assert f"device {device} (process 0) of ['params']['{leaf}']." in str(
            seen.value
        )
        assert not bool(ask(worse))


def test_what_workers_own_may_differ_but_not_behind_one_of_them():
    mesh = make_mesh("two_d", 4)  # two devices behind each
    tree = efopt.distribute(state(), mesh)
    residual = tree["opt"].residual
    own = np.arange(4 * 30, dtype=np.float32).reshape(4, 6, 5)
    x = jax.device_put(own, residual.value["w"].sharding)

    def around(x):
        node = residual.with_value({"w": x})
        return {**tree, "opt": tree["opt"]._replace(residual=node)}

    require_agreement(around(x))
    assert bool(inside(mesh, around(x))(around(x)))
    with pytest.raises(RuntimeError, match=r"device \d \(process 0\) of .*residual"):
        require_agreement(around(flipped(x, 5)))


@pytest.mark.parametrize("how", ["shard_map", slow("nested"), slow("unchecked")])
def test_devices_behind_a_worker_are_compared_in_the_step(how):
    """Of a leaf in shards those of all workers; of a whole one all devices.

    Which copy behind a worker is read, the compiler decides where it may.
    """
    mesh = jax.make_mesh(
        (2, 4), ("dcn", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    specs = {"cut": P("fsdp"), "whole": P()}
    tree = {k: np.arange(8, dtype=np.float32) for k in specs}
    tree = efopt.distribute(tree, mesh, specs)

    def ask(tree):
        return workers_agree(tree, axis_name="dcn")

    options = {
        "shard_map": {"in_specs": (specs,)},
        "nested": {"in_specs": (P(),), "axis_names": {"dcn"}},
        "unchecked": {"in_specs": (specs,), "check_vma": False},
    }[how]
    ask = jax.jit(jax.shard_map(ask, mesh=mesh, out_specs=P(), **options))
    assert bool(ask(tree))
    for device in (0, 6):
        for leaf in specs:
            worse = {**tree, leaf: flipped(tree[leaf], device)}
            if how != "nested" or leaf == "cut":
                assert not bool(ask(worse))
            with pytest.raises(RuntimeError, match=rf"device \d .* of \['{leaf}'\]"):
                require_agreement(worse)
    if how == "shard_map":  # both workers alike, and not their other devices
        worse = {**tree, "whole": flipped(flipped(tree["whole"], 2), 6)}
        assert not bool(ask(worse))


def test_rows_of_a_stacked_state_are_compared():
    tree = efopt.stack_workers(state(), 4)
    ask = jax.jit(jax.vmap(lambda t: workers_agree(t, axis_name=AXIS), axis_name=AXIS))
    require_agreement(tree, stacked=1)
    assert ask(tree).all()
    w = np.array(tree["params"]["w"])
    w[2, 0, 0] += 1
    worse = {**tree, "params": {**tree["params"], "w": w}}
    with pytest.raises(RuntimeError, match=r"worker 2 of \['params'\]\['w'\]"):
        require_agreement(worse, stacked=1)
    assert not ask(worse).any()


def test_random_keys_are_compared():
    tree = {"key": jax.random.split(jax.random.key(0), 2)}
    ask = jax.vmap(lambda t: workers_agree(t, axis_name=AXIS), axis_name=AXIS)
    assert not jax.jit(ask)(tree).any()


def test_momentum_unmarked_in_front_of_the_exchange_is_found():
    """Without `per_worker`, and where no types tell: under vmap."""
    tx = optax.chain(
        optax.trace(0.9), efopt.error_feedback(efopt.sign(), axis_name=AXIS)
    )

    def step(state, g):
        _, state = tx.update(g, state)
        return workers_agree(state, axis_name=AXIS)

    draws = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    state = efopt.stack_workers(jax.jit(tx.init)(draws[0]), 4)
    assert not jax.jit(jax.vmap(step, axis_name=AXIS))(state, draws).any()


def test_where_nothing_can_differ_it_says_so():
    with pytest.raises(ValueError, match="nothing to compare"):
        require_agreement(state())
    with pytest.raises(ValueError, match="nothing to compare"):
        require_agreement(efopt.stack_workers(state(), 1), stacked=1)
    with pytest.raises(ValueError, match="`workers_agree` works over the mapped axis"):
        workers_agree(state(), axis_name=AXIS)
