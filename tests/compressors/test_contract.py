"""What every compressor promises, over the rows of `registry.py`.

Tolerances come from one table, by the dtype in which a test's arithmetic was done.
Statistical tests state their number of draws and their bound in standard errors.
"""

import copy
import functools
import itertools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from registry import COMPRESSORS, EXCHANGES
from workers_under_test import FAST, slow

import efopt

TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Compiling is most of the cost of this file, so that most tests share two trees. The
# whole one has scalars, empty leaves, leaves of size 1 and odd ones, in every dtype;
# some leaves share a bucket, and one is larger than any block.
SHAPES = {
    "scalar": ((), jnp.float32),
    "empty": ((0, 3), jnp.float32),
    "long": ((1031,), jnp.float32),
    "one": ((1,), jnp.float32),
    "odd": ((7, 9), jnp.bfloat16),
    "odd too": ((7, 9), jnp.bfloat16),
    "empty half": ((3, 0), jnp.float16),
    "half": ((5,), jnp.float16),
}

# The other one has few shapes, for tests without jit: they compile each operation. Its
# leaves are long enough for the order of a sum to show.
PLAIN = {"a": ((1035,), jnp.float32), "b": ((45, 23), jnp.bfloat16)}


def each(rows, by_default=lambda row: True):
    params = [slow(r, when=r.slow or not by_default(r), id=r.name) for r in rows]
    return pytest.mark.parametrize("row", params)


each_row = each(COMPRESSORS)
# One row for each factory, for what does not depend on the options.
each_factory = each({r.factory: r for r in COMPRESSORS if not r.slow}.values())
# One for each way to take a leaf apart, for what depends on that alone.
each_kind = each([r for r in COMPRESSORS if r.kind])
each_random_row = each([r for r in COMPRESSORS if r.random])
each_message_row = each([r for r in COMPRESSORS if r.one_message])
# All of them in the slow lane, one of each kind in every run: for long tests.
each_row_kinds_first = each(COMPRESSORS, lambda row: row.kind)
each_message_row_kinds_first = each(
    [r for r in COMPRESSORS if r.one_message], lambda row: row.kind
)
each_rounding_row = each([r for r in COMPRESSORS if r.neighbours is not None])


def tree(seed, shapes=None):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, (shape, dtype) in (shapes or SHAPES).items()
    }


def specs(values):
    """Structure, and shapes, dtypes and weak types of the leaves."""
    return jax.tree.structure(values), [jax.typeof(x) for x in jax.tree.leaves(values)]


