"""What the papers show, shown again: where signs fail, what repairs them, and what not.

Small sizes, seeds fixed. `notebooks/why_error_feedback.ipynb` draws the same pictures.
"""

import functools
import importlib
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from workers_under_test import FAST, slow

import efopt

PAPERS = Path(__file__).resolve().parents[2] / "examples" / "paper"


def scaled_sign(rate):
    """Scaled sign without feedback."""
    return optax.chain(efopt.compress(efopt.scaled_sign()), optax.sgd(rate))


METHODS = {
    "sgd": optax.sgd,
    "signsgd": efopt.signsgd,
    "scaled_sign": scaled_sign,
    "ef_signsgd": efopt.ef_signsgd,
}
each_method = pytest.mark.parametrize("name", METHODS)


def minimise(tx, gradient, x, steps, seed=0, project=lambda x: x):
    """The last iterate; `gradient(x, key)` is stochastic."""

    def step(carry, key):
        x, state = carry
        updates, state = tx.update(gradient(x, key), state, x)
        return (project(optax.apply_updates(x, updates)), state), None

    def run(x, keys):
        return jax.lax.scan(step, (x, tx.init(x)), keys)[0][0]

    def keyed(x, seed):
        return run(x, jax.random.split(jax.random.key(seed), steps))

    last = jax.jit(keyed, compiler_options=FAST)(np.float32(x), np.uint32(seed))
    return np.asarray(last, np.float64)


def decaying(t):
    return 0.05 / jnp.sqrt(t + 1.0)


# ------------------------------------------- the counter-examples of 1901.09847


@each_method
def test_example_1_skewed_noise_drives_signsgd_uphill(name):
    """f = x / 4 on [-1, 1]; the gradient is 4 with probability 1/4, else -1."""

    def gradient(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.25, x.shape), 4.0, -1.0)

    clip = functools.partial(jnp.clip, min=-1.0, max=1.0)
    x = minimise(METHODS[name](0.01), gradient, [0], 5000, project=clip)
    f = float(x[0]) / 4
    if name == "signsgd":
        assert f > 0.24
    else:  # a single coordinate: scaled sign is the identity
        assert f < -0.2


def plus(x):
    return jnp.where(x >= 0, 1.0, -1.0)


def example_2(sign):
    """The subgradient of 0.5 |x + y| + |x - y|, by a convention for sign(0)."""

    def gradient(x, key):
        along, across = sign(x[0] + x[1]), sign(x[0] - x[1])
        return 0.5 * along * jnp.array([1.0, 1.0]) + across * jnp.array([1.0, -1.0])

    return gradient


@each_method
def test_example_2_signs_never_leave_the_line(name):
    f, subgradient = oracle.counterexample_2(0.5)
    gradient = example_2(plus)
    at_start = jax.jit(gradient)(np.ones(2, np.float32), 0)
    np.testing.assert_array_equal(at_start, subgradient(np.ones(2)))
    x = minimise(METHODS[name](decaying), gradient, [1, 1], 5000)
    if name in ("signsgd", "scaled_sign"):
        assert f(x) == pytest.approx(f(np.ones(2)), rel=0.01)
        assert float(x[0] + x[1]) == pytest.approx(2.0, abs=1e-4)
    else:
        assert f(x) < 2e-3


@each_method
def test_example_2_is_harmless_if_the_subgradient_says_sign_of_zero_is_zero(name):
    f, _ = oracle.counterexample_2(0.5)
    x = minimise(METHODS[name](decaying), example_2(jnp.sign), [1, 1], 5000)
    assert f(x) < 0.01


@each_method
def test_example_3_nor_if_the_function_is_smooth(name):
    """<a, x>^2 + <b, x>^2 from (1, 1), one of the terms at a time."""
    terms = np.float32([[1.5, -0.5], [-0.5, 1.5]])

    def gradient(x, key):
        a = jnp.asarray(terms)[jax.random.bernoulli(key).astype(int)]
        return 4 * jnp.dot(a, x) * a

    x = minimise(METHODS[name](decaying), gradient, [1, 1], 20_000)
    f = np.sum((terms @ x) ** 2)
    if name in ("signsgd", "scaled_sign"):
        assert f > 1.9
        assert float(x[0] + x[1]) == pytest.approx(2.0, abs=1e-3)
    else:
        assert f < 1e-10


