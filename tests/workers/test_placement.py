"""Where state lives: per-worker nodes, their layout, and training loops around them.

The loss is ``<grads, params>``, so that each worker's gradient is the array it is given
and an independent NumPy recursion can say what the parameters must be.
"""

import pickle
import subprocess
import sys
import textwrap

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from workers_under_test import slow

import efopt

AXIS, N, LR = "data", 8, 0.1
SHAPES = {"b": (5,), "w": (3, 4)}


def random_tree(seed, *lead):
    rng = np.random.default_rng(seed)
    normal = lambda s: rng.standard_normal((*lead, *s)).astype(np.float32)  # noqa: E731
    return {name: normal(shape) for name, shape in SHAPES.items()}


PARAMS = random_tree(0)
GRADS = [random_tree(1 + t, N) for t in range(8)]  # a leading axis of workers


def feedback(compressor=None, **kwargs):
    compressor = efopt.scaled_sign() if compressor is None else compressor
    return efopt.error_feedback(compressor, axis_name=AXIS, **kwargs)


def two_phase():
    return feedback(efopt.scaled_sign(4), exchange="two_phase")


def local_gradient(params, grads):
    """The gradient of <grads, params> at this worker, taken as a training step does."""

    def loss(params):
        products = jax.tree.map(lambda p, g: jnp.vdot(p, g[0]), params, grads)
        return sum(jax.tree.leaves(products))

    return jax.grad(loss)(efopt.local_params(params, AXIS))


def step_of(tx):
    """One step on ``(params, state)``; ``grads`` has a worker axis of length 1."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(local_gradient(params, grads), state, params)
        return optax.apply_updates(params, updates), state

    return step


def on_mesh(mesh, step, state, *, batch=P(AXIS), out=None, **options):
    """The step under ``jax.jit`` and ``shard_map`` with its default checks."""
    specs = efopt.partition_specs(state)
    out = specs if out is None else out
    step = jax.shard_map(step, mesh=mesh, in_specs=(specs, batch), out_specs=out)
    return jax.jit(step, **options)


def under_vmap(step):
    """The step for stacked state and gradients ``(workers, ...)``."""
    split = lambda grads: jax.tree.map(lambda g: g[None], grads)  # noqa: E731
    return jax.jit(jax.vmap(lambda s, g: step(s, split(g)), axis_name=AXIS))


def mapped(how, mesh, step, state):
    """The compiled step and its placed state under ``shard_map`` or ``vmap``."""
    if how == "vmap":
        return under_vmap(step), efopt.stack_workers(state, N)
    state = efopt.distribute(state, mesh)
    return on_mesh(mesh, step, state), state


def first(how, tree):
    """The parameters as NumPy: those of worker 0, checked to be those of all."""
    tree = jax.tree.map(np.asarray, tree)
    if how == "vmap":
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, x[:1] + 0 * x), tree)
        tree = jax.tree.map(lambda x: x[0], tree)
    return tree


def expected(grads, lr=LR, names=("b", "w"), compressor=oracle.scaled_sign):
    """Parameters after each step by the paper's algorithm in float64: ``[t][name]``."""
    steps = [[[g[name][i] for name in names] for i in range(N)] for g in grads]
    start = [PARAMS[name] for name in names]
    iterates, _ = oracle.ef_sgd_algorithm_2(start, steps, lr, compressor)
    return [dict(zip(names, x, strict=True)) for x in iterates[1:]]


def assert_close(got, want):
    """Equal to rounding: 8 steps of numbers of order one, in float32."""
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-5)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# The node.


def test_per_worker_is_a_pytree_that_keeps_its_static_fields():
    node = efopt.PerWorker({"a": jnp.ones((1, 3))}, AXIS, split=7)
    doubled = jax.tree.map(lambda x: 2 * x, node)
    assert (doubled.axis_name, doubled.split) == (AXIS, 7)
    np.testing.assert_array_equal(doubled.value["a"], 2 * np.ones((1, 3)))
    (path, _), *rest = jax.tree_util.tree_flatten_with_path(node)[0]
    assert not rest and jax.tree_util.keystr(path) == ".value['a']"
    other = efopt.PerWorker({"a": jnp.ones((1, 3))}, "model", split=7)
    assert jax.tree.structure(other) != jax.tree.structure(node)
    assert pickle.loads(pickle.dumps(jax.tree.structure(node))) == jax.tree.structure(
        node
    )


# partition_specs.


