"""What single compressors of the catalogue promise, beyond the common contract."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from workers_under_test import AXIS, FAST, once, slow

import efopt
from efopt.codecs import conversation
from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Batch
from efopt.compressors.power_sgd import orthonormalise
from efopt.ground import randomness
from efopt.ground.randomness import private_bits


def workers(tx, params, n):
    """A jitted update of ``n`` workers by vmap, and its first state."""
    state = jax.tree.map(np.asarray, jax.jit(tx.init)(params))
    state = efopt.stack_workers(state, n)
    update = jax.vmap(tx.update, axis_name=AXIS)
    return jax.jit(update, compiler_options=FAST), state


# ------------------------------------------------------------------ the wire, in bits


def test_payloads_are_as_small_as_the_documentation_says():
    d = 1 << 20
    share = {
        "sign": efopt.sign(),
        "scaled_sign": efopt.scaled_sign(1024),
        "quantize 8": efopt.quantize(8, block_size=128),
        "quantize 4": efopt.quantize(4),
        "terngrad": efopt.compressors.terngrad(block_size=256),
        "natural": efopt.compressors.natural(),
        "float8": efopt.compressors.cast("float8_e4m3fn"),
    }
    share = {k: c.payload_bits((d,)) / (32 * d) for k, c in share.items()}
    assert share["sign"] == 1 / 32
    assert share["scaled_sign"] <= 1 / 31
    assert share["quantize 8"] <= 0.26
    assert share["quantize 4"] <= 0.14
    assert share["terngrad"] <= 0.07
    assert share["natural"] == 9 / 32
    assert share["float8"] <= 0.26


def test_eight_bits_lose_less_than_a_ten_thousandth():
    x = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    decoded, _ = once(efopt.quantize(8, block_size=128), x)
    assert np.mean((np.asarray(decoded) - x) ** 2) <= 1e-4


# --------------------------------------------------------------- random rounding


def draws(ours, shape):
    """Random words from our counter hash, or from JAX's generator."""
    if not ours:
        return np.asarray(jax.random.bits(jax.random.key(7), shape, jnp.uint32)) >> 9
    n, size = shape
    index = jnp.arange(n, dtype=jnp.uint32)
    blocks = Blocks(index, None, None, (size,), np.dtype("float32"))
    turn = Turn(jnp.uint32(3), jnp.uint32(5))
    return np.asarray(private_bits(0, blocks, turn, 23)).astype(np.uint32)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "threefry"])
def test_rounding_noise_passes_the_tests_that_threefry_passes(ours):
    """2^20 draws, 6 standard errors: bits, buckets, runs along and across blocks."""
    x = draws(ours, (1024, 1024))
    n, sigmas = x.size, 6
    for bit in range(23):  # every bit is one half of the time
        assert abs(((x >> bit) & 1).mean() - 0.5) <= sigmas * 0.5 / np.sqrt(n)
    counts = np.bincount(x.ravel() >> 13, minlength=1024)  # 1024 buckets
    excess = ((counts - n / 1024) ** 2 / (n / 1024)).sum() - 1023
    assert abs(excess) <= sigmas * np.sqrt(2 * 1023)
    u = x / 2.0**23 - 0.5
    for lag in (1, 2, 7, 64):  # neighbours know nothing of each other
        for a, b in ((u[:, lag:], u[:, :-lag]), (u[lag:], u[:-lag])):
            assert abs((a * b).mean()) <= sigmas / 12 / np.sqrt(a.size)


def test_rounding_noise_differs_between_workers_steps_and_blocks():
    compressor = efopt.quantize(4, block_size=64)
    tx = efopt.compress(compressor, axis_name=AXIS, exchange="all_gather")
    x = np.full((4, 64), 0.3, np.float32)
    x[:, 0] = 1.0
    update, state = workers(tx, x[0], 4)
    one, state = update(x, state)
    two, _ = update(x, state)
    single, _ = once(compressor, x[0])
    # Four workers that rounded alike would have an average on the grid of one.
    on_grid = np.isin(np.asarray(one[0]).round(5), np.asarray(single).round(5))
    assert on_grid.mean() < 0.9
    assert (np.asarray(one) != np.asarray(two)).any()