# ------------------------------------------- over-parameterised least squares


def by_hand(feedback, sign):
    """(EF-)signSGD with a sign of one's own."""

    def update_fn(updates, state, params=None):
        p = updates + state
        sent = jnp.abs(p).mean() * sign(p)
        return sent, (p - sent if feedback else state)

    method = optax.GradientTransformation(jnp.zeros_like, update_fn)
    return optax.chain(optax.scale_by_learning_rate(10.0), method)


def positive(p):
    """The sign of two values, zeros positive."""
    return jnp.where(p >= 0, 1.0, -1.0)


LEAST_SQUARES = {
    "sgd": optax.sgd(0.5),
    "scaled, sign(0) = +1": by_hand(feedback=False, sign=positive),
    "ef, sign(0) = +1": by_hand(feedback=True, sign=positive),
    # As in the authors' code, whose sign has three values.
    "scaled, sign(0) = 0": by_hand(feedback=False, sign=jnp.sign),
    "ef, sign(0) = 0": by_hand(feedback=True, sign=jnp.sign),
    "scaled, sign(0) = coin": scaled_sign(10.0),
    "ef, sign(0) = coin": efopt.ef_signsgd(10.0),
    "signum, sign(0) = +1": optax.chain(
        optax.ema(0.1, debias=False),
        efopt.compress(efopt.sign(zero="positive")),
        optax.scale(-0.05),
    ),
    "signum, sign(0) = coin": efopt.optimizers.signum(0.05, beta=0.1),
}


@pytest.mark.slow
def test_least_squares_only_what_stays_in_the_span_generalises(monkeypatch):
    monkeypatch.syspath_prepend(PAPERS)
    points = importlib.import_module("small_problems").wilson
    test_loss, distance = {}, {}
    for draw in range(6):
        a, y, b, z = points(100, np.random.default_rng(draw))
        q, _ = np.linalg.qr(a.astype(np.float64).T)
        for name, tx in LEAST_SQUARES.items():
            x = _train(tx, a, y)
            test_loss.setdefault(name, []).append(np.sum((b @ x - z) ** 2) / 100)
            off = np.linalg.norm(x - q @ (q.T @ x))
            distance.setdefault(name, []).append(off)
            assert np.sum((a @ x - y) ** 2) / 100 < 1e-2 or "signum" in name
    test_loss, distance = (
        {k: np.array(v) for k, v in t.items()} for t in (test_loss, distance)
    )
    assert test_loss["sgd"].max() < 0.003 and distance["sgd"].max() < 1e-4
    for convention in ("sign(0) = +1", "sign(0) = 0", "sign(0) = coin"):
        ef, scaled = f"ef, {convention}", f"scaled, {convention}"
        assert test_loss[ef].max() < 0.01
        assert np.all(test_loss[scaled] > 50 * test_loss[ef])
        assert np.all(distance[scaled] > 10 * distance[ef])
    assert 0.5 < test_loss["scaled, sign(0) = 0"].min()
    assert test_loss["scaled, sign(0) = 0"].max() < 0.9
    assert np.all(np.abs(distance["scaled, sign(0) = 0"] - 4.1) < 0.2)
    assert np.all(np.abs(distance["scaled, sign(0) = +1"] - 9) < 0.6)
    # Coins take each other back: no further away than with three values.
    assert np.all(np.abs(distance["scaled, sign(0) = coin"] - 4.1) < 0.2)
    assert test_loss["signum, sign(0) = +1"].min() > 1
    assert test_loss["signum, sign(0) = coin"].min() > 0.5


@functools.partial(jax.jit, static_argnums=0)
def _train(tx, a, y):
    """80 full-batch steps from zero."""

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(a.T @ (a @ x - y) / len(y), state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.zeros(a.shape[1])
    return jax.lax.scan(step, (x, tx.init(x)), length=80)[0][0]


# ------------------------------------------------------------------ sparse noise


@pytest.mark.slow
def test_sparse_noise_is_where_signs_beat_feedback():
    """Half |x|^2 with noise of size 100 on one coordinate of 100; ten repeats."""

    def gradient(x, key):
        return x.at[0].add(100 * jax.random.normal(key))

    def end(tx, seed):
        key = jax.random.key(seed)

        def step(carry, key):
            x, state = carry
            updates, state = tx.update(gradient(x, key), state, x)
            return (optax.apply_updates(x, updates), state), None

        x = jax.random.normal(key, 100)
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), jax.random.split(key, 10_000))
        return jnp.sum(x**2) / 2

    def mean(tx):
        return float(np.mean(jax.jit(jax.vmap(lambda s: end(tx, s)))(np.arange(10))))

    signs, ef = mean(efopt.signsgd(1e-2)), mean(efopt.ef_signsgd(1e-3))
    dense = mean(optax.sgd(1e-3))
    assert signs < 0.4 * ef
    assert ef < 1.5 * dense and dense < 1.5 * ef