def test_partition_specs_split_what_is_per_worker_and_nothing_else():
    momentum = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    tx = optax.chain(momentum, two_phase(), optax.adam(LR))
    state = tx.init(PARAMS)
    specs = efopt.partition_specs(state)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    trace, ef, adam = specs
    assert set(jax.tree.leaves(trace)) == {P(AXIS)}
    assert set(jax.tree.leaves((ef.residual, ef.link.server))) == {P(AXIS)}
    assert set(jax.tree.leaves((ef.count, adam))) == {P()}


def test_partition_specs_of_structs_are_those_of_arrays():
    tx = optax.chain(two_phase(), optax.adam(LR))
    structs = jax.eval_shape(tx.init, PARAMS)
    assert efopt.partition_specs(structs) == efopt.partition_specs(tx.init(PARAMS))


def test_params_specs_stand_behind_the_worker_axis():
    params_specs = {"b": P(), "w": P(None, "model")}
    momentum = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    tx = optax.chain(momentum, feedback(efopt.compressors.identity()), optax.trace(0.5))
    trace, ef, outer = efopt.partition_specs(tx.init(PARAMS), params_specs)
    assert trace.value.trace == {"b": P(AXIS), "w": P(AXIS, None, "model")}
    assert ef.residual.value == trace.value.trace
    assert outer.trace == params_specs
    assert ef.count == P()


def test_params_specs_of_a_bare_array_leave_the_counter_alone():
    params = jnp.zeros(8)
    specs = efopt.partition_specs(feedback().init(params), P("model"))
    assert specs.residual.value == P(AXIS, "model")
    assert specs.count == P()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_training_with_sharded_parameters_on_a_2d_mesh(kind):
    mesh = jax.make_mesh((4, 2), (AXIS, "model"), axis_types=(kind, kind))
    params_specs = {"b": P(), "w": P(None, "model")}
    momentum = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    tx = optax.chain(momentum, feedback(efopt.compressors.identity()), optax.scale(-LR))
    carry = (PARAMS, tx.init(PARAMS))
    specs = efopt.partition_specs(carry, params_specs)
    carry = efopt.distribute(carry, mesh, params_specs)
    residual = carry[1][1].residual.value["w"]
    assert residual.sharding.spec == P(AXIS, None, "model")
    assert residual.addressable_shards[0].data.shape == (1, 3, 2)
    batch = {"b": P(AXIS), "w": P(AXIS, None, "model")}

    def step(carry, grads):
        params, state = carry
        own = jax.tree.map(lambda g: g[0], grads)
        updates, state = tx.update(own, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.shard_map(step, mesh=mesh, in_specs=(specs, batch), out_specs=specs)
    step = jax.jit(step, donate_argnums=0)
    want, velocity = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for grads in GRADS[:2]:
        grads = jax.tree.map(lambda g: g[:4], grads)
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), batch)
        carry = step(carry, jax.device_put(grads, shardings))
        mean = jax.tree.map(lambda g: g.mean(0), grads)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, mean)
        want = jax.tree.map(lambda p, v: p - LR * v, want, velocity)
    assert_close(carry[0], want)


# distribute and stack_workers.


@pytest.mark.parametrize("placed", ["host", "on the mesh"])
def test_donated_steps_leave_the_parameters_of_the_caller_alone(mesh, placed):
    params = PARAMS
    if placed == "on the mesh":  # where `device_put` has nothing to do, and no copy
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    tx = feedback()
    carry = efopt.distribute((params, tx.init(params)), mesh)
    early = carry
    step = on_mesh(mesh, step_of(tx), carry, donate_argnums=0)
    for grads in GRADS[:2]:
        carry = step(carry, grads)
    assert early[0]["w"].is_deleted()  # the donation was a real one
    chex.assert_trees_all_equal(params, PARAMS)


def test_distribute_makes_strong_arrays_of_python_numbers(mesh):
    tree = {"step": 0, "rate": 0.5, "weak": jnp.asarray(1.0)}
    placed = efopt.distribute(tree, mesh)
    for x in placed.values():
        assert isinstance(x, jax.Array) and not x.weak_type
        assert x.sharding == NamedSharding(mesh, P())
    assert placed["step"].dtype == jnp.int32 and placed["rate"].dtype == jnp.float32


def test_distribute_of_structs_describes_what_it_makes_of_arrays(mesh):
    tx = optax.chain(two_phase(), optax.adam(LR))
    make = lambda: {"step": 0, "params": PARAMS, "state": tx.init(PARAMS)}  # noqa: E731
    described = efopt.distribute(jax.eval_shape(make), mesh)
    made = efopt.distribute(make(), mesh)
    for x in jax.tree.leaves(described):
        assert isinstance(x, jax.ShapeDtypeStruct)
    fields = lambda x: (x.shape, x.dtype, x.weak_type, x.sharding)  # noqa: E731
    assert jax.tree.map(fields, described) == jax.tree.map(fields, made)