# -------------------------------------------------------------------------- low rank


def test_power_sgd_follows_numpy_for_twenty_steps_on_four_workers():
    rng = np.random.default_rng(9)
    shapes = {"m": (16, 12), "n": (16, 12), "k": (3, 3, 2, 8), "v": (4,)}
    params = {k: np.zeros(s, np.float32) for k, s in shapes.items()}
    tx = efopt.error_feedback(efopt.power_sgd(2, min_compression=1), axis_name=AXIS)
    update, state = workers(tx, params, 4)
    flat = {"m": (16, 12), "n": (16, 12), "k": (9, 16)}
    q = {k: np.asarray(state.link.codec[k][0, 0], np.float64) for k in flat}
    owed = {k: np.zeros((4, *s)) for k, s in flat.items()}
    base = {k: rng.standard_normal(s) for k, s in shapes.items()}
    for k, (rows, cols) in flat.items():
        # Two clear directions: where none stands out, float32's rounding decides.
        left, _ = np.linalg.qr(rng.standard_normal((rows, 2)))
        right, _ = np.linalg.qr(rng.standard_normal((cols, 2)))
        base[k] = ((left * [8.0, 4.0]) @ right.T).reshape(shapes[k])
    for _ in range(20):
        grads = {
            k: (base[k] + 0.3 * rng.standard_normal((4, *s))).astype(np.float32)
            for k, s in shapes.items()
        }
        out, state = update(grads, state)
        for k, shape in flat.items():
            mats = [g.reshape(shape).astype(np.float64) for g in grads[k]]
            mats = [m + e for m, e in zip(mats, owed[k], strict=True)]
            average, own, q[k] = oracle.power_sgd_round(mats, q[k])
            owed[k] = [m - o for m, o in zip(mats, own, strict=True)]
            scale = np.abs(average).max()
            got = np.asarray(out[k][0]).reshape(shape)
            np.testing.assert_allclose(got, average, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(out["v"][0], grads["v"].mean(0), rtol=0, atol=1e-6)


def test_power_sgd_of_full_rank_is_the_dense_mean():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 8, 5)).astype(np.float32)
    compressor = efopt.power_sgd(5, min_compression=0)
    update, state = workers(efopt.compress(compressor, axis_name=AXIS), x[0], 4)
    out, _ = update(x, state)
    np.testing.assert_allclose(out[0], x.mean(0), rtol=0, atol=1e-5)


def test_a_warm_start_helps_on_a_matrix_that_turns_slowly():
    """Mean share of the matrix that is lost over steps 5 to 20, warm against cold."""
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    matrix = (u * 0.7 ** np.arange(40)) @ v
    lost = {}
    for warm in (True, False):
        compressor = efopt.power_sgd(2, warm_start=warm)
        state = compressor.init(np.zeros((40, 40), np.float32))
        update = jax.jit(compressor.update, compiler_options=FAST)
        shares = []
        for step in range(20):
            x = matrix + 0.002 * step * rng.standard_normal((40, 40))
            out, state = update(x.astype(np.float32), state)
            shares.append(np.sum((np.asarray(out) - x) ** 2) / np.sum(x**2))
        lost[warm] = np.mean(shares[5:])
    assert lost[True] < 0.8 * lost[False]


def test_a_column_that_died_out_starts_anew():
    """A step of rank one leaves nothing to the second column; the next has rank two."""
    rng = np.random.default_rng(3)
    one = np.outer(rng.standard_normal(20), rng.standard_normal(20))
    two = one + np.outer(rng.standard_normal(20), rng.standard_normal(20))
    compressor = efopt.power_sgd(2)
    update = jax.jit(compressor.update, compiler_options=FAST)
    _, state = update(one.astype(np.float32), compressor.init(np.zeros((20, 20), "f4")))
    for _ in range(4):
        out, state = update(two.astype(np.float32), state)
    np.testing.assert_allclose(out, two, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3])
