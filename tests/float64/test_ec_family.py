"""The EC-SGD family and ECLK against their papers, to twelve digits.

Eight workers under `shard_map`, twenty under `vmap`, one alone; all data differ.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle_ec
import pytest
from workers_under_test import AXIS

import efopt
from efopt.codecs import layout
from efopt.codecs.blocks import Turn
from efopt.convex import coins as coin_rule

from .convex import MU, Problem, run

ROUNDS, P_MOVE, EXACT = 200, 0.1, 1e-12
FEW = 20  # rounds on eight devices, which a CPU plays slowly
SHIFTS = efopt.random_k(k=2, unbiased=True, seed=5)
TOP_1 = efopt.top_k(k=1)


def eclk_of(p, scale=1, **options):
    constants = {"smoothness": scale * p.smoothness, "strong_convexity": MU}
    return efopt.convex.eclk(TOP_1, **constants, **options)


@functools.cache
def problem(n):
    return Problem(n, ROUNDS)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=EXACT)


@functools.cache
def masks(compressor, role=None, rounds=ROUNDS):
    """What a compressor with shared randomness multiplies each coordinate by.

    A role has a stream of random numbers of its own.
    """
    ones, stream = jnp.ones(20), zlib.crc32(role.encode()) if role else 0
    plan = layout.lay_out([compressor.codec], [ones.shape], [ones.dtype])
    (bucket,) = plan.buckets
    (joined,) = plan.join([ones])

    def trip(step):
        turn, blocks = Turn(step, jnp.uint32(0), stream), bucket.blocks()
        payload = bucket.codec.encode(joined, blocks, turn)
        sent = bucket.codec.decode(payload, blocks, turn)
        return plan.part([sent], [jax.ShapeDtypeStruct(ones.shape, ones.dtype)])[0]

    return np.asarray(jax.jit(jax.vmap(trip))(jnp.arange(rounds, dtype=jnp.uint32)))


def shared(compressor, role=None):
    return lambda x, t: x * masks(compressor, role)[t]


def coins(p, n, kind="shared", seed=0, rounds=ROUNDS):
    """`[t, i]`: whether the reference point of worker i moves at the end of step t."""
    steps = jnp.arange(1, rounds + 1)[:, None]
    workers = jnp.arange(n) if kind == "per_worker" else jnp.full(n, coin_rule.NOBODY)
    return np.asarray(coin_rule.coin(p, seed, steps, workers[None].astype(jnp.uint32)))


# ------------------------------------------------- every method against its oracle


def rate(p):
    return 0.5 / p.smoothness


def ec_sgd(p, axis):
    tx = efopt.convex.ec_sgd(TOP_1, rate(p), axis_name=axis)
    return tx, oracle_ec.plain(p.grads, p.n)


def ec_gd_star(p, axis):
    given = p.reference() if axis else p.reference()[0]
    tx = efopt.convex.ec_gd_star(
        TOP_1, rate(p), reference_grads=jnp.asarray(given), axis_name=axis
    )
    return tx, oracle_ec.star(oracle_ec.plain(p.grads, p.n), p.reference())


def ec_sgd_diana(p, axis):
    tx = efopt.convex.ec_sgd_diana(
        TOP_1, rate(p), shift_compressor=SHIFTS, axis_name=axis
    )
    plain = oracle_ec.plain(p.grads, p.n)
    return tx, oracle_ec.Diana(
        plain, shared(SHIFTS, "shifts"), 0.1, p.start, p.n
    )  # 2 of 20


def lsvrg(p, kind):
    moves = coins(P_MOVE, p.n, kind)
    return oracle_ec.Lsvrg(p.grads, p.full, moves, p.start, p.n)


def ec_lsvrg(p, axis):
    tx = efopt.convex.ec_lsvrg(
        TOP_1, rate(p), probability=P_MOVE, axis_name=axis, coin="per_worker"
    )
    return tx, lsvrg(p, "per_worker")


def ec_lsvrg_one_coin(p, axis):
    tx = efopt.convex.ec_lsvrg(TOP_1, rate(p), probability=P_MOVE, axis_name=axis)
    return tx, lsvrg(p, "shared")


def ec_lsvrg_diana(p, axis):
    tx = efopt.convex.ec_lsvrg_diana(
        TOP_1,
        rate(p),
        probability=P_MOVE,
        shift_compressor=SHIFTS,
        alpha=0.05,
        axis_name=axis,
        coin="per_worker",
    )
    inner = lsvrg(p, "per_worker")
    return tx, oracle_ec.Diana(inner, shared(SHIFTS, "shifts"), 0.05, p.start, p.n)


FAMILY = {
    f.__name__: f
    for f in (
        ec_sgd,
        ec_gd_star,
        ec_sgd_diana,
        ec_lsvrg,
        ec_lsvrg_one_coin,
        ec_lsvrg_diana,
    )
}


@functools.cache
def family(name, n):
    """Of the oracle: iterates, residuals, estimates."""
    p = problem(n)
    _, estimate = FAMILY[name](p, AXIS)
    return oracle_ec.ec_sgd(p.start, n, ROUNDS, estimate, rate(p), oracle_ec.top_1)


def residual(state):
    (found,) = [
        x for x in jax.tree.leaves(state, is_leaf=is_feedback) if is_feedback(x)
    ]
    return found.residual


def is_feedback(x):
    return isinstance(x, efopt.feedback.ErrorFeedbackState)


def some(names, default):
    """The rest is left to the slow lane: it differs in what others cover."""
    marks = {name: [] if name in default else [pytest.mark.slow] for name in names}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.mark.parametrize(
    "name", some(FAMILY, ["ec_sgd", "ec_gd_star", "ec_sgd_diana", "ec_lsvrg_diana"])
)
def test_the_family_is_its_oracle_and_follows_the_virtual_iterate(name):
    p = problem(20)
    tx, _ = FAMILY[name](p, AXIS)
    x, state = run(tx, p, ROUNDS, batch=True)
    path, owed, used = family(name, 20)
    close(x, path[1:])
    close(-residual(state).value[:, :, 0], owed)  # updates are minus the paper's steps
    # x - mean e walks the path of SGD with the same estimates.
    walk = p.start - rate(p) * np.cumsum(used.mean(axis=1), axis=0)
    virtual = [
        efopt.virtual_params(
            np.stack([a] * p.n), jax.tree.map(lambda s, t=t: s[t], state)
        )
        for t, a in enumerate(x)
        if t % 100 == 99
    ]
    close(np.stack(virtual)[:, 0], walk[99::100])
    assert np.abs(x[-1] - walk[-1]).max() > 1e-3


@pytest.mark.parametrize("name", some(FAMILY, ["ec_lsvrg_diana"]))
def test_the_family_is_the_same_on_devices(name):
    p = problem(8)
    tx, _ = FAMILY[name](p, AXIS)
    path = family(name, 8)[0][1 : FEW + 1]
    close(run(tx, p, FEW, batch=True, how="auto")[0], path)
    close(run(tx, p, FEW, batch=True)[0], path)


@pytest.mark.parametrize("name", some(FAMILY, ["ec_gd_star", "ec_lsvrg_diana"]))
def test_the_family_of_one_worker_is_its_oracle(name):
    p = problem(1)
    tx, _ = FAMILY[name](p, None)
    close(run(tx, p, ROUNDS, batch=True, how="alone")[0], family(name, 1)[0][1:])


def ec_lsvrg_shifted(p, axis):
    tx = efopt.convex.ec_lsvrg_shifted(
        TOP_1,
        rate(p),
        probability=P_MOVE,
        shift_compressor=efopt.random_k(k=3),
        axis_name=axis,
    )
    path, _ = oracle_ec.ec_lsvrg_shifted(
        p.start,
        p.n,
        ROUNDS,
        p.grads,
        p.full,
        coins(P_MOVE, p.n)[:, 0],
        rate(p),
        oracle_ec.top_1,
        shared(efopt.random_k(k=3), "shifts"),
    )
    return tx, path


def ecq_sgd(p, axis):
    tx = efopt.optimizers.ecq_sgd(
        0.05 * rate(p), compressor=SHIFTS, alpha=0.3, beta=0.8, axis_name=axis
    )
    path, _ = oracle_ec.ecq_sgd(
        p.start, p.n, ROUNDS, p.grads, 0.05 * rate(p), shared(SHIFTS), 0.3, 0.8
    )
    return tx, path


PAYLOAD = 64 + 8  # one float64 and its index


def defaults(p):
    """L_1, theta_1, theta_2 and the probability."""
    probability = 2 * PAYLOAD / (64 * 20)
    l_1 = p.smoothness / 3
    return l_1, 0.5 * (MU / (l_1 * probability)) ** 0.5, 0.5, probability


def eclk_path(p, compress, grads=None, prox=None, probability=None):
    l_1, theta_1, theta_2, default = defaults(p)
    if probability is not None:
        theta_1 = 0.5 * min(1, (MU / (l_1 * probability)) ** 0.5)
    return oracle_ec.eclk(
        p.start,
        p.n,
        ROUNDS,
        p.grads if grads is None else grads,
        p.full,
        coins(default if probability is None else probability, p.n)[:, 0],
        l_1,
        MU,
        theta_1,
        theta_2,
        compress,
        prox,
    )


def eclk(p, axis):
    return eclk_of(p, axis_name=axis), eclk_path(p, oracle_ec.top_1)


def shrink(x, step):
    """The proximal map of 0.01 |x|_1."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.01 * step, 0)