@pytest.mark.parametrize("exchange", ["all_gather", "two_phase"])
def test_distribute_twice_changes_nothing_and_copies_again(mesh, exchange):
    tx = feedback(efopt.scaled_sign(4), exchange=exchange)
    once = efopt.distribute((PARAMS, tx.init(PARAMS)), mesh)
    # Workers differ: if worker 0 were spread to all once more, it would show.
    differing = lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)  # noqa: E731
    once = jax.tree.map(differing, once)
    twice = efopt.distribute(once, mesh)
    chex.assert_trees_all_equal(twice, once, strict=True)
    shardings = [jax.tree.map(lambda x: x.sharding, t) for t in (once, twice)]
    assert shardings[0] == shardings[1]
    before = jax.tree.map(np.asarray, once)
    jax.tree.map(lambda x: x.delete(), twice)
    chex.assert_trees_all_equal(once, before, strict=True)


@pytest.mark.parametrize("blocks", [1, 3, 7, 8, 9, 13, 16])
def test_blocks_of_a_split_value_are_padded_and_cut_into_ranges(mesh, blocks):
    whole = 1 + np.arange(blocks * 4, dtype=np.float32).reshape(1, blocks, 4)
    node = efopt.PerWorker((jnp.asarray(whole),), AXIS, split=blocks)
    rows = -(-blocks // N)
    want = np.zeros((N * rows, 4), np.float32)
    want[:blocks] = whole[0]
    want = want.reshape(N, rows, 4)
    (placed,) = efopt.distribute(node, mesh).value
    np.testing.assert_array_equal(placed, want)
    assert placed.sharding == NamedSharding(mesh, P(AXIS))
    (stacked,) = efopt.stack_workers(node, N).value
    np.testing.assert_array_equal(stacked, want[:, None])


def test_stack_workers_gives_every_leaf_a_worker_axis():
    tx = optax.chain(feedback(), optax.adam(LR))
    tree = {"step": 3, "params": PARAMS, "state": tx.init(PARAMS)}
    stacked = efopt.stack_workers(tree, 3)
    assert jax.tree.structure(stacked) == jax.tree.structure(tree)
    assert not any(x.weak_type for x in jax.tree.leaves(stacked))
    np.testing.assert_array_equal(stacked["step"], [3, 3, 3])
    np.testing.assert_array_equal(stacked["params"]["w"], np.stack([PARAMS["w"]] * 3))
    ef, (adam, _) = stacked["state"]
    assert ef.residual.value["w"].shape == (3, 1, 3, 4)
    assert adam.mu["w"].shape == (3, 3, 4)


# What is made inside the mapped function.


EVERYTHING = {
    "all_gather": feedback(),
    "two_phase": two_phase(),
    "per_worker": efopt.per_worker(optax.adam(LR), axis_name=AXIS),
    "accumulate": efopt.accumulate(feedback(), every=3, axis_name=AXIS),
    "chain": optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS), two_phase(), optax.adam(LR)
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_state_made_inside_the_mapped_function_equals_a_placed_one(mesh, name):
    tx = EVERYTHING[name]
    placed = efopt.distribute(tx.init(PARAMS), mesh)
    specs = efopt.partition_specs(placed)
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    made = jax.jit(init)(PARAMS)
    chex.assert_trees_all_equal(made, placed, strict=True)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(placed), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize(
    "name, made",
    [
        slow("chain", "outside"),
        ("chain", "inside"),
        slow("accumulate", "outside"),
        slow("accumulate", "inside"),
    ],
)
def test_scan_over_steps_inside_the_mapped_function(mesh, name, made):
    tx = EVERYTHING[name]
    carry = efopt.distribute((PARAMS, tx.init(PARAMS)), mesh)
    specs = efopt.partition_specs(carry)
    stacked = jax.tree.map(lambda *g: np.stack(g), *GRADS[:3])  # (step, worker, ...)

    def loop(carry, grads):
        params, state = carry
        if made == "inside":
            state = tx.init(params)
        return lax.scan(lambda c, g: (step_of(tx)(c, g), None), (params, state), grads)[
            0
        ]

    loop = on_mesh(mesh, loop, carry, batch=P(None, AXIS))
    step = on_mesh(mesh, step_of(tx), carry)
    got = loop(carry, stacked)
    for grads in GRADS[:3]:
        carry = step(carry, grads)
    assert efopt.partition_specs(got) == specs
    assert types(got) == types(carry)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
    jax.tree.map(close, got, carry)
    assert not np.array_equal(got[0]["w"], PARAMS["w"])


# per_worker.


INNER = {"trace": optax.trace(0.9), "adam": optax.scale_by_adam()}


@pytest.mark.parametrize("how", ["shard_map", "vmap"])
@pytest.mark.parametrize("name", INNER)
def test_per_worker_runs_the_inner_transformation_on_each_worker(mesh, name, how):
    inner = INNER[name]
    tx = efopt.per_worker(inner, axis_name=AXIS)

    def step(state, grads):
        updates, state = tx.update(jax.tree.map(lambda g: g[0], grads), state, PARAMS)
        return jax.tree.map(lambda u: u[None], updates), state

    state = tx.init(PARAMS)
    if how == "vmap":
        fn, state = mapped(how, mesh, step, state)
    else:
        state = efopt.distribute(state, mesh)
        out = (P(AXIS), efopt.partition_specs(state))
        fn = on_mesh(mesh, step, state, out=out)
    alone = [inner.init(PARAMS) for _ in range(N)]
    update = jax.jit(inner.update)
    for grads in GRADS[:3]:
        got, state = fn(state, grads)
        for i in range(N):
            own = jax.tree.map(lambda g, i=i: g[i], grads)
            want, alone[i] = update(own, alone[i], PARAMS)
            for key, x in want.items():
                mine = np.asarray(got[key][i]).reshape(x.shape)
                np.testing.assert_allclose(mine, x, rtol=1e-6, atol=1e-7)


def test_per_worker_passes_extra_arguments_on(mesh):
    def update(updates, state, params=None, *, gain, **extra_args):
        return jax.tree.map(lambda u: gain * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = efopt.per_worker(inner, axis_name=AXIS)
    state = efopt.stack_workers(tx.init(PARAMS), N)
    fn = jax.vmap(lambda g, s: tx.update(g, s, gain=3.0), axis_name=AXIS)
    updates, _ = fn(GRADS[0], state)
    np.testing.assert_array_equal(updates["w"], np.float32(3.0) * GRADS[0]["w"])


# accumulate.


@pytest.mark.parametrize("how", ["shard_map", slow("vmap")])
def test_accumulate_takes_one_step_of_the_mean_every_k_calls(mesh, how):
    inner = optax.chain(feedback(), optax.sgd(LR))
    tx = efopt.accumulate(inner, every=4, axis_name=AXIS)
    fn, carry = mapped(how, mesh, step_of(tx), (PARAMS, tx.init(PARAMS)))
    wanted = (PARAMS, inner.init(PARAMS))
    whole, wanted = mapped(how, mesh, step_of(inner), wanted)
    before = carry[0]
    structure = types(carry)
    for t, grads in enumerate(GRADS):
        carry = fn(carry, grads)
        assert types(carry) == structure
        if t % 4 != 3:
            chex.assert_trees_all_equal(carry[0], before, strict=True)
            chex.assert_trees_all_equal(carry[1].inner, wanted[1], strict=True)
            continue
        mean = jax.tree.map(lambda *g: sum(x / 4 for x in g), *GRADS[t - 3 : t + 1])
        wanted = whole(wanted, mean)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # noqa: E731
        jax.tree.map(close, (carry[0], carry[1].inner), wanted)
        assert not np.array_equal(carry[0]["w"], before["w"])
        before = carry[0]
        assert not any(x.any() for x in jax.tree.leaves(carry[1].accumulator))
    assert fn._cache_size() == 1
    first(how, carry[0])


def test_accumulate_sends_nothing_outside_the_branch(mesh):
    tx = efopt.accumulate(feedback(), every=4, axis_name=AXIS)
    carry = efopt.distribute((PARAMS, tx.init(PARAMS)), mesh)
    report = efopt.wire.measure(on_mesh(mesh, step_of(tx), carry), carry, GRADS[0])
    assert [c.operation for c in report.collectives] == ["all-gather"]
    assert all(c.loop for c in report.collectives)


@pytest.mark.slow
def test_accumulate_of_one_is_the_inner_transformation(mesh):
    inner = optax.chain(feedback(), optax.sgd(LR))
    tx = efopt.accumulate(inner, every=1, axis_name=AXIS)
    fn, carry = mapped("vmap", mesh, step_of(tx), (PARAMS, tx.init(PARAMS)))
    for grads, want in zip(GRADS[:3], expected(GRADS[:3]), strict=True):
        carry = fn(carry, grads)
        assert_close(first("vmap", carry[0]), want)


def test_accumulate_keeps_small_gradients_of_a_narrow_dtype():
    # 256 + 1 is 256 in bfloat16: a sum in the leaf's dtype would lose the second half.
    tx = efopt.accumulate(
        feedback(efopt.compressors.identity()), every=2, axis_name=AXIS
    )
    params = jnp.zeros(2, jnp.bfloat16)
    state = efopt.stack_workers(tx.init(params), 2)
    assert state.accumulator.value.dtype == jnp.float32
    update = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    for value in (512.0, 4.0):
        updates, state = update(jnp.full((2, 2), value, jnp.bfloat16), state)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(updates, np.float32), 258.0)


# local_params.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradients_at_local_params_are_those_of_each_worker(kind):
    mesh = jax.make_mesh((N,), (AXIS,), axis_types=(kind,))

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"])) + jnp.vdot(params["b"], params["b"])

    def gradients(params, x):
        local = efopt.local_params(params, AXIS)
        grads = jax.grad(loss)(local, x)
        total = jax.grad(loss)(params, x)  # what the mark prevents
        return jax.tree.map(lambda g: g[None], grads), total

    xs = np.random.default_rng(3).standard_normal((2 * N, 3)).astype(np.float32)
    fn = jax.jit(
        jax.shard_map(
            gradients, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(AXIS), P())
        )
    )
    params = efopt.distribute(PARAMS, mesh)
    got, total = fn(params, jax.device_put(xs, NamedSharding(mesh, P(AXIS))))
    alone = jax.jit(jax.grad(loss))
    want = [alone(PARAMS, xs[2 * i : 2 * i + 2]) for i in range(N)]
    for key in PARAMS:
        each = np.stack([w[key] for w in want])
        np.testing.assert_allclose(got[key], each, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(total[key], each.sum(0), rtol=1e-5, atol=1e-5)


def test_local_params_changes_nothing_under_vmap_and_pmap():
    for mapping in (jax.vmap, jax.pmap):
        got = mapping(lambda x: efopt.local_params(x, AXIS), axis_name=AXIS)(GRADS[0])
        chex.assert_trees_all_equal(got, GRADS[0], strict=True)


# Training loops.


@pytest.fixture(scope="module")
def lowered():
    """The names of the programs that JAX has lowered since, whatever caches hold."""
    names = []

    def listen(event, duration, fun_name="", **details):
        del duration, details
        if event.endswith("jaxpr_to_mlir_module_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


@pytest.mark.parametrize(
    "n, kind",
    [
        slow(n, kind, when=(n == N) == (kind is AxisType.Explicit))
        for n in (1, N)
        for kind in (AxisType.Auto, AxisType.Explicit)
    ],
    ids=str,
)
def test_the_step_compiles_once(lowered, n, kind):
    devices = jax.devices()[:n]
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(kind,), devices=devices)
    tx = optax.chain(two_phase(), optax.sgd(LR, momentum=0.5))
    # An empty leaf, which a step may return with another sharding than it was given.
    params = {"e": np.zeros((0, 3), np.float32), "w": PARAMS["w"]}
    carry = efopt.distribute((params, tx.init(params)), mesh)
    step = on_mesh(mesh, step_of(tx), carry, donate_argnums=0)
    grads = {"e": np.zeros((n, 0, 3), np.float32), "w": GRADS[0]["w"][:n]}
    grads = jax.device_put(grads, NamedSharding(mesh, P(AXIS)))
    lowered.clear()
    carry = step(carry, grads)
    assert len(lowered) == 1
    for _ in range(2):
        carry = step(carry, grads)
    assert len(lowered) == 1
    if n == N and kind is AxisType.Auto:  # nor does dispatch see another sharding
        assert step._cache_size() == 1
    assert carry[0]["e"].shape == (0, 3)


@pytest.mark.parametrize("how", ["shard_map", "vmap"])
@pytest.mark.parametrize("state", [slow("bare"), "chain"])
def test_training_follows_the_paper(mesh, how, state):
    if state == "bare":
        tx = feedback()
        grads = [jax.tree.map(lambda g: -np.float32(LR) * g, g) for g in GRADS[:3]]
    else:
        tx, grads = optax.chain(feedback(), optax.sgd(LR)), GRADS[:3]
    fn, carry = mapped(how, mesh, step_of(tx), (PARAMS, tx.init(PARAMS)))
    for g, want in zip(grads, expected(GRADS[:3]), strict=True):
        carry = fn(carry, g)
        assert_close(first(how, carry[0]), want)
    assert fn._cache_size() == 1


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.tanh(nn.Dense(4)(x)))


