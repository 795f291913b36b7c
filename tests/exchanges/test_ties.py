"""What a vote, and a sign, make of zeros and of ties: a fair coin, never a drift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import slow

import efopt

AXIS = "data"
WORKERS = (2, 3, slow(4), slow(8))  # even and odd
WAYS = ("majority_vote", "all_gather", "two_phase")


def steps_of(grads, *, exchange="majority_vote", compressor=None):
    """Updates ``(steps, d)``, equal on all workers, of gradients ``(steps, n, d)``."""
    compressor = efopt.sign() if compressor is None else compressor
    tx = efopt.compress(compressor, axis_name=AXIS, exchange=exchange)
    n, d = grads[0].shape
    state = efopt.stack_workers(tx.init(jnp.zeros(d)), n)

    def body(state, g):
        u, state = jax.vmap(tx.update, axis_name=AXIS)(g, state)
        return state, u

    updates = np.asarray(jax.lax.scan(body, state, grads)[1])
    np.testing.assert_array_equal(updates, updates[:, :1].repeat(n, axis=1))
    return updates[:, 0]


def repeated(g, steps):
    return jnp.broadcast_to(jnp.asarray(g, jnp.float32), (steps, *np.shape(g)))


@pytest.mark.parametrize("n", (1, *WORKERS))
@pytest.mark.parametrize("exchange", ["majority_vote", "all_gather"])
def test_coordinates_without_gradient_stand_still_over_two_steps(n, exchange):
    u = steps_of(jnp.zeros((6, n, 3000)), exchange=exchange)
    np.testing.assert_array_equal(u[0::2] + u[1::2], 0)
    if exchange == "majority_vote":
        assert set(np.unique(u)) == {-1, 1}
        # 9000 fair coins: 5 sigma of the mean are 0.053.
        assert abs(u[0::2].mean()) < 0.053
    elif n % 2 == 0:
        np.testing.assert_array_equal(u, 0)  # neighbours take each other back


@pytest.mark.parametrize("n", WORKERS)
def test_negated_gradients_give_negated_votes_in_the_mean(n):
    """Signs and zeros in all proportions: over two steps exactly, ties and all."""
    g = np.random.default_rng(n).integers(-1, 2, size=(n, 500))
    plus, minus = steps_of(repeated(g, 6)), steps_of(repeated(-g, 6))
    np.testing.assert_array_equal(plus[0::2] + plus[1::2], -(minus[0::2] + minus[1::2]))
    decided = np.abs(g.sum(axis=0)) > np.sum(g == 0, axis=0)
    right = np.sign(g.sum(axis=0))[decided]
    np.testing.assert_array_equal(plus[:, decided], [right] * 6)


@pytest.mark.parametrize("n", WORKERS)
def test_opposite_gradients_in_two_steps_take_each_other_back(n):
    """A step with g and one with -g: the coins are turned over as gradients are."""
    g = np.random.default_rng(n).integers(-1, 2, size=(1, n, 500))
    pair = jnp.asarray(np.concatenate([g, -g] * 2), jnp.float32)
    u = steps_of(pair)
    np.testing.assert_array_equal(u[0::2] + u[1::2], 0)


@pytest.mark.parametrize("n", WORKERS)
def test_one_worker_with_a_gradient_is_heard_among_zeros(n):
    """Its vote is right at least three times in four, however many others are silent.

    2000 pairs of steps, each one coin a coordinate, 40 coordinates: sigma of the whole
    mean is below 0.004, and 0.5 is what three rights in four are on average.
    """
    for who in (0, n - 1):
        g = np.zeros((n, 40))
        g[who] = 1
        assert steps_of(repeated(g, 2000)).mean() > 0.5 - 0.02


@pytest.mark.parametrize("n", (slow(1), 2, slow(4), slow(8)))
def test_a_noisy_quadratic_ends_at_its_minimum(n):
    """Ends at -0.55, -0.29 and -0.15 for 2, 4, 8 workers if ties count as +1.

    500 coordinates whose deviation at the end is below 0.05: 5 sigma are 0.011.
    """
    tx = efopt.compress(efopt.sign(), axis_name=AXIS, exchange="majority_vote")
    state = efopt.stack_workers(tx.init(jnp.zeros(500)), n)

    def body(carry, key):
        x, state = carry
        g = x[None] + jax.random.normal(key, (n, 500))
        u, state = jax.vmap(tx.update, axis_name=AXIS)(g, state)
        return (x - 0.002 * u[0], state), None

    keys = jax.random.split(jax.random.key(0), 2000)
    x = np.asarray(jax.lax.scan(body, (jnp.zeros(500), state), keys)[0][0])
    assert x.std() < 0.05
    assert abs(x.mean()) < 0.011


@pytest.mark.slow
@pytest.mark.parametrize("exchange", WAYS)
def test_coins_are_the_same_under_jit(exchange):
    tx = efopt.compress(efopt.sign(), axis_name=AXIS, exchange=exchange)
    g = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (4, 999)), jnp.float32)
    state = efopt.stack_workers(tx.init(g[0]), 4)
    step = jax.vmap(tx.update, axis_name=AXIS)
    np.testing.assert_array_equal(step(g, state)[0], jax.jit(step)(g, state)[0])


def test_the_letter_of_the_paper_counts_zeros_and_ties_as_positive():
    letter = efopt.sign(zero="positive")
    g = repeated([[1.0, 0.0, -1.0], [-1.0, 0.0, -1.0]], 3)
    u = steps_of(g, compressor=letter)
    np.testing.assert_array_equal(u, [[1, 1, -1]] * 3)
    assert repr(letter) == "sign(zero='positive')"
    assert letter.payload_bits((999,)) == efopt.sign().payload_bits((999,))
    with pytest.raises(ValueError, match="'fair', 'positive', got 'zero'"):
        efopt.sign(zero="zero")


def test_scaled_signs_of_zeros_take_themselves_back():
    """Without feedback too: a zero inside a block that is not zero does not drift."""
    g = np.zeros((4, 64))
    g[:, ::2] = np.random.default_rng(0).normal(size=(4, 32))
    scaled = efopt.scaled_sign(64)
    u = steps_of(repeated(g, 4), compressor=scaled, exchange="all_gather")
    np.testing.assert_allclose(u[0::2, 1::2] + u[1::2, 1::2], 0, atol=1e-7)
    np.testing.assert_array_equal(u[0, ::2], u[1, ::2])