def eclk_prox(p, axis):
    tx = eclk_of(p, prox=shrink, axis_name=axis)

    def by_hand(x, step):
        return np.where(np.abs(x) > 0.01 * step, x - 0.01 * step * np.sign(x), 0)

    return tx, eclk_path(p, oracle_ec.top_1, prox=by_hand)


def loopless_katyusha(p, axis):
    tx = efopt.convex.loopless_katyusha(
        smoothness=p.smoothness, strong_convexity=MU, probability=0.2, axis_name=axis
    )
    return tx, eclk_path(p, lambda x, t: x, probability=0.2)


OTHERS = {
    f.__name__: f
    for f in (ec_lsvrg_shifted, ecq_sgd, eclk, eclk_prox, loopless_katyusha)
}


@pytest.mark.parametrize("name", some(OTHERS, ["ec_lsvrg_shifted", "ecq_sgd", "eclk"]))
def test_method_is_its_oracle(name):
    p = problem(20)
    tx, path = OTHERS[name](p, AXIS)
    close(run(tx, p, ROUNDS, batch=True)[0], path[1:])


@pytest.mark.parametrize("name", some(OTHERS, ["eclk"]))
def test_method_is_the_same_on_devices(name):
    p = problem(8)
    tx, path = OTHERS[name](p, AXIS)
    close(run(tx, p, FEW, batch=True, how="auto")[0], path[1 : FEW + 1])
    close(run(tx, p, FEW, batch=True)[0], path[1 : FEW + 1])