NET = Net()
APPLY = NET.apply


def flax_step(state, batch):
    """The step of the documentation."""

    def loss_fn(params, x):
        return jnp.mean((state.apply_fn({"params": params}, x) - 1) ** 2)

    local = efopt.local_params(state.params, AXIS)
    loss, grads = jax.value_and_grad(loss_fn)(local, batch)
    return state.apply_gradients(grads=grads), lax.pmean(loss, AXIS)


def flax_state(tx):
    params = NET.init(jax.random.key(0), jnp.zeros((1, 5)))["params"]
    return TrainState.create(apply_fn=APPLY, params=params, tx=tx)


def batches(num, rows=2 * N):
    rng = np.random.default_rng(7)
    return [rng.standard_normal((rows, 5)).astype(np.float32) for _ in range(num)]


def flax_loop(mesh, state):
    specs = efopt.partition_specs(state)
    return on_mesh(mesh, flax_step, state, out=(specs, P()), donate_argnums=0)


def test_flax_train_state_takes_stacked_gradients(mesh):
    """In a plain jitted step, where Flax first asks what kind of tree they are."""
    tx = optax.chain(feedback(), optax.sgd(LR))
    state = efopt.distribute(jax.eval_shape(lambda: flax_state(tx)), mesh)

    def loss_fn(params, x):
        return jnp.mean((NET.apply({"params": params}, x) - 1) ** 2)

    def step(state, x):
        grads = efopt.value_and_grad(loss_fn, axis_name=AXIS)(state.params, x)[1]
        assert "Dense_0" in grads and "params" not in grads
        assert isinstance(grads["Dense_0"], efopt.PerWorker)
        return state.apply_gradients(grads=grads)

    after = jax.eval_shape(step, state, batches(1)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(after.params, state.params)


@pytest.mark.slow
def test_flax_train_state_donated(mesh):
    momentum = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    tx = optax.chain(momentum, feedback(), optax.sgd(LR))
    fresh = flax_state(tx)
    state = efopt.distribute(fresh, mesh)
    simulated = efopt.stack_workers(fresh, N)
    step = flax_loop(mesh, state)
    simulate = jax.jit(jax.vmap(flax_step, axis_name=AXIS))
    losses = []
    for x in batches(3):
        state, loss = step(state, x)
        simulated, _ = simulate(simulated, x.reshape(N, 2, 5))
        losses.append(float(loss))
    assert step._cache_size() == 1
    assert int(state.step) == 3
    # The collectives of vmap round differently in the last bit.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # noqa: E731
    want = jax.tree.map(lambda x: x[0], simulated.params)
    jax.tree.map(close, state.params, want)
    assert losses[-1] < losses[0]
    assert np.isfinite(jax.tree.leaves(fresh.params)[0]).all()  # still readable


def test_partition_with_dense_leaves_is_right_for_both(mesh):
    # The replacement for `optax.masked(error_feedback(...))`.
    dense = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)
    kinds = {"sparse": feedback(efopt.top_k(k=2)), "dense": dense}
    tx = optax.chain(
        optax.partition(kinds, {"b": "dense", "w": "sparse"}), optax.sgd(LR)
    )
    fn, carry = mapped("shard_map", mesh, step_of(tx), (PARAMS, tx.init(PARAMS)))
    w = expected(GRADS[:3], names=["w"], compressor=lambda x: oracle.top_k(x, k=2))
    b = expected(GRADS[:3], names=["b"], compressor=oracle.identity)
    for t, grads in enumerate(GRADS[:3]):
        carry = fn(carry, grads)
        assert_close(carry[0], {**b[t], **w[t]})
    assert fn._cache_size() == 1
    # Only the leaf that is compressed has a residual.
    residual = optax.tree.get(carry[1], "residual").value
    assert [x.shape for x in jax.tree.leaves(residual)] == [(N, 3, 4)]