def test_columns_are_orthonormal_and_dependent_ones_zero(rank):
    rng = np.random.default_rng(4)
    p = rng.standard_normal((5, 30, rank)).astype(np.float32) * 1e20
    if rank == 3:
        p[0, :, 2] = p[0, :, 0] - 2 * p[0, :, 1]
        p[1] = 0
    got = np.asarray(jax.jit(orthonormalise)(p), np.float64)
    gram = np.einsum("bnr,bns->brs", got, got)
    expected = np.broadcast_to(np.eye(rank), gram.shape).copy()
    if rank == 3:
        expected[0, 2, 2] = 0
        expected[1] = 0
    np.testing.assert_allclose(gram, expected, rtol=0, atol=1e-6)


def test_matrices_are_cut_where_they_are_square_or_where_one_says():
    view = lambda **options: efopt.power_sgd(1, **options).codec.block_shape  # noqa: E731
    assert view()((3, 3, 16, 32)) == (1, 144, 32)
    assert view()((32, 16, 3, 3)) == (1, 32, 144)
    assert view(split=1)((3, 3, 16, 32)) == (1, 3, 3 * 16 * 32)
    assert view(split=-1)((3, 4, 5)) == (1, 12, 5)
    assert view(split=3)((6, 7)) == (1, 6, 7)


def test_what_would_not_shrink_goes_dense():
    compressor = efopt.power_sgd(4)
    dense = efopt.compressors.identity()
    for shape in ((), (500,), (12, 12), (1, 4096)):
        assert compressor.payload_bits(shape) == dense.payload_bits(shape)
    assert compressor.payload_bits((64, 64)) == 32 * 4 * (64 + 64)


# ---------------------------------------------------------------------------- sketch


def sketch_matrix(compressor, d, step=0):
    one = lambda x: compressor.compress(x, step)["sums"][0, 0]  # noqa: E731
    rows = jax.jit(jax.vmap(one))(np.eye(d, dtype=np.float32))
    return np.asarray(rows, np.float64)