def bits(values):
    """A tree's leaves as bytes, so that -0.0 differs from 0.0 and nan equals itself."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(values)]


def wide(values):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(values)]


@functools.cache
def jitted(tx):
    """`update` under `jax.jit`, compiled once for the whole file."""
    return jax.jit(tx.update, compiler_options=FAST)


@functools.cache
def fed_back(compressor):
    return efopt.error_feedback(compressor)


def both(row, seed=0):
    """The bare compressor and error feedback around it, with updates for each."""
    compressor = row.make()
    return (compressor, tree(seed, PLAIN)), (fed_back(compressor), tree(seed))


def at_step(step, compressor=None, grads=None):
    """The state of a compressor at a step, of one without memory by default."""
    memory = () if compressor is None else compressor.init(grads).codec
    step = step if isinstance(step, jax.Array) else np.int32(step)
    return efopt.compressors.RoundTripState(step, memory)


# ------------------------------------------------------------- shapes and zeros


@each_row_kinds_first
def test_update_keeps_structure_shapes_and_dtypes(row):
    for tx, grads in both(row):
        updates, state = jitted(tx)(grads, tx.init(grads))
        assert specs(updates) == specs(grads)
        assert all(np.isfinite(x).all() for x in wide(updates))
        assert int(state.count) == 1
        updates, _ = jax.eval_shape(tx.update, tree(0), tx.init(tree(0)))
        assert specs(updates) == specs(tree(0))


@each_row_kinds_first
def test_zeros_stay_finite_and_zero_where_the_wire_can_say_so(row):
    for tx, grads in both(row):
        zeros = jax.tree.map(np.zeros_like, grads)
        updates, state = jitted(tx)(zeros, tx.init(zeros))
        for x in wide(updates):
            assert np.isfinite(x).all()
            assert (x == 0).all() == (row.says_zero or x.size == 0)
        assert all(np.isfinite(x).all() for x in wide(state))


@each_factory
def test_trees_without_coordinates_pass_through(row):
    for grads in ({}, (), {"empty": np.zeros((0, 3), np.float32)}):
        for tx in (row.make(), fed_back(row.make())):
            updates, _ = jax.eval_shape(tx.update, grads, tx.init(grads))
            assert specs(updates) == specs(grads)


# ------------------------------------------------------------------------ state


@each_row
def test_state_keeps_its_type_through_steps_and_branches(row):
    for tx, grads in both(row):
        first = tx.init(grads)
        update = jitted(tx)
        _, second = update(grads, first)
        assert specs(second) == specs(first)
        programs = update._cache_size()
        _, third = update(grads, second)
        assert update._cache_size() == programs
        assert specs(third) == specs(first)
        if not (row.slow or row.kind):
            continue  # a branch asks for equal types and nothing else

        def step(take, grads, state, tx=tx):
            def skip(grads, state):
                return jax.tree.map(jnp.zeros_like, grads), state

            return jax.lax.cond(take, tx.update, skip, grads, state)

        # A branch of another type is a TypeError, at trace time already.
        out, state = jax.eval_shape(step, True, grads, first)
        assert specs(state) == specs(first)
        assert specs(out) == specs(grads)


@each_factory
def test_init_takes_shapes_for_arrays(row):
    params = tree(0)
    structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    for tx in (row.make(), efopt.error_feedback(row.make())):
        assert specs(tx.init(structs)) == specs(tx.init(params))
        assert specs(jax.eval_shape(tx.init, structs)) == specs(tx.init(params))


@each_factory
def test_map_params_finds_the_residual_and_nothing_else(row):
    params = tree(0)
    tx = efopt.error_feedback(row.make())
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx,
        lambda x: ("params", x.shape),
        state,
        # A codec's state is no parameter's, and comes whole.
        transform_non_params=lambda x: ("other", getattr(x, "shape", None)),
    )
    assert marked.residual == {
        name: ("params", shape) for name, (shape, _) in SHAPES.items()
    }
    assert marked.count == ("other", ())


@each_row
def test_map_params_maps_the_bare_state(row):
    params, compressor = tree(0), row.make()
    marked = optax.tree.map_params(
        compressor,
        lambda x: "params",
        compressor.init(params),
        transform_non_params=lambda x: "other",
    )
    assert marked.count == "other"
    # A codec's state is no parameter's, and comes whole.
    assert marked.codec == ("other" if compressor.codec.stateful else ())


@each_factory
def test_tree_get_finds_the_residual_in_a_chain(row):
    params = tree(0)
    tx = optax.chain(fed_back(row.make()), optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)
    assert optax.tree.get(state, "residual") is state[0].residual


# ------------------------------------------------------------------ inside optax


def alone(compressor, grads):
    return jitted(compressor)(grads, compressor.init(grads))[0]


@each_kind
def test_unknown_extra_arguments_are_ignored(row):
    grads, extra = tree(1, PLAIN), {"value": jnp.zeros([]), "batch": {"x": 1}}
    for tx in (row.make(), fed_back(row.make()), efopt.compress(row.make())):
        state = tx.init(grads)
        plain = jax.make_jaxpr(tx.update)(grads, state)
        given = jax.make_jaxpr(functools.partial(tx.update, **extra))(grads, state)
        assert str(given) == str(plain)


@each_kind
def test_chain_passes_the_round_trip_on(row):
    grads, compressor = tree(1, PLAIN), row.make()
    tx = optax.chain(compressor, optax.scale(-1.0))
    updates, _ = jitted(tx)(grads, tx.init(grads), grads)
    assert bits(updates) == bits(jax.tree.map(np.negative, alone(compressor, grads)))


@each_kind
def test_partition_and_masked_compress_their_own_leaves_only(row):
    grads, compressor = tree(1, PLAIN), row.make()
    # Alone in its tree as well: random numbers go by the number of a block.
    mine = alone(compressor, {"b": grads["b"]})
    labels = {name: "mine" if name == "b" else "rest" for name in grads}
    tx = optax.partition({"mine": compressor, "rest": optax.scale(2.0)}, labels)
    updates, _ = jitted(tx)(grads, tx.init(grads), grads)
    assert bits(updates) == bits({**jax.tree.map(lambda x: 2 * x, grads), **mine})
    tx = optax.masked(compressor, {name: name == "b" for name in grads})
    updates, _ = jitted(tx)(grads, tx.init(grads), grads)
    assert bits(updates) == bits({**grads, **mine})


@each_factory
def test_inject_hyperparams_changes_nothing_with_the_static_arguments(row):
    grads = tree(1, PLAIN)
    injected = optax.inject_hyperparams(row.factory, static_args=row.static_args)
    tx = injected(**row.options)
    updates, state = jitted(tx)(grads, tx.init(grads), grads)
    assert bits(updates) == bits(alone(row.make(), grads))
    assert set(state.hyperparams) == set(row.options) - {
        *row.static_args,
        "outer",
        "inner",
    }
    assert specs(state) == specs(tx.init(grads))


NUMBERS = [
    slow(row, name, when=row.slow, id=f"{row.name}-{name}")
    for row in COMPRESSORS
    for name in row.static_args
    # A bool is never traced.
    if type(row.options.get(name)) in (int, float)
]


@pytest.mark.parametrize(("row", "name"), NUMBERS)
def test_inject_hyperparams_without_the_static_argument_says_what_to_pass(row, name):
    others = tuple(n for n in row.static_args if n != name)
    tx = optax.inject_hyperparams(row.factory, static_args=others)(**row.options)
    with pytest.raises(TypeError, match=f"static_args=.*{name}"):
        tx.init(tree(1, PLAIN))


# ------------------------------------------------------------------ determinism


# Without jit each operation is a program of its own: one that rounds to scales and one
# that draws.
# Without jit each operation is a program of its own: one row by default.
@each(COMPRESSORS, by_default=lambda row: row.name == "scaled_sign_8")
def test_jit_changes_no_bit(row):
    tx = fed_back(row.make())
    eager = fast = tx.init(tree(0, PLAIN))
    update = jax.jit(tx.update)
    for step in range(2):
        grads = tree(step, PLAIN)
        slow_updates, eager = tx.update(grads, eager)
        fast_updates, fast = update(grads, fast)
        assert bits(slow_updates) == bits(fast_updates)
        assert bits(eager) == bits(fast)


@each_row
def test_same_step_gives_same_bits_and_another_step_only_if_random(row):
    grads, compressor = tree(3, PLAIN), row.make()
    first = compressor.init(grads)
    once, _ = jitted(compressor)(grads, first)
    twice, _ = jitted(row.make())(grads, first)
    other, _ = jitted(compressor)(grads, first._replace(count=np.int32(1)))
    assert bits(once) == bits(twice)
    assert (bits(other) == bits(once)) != row.random


@each_random_row
def test_another_seed_gives_other_numbers(row):
    grads = tree(3, PLAIN)
    other = row.make(**row.reseeded)
    assert bits(alone(row.make(), grads)) != bits(alone(other, grads))


# --------------------------------------------------------------- the wire format

WIRE_SHAPES = ((), (1,), (2,), (7,), (3, 5), (16,), (17,), (33, 5), (1024,), (1025,))
WIRE_SHAPES += ((2, 1031), (65537,))


@each_message_row_kinds_first
def test_decompress_of_compress_is_the_update(row):
    """What decodes knows the payload, the step, shape and dtype, and nothing else."""
    compressor = row.make()

    @functools.partial(jax.jit, compiler_options=FAST)
    def read(payloads, step):
        return {
            name: compressor.decompress(payloads[name], shape, dtype, step=step)
            for name, (shape, dtype) in PLAIN.items()
        }

    @functools.partial(jax.jit, compiler_options=FAST)
    def write(xs, step):
        payloads = {k: compressor.compress(x, step=step) for k, x in xs.items()}
        update = lambda x: compressor.update(x, at_step(step))[0]  # noqa: E731
        return payloads, {k: update(x) for k, x in xs.items()}

    xs = tree(5, PLAIN)
    payloads, updates = write(xs, np.int32(2))
    decoded = read(jax.tree.map(np.asarray, payloads), np.int32(2))
    assert specs(decoded) == specs(xs)
    assert bits(decoded) == bits(updates)


@each_message_row_kinds_first
def test_payload_is_unsigned_or_float_by_blocks_and_as_large_as_declared(row):
    compressor = row.make()
    cases = [(shape, jnp.float32) for shape in WIRE_SHAPES]
    cases += [((), jnp.bfloat16), ((33, 5), jnp.bfloat16), ((1025,), jnp.float16)]
    for shape, dtype in cases:
        x = jax.ShapeDtypeStruct(shape, dtype)
        arrays = jax.tree.leaves(jax.eval_shape(compressor.compress, x))
        (blocks,) = {a.shape[0] for a in arrays}
        size, unit = math.prod(shape), compressor.block_size
        if unit is None:
            assert blocks == 1
        elif "tile" in row.options:  # smaller ones may fit better
            assert 1 <= blocks <= size
        elif size >= unit:
            assert blocks == -(-size // unit)
        else:  # a leaf below the block size may have smaller blocks
            assert 1 <= blocks <= size
        for a in arrays:
            unsigned = jnp.issubdtype(a.dtype, jnp.unsignedinteger)
            assert unsigned or jnp.issubdtype(a.dtype, jnp.floating), a
        counted = sum(8 * a.size * a.dtype.itemsize for a in arrays)
        assert compressor.payload_bits(shape, dtype) == counted, shape
    assert compressor.payload_bits((0, 3)) == 0


def test_payload_bits_are_those_of_the_arithmetic():
    # 100 coordinates: 100 signs in 13 bytes; one scale; 3 values and 3 uint8 indices.
    assert efopt.compressors.identity().payload_bits((10, 10)) == 3200
    assert efopt.scaled_sign().payload_bits((10, 10)) == 8 * 13 + 32
    # 7 blocks of 16, each with 16 signs and one scale.
    assert efopt.scaled_sign(block_size=16).payload_bits((100,)) == 7 * (16 + 32)
    assert efopt.top_k(k=3).payload_bits((100,)) == 3 * (32 + 8)
    # 3 values, and 3 indices of 10 bits: 8 in a byte each, 2 in a quarter of one.
    assert efopt.top_k(k=3).payload_bits((1000,), jnp.bfloat16) == 3 * (16 + 8) + 8
    # 12 bits where a block has 4096.
    blocks = efopt.top_k(k=64, block_size=4096)
    assert blocks.payload_bits((8, 4096)) == 8 * 64 * (32 + 12)
    assert efopt.random_k(k=3).payload_bits((100,), jnp.float16) == 3 * 16


SUMMED = (1035,)


@each_message_row
def test_only_payloads_of_float32_are_linear(row):
    payload = jax.eval_shape(row.make().compress, jax.ShapeDtypeStruct(SUMMED, "f4"))
    dtypes = {a.dtype for a in jax.tree.leaves(payload)}
    assert row.make().linear == (dtypes == {np.dtype("float32")})


@each([r for r in COMPRESSORS if r.one_message and r.make().linear])
def test_linear_payloads_may_be_summed(row):
    compressor = row.make()
    xs = np.random.default_rng(4).standard_normal((5, *SUMMED)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(xs):
        payloads = jax.vmap(lambda x: compressor.compress(x, step=7))(xs)
        read = lambda p: compressor.decompress(p, SUMMED, step=7)  # noqa: E731
        mean = jax.tree.map(lambda p: p.mean(axis=0), payloads)
        return read(mean), jax.vmap(read)(payloads)

    together, apart = both(xs)
    apart = np.mean(wide(apart)[0], axis=0)
    np.testing.assert_allclose(together, apart, rtol=0, atol=TOLERANCE["float32"])


@each_row
def test_exchanges_carry_it_or_refuse_with_the_reason(row):
    compressor = row.make()
    for scheme in (efopt.error_feedback, efopt.compress):
        scheme(compressor, axis_name="data")
        for exchange in (e.name for e in EXCHANGES if e.alias):
            if exchange in row.exchanges:
                scheme(compressor, axis_name="data", exchange=exchange)
            else:
                with pytest.raises(ValueError, match=f"{exchange}.*cannot work: "):
                    scheme(compressor, axis_name="data", exchange=exchange)


# -------------------------------------------------- the declared delta and omega

FACTOR_SHAPES = ((1,), (7,), (64,), (1000,), (33, 5))
DRAWS, SIGMAS = 200, 6


def adversaries(shape, largest):
    """Inputs by name, on which a wrong factor or a sum that overflows shows."""
    rng = np.random.default_rng(5)
    size = math.prod(shape)
    place = np.arange(size)
    gauss = rng.standard_normal(size)
    inputs = {
        "gaussian": gauss,
        "constant": np.full(size, -0.7),
        "sparse": np.where(place % 11 == 3, gauss, 0),
        "zero": np.zeros(size),
        "one_hot_first": np.where(place == 0, 2.0, 0),
        "one_hot_last": np.where(place == size - 1, -2.0, 0),
        "huge": rng.uniform(-3, 3, size) * 1e38,
        "all_huge": np.full(size, 3e38),
        "tiny": gauss * 1e-30,
        "heavy_tailed": rng.standard_cauchy(size),
        "alternating": np.where(place % 2 == 0, 1.0, -1.0),
        "geometric": 0.9**place,
    }
    clipped = {k: np.clip(x, -largest, largest) for k, x in inputs.items()}
    return {k: x.astype(np.float32).reshape(shape) for k, x in clipped.items()}


@each_row_kinds_first
def test_declared_factors_hold_on_adversarial_inputs(row):
    """Random compressors: 200 draws, bounds of 6 standard errors.

    For a contraction the error's share lies in [0, 1] with mean 1 - delta at most, so
    that its variance is at most delta (1 - delta) where the bound is tight; where it is
    loose the sample's own is taken. For an unbiased compressor the error of the mean of
    n draws has squared length omega |x|^2 / n on average.
    """
    compressor, draws = row.make(), DRAWS if row.random else 1
    inputs = {str(shape): adversaries(shape, row.largest) for shape in FACTOR_SHAPES}
    names = list(inputs[str(FACTOR_SHAPES[0])])
    stacked = {s: np.stack(list(xs.values())) for s, xs in inputs.items()}

    @functools.partial(jax.jit, compiler_options=FAST)
    def outcomes(stacked):
        over_inputs = jax.vmap(compressor.update, in_axes=(0, None))
        one = {s: x[0] for s, x in stacked.items()}
        return jax.lax.map(
            lambda step: over_inputs(stacked, at_step(step, compressor, one))[0],
            jnp.arange(draws),
        )

    decoded = outcomes(stacked)
    for shape, (i, name) in itertools.product(FACTOR_SHAPES, enumerate(names)):
        x = stacked[str(shape)][i].astype(np.float64).ravel()
        cx = np.asarray(decoded[str(shape)][:, i], np.float64).reshape(draws, -1)
        check_factors(row, shape, x, cx, f"{name} {shape}")


def check_factors(row, shape, x, cx, case):
    compressor, draws, slack = row.make(), len(cx), TOLERANCE["float32"]
    delta, omega = compressor.delta(shape), compressor.omega(shape)
    if compressor.codec.assign(np.zeros(shape, np.float32)) == [compressor.codec]:
        assert compressor.unbiased == (omega is not None)
    assert delta is None or 0 < delta <= 1
    assert np.isfinite(cx).all(), case
    whole = np.sum(x**2)
    if whole == 0:
        assert not row.says_zero or not cx.any(), case
        return
    shares = np.sum((cx - x) ** 2, axis=1) / whole
    if delta is not None:
        spread = max(shares.var(), delta * (1 - delta)) if row.random else 0
        bound = 1 - delta + SIGMAS * math.sqrt(spread / draws)
        assert shares.mean() <= bound + slack, case
    if omega is not None:
        spread = max(shares.var(), omega**2) if row.random else 0
        bound = omega + SIGMAS * math.sqrt(spread / draws)
        assert shares.mean() <= bound + slack, case
        bias = np.sum((cx.mean(axis=0) - x) ** 2) / whole
        assert math.sqrt(bias) <= SIGMAS * math.sqrt(omega / draws) + slack, case


def test_the_factors_that_theory_gives_are_declared():
    # 64 coordinates: the worst input of a scaled sign is one-hot; k of d are kept.
    assert (
        efopt.compressors.identity().delta((64,)) == 1
        and efopt.compressors.identity().omega((64,)) == 0
    )
    assert efopt.sign().delta((64,)) is None
    assert efopt.scaled_sign().delta((8, 8)) == 1 / 64
    assert efopt.scaled_sign(block_size=16).delta((8, 8)) == 1 / 16
    for sparse in (efopt.top_k, efopt.random_k):
        assert sparse(k=3).delta((64,)) == 3 / 64
        assert sparse(k=100).delta((64,)) == 1
        assert sparse(fraction=0.1).delta((64,)) == 7 / 64
        assert sparse(fraction=0.25, block_size=16).delta((64,)) == 1 / 4


# ----------------------------------------------------------- what random ones draw


@pytest.mark.parametrize("factory", [efopt.random_k, efopt.random_block])
@pytest.mark.parametrize("size, k", [(5, 4), (17, 16), (1000, 100)])
def test_random_coordinates_are_k_distinct_ones(factory, size, k):
    compressor, ones = factory(k=k), np.ones(size, np.float32)
    sent = jax.jit(jax.vmap(lambda s: compressor.update(ones, at_step(s))[0]))
    sent = np.asarray(sent(np.arange(40)))
    np.testing.assert_array_equal(sent.sum(axis=1), k)
    if factory is efopt.random_block:  # one run, which may wrap
        edges = np.abs(np.diff(sent, axis=1, append=sent[:, :1])).sum(axis=1)
        np.testing.assert_array_equal(edges, 2)


@pytest.mark.parametrize("factory", [efopt.random_k, efopt.random_block])
def test_random_coordinates_are_drawn_anew_for_every_block_and_leaf(factory):
    ones = {k: np.ones((64, 101), np.float32) for k in "ab"}
    compressor = factory(k=5, block_size=101)
    updates, _ = jax.jit(compressor.update)(ones, at_step(0))
    sent = np.concatenate([x != 0 for x in wide(updates)])
    # 101 starts: 128 draws of one block hit about 72 of them.
    assert len({row.tobytes() for row in sent}) > 50


# ------------------------------------------------------------- those that round


@each_rounding_row
def test_every_coordinate_is_rounded_to_a_neighbour(row):
    """The grid is the oracle's; rounding to the nearest goes to the nearer end."""
    compressor, rng = row.make(), np.random.default_rng(11)
    update = jax.jit(compressor.update, compiler_options=FAST)
    for scale in row.scales:
        x = (rng.standard_normal(1035) * scale).astype(np.float32)
        x[::50] = 0
        low, high = row.neighbours(x.astype(np.float64))
        got = np.asarray(update(x, at_step(3))[0], np.float64)
        near = lambda y: np.isclose(got, y, rtol=1e-6, atol=1e-6 * scale)  # noqa: B023, E731
        assert (near(low) | near(high)).all()
        if not row.random:
            further = np.maximum(np.abs(low - x), np.abs(high - x))
            assert (np.abs(got - x) <= further + 1e-6 * scale).all()
            assert (
                np.abs(got - x) <= (high - low) / 2 * 1.0001 + 1e-6 * scale
            ).all() or (low == high).all()


