"""Estimators and convex optimizers as Optax meets them, and what bad input gets.

That they are their papers' algorithms is shown in float64, in tests/float64.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from workers_under_test import AXIS

import efopt
from efopt.convex import coins

TOP_1 = efopt.top_k(k=1)
UNBIASED = efopt.random_k(k=1, unbiased=True)


def eclk(compressor, smoothness=1.0, strong_convexity=0.1, **options):
    constants = {"smoothness": smoothness, "strong_convexity": strong_convexity}
    return efopt.convex.eclk(compressor, **constants, **options)


def grad_fn(params):
    """Of a quadratic with curvatures from 0.1 to 1 and its optimum at one."""

    def pull(p):
        return jnp.linspace(0.1, 1, p.size, dtype=p.dtype).reshape(p.shape) * (p - 1)

    return jax.tree.map(pull, params)


def advance(tx, params, state, function=grad_fn):
    updates, state = tx.update(
        function(params),
        state,
        params,
        grad_fn=function,
        full_grad_fn=function,
        loss=1.0,  # for somebody else in the chain
    )
    return optax.apply_updates(params, updates), state


# -------------------------------------------------------------- what is claimed


def test_diana_and_star_keep_the_mean_and_learn_the_difference():
    draws = np.random.default_rng(0)
    grads = jnp.asarray(draws.standard_normal((4, 6)), jnp.float32)
    mean = np.broadcast_to(grads.mean(axis=0), (4, 6))
    for tx in (
        efopt.convex.diana(UNBIASED, axis_name=AXIS),
        efopt.convex.star(grads, axis_name=AXIS),
    ):
        state = efopt.stack_workers(tx.init(grads[0]), 4)
        step = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
        for _ in range(60):
            updates, state = step(grads, state)
            np.testing.assert_allclose(updates.mean(axis=0), mean[0], atol=1e-6)
        np.testing.assert_allclose(updates, mean, atol=1e-5)


def test_coins_fall_as_often_as_they_should_and_are_shared_or_not():
    n, p = 20_000, 0.3
    steps = jnp.arange(n)
    shared = coins.coin(p, 1, steps)
    own = [coins.coin(p, 1, steps, jnp.uint32(i)) for i in range(3)]
    for coin in (shared, *own):  # five deviations: one false alarm in a million
        assert abs(coin.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    both = jnp.mean(own[0] & own[1])
    assert abs(both - p**2) < 5 * (p**2 * (1 - p**2) / n) ** 0.5
    assert not (coins.coin(p, 2, steps) == shared).all()
    assert coins.coin(1.0, 0, steps).all()


def test_eclk_goes_to_the_constrained_optimum():
    """A box, by optax.projections, and a group whose norm is penalised."""

    def box(x, step):
        del step
        return optax.projections.projection_box(x, -0.5, 0.5)

    def group(x, step):
        norm = jnp.linalg.norm(x)
        return x * jnp.maximum(1 - 2.0 * step / norm, 0)

    def gradient(x):
        return jnp.array([1.0, 0.5, 0.1]) * (x - jnp.array([1.0, -0.25, 3.0]))

    def minimise(prox):
        tx, x = (
            efopt.convex.eclk(TOP_1, smoothness=1.0, strong_convexity=0.1, prox=prox),
            jnp.zeros(3),
        )
        step = functools.partial(advance, tx, function=gradient)
        many = jax.jit(
            lambda c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=1500)[0]
        )
        return many((x, tx.init(x)))[0]

    np.testing.assert_allclose(minimise(box), [0.5, -0.25, 0.5], atol=1e-5)
    # 2 |x| against a gradient of norm 1.05 at zero: nothing is worth its price.
    np.testing.assert_allclose(minimise(group), 0, atol=1e-6)


def test_default_probability_is_twice_the_share_of_the_payload():
    """40 bits of 640: the reference moves in every eighth step."""
    tx, x = eclk(TOP_1), jnp.zeros(20)
    state = tx.init(x)

    def one(carry, _):
        x, state = advance(tx, *carry)
        return (x, state), (state.w != carry[1].w).any()

    _, moved = jax.jit(lambda c: jax.lax.scan(one, c, length=64))((x, state))
    fell = coins.coin(0.125, 0, jnp.arange(1, 65))
    assert (moved[1:] == fell[1:]).all() and fell.sum() > 3


def test_diana_hears_the_same_however_messages_meet():
    grads = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)
    found = []
    for exchange in (None, "all_gather"):
        tx = efopt.convex.diana(UNBIASED, axis_name=AXIS, exchange=exchange)
        state = efopt.stack_workers(tx.init(grads[0]), 4)
        step = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
        for _ in range(5):
            _, state = step(grads, state)
        found.append((state.shift.value[:, 0], state.mean))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found)
    shift, mean = found[0]
    assert np.abs(shift).max() > 0.1
    np.testing.assert_allclose(shift.mean(axis=0), mean[0], atol=1e-6)


@pytest.mark.parametrize("name", [n for n in dir(efopt.convex) if n.endswith("State")])
def test_no_field_of_a_state_is_named_like_an_option(name):
    """By such a name `optax.tree.get` and `inject_hyperparams` look things up."""
    options = set()
    for factory in vars(efopt.convex).values():
        if inspect.isfunction(factory):
            options |= set(inspect.signature(factory).parameters)
    assert {"probability", "learning_rate"} <= options
    assert options.isdisjoint(getattr(efopt.convex, name)._fields)


def test_default_probability_of_a_partition_is_that_of_its_payloads():
    """Of 20 coordinates 4 travel whole and of 16 one: 4 * 32 + 40 bits of 640."""
    both = {"a": efopt.top_k(k=1), "b": efopt.compressors.identity()}
    compressor = efopt.compressors.partition(both, {"a": "a", "b": "b"})
    tx, x = eclk(compressor), {"a": jnp.zeros(16), "b": jnp.zeros(4)}

    def one(carry, _):
        x, state = advance(tx, *carry)
        return (x, state), (state.w["a"] != carry[1].w["a"]).any()

    _, moved = jax.jit(lambda c: jax.lax.scan(one, c, length=32))((x, tx.init(x)))
    fell = coins.coin(2 * 168 / 640, 0, jnp.arange(1, 33))
    assert (moved[1:] == fell[1:]).all() and 3 < fell.sum() < 29


# ------------------------------------------------------------------- bad input

OPTIONS = {
    "probability-zero": (
        lambda: efopt.convex.lsvrg(0.0),
        "`lsvrg(probability=...)` must lie",
    ),
    "probability-above": (lambda: efopt.convex.lsvrg(1.5), r"in (0, 1], got 1.5"),
    "probability-nan": (lambda: efopt.convex.lsvrg(float("nan")), "got nan"),
    "probability-eclk": (
        lambda: eclk(TOP_1, probability=0),
        "`eclk(probability=...)` must lie in (0, 1], got 0",
    ),
    "probability-katyusha": (
        lambda: efopt.convex.loopless_katyusha(
            smoothness=1.0, strong_convexity=0.1, probability=2.0
        ),
        "`loopless_katyusha(probability=...)` must lie in (0, 1], got 2.0",
    ),
    "coin": (lambda: efopt.convex.lsvrg(0.5, coin="own"), "'shared', 'per_worker'"),
    "alpha-zero": (
        lambda: efopt.convex.diana(UNBIASED, alpha=0.0),
        "`diana(alpha=...)` must be p",
    ),
    "diana-biased": (
        lambda: efopt.convex.diana(TOP_1),
        "needs an unbiased compressor, such as `efopt.random_k(k=1, unbiased=True)`",
    ),
    "diana-two-phase": (
        lambda: efopt.convex.diana(
            efopt.quantize(stochastic=True), axis_name=AXIS, exchange="two_phase"
        ).init(jnp.zeros(600)),
        "`diana(exchange='two_phase')` cannot work: a residual stays",
    ),
    "smoothness-zero": (lambda: eclk(TOP_1, 0.0, 0.0), "smoothness=0.0"),
    "smoothness-negative": (lambda: eclk(TOP_1, -1.0), "got -1.0"),
    "strong-convexity-zero": (
        lambda: eclk(TOP_1, 1.0, 0.0),
        "needs 0 < strong_convexity <= smoothness, got strong_convexity=0.0",
    ),
    "strong-convexity-above": (
        lambda: eclk(TOP_1, 1.0, 2.0),
        "needs 0 < strong_convexity <= smoothness, got strong_convexity=2.0",
    ),
    "theta": (
        lambda: eclk(TOP_1, theta_2=1.0),
        "`eclk(theta_2=...)` must lie in (0, 1), got 1.0",
    ),
    "thetas": (
        lambda: eclk(TOP_1, theta_1=0.6, theta_2=0.6).init(jnp.zeros(3)),
        "must sum to at most 1, got 0.6 and 0.6",
    ),
    "damped-alpha": (
        lambda: efopt.feedback.damped_error_feedback(UNBIASED, alpha=1.5, beta=1.0),
        "`damped_error_feedback(alpha=...)` must be in [0, 1], got 1.5",
    ),
    "damped-beta": (lambda: efopt.optimizers.ecq_sgd(0.1, beta=-0.1), "got -0.1"),
    "ecq-biased": (
        lambda: efopt.optimizers.ecq_sgd(0.1, compressor=TOP_1),
        "needs an unbiased quantiser",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_is_refused(name):
    call, words = OPTIONS[name]
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


def test_alpha_above_its_bound_needs_force_and_warns_even_so():
    bound = r"above 1 / \(1 \+ omega\) = 0\.2"  # one of five coordinates
    with pytest.raises(ValueError, match=f"{bound}.*`force=True`"):
        efopt.convex.diana(UNBIASED, alpha=0.5).init(jnp.zeros(5))
    with pytest.warns(UserWarning, match=bound):
        efopt.convex.diana(UNBIASED, alpha=0.5, force=True).init(jnp.zeros(5))
    efopt.convex.diana(UNBIASED, alpha=0.2).init(jnp.zeros(5))
    with pytest.raises(ValueError, match=bound):
        efopt.convex.ec_sgd_diana(
            TOP_1, 0.1, shift_compressor=UNBIASED, alpha=0.5
        ).init(jnp.zeros(5))


@pytest.mark.parametrize(
    "factory",
    [
        lambda c: efopt.convex.ec_sgd(c, 0.1),
        lambda c: efopt.convex.ec_gd_star(c, 0.1, reference_grads=jnp.zeros(100)),
        lambda c: efopt.convex.ec_sgd_diana(c, 0.1, shift_compressor=UNBIASED),
        lambda c: efopt.convex.ec_lsvrg(c, 0.1, probability=0.5),
        lambda c: efopt.convex.ec_lsvrg_diana(
            c, 0.1, probability=0.5, shift_compressor=UNBIASED
        ),
        lambda c: efopt.convex.ec_lsvrg_shifted(c, 0.1, probability=0.5),
        lambda c: efopt.convex.ec_lsvrg_shifted(
            TOP_1, 0.1, probability=0.5, shift_compressor=c
        ),
        lambda c: eclk(c),
    ],
)
@pytest.mark.parametrize(
    "compressor", [efopt.sign(), efopt.compressors.terngrad(), UNBIASED]
)
def test_compressor_that_is_not_contractive_is_refused(factory, compressor):
    with pytest.raises(ValueError, match=r"needs a contractive compressor.*top_k"):
        factory(compressor).init(jnp.zeros(100))


def test_star_needs_one_gradient_for_each_worker():
    tx = efopt.convex.star(jnp.zeros((3, 5)), axis_name=AXIS)
    with pytest.raises(ValueError, match=r"\(4, 5\), and got \(3, 5\)"):
        jax.eval_shape(
            jax.vmap(lambda g: tx.update(g, optax.EmptyState())[0], axis_name=AXIS),
            jnp.zeros((4, 5)),
        )