@pytest.mark.parametrize("d, width", [(10, 3), slow(64, 16), slow(7, 7)])
def test_every_coordinate_goes_to_one_sum_and_every_sum_has_as_many(d, width):
    compressor = efopt.compressors.count_sketch(width=width)
    matrix = sketch_matrix(compressor, d)
    assert matrix.shape == (d, width)
    assert (np.abs(matrix).sum(axis=1) == 1).all()
    loads = np.abs(matrix).sum(axis=0)
    assert loads.max() <= -(-d // width)
    x = np.random.default_rng(0).standard_normal(d).astype(np.float32)
    got, _ = once(compressor, x)
    np.testing.assert_allclose(got, matrix @ (matrix.T @ x), rtol=0, atol=1e-5)


def test_two_coordinates_share_a_sum_once_in_its_width():
    """600 hashes, 6 standard errors, for coordinates of different lines."""
    compressor, width, draws = efopt.compressors.count_sketch(width=8), 8, 600
    pair = np.zeros((2, 40), np.float32)
    pair[0, 3] = pair[1, 25] = 1.0
    both = jax.vmap(lambda x, s: compressor.compress(x, s)["sums"][0, 0], (0, None))
    tables = jax.jit(jax.vmap(functools.partial(both, pair)))(np.arange(draws))
    places = np.abs(np.asarray(tables)).argmax(axis=2)
    met = (places[:, 0] == places[:, 1]).mean()
    bound = 6 * np.sqrt(1 / width * (1 - 1 / width) / draws)
    assert abs(met - 1 / width) <= bound


def test_sketches_of_all_workers_add_up():
    compressor = efopt.compressors.count_sketch(fraction=0.3)
    x = np.random.default_rng(1).standard_normal((4, 100)).astype(np.float32)
    update, state = workers(efopt.compress(compressor, axis_name=AXIS), x[0], 4)
    out, _ = update(x, state)
    alone, _ = once(compressor, x.mean(0))
    np.testing.assert_allclose(out[0], alone, rtol=0, atol=1e-5)


# ------------------------------------------------------------- mixtures, structure


def test_values_are_written_by_the_inner_compressor():
    outer, inner = efopt.top_k(k=40), efopt.quantize(8, block_size=16)
    both = efopt.compose(outer, inner)
    # 3 blocks of 14 values, the least padding; indices of ten bits, steps of two
    # bytes.
    assert both.payload_bits((1000,)) == 3 * (14 * 8 + 16) + 40 * 10
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    kept, got = (np.asarray(once(c, x)[0]) for c in (outer, both))
    assert ((got != 0) <= (kept != 0)).all()
    assert np.abs(got - kept).max() <= np.abs(kept).max() / 127 / 2 * 1.01


def test_contracts_of_a_composition_multiply():
    top, random = efopt.top_k(k=16), efopt.random_k(k=16, unbiased=True)
    eight, seven = efopt.quantize(8), efopt.compressors.qsgd(7)
    both = efopt.compose(top, eight)
    assert both.delta((64,)) == pytest.approx(0.25 * eight.delta((16,)))
    both = efopt.compose(random, seven)
    assert both.unbiased and not both.linear
    assert both.omega((64,)) == pytest.approx(4 * (1 + seven.omega((16,))) - 1)
    assert efopt.compose(top, efopt.sign()).delta((64,)) is None
    assert efopt.compose(efopt.random_k(k=4), efopt.compressors.identity()).linear


def test_a_threshold_may_be_a_schedule_or_traced():
    x = np.float32([1.0, -3.0, 2.0])
    tx = efopt.compressors.threshold(lambda step: 2.5 - step, k=3)
    out, state = once(tx, x)
    np.testing.assert_array_equal(out, [0, -3, 0])
    np.testing.assert_array_equal(once(tx, x, state)[0], [0, -3, 2])

    @jax.jit
    def traced(level):
        tx = efopt.compressors.threshold(level, k=3)
        return tx.update(x, tx.init(x))[0]

    np.testing.assert_array_equal(traced(1.5), [0, -3, 2])
    np.testing.assert_array_equal(traced(2.5), [0, -3, 0])


def test_a_threshold_spends_what_it_may_and_owes_the_rest():
    x = np.arange(1, 11).astype(np.float32)
    tx = efopt.error_feedback(efopt.compressors.threshold(3.0, k=4))
    out, state = once(tx, x)
    np.testing.assert_array_equal(out, [0] * 6 + [7, 8, 9, 10])
    np.testing.assert_array_equal(state.residual, [1, 2, 3, 4, 5, 6, 0, 0, 0, 0])


def test_float8_saturates_and_float16_too():
    x = np.float32([3e38, -1.0])
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        tx = efopt.compressors.cast(dtype)
        out, _ = once(tx, x)
        assert np.isfinite(out).all() and float(out[0]) > 2.7e38
    tx = efopt.compressors.cast("float16")
    np.testing.assert_array_equal(once(tx, x)[0], [65504, -1])


def test_bits_of_a_subnormal_block_are_zero():
    x = np.full(16, 1e-39, np.float32)
    for c in (
        efopt.quantize(8),
        efopt.compressors.cast("float8_e4m3fn"),
        efopt.scaled_sign(),
    ):
        out = np.asarray(once(c, x)[0])
        assert np.isfinite(out).all() and (np.abs(out) <= 1e-38).all()


def test_partitions_keep_the_contract_of_each_leaf():
    compressor = efopt.compressors.partition(
        {"m": efopt.power_sgd(1), "v": efopt.scaled_sign(16)},
        lambda tree: jax.tree.map(lambda x: "m" if x.ndim > 1 else "v", tree),
    )
    assert compressor.payload_bits((64, 64)) == 32 * 128
    assert compressor.payload_bits((64,)) == 4 * (16 + 32)
    assert compressor.delta((64,)) == 1 / 16
    grads = {"a": np.ones((64, 64), "f4"), "b": np.arange(1, 65, dtype="f4")}
    state = compressor.init(grads)
    assert state.codec["a"].shape == (1, 64, 1) and state.codec["b"] == ()
    out, _ = once(compressor, grads)
    alone, _ = once(efopt.scaled_sign(16), grads["b"])
    np.testing.assert_array_equal(out["b"], alone)
    np.testing.assert_allclose(out["a"], grads["a"], rtol=0, atol=1e-5)


def test_stratified_draws_need_no_loop_and_no_sort():
    text = (
        jax.jit(lambda key: randomness.stratified_sample(key, 100, 10_000))
        .lower(np.zeros(1, np.uint32))
        .as_text()
    )
    assert "while" not in text and "sort" not in text


# ------------------------------------------------------------- two in one chain


@pytest.mark.parametrize(
    "first, second",
    [
        [functools.partial(efopt.random_k, fraction=0.5, unbiased=True)] * 2,
        [functools.partial(efopt.quantize, b, stochastic=True) for b in (3, 2)],
    ],
    ids=["random_k", "quantize"],
)
def test_two_in_one_chain_are_unbiased_together_with_seeds_of_their_own(first, second):
    """With one seed they draw alike, and the mean over 500 steps is another."""
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)

    def bias(seed):
        chained = optax.chain(
            efopt.compress(first(seed=0)), efopt.compress(second(seed=seed))
        )
        step = lambda state, _: chained.update(x, state)[::-1]  # noqa: E731
        run = jax.jit(lambda s: jax.lax.scan(step, s, None, length=500)[1])
        mean = np.mean(np.asarray(run(chained.init(x)), np.float64), axis=0)
        return np.linalg.norm(mean - x) / np.linalg.norm(x)

    assert bias(seed=1) < 0.15 < 0.25 < bias(seed=0)


