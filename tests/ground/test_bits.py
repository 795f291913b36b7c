"""Arithmetic on bits, against NumPy: packing, rounding, hashing, sampling, carriers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import FAST

from efopt.exchanges import carrier
from efopt.ground import bits, randomness

SIGMAS = 6
# Many small programs of exact operations: compile them fast rather than well.
fast = functools.partial(jax.jit, compiler_options=FAST)


# ---------------------------------------------------------------------- packing


def test_signs_survive_packing_at_every_size():
    rng = np.random.default_rng(0)
    sizes = [*range(1, 35), 63, 64, 65, 1023, 1024, 1025]
    signs = [rng.random((3, size)) < 0.5 for size in sizes]

    @fast
    def both(signs):
        packed = [bits.pack_bits(x) for x in signs]
        sizes = [x.shape[1] for x in signs]
        opened = [bits.unpack_bits(p, n) for p, n in zip(packed, sizes, strict=True)]
        return packed, opened

    packed, opened = both(signs)
    for size, x, p, y in zip(sizes, signs, packed, opened, strict=True):
        assert p.dtype == jnp.uint8 and p.shape == (3, -(-size // 8))
        np.testing.assert_array_equal(y, x)
        # As documented: bit j of byte w is coordinate j * width + w, unused bits zero.
        whole = np.zeros((3, 8 * p.shape[1]), bool)
        whole[:, :size] = x
        planes = whole.reshape(3, 8, -1).astype(np.uint8)
        by_hand = np.packbits(planes, axis=1, bitorder="little")[:, 0]
        np.testing.assert_array_equal(p, by_hand)
    np.testing.assert_array_equal(bits.pack_bits(signs[12]), packed[12])


# --------------------------------------------------------------------- rounding


def around(dtype):
    """Every value of a 16-bit float, every midpoint, and the float32 next to each."""
    patterns = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    values = patterns.view(jnp.dtype(dtype)).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    points = np.concatenate([values, middles])
    up, down = np.nextafter(points, np.float32(np.inf)), -np.nextafter(-points, np.inf)
    points = np.concatenate([points, up, down]).astype(np.float32)
    # Below, float32 itself is subnormal, which XLA on a CPU takes for zero.
    normal = np.abs(points) >= np.finfo(np.float32).tiny
    beyond = np.float32([65504, 65519, 65520, 65536, 1e6, 3.3895e38, 3.4e38])
    special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan])
    return np.concatenate([points[normal], beyond, -beyond, special])


def rounded_by_numpy(x, dtype):
    with np.errstate(over="ignore"):
        out = x.astype(jnp.dtype(dtype)).astype(np.float32)
    largest = float(jnp.finfo(dtype).max)
    out = np.where(np.isfinite(x), np.clip(out, -largest, largest), out)
    return out.astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_rounding_is_that_of_numpy_bit_for_bit_and_saturates(dtype):
    x = around(dtype)
    expected = rounded_by_numpy(x, dtype)
    assert np.any(expected != x) and x.size > 300_000
    for call in (bits.round_to, jax.jit(bits.round_to, static_argnums=1)):
        got = np.asarray(call(x, dtype))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got[:-1].view("u4"), expected[:-1].view("u4"))
        assert np.isnan(got[-1])
    for call in (bits.cast, jax.jit(bits.cast, static_argnums=1)):
        got = np.asarray(call(x, dtype))
        narrow = expected.astype(jnp.dtype(dtype))
        assert got.dtype == narrow.dtype
        np.testing.assert_array_equal(got[:-1].view("u2"), narrow[:-1].view("u2"))
        assert np.isnan(got[-1].astype(np.float32))


def test_rounding_reaches_every_subnormal_of_float16():
    # 2^-24 is the smallest; half of it goes to even, which is zero.
    grid = np.arange(1024, dtype=np.float64) * 2.0**-24
    x = np.concatenate([grid, grid + 2.0**-25]).astype(np.float32)
    got = np.asarray(bits.round_to(x, jnp.float16))
    np.testing.assert_array_equal(got[:1024], grid)
    even = 2 * np.round((np.arange(1024) + 0.5) / 2) * 2.0**-24
    np.testing.assert_array_equal(got[1024:], even)


def test_rounding_to_a_dtype_at_least_as_wide_changes_nothing():
    x = around(jnp.float16)
    assert np.asarray(bits.round_to(x, jnp.float32)).tobytes() == x.tobytes()
    y = jnp.asarray(x, jnp.bfloat16)
    assert np.asarray(bits.round_to(y, jnp.float32)).tobytes() == y.tobytes()


def test_the_rounding_error_survives_jit():
    x = jnp.float32(1 + 2**-12)
    error = jax.jit(lambda x: x - bits.cast(x, jnp.bfloat16).astype(jnp.float32))(x)
    assert float(error) == 2**-12


# ---------------------------------------------------------------------- hashing

COUNTERS = 2**16


@pytest.mark.parametrize("keys", [(0,), (1,), (7, 9)], ids=str)
def test_hash_has_no_collisions_and_even_bits(keys):
    """65536 counters; each bit and each pair of bits even to 6 standard errors."""
    words = np.asarray(
        randomness.hash_words(*keys, jnp.arange(COUNTERS, dtype=jnp.uint32))
    )
    assert words.dtype == np.uint32
    assert np.unique(words).size == COUNTERS
    ones = (words[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    bound = SIGMAS * 0.5 / np.sqrt(COUNTERS)
    assert np.abs(ones.mean(axis=0) - 0.5).max() <= bound
    signs = 2.0 * ones - 1
    together = signs.T @ signs / COUNTERS - np.eye(32)
    assert np.abs(together).max() <= 2 * bound


@pytest.mark.parametrize("word", [0, 1], ids=["first", "last"])
def test_hash_spreads_every_bit_of_every_word(word):
    """4096 random pairs of words: a flipped bit flips every other bit half the time.

    6 standard errors for each of the 32 x 32 pairs of bits.
    """
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, (2, 4096), dtype=np.uint64).astype(np.uint32)
    before = np.asarray(randomness.hash_words(*words))
    flipped = np.repeat(words[:, None], 32, axis=1)
    flipped[word] ^= np.uint32(1) << np.arange(32, dtype=np.uint32)[:, None]
    changed = np.asarray(randomness.hash_words(*flipped)) ^ before
    ones = (changed[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(ones.mean(axis=1) - 0.5).max() <= SIGMAS * 0.5 / np.sqrt(4096)


def test_hash_broadcasts_and_is_the_same_under_jit():
    a, b = (jnp.arange(n, dtype=jnp.uint32) for n in (5, 3))
    a, b = a[:, None], b[None]
    hashed = randomness.hash_words(3, a, b)
    assert hashed.shape == (5, 3)
    np.testing.assert_array_equal(hashed, jax.jit(randomness.hash_words)(3, a, b))
    assert int(hashed[4, 2]) == int(randomness.hash_words(3, 4, 2))
    assert int(randomness.hash_words(1, 2)) != int(randomness.hash_words(2, 1))


# --------------------------------------------------------------------- sampling


def samples(draws, num, size):
    def draw(counters):
        keys = randomness.hash_words(counters)
        return randomness.stratified_sample(keys, num, size)

    return np.asarray(fast(draw)(np.arange(draws, dtype=np.uint32)))


@pytest.mark.parametrize(
    "num, size", [(1, 1), (1, 7), (2, 5), (5, 5), (16, 17), (999, 1000), (65536, 65537)]
)
def test_a_sample_has_distinct_indices_in_range(num, size):
    sample = samples(64, num, size)
    assert sample.dtype == np.int32 and sample.shape == (64, num)
    assert sample.min() >= 0 and sample.max() < size
    assert all(len(set(row)) == num for row in sample.tolist())


@pytest.mark.parametrize("num, size", [(1, 2), (2, 5), (5, 17), (8, 64)])
def test_a_sample_has_every_index_equally_often(num, size):
    """4000 samples: 6 standard errors for each index and for their chi-square.

    A count is binomial with p = num / size, and the counts of one sample add up to num.
    """
    sample = samples(4000, num, size)
    counts = np.bincount(sample.ravel(), minlength=size)
    p, freedom = num / size, size - 1
    z = (counts - 4000 * p) / np.sqrt(4000 * p * (1 - p))
    assert np.abs(z).max() <= SIGMAS
    excess = np.sum(z**2) * freedom / size - freedom
    assert excess / np.sqrt(2 * freedom) <= 2 * SIGMAS


# ------------------------------------------------------------- integers of few bits


@pytest.mark.parametrize("width", [*range(1, 9), 12, 20, 31])
def test_integers_of_few_bits_come_back_and_fill_their_bytes(width):
    draws, sizes = np.random.default_rng(0), (1, 5, 64, 1031)
    xs = [draws.integers(0, 2**width, (3, size)) for size in sizes]
    xs = [x.astype(np.uint8 if width <= 8 else np.uint32) for x in xs]

    @fast
    def both(xs):
        packed = [bits.pack_uints(x, width) for x in xs]
        pairs = zip(packed, sizes, strict=True)
        return packed, [bits.unpack_uints(p, width, size) for p, size in pairs]

    fields = [8] * (width // 8) + [w for w in (4, 2, 1) if width & w]
    for size, x, packed, opened in zip(sizes, xs, *both(xs), strict=True):
        np.testing.assert_array_equal(opened, x)
        assert [p.shape for p in packed] == [(3, -(-size * w // 8)) for w in fields]
        assert all(p.dtype == jnp.uint8 for p in packed)


@pytest.mark.parametrize("size", [1, 4, 5, 6, 1031])
def test_five_trits_share_a_byte(size):
    x = np.random.default_rng(0).integers(0, 3, (3, size)).astype(np.uint8)
    packed = fast(bits.pack_trits)(x)
    assert packed.shape == (3, -(-size // 5)) and packed.dtype == jnp.uint8
    opened = fast(lambda packed: bits.unpack_trits(packed, size))(packed)
    np.testing.assert_array_equal(opened, x)


def test_rounding_up_makes_products_with_small_integers_exact():
    x = np.exp(np.random.default_rng(0).uniform(-60, 60, 10_000)).astype(np.float32)
    up = np.asarray(fast(bits.round_up)(x))
    ratio = up.astype(np.float64) / x
    assert ratio.min() >= 1 and ratio.max() <= 1 + 2.0**-7
    product = up.astype(np.float64) * 255
    np.testing.assert_array_equal(product.astype(np.float32), product)


# --------------------------------------------------------------------- carriers

DTYPES = ("uint8", "uint16", "uint32", "float32", "bfloat16", "float16")


@pytest.mark.parametrize("rows", [1, 6])
def test_carriers_bring_every_dtype_back_bit_for_bit(rows):
    rng = np.random.default_rng(2)

    def random(dtype, *shape):
        dtype = jnp.dtype(dtype)
        raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
        # A nan may come back as another nan where it passes through a register.
        values = raw.view(dtype)[..., 0]
        return np.where(np.isnan(values.astype(np.float64)), 0, values).astype(dtype)

    tree = {dtype: [random(dtype, 6, 5), random(dtype, 12, 3, 7)] for dtype in DTYPES}

    @jax.jit
    def both(tree):
        packed = carrier.pack(tree, rows)
        row = packed[rows // 2][None]
        return (
            packed,
            carrier.unpack(packed, tree, rows),
            carrier.unpack(row, tree, rows),
        )

    packed, whole, part = both(tree)
    # Each array of each row fills whole words of four bytes, and no more.
    words = sum(-(-x.nbytes // rows // 4) for x in jax.tree.leaves(tree))
    assert packed.shape == (rows, words) and packed.dtype == jnp.uint32
    for x, y, z in zip(*map(jax.tree.leaves, (tree, whole, part)), strict=True):
        assert y.dtype == x.dtype and y.shape == x.shape
        assert np.asarray(y).tobytes() == x.tobytes()
        size = x.shape[0] // rows
        mine = x[rows // 2 * size : (rows // 2 + 1) * size]
        assert np.asarray(z).tobytes() == mine.tobytes()