@pytest.mark.parametrize("how", ["shard_map", slow("vmap")])
def test_injected_learning_rate_is_traced_and_rescales_the_residual(mesh, how):
    @optax.inject_hyperparams
    def factory(learning_rate):
        ef = feedback(learning_rate=learning_rate)
        return optax.chain(ef, optax.sgd(learning_rate))

    tx = factory(learning_rate=LR)
    fn, carry = mapped(how, mesh, step_of(tx), (PARAMS, tx.init(PARAMS)))
    rates = [0.1, 0.1, 0.025, 0.4]
    want = expected(GRADS[:4], lr=lambda t: rates[t])
    for t, rate in enumerate(rates):
        params, state = carry
        old = state.hyperparams["learning_rate"]
        # Another value; dtype and sharding stay, or the step would compile again.
        state.hyperparams["learning_rate"] = 0 * old + rate
        carry = fn((params, state), GRADS[t])
        assert_close(first(how, carry[0]), want[t])
    assert fn._cache_size() == 1


# flax.nnx.


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def nnx_loss(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def nnx_split(tx):
    """`nnx.split` the model; the optimizer's state is made from the params State."""
    graphdef, params = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param)

    def step(carry, x):
        params, state = carry
        loss_fn = lambda p: nnx_loss(nnx.merge(graphdef, p), x)  # noqa: E731
        grads = jax.grad(loss_fn)(efopt.local_params(params, AXIS))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, tx.init(params)), lambda carry: carry[0]