# --------------------------------------------------------------- error feedback


@each_row
def test_error_feedback_loses_nothing(row):
    """Updates in + old residual == applied + new residual, in every dtype.

    To the float32 of the residual, not to the leaf's own: the rounding of what is
    applied is owed as well.
    """
    tx = fed_back(row.make())
    state = tx.init(tree(0))
    for step in range(20):
        grads, old = tree(step), state.residual
        updates, state = jitted(tx)(grads, state)
        for g, e, u, new in zip(
            wide(grads), wide(old), wide(updates), wide(state.residual), strict=True
        ):
            scale = max([1.0, *np.abs(g + e).ravel(), *np.abs(u).ravel()])
            atol = TOLERANCE["float32"] * scale
            np.testing.assert_allclose(u + new, g + e, rtol=0, atol=atol)
    assert {x.dtype for x in jax.tree.leaves(state.residual)} == {np.dtype("float32")}


@each([r for r in COMPRESSORS if r.oracle])
def test_every_step_is_that_of_the_oracle(row):
    """The oracle is given efopt's own residual, so that errors do not add up.

    It has no word on dtypes: what is applied is rounded to the leaf's, what is applied
    and still owed together is not.
    """
    # Of sign, the oracle knows the paper's letter: in narrow dtypes zeros do occur.
    letter = {"zero": "positive"} if row.factory is efopt.sign else {}
    tx, grads = fed_back(row.make(**letter)), tree(0)
    first = state = tx.init(grads)
    ones = jax.tree.map(np.ones_like, grads)
    dtypes = [x.dtype.name for x in jax.tree.leaves(grads)]
    for step in range(5):
        grads = tree(step)
        sent = wide(jitted(tx)(ones, first._replace(count=state.count))[0])
        speak = [functools.partial(row.oracle, mask=mask) for mask in sent]
        expected, (owed,) = oracle.error_feedback_step(
            [wide(grads)], [wide(state.residual)], speak
        )
        updates, state = jitted(tx)(grads, state)
        got = zip(wide(updates), wide(state.residual), strict=True)
        want = zip(expected, owed, dtypes, strict=True)
        for (u, e), (applied, kept, dtype) in zip(got, want, strict=True):
            atol = TOLERANCE[dtype] * max([1.0, *np.abs(applied).ravel()])
            np.testing.assert_allclose(u, applied, rtol=0, atol=atol)
            np.testing.assert_allclose(e, kept, rtol=0, atol=atol)