# --------------------------------------------------- matrices of unequal heights


def test_power_sgd_orthonormalises_matrices_of_like_heights_in_one_program():
    tx = efopt.error_feedback(efopt.power_sgd(2, min_compression=0))

    def roots(heights):
        params = [jax.ShapeDtypeStruct((rows, 9), np.float32) for rows in heights]
        state = jax.eval_shape(tx.init, params)
        return (
            jax.jit(tx.update).lower(params, state).as_text().count(" = stablehlo.sqrt")
        )

    assert roots([17]) > 0
    assert roots([17, 20, 29, 32]) == roots([17])
    assert roots([17, 33]) == 2 * roots([17])


def test_heights_in_one_program_are_orthonormalised_as_alone():
    rng = np.random.default_rng(0)
    shapes = [(2, 17, 3), (1, 32, 3), (3, 20, 3)]
    xs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    xs[0][0, :, 2] = xs[0][0, :, 1]  # a dependent column

    def together(xs):
        batches = {i: Batch(orthonormalise, x) for i, x in enumerate(xs)}
        return conversation.computed(batches), [orthonormalise(x) for x in xs]

    got, alone = jax.jit(together)(xs)
    for i, want in enumerate(alone):
        assert got[i].shape == want.shape
        np.testing.assert_allclose(got[i], want, atol=2e-6)
    assert not np.asarray(got[0])[0, :, 2].any()


def test_a_leaf_that_fills_no_whole_blocks_is_written_without_its_padding():
    tx = efopt.error_feedback(efopt.random_k(fraction=0.01, block_size=4096))
    leaf = jax.ShapeDtypeStruct((300, 1023), jnp.float32)
    state = jax.eval_shape(tx.init, leaf)
    compiled = jax.jit(tx.update).lower(leaf, state).compile()
    copies = compiled.memory_analysis().temp_size_in_bytes / (4 * leaf.size)
    assert copies < 0.5  # two, if update and residual were padded


@pytest.mark.parametrize(("size", "k"), [(4096, 41), (1000, 10), (100, 3), (64, 60)])
def test_largest_are_the_same_in_three_rows_as_in_one(size, k):
    """Those of a GPU; ties, infinities and what is no number too."""
    module = importlib.import_module("efopt.compressors.top_k")
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((4, size)), 1).astype(np.float32)
    x[0], x[1, 5], x[1, 9] = 0, np.nan, -np.inf

    @jax.jit
    def both(x):
        three = module._ranked(x, k, module._chunks(size, k))
        return three, jax.lax.top_k(jnp.abs(x), k)[1]

    given, expected = both(x)
    np.testing.assert_array_equal(given, expected)