def nnx_model_as_pytree(tx):
    model = NnxNet(nnx.Rngs(0))

    def step(carry, x):
        model, state = carry
        grads = jax.grad(nnx_loss)(efopt.local_params(model, AXIS), x)
        updates, state = tx.update(grads, state, model)
        return optax.apply_updates(model, updates), state

    return step, (model, tx.init(model)), lambda carry: nnx.state(carry[0])


def nnx_optimizer_as_pytree(tx):
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(carry, x):
        model, optimizer = carry
        grads = jax.grad(nnx_loss)(efopt.local_params(model, AXIS), x)
        optimizer.update(model, grads)
        return model, optimizer

    return step, (model, optimizer), lambda carry: nnx.state(carry[0])


NNX = {
    "split": nnx_split,
    "model": nnx_model_as_pytree,
    "optimizer": nnx_optimizer_as_pytree,
}


@pytest.mark.parametrize("way", [slow(n, when=n != "optimizer") for n in NNX])
def test_nnx(mesh, way):
    tx = optax.chain(feedback(efopt.top_k(k=2)), optax.sgd(LR))
    step, carry, params_of = NNX[way](tx)
    names = [jax.tree_util.keystr(p) for p, _ in nnx.to_flat_state(params_of(carry))]
    start = [np.array(x) for x in jax.tree.leaves(params_of(carry))]
    assert len(names) == 4
    graphdef = nnx.split(NnxNet(nnx.Rngs(0)))[0]
    structure = jax.tree.structure(params_of(carry))
    alone = jax.jit(jax.grad(lambda p, x: nnx_loss(nnx.merge(graphdef, p), x)))

    def gradients(leaves, x):
        leaves = [jnp.asarray(p, jnp.float32) for p in leaves]
        return jax.tree.leaves(alone(jax.tree.unflatten(structure, leaves), x))

    carry = efopt.distribute(carry, mesh)
    fn = on_mesh(mesh, step, carry, donate_argnums=0)
    iterates, steps = [start], []
    for x in batches(3):
        steps.append([gradients(iterates[-1], own) for own in x.reshape(N, 2, 5)])
        rates = (start, steps, LR, lambda x: oracle.top_k(x, k=2))
        iterates.append(oracle.ef_sgd_algorithm_2(*rates)[0][-1])
        carry = fn(carry, x)
        got = [np.asarray(p) for p in jax.tree.leaves(params_of(carry))]
        assert_close(got, iterates[-1])
    assert fn._cache_size() == 1


