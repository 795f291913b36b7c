"""Each worker's values on another number of workers: what keeps the mean."""

import jax.numpy as jnp
import numpy as np
import pytest

from efopt.workers import moves

MOVES = [(8, 4), (8, 16), (4, 3), (3, 8), (8, 1), (1, 5), (7, 5), (6, 9)]
each_move = pytest.mark.parametrize("n, m", MOVES)


@each_move
def test_a_worker_takes_over_from_those_whose_share_it_takes_over(n, m):
    share = moves.weights(n, m)
    assert (share.sum(1) == n).all() and (share.sum(0) == m).all()
    for j in range(m):
        for i in range(n):
            overlap = min((j + 1) / m, (i + 1) / n) - max(j / m, i / n)
            assert share[j, i] / (n * m) == pytest.approx(max(0, overlap), abs=1e-12)


@each_move
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_mean_stays_to_half_a_unit_of_one_worker(n, m, dtype):
    rng = np.random.default_rng(n * m)
    scale = 10.0 ** rng.integers(-3, 3, (n, 50))
    x = (scale * rng.standard_normal((n, 50))).astype(jnp.dtype(dtype))
    y = moves.mean(x, m)
    assert y.dtype == x.dtype and y.shape == (m, 50)
    wide = np.longdouble
    off = np.abs(y.astype(wide).sum(0) / m - x.astype(wide).sum(0) / n)
    largest = np.abs(y.astype(wide)).max(0)
    unit = largest * wide(jnp.finfo(y.dtype).eps)
    assert (off <= 0.5 * unit / m + 1e-18 * largest).all()
    if m % n == 0:
        assert (y == np.repeat(x, m // n, axis=0)).all()
    # No larger than the largest was, but for the rounding that it takes over.
    assert (largest <= np.abs(x.astype(wide)).max(0) + unit).all()


@each_move
def test_what_cannot_be_negative_does_not_become_it(n, m):
    """Second moments, of which an optimizer takes roots."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((n, 400)) < 0.5, 0, rng.random((n, 400)) ** 8)
    assert (moves.mean(x.astype(np.float32), m) >= 0).all()


def test_infinity_stays_with_those_who_take_over_from_it():
    x = np.ones((4, 3), np.float32)
    x[3, 1] = np.inf
    y = moves.mean(x, 3)
    assert np.isfinite(y[:2]).all() and np.isinf(y[2]).tolist() == [False, True, False]


@each_move
@pytest.mark.parametrize("split", [1, 7, 12])
@pytest.mark.parametrize("shards", [0, 2])
def test_ranges_are_cut_anew_to_the_bit(n, m, split, shards):
    whole = np.random.default_rng(0).standard_normal((max(shards, 1), split, 4))

    def cut(n):
        rows = -(-split // n)
        padded = np.pad(whole, ((0, 0), (0, rows * n - split), (0, 0)))
        out = np.moveaxis(padded.reshape(-1, n, rows, 4), 1, 0)
        return out if shards else out[:, 0]

    lead = 2 if shards else 1
    np.testing.assert_array_equal(moves.ranges(cut(n), m, split, lead), cut(m))


def test_integers_that_differ_are_refused_with_both():
    x = np.array([[3, 4], [3, 4], [3, 5]])
    with pytest.raises(ValueError, match=r"int64, such as 4 of worker 0 and 5 of w"):
        moves.mean(x, 2)
    assert (moves.mean(x[:2], 3) == [3, 4]).all()