@pytest.mark.parametrize("name", some(OTHERS, ["eclk_prox", "loopless_katyusha"]))
def test_method_of_one_worker_is_its_oracle(name):
    p = problem(1)
    tx, path = OTHERS[name](p, None)
    close(run(tx, p, ROUNDS, batch=True, how="alone")[0], path[1:])


@pytest.mark.parametrize("how", some(["vmap", "auto", "alone"], ["vmap", "alone"]))
def test_eclk_of_full_gradients_is_its_oracle(how):
    """It remembers those at the reference point."""
    p, rounds = problem(1 if how == "alone" else 8), FEW if how == "auto" else ROUNDS
    tx = eclk_of(
        p,
        axis_name=None if how == "alone" else AXIS,
    )
    path = eclk_path(p, oracle_ec.top_1, lambda t, x, i: p.full(x, i))
    close(run(tx, p, rounds, how=how)[0], path[1 : rounds + 1])


def test_eclk_keeps_the_invariant_of_the_shifted_z():
    """z - mean e / (1 + eta sigma) follows the uncompressed recursion (papers.md 3a).

    The right side takes x shifted alike, and the plain mean of the gradients.
    """
    p, rounds = problem(20), 1000
    tx = eclk_of(p, axis_name=AXIS)
    x, state = run(tx, p, rounds)
    l_1, theta_1, _, _ = defaults(p)
    eta, sigma = 1 / (3 * theta_1), MU / (2 * l_1)
    grow = 1 + eta * sigma
    mean = residual(state).value[:, :, 0].mean(axis=1)  # of e, after each step
    shifted_z, shifted_x = state.z - mean / grow, x - mean / grow
    for t in range(rounds - 1):
        # Full gradients: their mean difference and the gradient at w make f's at x.
        slope = np.mean([p.full(x[t], i) for i in range(p.n)], axis=0)
        after = (eta * sigma * shifted_x[t] + shifted_z[t] - eta / l_1 * slope) / grow
        close(shifted_z[t + 1], after)
    assert np.abs(mean).max() > 1e-2


