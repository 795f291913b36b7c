"""Contractive error feedback: what a compressed memory keeps, and what it costs."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from workers_under_test import AXIS, FAST, run, slow

import efopt
from efopt.codecs import layout
from efopt.codecs.blocks import Turn
from efopt.feedback import stored as store

SKETCH = efopt.compressors.count_sketch(fraction=0.2)
MEMORIES = {
    "sketch": SKETCH,
    "sketch_rows": efopt.compressors.count_sketch(fraction=0.1, rows=2, block_size=64),
    "sketch_random": efopt.compressors.count_sketch(fraction=0.2, hash="random"),
    "int8": efopt.quantize(8, block_size=64),
    "int4": efopt.quantize(4, block_size=64),
    "bfloat16": efopt.compressors.cast("bfloat16"),
    "top_k": efopt.top_k(fraction=0.2),
    "identity": efopt.compressors.identity(),
    "mixed": efopt.compressors.partition(
        {"sketch": SKETCH, "int8": efopt.quantize(8)},
        lambda tree: jax.tree.map(lambda x: "sketch" if x.ndim < 3 else "int8", tree),
    ),
}
# Whose steps are the same to the bit however they are compiled.
EXACT = ("int8", "int4", "bfloat16", "top_k", "identity")
SHAPES = {"w": (19, 21), "v": (3, 10, 10)}


def scheme(memory, **options):
    return efopt.contractive_error_feedback(
        efopt.random_block(fraction=0.3), memory=memory, **options
    )


def tree(rng, lead=(), shapes=None):
    return {
        k: rng.standard_normal((*lead, *s)).astype(np.float32)
        for k, s in (shapes or SHAPES).items()
    }


def steps(tx, grads):
    """Updates of every step, and the last state."""
    state, update, out = jax.jit(tx.init)(grads[0]), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state)
        out.append(updates)
    return out, state


@functools.partial(jax.jit, static_argnums=0)
def written(memory, x):
    """The payload of one leaf in a linear memory, which has its own stream."""
    (codec,) = memory.codec.assign(x)
    plan = layout.lay_out([codec], [x.shape], [x.dtype])
    turn = Turn(jnp.uint32(0), jnp.uint32(0), store.PRIVATE)
    joined = zip(plan.buckets, plan.join([x]), strict=True)
    payloads = [b.codec.encode(v, b.blocks(), turn) for b, v in joined]
    return plan.part_blocked(payloads, [()])[0]


# ---------------------------------------------------------------- what is conserved


@pytest.mark.parametrize(
    "name, damping",
    [
        slow("sketch", 0.0),
        ("sketch", 0.9),
        slow("sketch_random", 0.9),
        slow("sketch_rows", 0.9),
        slow("sketch", 0.5),
        slow("sketch", 1.0),
        slow("sketch_random", 0.0),
        slow("sketch_rows", 0.0),
        slow("identity", 0.9),
    ],
)
def test_a_linear_memory_holds_the_sum_of_what_was_not_paid(name, damping):
    """S_T = encode(sum of (g - q)), for every damping, over 100 steps.

    To 1e-4 of the largest number that went through: a burst comes and goes.
    """
    memory, rng = MEMORIES[name], np.random.default_rng(0)
    grads = list(rng.standard_normal((100, 19, 21)).astype(np.float32))
    tx = scheme(memory, damping=damping, form="increment")
    out, state = steps(tx, grads)
    unpaid = np.sum(np.float64(grads), axis=0) - np.sum(np.float64(out), axis=0)
    expected = written(memory, unpaid.astype(np.float32))
    for got, want in zip(
        jax.tree.leaves(state.residual), jax.tree.leaves(expected), strict=True
    ):
        size = max(np.abs(want).max(), np.abs(out).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * size)


def test_a_sketch_is_rescaled_when_the_rate_changes():
    """In units of parameters: rate_T S_T = encode(sum of rate_t (g - q))."""
    rng = np.random.default_rng(1)
    rate = lambda t: 0.1 / (1.0 + 0.5 * t)  # noqa: E731
    grads = list(rng.standard_normal((9, 19, 21)).astype(np.float32))
    out, state = steps(scheme(SKETCH, learning_rate=rate), grads)
    unpaid = sum(
        rate(t) * (np.float64(g) - q)
        for t, (g, q) in enumerate(zip(grads, out, strict=True))
    )
    want = written(SKETCH, (unpaid / rate(8)).astype(np.float32))["sums"]
    got = state.residual["sums"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_a_rate_of_zero_holds_what_is_stored():
    rng = np.random.default_rng(2)
    rates = jnp.array([0.1, 0.0])
    tx = scheme(efopt.quantize(4), learning_rate=lambda t: rates[t])
    grads = [tree(rng), tree(rng)]
    _, first = steps(tx, grads[:1])
    (_, held), second = steps(tx, grads)
    chex.assert_trees_all_equal(first.residual, second.residual)
    assert all((x == 0).all() for x in jax.tree.leaves(held))


@pytest.mark.parametrize(
    "compressor, rate",
    [
        slow(efopt.random_block(fraction=0.1), lambda t: 0.1 / (t + 1.0)),
        (efopt.scaled_sign(), None),
        slow(efopt.power_sgd(1), None),
        slow(efopt.random_block(fraction=0.1), None),
    ],
    ids=["random_block-decay", "scaled_sign", "power_sgd", "random_block"],
)
def test_identity_without_damping_is_error_feedback_to_the_bit(compressor, rate):
    rng = np.random.default_rng(3)
    shapes = {**SHAPES, "bias": (5,), "scalar": (), "empty": (0, 3)}
    grads = [tree(rng, shapes=shapes) for _ in range(12)]
    grads = [{**g, "half": g["w"].astype(jnp.bfloat16)} for g in grads]
    options = {} if rate is None else {"learning_rate": rate}
    plain = efopt.error_feedback(compressor, **options)
    conef = efopt.contractive_error_feedback(
        compressor, memory=efopt.compressors.identity(), damping=0, **options
    )
    expected, plain_state = steps(plain, grads)
    got, state = steps(conef, grads)
    chex.assert_trees_all_equal(got, expected)
    stored = [x.reshape(-1) for x in jax.tree.leaves(state.residual)]
    wanted = [x.reshape(-1) for x in jax.tree.leaves(plain_state.residual) if x.size]
    chex.assert_trees_all_equal(stored, wanted)


# ------------------------------------------------------------------------ stability


STARTS = 4


@functools.cache
def quadratic(tx, steps=3000, rate=0.05):
    """papers.md, section 4: the loss after so many steps, from about 100.

    From four starts, which one program walks side by side.
    """
    curvature = np.logspace(-2, 0, 1000, dtype=np.float32).reshape(40, 25)
    draws = (np.random.default_rng(seed) for seed in range(STARTS))
    starts = np.stack([d.standard_normal((40, 25), np.float32) for d in draws])

    def body(carry, _):
        x, state = carry
        updates, state = tx.update(curvature * x, state)
        return (x - rate * updates, state), None

    @functools.partial(jax.jit, compiler_options=FAST)
    @jax.vmap
    def last(x):
        (x, _), _ = jax.lax.scan(body, (x, tx.init(x)), length=steps)
        return 0.5 * jnp.sum(curvature * x**2)

    return np.asarray(last(starts))


BLOCK = efopt.random_block(fraction=0.1)
WITHOUT = efopt.compress(BLOCK)
WITH = efopt.error_feedback(BLOCK)


def sketched(hash, damping):
    memory = efopt.compressors.count_sketch(fraction=0.2, hash=hash)
    return quadratic(
        efopt.contractive_error_feedback(BLOCK, memory=memory, damping=damping)
    )


@pytest.mark.slow
def test_a_random_hash_bursts_without_damping():
    losses = sketched("random", 0.0)
    assert not (losses < 10 * quadratic(WITHOUT)).all()


@pytest.mark.parametrize(
    "hash, damping",
    [
        ("structured", 0.0),
        slow("random", 0.3),
        slow("structured", 0.3),
        slow("structured", 0.5),
        slow("structured", 0.9),
        slow("random", 0.5),
        slow("random", 0.9),
    ],
)
def test_a_damped_or_structured_sketch_is_calm(hash, damping):
    losses = sketched(hash, damping)
    assert (losses > 2.0).all() and (losses < 1.05 * quadratic(WITHOUT)).all()


@pytest.mark.slow
def test_the_memories_end_in_order():
    full, none, sketch = quadratic(WITH), quadratic(WITHOUT), sketched("random", 0.9)
    assert 0.01 < full[0] < 0.03
    assert 2.5 < none[0] < 2.8
    assert 2.2 < sketch[0] < 2.6 and (sketch < none).all()


@pytest.mark.parametrize(
    "memory, worst",
    [
        (efopt.quantize(8, stochastic=True), 1.02),
        slow(efopt.quantize(8), 1.1),
        slow(efopt.compressors.cast("bfloat16"), 1.02),
        slow(efopt.quantize(4), 1.1),
        slow(efopt.top_k(fraction=0.1), 30),
    ],
    ids=["int8", "int8-nearest", "bfloat16", "int4", "top_k"],
)
def test_a_faithful_memory_ends_like_error_feedback(memory, worst):
    loss = quadratic(efopt.contractive_error_feedback(BLOCK, memory=memory))
    full = quadratic(WITH)
    assert (0.98 * full < loss).all() and (loss < worst * full).all()
    harmed = quadratic(
        efopt.contractive_error_feedback(BLOCK, memory=memory, damping=0.9)
    )
    assert (harmed > 2.0).all()  # damping is for sketches


def test_four_bits_to_the_nearest_are_refused_for_a_reason():
    """What is owed of small coordinates beside a large one is forgotten, every time."""
    nearest = efopt.quantize(4, stochastic=False)
    owed = np.full((40, 25), 0.05, np.float32)
    owed[0, 0] = 1.0
    kept, _ = jax.jit(nearest.update)(owed, nearest.init(owed))
    assert (np.asarray(kept).reshape(-1)[1:256] == 0).all()
    with pytest.raises(ValueError, match="rounded to the nearest"):
        scheme(nearest)


# --------------------------------------------------------------------------- memory


MILLIONS = {"w": jax.ShapeDtypeStruct((2500, 4000), jnp.float32)}
SIZES = {  # live bytes of the residual and temporary bytes, over those of parameters
    "sketch": (SKETCH, {}, 0.21, 0.35),
    "float16": (SKETCH, {"residual_dtype": "float16"}, 0.11, 0.25),
    "int8": (efopt.quantize(8, stochastic=True), {}, 0.27, 0.35),
    "int4": (efopt.quantize(4), {}, 0.15, 0.35),
}


# The default lane compiles quickly, with buffers that users do not have for a sketch.
@pytest.mark.parametrize("name", [slow(n, when=n == "sketch") for n in SIZES])
def test_ten_million_parameters_in_a_fraction_of_the_memory(name):
    memory, options, most_live, most_temporary = SIZES[name]
    tx = efopt.contractive_error_feedback(BLOCK, memory=memory, **options)
    whole = 4 * 10_000_000
    state = jax.eval_shape(tx.init, MILLIONS)
    live = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.residual))
    assert live <= most_live * whole

    def step(params, state, x, y):
        """The gradient of <x params, y>, which is there once and has to be."""
        grads = jax.tree.map(lambda p: jnp.outer(x @ p @ y * x, y), params)
        updates, state = tx.update(grads, state)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

    x, y = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2500, 4000))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(MILLIONS, state, x, y)
    temporary = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporary - whole <= most_temporary * whole


@pytest.mark.parametrize(
    "name", ["sketch", slow("int8"), slow("int4"), slow("bfloat16"), slow("identity")]
)
def test_a_large_leaf_is_stored_as_a_small_one_is(name, monkeypatch):
    """In pieces of blocks, the last of which is not full."""
    memory, rng = MEMORIES[name], np.random.default_rng(4)
    grads = [tree(rng, shapes={"w": (41, 67), "v": (64, 64)}) for _ in range(4)]
    expected, expected_state = steps(scheme(memory), grads)
    for module in (store, layout):
        monkeypatch.setattr(module, "BUCKET_SIZE", 1000)
    monkeypatch.setattr(store, "PIECES", 5)
    monkeypatch.setattr(store, "PIECE", 1)
    got, state = steps(scheme(memory), grads)
    tolerance = {"rtol": 0, "atol": 0 if name in EXACT else 1e-5}
    chex.assert_trees_all_close(got, expected, **tolerance)
    chex.assert_trees_all_close(state, expected_state, **tolerance)


def test_small_leaves_are_kept_exact():
    params = {
        "bias": (4096,),
        "long": (65_536,),
        "tiny": (5, 51),
        "matrix": (16, 16),
    }
    params = {k: jax.ShapeDtypeStruct(s, jnp.bfloat16) for k, s in params.items()}
    stored = jax.eval_shape(scheme(efopt.quantize(8)).init, params).residual
    for name in ("bias", "tiny"):
        assert stored[name]["values"].dtype == jnp.float32
    for name in ("long", "matrix"):
        assert "step" in stored[name]
    # What would be no smaller is not compressed either.
    wide = jax.eval_shape(scheme(efopt.top_k(fraction=0.9)).init, params).residual
    assert wide["matrix"]["values"].shape == (1, 16, 16)


# ------------------------------------------------------------- programs and workers


@pytest.mark.parametrize(
    "name",
    [slow(n) for n in MEMORIES],
)
def test_a_step_is_the_same_with_and_without_jit(name):
    tx, rng = scheme(MEMORIES[name]), np.random.default_rng(5)
    shapes = {"w": (19, 21)}
    eager = jitted = tx.init(tree(rng, shapes=shapes))
    update = jax.jit(tx.update)
    for _ in range(2):
        grads = tree(rng, shapes=shapes)
        slow, eager = tx.update(grads, eager)
        fast, jitted = update(grads, jitted)
        tolerance = {"rtol": 0, "atol": 0 if name in EXACT else 1e-5}
        chex.assert_trees_all_close(slow, fast, **tolerance)
        chex.assert_trees_all_close(eager, jitted, **tolerance)
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    "name, how, workers",
    [
        slow("sketch", "auto", 8),
        slow("int4", "auto", 2),
        slow("int4", "auto", 1),
        slow("sketch", "auto", 1),
        slow("sketch", "auto", 2),
        slow("int4", "auto", 8),
        slow("sketch", "pmap", 8),
        slow("int4", "pmap", 8),
    ],
)
def test_workers_agree_however_they_are_mapped(name, how, workers):
    rng = np.random.default_rng(6)
    tx = optax.chain(
        scheme(MEMORIES[name], axis_name=AXIS), optax.scale_by_learning_rate(0.1)
    )
    grads = [tree(rng, (workers,)) for _ in range(3)]
    start = tree(rng)
    params, state = run(how, tx, start, grads, workers)
    expected, reference = run("vmap", tx, start, grads, workers)
    stored = jax.tree.leaves(state[0].residual)
    wanted = jax.tree.leaves(reference[0].residual)
    for x, y in zip(stored, wanted, strict=True):
        atol = 1 if x.dtype == np.uint8 else 1e-4
        x, y = (np.asarray(a, np.float64).reshape(workers, -1) for a in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)
        if workers > 1:
            assert (x[0] != x[1]).any()  # each worker's own
    first = jax.tree.map(lambda p: p[0], expected[-1])
    if how == "pmap":
        params = [jax.tree.map(lambda p: p[0], params[-1])]
    chex.assert_trees_all_close(params[-1], first, rtol=0, atol=1e-5)


def test_the_sum_over_workers_is_conserved():
    rng, workers = np.random.default_rng(7), 4
    tx = scheme(SKETCH, axis_name=AXIS)
    state = jax.jit(tx.init)(np.zeros((19, 21), np.float32))
    state = efopt.stack_workers(jax.tree.map(np.asarray, state), workers)
    update = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    unpaid = np.zeros((19, 21))
    for _ in range(20):
        g = rng.standard_normal((workers, 19, 21)).astype(np.float32)
        out, state = update(g, state)
        unpaid += g.mean(axis=0, dtype=np.float64) - out[0]
    want = written(SKETCH, unpaid.astype(np.float32))["sums"]
    got = state.residual.value["sums"].mean(axis=(0, 1))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(efopt.quantize(8, stochastic=True), id="int8"),
        slow(efopt.compressors.count_sketch(fraction=0.2), id="sketch"),
    ],
)
def test_damping_of_nothing_is_contractive_error_feedback(memory):
    grads = np.random.default_rng(0).standard_normal((3, 64, 64), np.float32)
    contractive = efopt.contractive_error_feedback(efopt.top_k(k=9), memory=memory)
    damped = efopt.feedback.damped_error_feedback(
        efopt.top_k(k=9), alpha=1.0, beta=1.0, memory=memory
    )
    states = [tx.init(grads[0]) for tx in (contractive, damped)]
    updates = [jax.jit(tx.update) for tx in (contractive, damped)]
    for g in grads:
        outs = [update(g, s) for update, s in zip(updates, states, strict=True)]
        states = [state for _, state in outs]
        pairs = [(out, state.residual) for out, state in outs]
        jax.tree.map(np.testing.assert_array_equal, *pairs)