def test_nnx_split_of_the_optimizer_is_refused(mesh):
    # `nnx.split` turns the node into a dict. That is a limit; it must not be silent.
    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, feedback(), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    def step(state, x):
        model, optimizer = nnx.merge(graphdef, state)
        grads = jax.grad(nnx_loss)(efopt.local_params(model, AXIS), x)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer))

    step = on_mesh(mesh, step, state)
    with pytest.raises(ValueError, match="not laid out over the workers"):
        jax.eval_shape(step, efopt.distribute(state, mesh), batches(1)[0])


# Wrappers that cannot stand around an exchange.


REFUSED = {
    "MultiSteps": (
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        "use `efopt.accumulate` in place of `optax.MultiSteps`",
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 3),
        "`distribute` got `optax.apply_if_finite` around what meets other workers.*"
        r"`efopt.watch.skip_not_finite\(\.\.\., axis_name=\.\.\.\)`",
    ),
    "masked": (
        lambda tx: optax.masked(tx, {"b": False, "w": True}),
        "require replication which can't be statically inferred",
    ),
    "trace in front": (
        lambda tx: optax.chain(optax.trace(0.9), tx),
        "require replication which can't be statically inferred",
    ),
}
INSTEAD = {
    "MultiSteps": lambda tx: efopt.accumulate(tx, every=2, axis_name=AXIS),
    "apply_if_finite": lambda tx: efopt.watch.skip_not_finite(tx, axis_name=AXIS),
    "masked": lambda tx: optax.partition(
        {
            "ef": tx,
            "dense": efopt.compress(efopt.compressors.identity(), axis_name=AXIS),
        },
        {"b": "dense", "w": "ef"},
    ),
    "trace in front": lambda tx: optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS), tx
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrapper_around_an_exchange_is_refused_and_its_replacement_is_not(mesh, name):
    def trace(wrap):
        tx = wrap(feedback())
        carry = efopt.distribute((PARAMS, tx.init(PARAMS)), mesh)
        jax.eval_shape(on_mesh(mesh, step_of(tx), carry), carry, GRADS[0])

    # By whichever of the wrapper, JAX or efopt notices first.
    wrap, words = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=words):
        trace(wrap)
    trace(INSTEAD[name])