# ----------------------------------------------------------------- majority vote


@pytest.mark.slow
def test_identical_workers_vote_as_one():
    grads = np.random.default_rng(0).standard_normal((3, 40), np.float32)

    def steps(update, state):
        scan = lambda s, gs: jax.lax.scan(lambda s, g: update(g, s)[::-1], s, gs)[1]  # noqa: E731
        return np.asarray(jax.jit(scan, compiler_options=FAST)(state, grads))

    tx = efopt.optimizers.signum(0.1)
    single = steps(tx.update, tx.init(grads[0]))
    for n in (2, 5):
        tx = efopt.optimizers.signum(0.1, axis_name="data")
        update = jax.vmap(tx.update, axis_name="data", in_axes=(None, 0))
        votes = steps(update, efopt.stack_workers(tx.init(grads[0]), n))
        np.testing.assert_array_equal(votes, np.repeat(single[:, None], n, axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "laplace", "uniform"])
def test_votes_go_wrong_less_often_the_more_workers(noise):
    """20 000 votes, a gradient of half the noise's deviation; false alarm: 5 sigma."""
    trials, ratio = 20_000, 0.5
    tx = efopt.signsgd(1.0, axis_name="data")
    wide = {"normal": 1.0, "laplace": math.sqrt(2), "uniform": 1 / math.sqrt(3)}[noise]
    draw = getattr(jax.random, noise)
    span = {"minval": -1.0, "maxval": 1.0} if noise == "uniform" else {}
    wrong, one = [], None
    for n in (1, 3, 9, 27):

        @functools.partial(jax.jit, compiler_options=FAST)
        def vote(seed, n=n):
            g = ratio * wide + draw(jax.random.key(seed), (n, trials), **span)
            state = efopt.stack_workers(tx.init(g[0]), n)
            return jax.vmap(tx.update, axis_name="data")(g, state)[0][0]

        wrong.append(float((np.asarray(vote(n)) > 0).mean()))
        sigma = math.sqrt(wrong[-1] * (1 - wrong[-1]) / trials)
        assert wrong[-1] <= 1 / (math.sqrt(n) * ratio) + 5 * sigma  # 1810.05291
        if one is None:  # the lemma on a single sign, S < 2 / sqrt(3)
            one = wrong[0]
            assert one <= 0.5 - ratio / (2 * math.sqrt(3)) + 5 * sigma
        exact = sum(
            math.comb(n, k) * one**k * (1 - one) ** (n - k)
            for k in range(n // 2 + 1, n + 1)
        )
        assert wrong[-1] == pytest.approx(exact, abs=0.02)
    assert wrong == sorted(wrong, reverse=True) and wrong[-1] < wrong[0] / 5


def among_workers(tx, corrupt, steps=400):
    """|x|^2 / 2 at the end, seven workers with noise of their own."""

    def gradient(x, key):
        return corrupt(x + 0.5 * jax.random.normal(key, (7, *x.shape[1:])))

    def step(carry, key):
        x, state = carry
        updates, state = jax.vmap(tx.update, axis_name="data")(
            gradient(x, key), state, x
        )
        return (optax.apply_updates(x, updates), state), None

    def run(x, keys):
        carry = efopt.stack_workers((x, tx.init(x)), 7)
        return jnp.sum(jax.lax.scan(step, carry, keys)[0][0][0] ** 2) / 2

    return float(
        jax.jit(
            lambda x: run(x, jax.random.split(jax.random.key(1), steps)),
            compiler_options=FAST,
        )(np.full(50, 2.0, np.float32))
    )


def test_a_vote_survives_three_liars_of_seven_and_a_mean_not_one():
    vote = efopt.signsgd(0.01, axis_name="data")
    mean = optax.chain(
        efopt.compress(efopt.compressors.identity(), axis_name="data"), optax.sgd(0.01)
    )

    def liars(g):
        return g.at[:3].multiply(-1.0)

    def loud(g):
        return g.at[0].multiply(-1000.0)

    start = 100.0
    assert among_workers(vote, liars) < 0.01 * start
    assert among_workers(vote, loud) < 0.01 * start
    assert among_workers(mean, lambda g: g) < 0.01 * start
    end = among_workers(mean, loud)
    assert math.isnan(end) or end > 1e6 * start


# ------------------------------------------------------------ a network on digits


@functools.cache
def digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = (x / 8 - 1).astype(np.float32)
    return train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)