# ------------------------------------------------------------- compressors as values


@each_row
def test_compressors_compare_and_travel_by_their_options(row):
    compressor, twin = row.make(), row.make()
    assert isinstance(compressor, optax.GradientTransformation)
    assert isinstance(compressor, efopt.Compressor)
    assert not callable(compressor)  # `inject_hyperparams` would call it a schedule
    names = dict(vars(efopt.compressors))
    for other in (
        twin,
        pickle.loads(pickle.dumps(compressor)),
        copy.copy(compressor),
        copy.deepcopy(compressor),
        compressor
        if "<function" in repr(compressor)
        else eval(repr(compressor), names),
    ):
        assert type(other) is efopt.Compressor
        assert other == compressor and hash(other) == hash(compressor)
        assert repr(other) == repr(compressor)


def test_different_options_make_different_compressors():
    compressors = [row.make() for row in COMPRESSORS]
    compressors += [row.make(**row.reseeded) for row in COMPRESSORS if row.random]
    for one, other in itertools.combinations(compressors, 2):
        assert one != other and repr(one) != repr(other)


def test_an_empty_leaf_loses_nothing_and_sends_nothing():
    for compressor in (
        efopt.scaled_sign(),
        efopt.top_k(k=2),
        efopt.compressors.identity(),
    ):
        assert compressor.delta((0, 3)) == 1.0
        assert compressor.payload_bits((0, 3)) == 0
        with pytest.raises(ValueError, match="at least one coordinate"):
            compressor.compress(np.zeros((0, 3), np.float32))
    assert efopt.sign().delta((0,)) is None