# Checkpoints.


def through_flax(state, mesh, folder):
    del folder
    data = flax.serialization.to_bytes(state)
    fresh = efopt.distribute(flax_state(state.tx), mesh)
    return efopt.distribute(flax.serialization.from_bytes(fresh, data), mesh)


def through_orbax(state, mesh, folder):
    # `tx` and `apply_fn` are no arrays: a checkpoint holds the rest.
    parts = lambda s: {"params": s.params, "opt": s.opt_state, "step": s.step}  # noqa: E731
    fresh = efopt.distribute(flax_state(state.tx), mesh)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", parts(state))
        checkpointer.wait_until_finished()
        # The target is a description: no array is made for it.
        target = jax.eval_shape(lambda: parts(flax_state(state.tx)))
        target = efopt.distribute(target, mesh)
        got = checkpointer.restore(folder / "state", target)
    return fresh.replace(params=got["params"], opt_state=got["opt"], step=got["step"])


@pytest.mark.parametrize("exchange", [slow("all_gather"), "two_phase"])
@pytest.mark.parametrize(
    "through", [through_flax, through_orbax], ids=["flax", "orbax"]
)
def test_checkpoint_restores_every_bit(mesh, tmp_path, through, exchange):
    momentum = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    ef = feedback(efopt.scaled_sign(4), exchange=exchange)
    tx = optax.chain(momentum, ef, optax.sgd(LR))
    state = efopt.distribute(flax_state(tx), mesh)
    step = flax_loop(mesh, state)
    xs = batches(4)
    for x in xs[:2]:
        state, loss = step(state, x)
        loss.block_until_ready()
    residual = optax.tree.get(state.opt_state, "residual").value["Dense_0"]["kernel"]
    assert not np.array_equal(residual[0], residual[1])  # workers really differ
    restored = through(state, mesh, tmp_path)
    chex.assert_trees_all_equal(restored, state, strict=True)
    shardings = [jax.tree.map(lambda x: x.sharding, s) for s in (restored, state)]
    for a, b, x in zip(*map(jax.tree.leaves, (*shardings, state)), strict=True):
        assert a.is_equivalent_to(b, x.ndim)
    for x in xs[2:]:
        state, loss = step(state, x)
        restored, again = step(restored, x)
        assert float(loss) == float(again)
    chex.assert_trees_all_equal(restored, state, strict=True)
    assert step._cache_size() == 1


def test_flax_stores_the_value_of_a_node_and_nothing_else():
    tx = two_phase()
    state = jax.tree.map(lambda x: x + 1, tx.init(PARAMS))
    stored = flax.serialization.to_state_dict(state)
    assert set(stored["residual"]) == {"value"}
    back = flax.serialization.from_state_dict(tx.init(PARAMS), stored)
    chex.assert_trees_all_equal(back, state, strict=True)
    assert isinstance(back.residual, efopt.PerWorker)


def test_flax_knows_the_node_when_it_is_imported_late():
    """From the first node that is built after its import: a step, a map, an init."""
    program = """
        import jax, jax.numpy as jnp, efopt
        tx = efopt.error_feedback(efopt.scaled_sign(), axis_name="data")
        state = tx.init(jnp.zeros(3))
        from flax import serialization
        state = jax.tree.map(lambda x: x, state)
        data = serialization.to_bytes(state)
        print(type(serialization.from_bytes(state, data).residual).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PerWorker", done.stderr[-500:]