def network():
    rng, sizes = np.random.default_rng(0), (64, 64, 64, 10)
    return [
        (
            rng.normal(0, (2 / i) ** 0.5, (i, o)).astype(np.float32),
            np.zeros(o, np.float32),
        )
        for i, o in itertools.pairwise(sizes)
    ]


def logits(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b[None, :])
    w, b = params[-1]
    return x @ w + b[None, :]


def density(v):
    """|v|_1^2 / (d |v|_2^2), leaf by leaf: the contraction of scaled sign."""
    leaves = jax.tree.leaves(v)
    kept = sum(jnp.sum(jnp.abs(x)) ** 2 / x.size for x in leaves)
    return kept / sum(jnp.sum(x**2) for x in leaves)


def train(tx, steps=200, workers=4, watch=lambda grads, state: 0.0):
    """Test accuracy, and what `watch` saw at every step."""
    x, test_x, y, test_y = digits()
    picks = np.random.default_rng(0).integers(len(y), size=(steps, workers, 32))

    def loss(params, pick):
        out = logits(params, jnp.asarray(x)[pick])
        return optax.softmax_cross_entropy_with_integer_labels(
            out, jnp.asarray(y)[pick]
        ).mean()

    def step(carry, pick):
        params, state = carry
        grads = jax.grad(loss)(params, pick)
        seen = watch(grads, state)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), seen

    def run(carry, picks):
        each = jax.vmap(step, axis_name="data")
        return jax.lax.scan(each, carry, picks)

    params = network()
    carry = jax.jit(lambda p: efopt.stack_workers((p, tx.init(p)), workers))(params)
    (params, _), seen = jax.jit(run, compiler_options=FAST)(carry, picks)
    out = jax.jit(logits)(jax.tree.map(lambda p: np.asarray(p)[0], params), test_x)
    return float((np.argmax(out, axis=-1) == test_y).mean()), seen


@pytest.mark.slow
def test_corrected_gradients_stay_dense_while_a_network_trains():
    tx = optax.chain(
        efopt.error_feedback(efopt.scaled_sign(), axis_name="data"), optax.sgd(0.1)
    )

    def watch(grads, state):
        owed = jax.tree.map(lambda e: e[0], state[0].residual.value)
        return density(jax.tree.map(jnp.add, grads, owed))

    accuracy, seen = train(tx, watch=watch)
    largest = max(p.size for p in jax.tree.leaves(network()))
    assert accuracy > 0.9
    assert seen.min() > 0.05 > 100 / largest


MOMENTUM = {
    "dense": (
        optax.chain(
            efopt.compress(efopt.compressors.identity(), axis_name="data"),
            optax.sgd(0.1, 0.9),
        ),
        True,
    ),
    "at_workers": (efopt.ef_signsgd(0.1, momentum=0.9, axis_name="data"), True),
    "dist_ef_sgd": (efopt.dist_ef_sgd(0.1, axis_name="data"), True),
    "power_sgd": (efopt.power_sgd_momentum(0.1, rank=2, axis_name="data"), True),
    "top_k_at_server": (
        efopt.ef_sgd(
            efopt.top_k(fraction=0.01),
            0.1,
            momentum=0.9,
            momentum_at="server",
            axis_name="data",
        ),
        True,
    ),
    "at_server": (
        efopt.ef_sgd(
            efopt.scaled_sign(),
            0.1,
            momentum=0.9,
            momentum_at="server",
            axis_name="data",
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", [slow(n) for n in MOMENTUM])
def test_momentum_behind_scaled_sign_does_not_train(name):
    tx, trains = MOMENTUM[name]
    accuracy, _ = train(tx)
    assert accuracy > 0.9 if trains else accuracy < 0.7