# ------------------------------------------------------------------ what they are for


def gaps(methods, p, rounds, every, batch):
    """f - f* along the way, for each method."""
    found = {}
    for name, tx in methods.items():
        x, _ = run(tx, p, rounds, batch=batch, every=every)
        found[name] = np.array([p.gap(a) for a in x])
    return found


def rounds_to(gap, tolerance, every):
    assert gap.min() < tolerance
    return every * (1 + (gap < tolerance).argmax())


def test_only_what_knows_the_workers_apart_converges():
    """EC-GD stalls; the star and DIANA go on; ECLK is there first."""
    p, gamma = Problem(8), 1 / problem(8).smoothness
    methods = {
        "ec_gd": efopt.convex.ec_sgd(TOP_1, gamma, axis_name=AXIS),
        "star": efopt.convex.ec_gd_star(
            TOP_1,
            gamma,
            reference_grads=jnp.asarray(p.reference()),
            axis_name=AXIS,
        ),
        "diana": efopt.convex.ec_sgd_diana(
            TOP_1, gamma, shift_compressor=SHIFTS, axis_name=AXIS
        ),
        "eclk": eclk_of(p, axis_name=AXIS),
    }
    gap = gaps(methods, p, 1800, 50, batch=False)
    assert gap["ec_gd"][-1] > 0.3 * gap["ec_gd"][18] > 1e-9
    assert gap["star"][-1] < 1e-5 * gap["ec_gd"][-1]
    assert gap["diana"][-1] < 1e-5 * gap["ec_gd"][-1]
    assert 1.5 * rounds_to(gap["eclk"], 1e-12, 50) < rounds_to(gap["diana"], 1e-12, 50)


def test_variance_reduction_removes_the_noise_of_minibatches():
    p, gamma = Problem(8, 3000), 0.25 / problem(8).smoothness
    methods = {
        "ec_lsvrg": efopt.convex.ec_lsvrg(
            TOP_1, gamma, probability=0.1, axis_name=AXIS
        ),
        "ec_lsvrg_diana": efopt.convex.ec_lsvrg_diana(
            TOP_1,
            gamma,
            probability=0.1,
            shift_compressor=SHIFTS,
            axis_name=AXIS,
        ),
        "eclk": eclk_of(p, 3, axis_name=AXIS),
    }
    gap = gaps(methods, p, 3000, 1000, batch=True)
    assert 1e-4 > gap["ec_lsvrg"][-1] > 1e-6
    assert gap["ec_lsvrg_diana"][-1] < 1e-8
    assert gap["eclk"][-1] < 1e-13


def test_full_gradients_are_evaluated_only_when_the_coin_falls():
    """Counted by a callback: at the start, and in the step after each move."""
    p, calls = problem(1), []
    a = jnp.asarray(p.a[0])

    def full(x):
        jax.debug.callback(lambda: calls.append(1))
        return MU * x - a.T @ jax.nn.sigmoid(-(a @ x)) / len(a)

    def batch(x):
        return MU * x - a[:2].T @ jax.nn.sigmoid(-(a[:2] @ x)) / 2

    for tx in (
        efopt.convex.lsvrg(P_MOVE),
        eclk_of(p, probability=P_MOVE),
    ):
        calls.clear()

        def one(carry, _, tx=tx):
            x, state = carry
            updates, state = tx.update(
                batch(x), state, x, grad_fn=batch, full_grad_fn=full
            )
            return (optax.apply_updates(x, 1e-3 * updates), state), None

        x = jnp.asarray(p.start)
        last, _ = jax.jit(lambda c: jax.lax.scan(one, c, length=ROUNDS))(
            (x, tx.init(x))
        )
        jax.block_until_ready(last)
        jax.effects_barrier()
        assert len(calls) == 1 + coins(P_MOVE, 1)[: ROUNDS - 1, 0].sum()
