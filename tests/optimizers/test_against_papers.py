"""The published optimizers against their papers, and as Optax meets them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from workers_under_test import AXIS, FAST, make_mesh, make_step, slow

import efopt
from efopt import wire

WORKERS, STEPS, DECAY = 3, 50, 0.01
SHAPES = {"b": (11,), "w": (12, 10)}
MASK = {"b": False, "w": True}  # of weight decay


BLOCKED, blocked = efopt.scaled_sign(16), lambda x: oracle.scaled_sign(x, 16)


def schedule(t):
    return 0.1 / (1.0 + 0.1 * t)


def tree(rng, *lead):
    return {k: rng.standard_normal((*lead, *s), np.float32) for k, s in SHAPES.items()}


def leaves(t):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(t)]


def problem(seed=0, steps=STEPS):
    """Parameters, gradients `[t, worker, ...]`, and both as the oracle takes them."""
    rng = np.random.default_rng(seed)
    params = tree(rng)
    grads = tree(rng, steps, WORKERS)
    lists = [
        [[x[t, i] for x in leaves(grads)] for i in range(WORKERS)] for t in range(steps)
    ]
    return params, grads, leaves(params), lists


def some(names, *by_default):
    """All the names, of which `pytest -m slow` takes those that are not listed."""
    rest = [n for n in names if n not in by_default]
    return [*by_default, *map(slow, rest)]


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _simulate(tx, params, grads):
    state = efopt.stack_workers((params, tx.init(params)), WORKERS)

    def step(carry, g):
        params, state = carry
        updates, state = jax.vmap(tx.update, axis_name=AXIS)(g, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.lax.scan(step, state, grads)[1]


def simulate(tx, params, grads):
    """Parameters and states after each step, `[t, worker, ...]`."""
    return jax.tree.map(np.asarray, _simulate(tx, params, grads))


def follows(params, path, atol=1e-5):
    """Every worker holds the oracle's iterate after every step."""
    for got, *want in zip(jax.tree.leaves(params), *path[1:], strict=True):
        for i in range(WORKERS):
            np.testing.assert_allclose(got[:, i], np.stack(want), rtol=0, atol=atol)


def decayed(lists, mask=MASK):
    """Gradients to which the leaves that decay are added: functions of x."""
    on = [DECAY * float(m) for m in jax.tree.leaves(mask)]

    def at(step):
        return lambda x: [
            [g + c * p for g, c, p in zip(u, on, x, strict=True)] for u in step
        ]

    return [at(step) for step in lists]


# ----------------------------------------------------------- against the papers


@pytest.mark.parametrize(
    ("beta", "exchange"),
    [slow(None, "majority_vote"), (0.9, "majority_vote"), slow(0.9, "all_gather")],
)
def test_sign_methods_are_their_oracle(beta, exchange):
    params, grads, x0, lists = problem()
    options = dict(weight_decay=DECAY, axis_name=AXIS, exchange=exchange)
    if beta is None:
        tx = efopt.signsgd(schedule, **options)
    else:
        tx = efopt.optimizers.signum(schedule, beta=beta, **options)
    vote = exchange == "majority_vote"
    path, momenta = oracle.signum(x0, lists, schedule, beta or 0.0, DECAY, vote)
    got, state = simulate(tx, params, grads)
    follows(got, path)
    if beta is not None:
        last = jax.tree.map(lambda x: x[-1, :, 0], state[0].value.ema)
        for i in range(WORKERS):
            mine = [x[i] for x in leaves(last)]
            for a, b in zip(mine, momenta[-1][i], strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_weight_decay_comes_after_the_vote():
    """Decay far larger than any gradient: inside the vote it would decide every bit."""
    params = {"w": np.float32([100.0, -100.0])}
    tx = efopt.signsgd(0.5, weight_decay=0.1, axis_name=AXIS)
    grads = {"w": np.tile(np.float32([-1.0, 1.0]), (1, WORKERS, 1))}
    got, _ = simulate(tx, params, grads)
    # x - 0.5 (sign + 0.1 x) = 100 - 0.5 (-1 + 10)
    np.testing.assert_allclose(got["w"][0, 0], [95.5, -95.5], rtol=1e-6)


EF_CASES = {
    "plain": {},
    "workers": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "server": {"momentum": 0.9, "momentum_at": "server"},
}


@pytest.mark.parametrize("case", some(EF_CASES, "nesterov", "server"))
def test_ef_sgd_is_its_oracle(case):
    params, grads, x0, lists = problem(1)
    options = EF_CASES[case]
    tx = efopt.ef_sgd(
        efopt.top_k(k=1),
        schedule,
        **options,
        weight_decay=DECAY,
        mask=MASK,
        axis_name=AXIS,
    )
    path, residuals = oracle.ef_sgd(
        x0,
        decayed(lists),
        schedule,
        lambda x: oracle.top_k(x, k=1),
        momentum=options.get("momentum", 0.0),
        nesterov=options.get("nesterov", False),
        server=case == "server",
    )
    got, state = simulate(tx, params, grads)
    follows(got, path, atol=1e-5)
    last = jax.tree.map(lambda x: x[-1, :, 0], state[3].residual.value)
    for i in range(WORKERS):  # updates are minus the paper's steps
        mine = [-x[i] for x in leaves(last)]
        for a, b in zip(mine, residuals[-1][i], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_ef_signsgd_is_its_oracle():
    params, grads, x0, lists = problem(2)
    tx = efopt.ef_signsgd(schedule, momentum=0.9, weight_decay=DECAY, axis_name=AXIS)
    path, _ = oracle.ef_sgd(
        x0, lists, schedule, oracle.scaled_sign, momentum=0.9, weight_decay=DECAY
    )
    follows(simulate(tx, params, grads)[0], path, atol=1e-5)


def test_dist_ef_sgd_is_its_oracle():
    params, grads, x0, lists = problem(3)
    tx = efopt.dist_ef_sgd(
        schedule, compressor=BLOCKED, weight_decay=DECAY, axis_name=AXIS
    )
    path, _, _ = oracle.dist_ef_sgd(x0, lists, schedule, blocked, 0.9, True, DECAY)
    follows(simulate(tx, params, grads)[0], path, atol=1e-5)


def test_power_sgd_momentum_is_its_oracle():
    params, grads, x0, _ = problem(4)
    # Two clear directions: where none stands out, float32's rounding decides.
    rng = np.random.default_rng(4)
    left, _ = np.linalg.qr(rng.standard_normal((12, 2)))
    right, _ = np.linalg.qr(rng.standard_normal((10, 2)))
    clear = ((left * [2.0, 1.0]) @ right.T).astype(np.float32)
    grads["w"] = clear + np.float32(0.03) * grads["w"]
    lists = [
        [[x[t, i] for x in leaves(grads)] for i in range(WORKERS)] for t in range(STEPS)
    ]
    tx = efopt.power_sgd_momentum(schedule, rank=2, weight_decay=DECAY, axis_name=AXIS)
    qs = [None, np.asarray(tx.init(params)[0].link.codec["w"][0], np.float64)]
    path = oracle.power_sgd_momentum(x0, lists, schedule, qs, 0.9, DECAY)
    follows(simulate(tx, params, grads)[0], path)


RATES = np.array([0.0, 0.1, 0.0, 0.05, 0.1, 0.0, 0.0, 0.2, 0.1, 0.05], np.float32)


def with_zeros(t):
    return jnp.asarray(RATES)[t]


def test_a_rate_of_zero_holds_what_dist_ef_sgd_owes():
    params, grads, x0, lists = problem(5, len(RATES))
    tx = efopt.dist_ef_sgd(
        with_zeros, compressor=BLOCKED, nesterov=False, axis_name=AXIS
    )
    rate = RATES.__getitem__
    path, _, _ = oracle.dist_ef_sgd(x0, lists, rate, blocked, 0.9, False)
    got, state = simulate(tx, params, grads)
    follows(got, path)
    for x in jax.tree.leaves(state):
        assert np.isfinite(x).all()
    held = jax.tree.map(lambda x: (x[4], x[5], x[6]), (got, state[2].residual))
    for before, zero, again in jax.tree.leaves(held, is_leaf=_is_triple):
        np.testing.assert_array_equal(before, zero)
        np.testing.assert_array_equal(before, again)


def _is_triple(x):
    return isinstance(x, tuple) and len(x) == 3


def test_at_a_rate_of_zero_ef_sgd_goes_on_paying():
    tx = efopt.ef_sgd(efopt.top_k(k=1), lambda t: jnp.where(t == 0, 1.0, 0.0))
    x, update = np.zeros(3, np.float32), jax.jit(tx.update)
    state, paid = tx.init(x), []
    for _ in range(3):
        updates, state = update(np.float32([3.0, 2.0, 1.0]), state, x)
        paid.append(updates)
    np.testing.assert_array_equal(np.stack(paid), -np.diag([3.0, 2.0, 1.0]))
    np.testing.assert_array_equal(state[3].residual, 0)


# ------------------------------------------------------------ the virtual iterate


def momentum_sgd(x0, lists, rate, momentum=0.0, nesterov=False):
    path, _ = oracle.ef_sgd(x0, lists, rate, oracle.identity, momentum, nesterov)
    return path


VIRTUAL = {
    "inside": (efopt.ef_sgd(efopt.top_k(k=1), schedule, axis_name=AXIS), {}),
    "inside_momentum": (
        efopt.ef_sgd(efopt.top_k(k=1), schedule, momentum=0.9, axis_name=AXIS),
        {"momentum": 0.9},
    ),
    "two_phase": (
        efopt.dist_ef_sgd(schedule, compressor=BLOCKED, axis_name=AXIS),
        {"momentum": 0.9, "nesterov": True},
    ),
    "behind": (
        optax.chain(
            efopt.error_feedback(efopt.sign(), axis_name=AXIS, learning_rate=schedule),
            optax.sgd(schedule),
        ),
        {},
    ),
    "partition": (
        optax.partition(
            {
                True: efopt.ef_sgd(efopt.top_k(k=1), schedule, axis_name=AXIS),
                False: efopt.dist_ef_sgd(
                    schedule, compressor=BLOCKED, momentum=None, axis_name=AXIS
                ),
            },
            MASK,
        ),
        {},
    ),
    "accumulate": (
        efopt.accumulate(
            efopt.ef_sgd(efopt.top_k(k=1), schedule, axis_name=AXIS),
            every=1,
            axis_name=AXIS,
        ),
        {},
    ),
    "injected": (
        optax.inject_hyperparams(efopt.ef_signsgd)(schedule, axis_name=AXIS),
        {},
    ),
}


@pytest.mark.parametrize("name", some(VIRTUAL, "two_phase"))
def test_virtual_params_walk_the_path_of_sgd(name):
    tx, momentum = VIRTUAL[name]
    params, grads, x0, lists = problem(6)
    got, state = simulate(tx, params, grads)
    path = momentum_sgd(x0, lists, schedule, **momentum)
    virtual = jax.jit(lambda p, s: efopt.virtual_params(p, s, compressor=BLOCKED))
    for t in (0, 1, 20, STEPS - 1):
        at = jax.tree.map(lambda x, t=t: x[t], (got, state))
        for x, p, want in zip(
            jax.tree.leaves(virtual(*at)), leaves(at[0]), path[t + 1], strict=True
        ):
            assert x.dtype == jnp.float32 and x.shape == p.shape
            np.testing.assert_allclose(x[1], want, rtol=0, atol=5e-5)
            assert np.abs(p[1] - want).max() > 1e-3  # the parameters do not


def test_virtual_params_of_a_fresh_state_are_the_parameters():
    params = problem()[0]
    for tx, _ in VIRTUAL.values():
        fresh = lambda p, tx=tx: efopt.virtual_params(  # noqa: E731
            p, tx.init(p), compressor=BLOCKED
        )
        got = jax.jit(fresh, compiler_options=FAST)(params)
        jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.parametrize("name", some(["inside", "two_phase"]))
def test_virtual_params_are_the_same_placed_stacked_and_inside(name):
    tx = VIRTUAL[name][0]
    params, grads, _, _ = problem(7, 4)
    virtual = functools.partial(efopt.virtual_params, compressor=BLOCKED)

    got, state = jax.tree.map(lambda x: x[-1], simulate(tx, params, grads))
    stacked = jax.jit(virtual, compiler_options=FAST)(got, state)
    mapped = jax.jit(jax.vmap(virtual, axis_name=AXIS), compiler_options=FAST)(
        got, state
    )

    mesh = make_mesh("auto", WORKERS)
    state = efopt.distribute((params, tx.init(params)), mesh)
    specs = efopt.partition_specs(state)
    step = make_step(tx)

    def steps(state, grads):
        for t in range(4):
            state = step(state, jax.tree.map(lambda x, t=t: x[t, 0], grads))
        return state, virtual(*state)

    spec = jax.sharding.PartitionSpec
    both = jax.shard_map(
        steps,
        mesh=mesh,
        in_specs=(specs, spec(None, AXIS)),
        out_specs=(specs, spec()),
    )
    state, inside = jax.jit(both)(state, grads)
    placed = jax.jit(virtual)(*state)
    for a, b, c, d in zip(
        *map(jax.tree.leaves, (stacked, mapped, inside, placed)), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)
        np.testing.assert_allclose(c, a[0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(d, c, rtol=0, atol=1e-6)


def test_virtual_params_of_an_unknown_rate_ask_for_it():
    params, grads, x0, lists = problem(8, 6)
    path = oracle.sgd(x0, lists, 0.1)[-1]
    feedback = efopt.error_feedback(efopt.top_k(k=1), axis_name=AXIS)
    rate = optax.scale_by_learning_rate(0.1)
    for tx, told in (
        (optax.chain(feedback, rate), 0.1),
        (optax.chain(rate, feedback), -1),
    ):
        at = jax.tree.map(lambda x: x[-1], simulate(tx, params, grads))
        with pytest.raises(ValueError, match="does not know what the residual is wort"):
            efopt.virtual_params(*at)
        for x, want in zip(
            jax.tree.leaves(efopt.virtual_params(*at, learning_rate=told)),
            path,
            strict=True,
        ):
            np.testing.assert_allclose(x[0], want, rtol=0, atol=1e-5)


SINGLE = efopt.ef_sgd(efopt.top_k(k=1), 0.1)
REFUSED = {
    "no_feedback": (
        optax.sgd(0.1),
        None,
        "holds an `efopt.feedback.ErrorFeedbackState`",
    ),
    "no_compressor": (
        efopt.dist_ef_sgd(0.1, compressor=BLOCKED, axis_name=AXIS),
        None,
        "needs `compressor=...`",
    ),
    "momentum_behind": (
        efopt.power_sgd_momentum(0.1),
        0.1,
        "momentum behind the feedback",
    ),
    "server_momentum": (
        efopt.ef_sgd(efopt.top_k(k=1), 0.1, momentum=0.9, momentum_at="server"),
        None,
        "momentum behind the feedback",
    ),
    "adam_behind": (
        optax.chain(
            optax.chain(efopt.error_feedback(efopt.top_k(k=1))), optax.adam(0.1)
        ),
        0.1,
        "momentum behind the feedback",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_virtual_params_refuse_what_they_cannot_know(name):
    tx, rate, words = REFUSED[name]
    params = problem()[0]
    state = tx.init(params)
    if "no_compressor" == name:
        state = efopt.distribute(state, make_mesh("auto", WORKERS))
    with pytest.raises(ValueError, match=words):
        efopt.virtual_params(params, state, learning_rate=rate)


def test_virtual_params_refuse_parameters_of_another_placement():
    params = problem()[0]
    tx = efopt.ef_sgd(efopt.top_k(k=1), 0.1, axis_name=AXIS)
    state = efopt.stack_workers(tx.init(params), WORKERS)
    with pytest.raises(ValueError, match="placed or stacked as the state is"):
        efopt.virtual_params(params, state)


# ------------------------------------------------------------ as Optax's own do


def close(a, b, atol=1e-6):
    chex.assert_trees_all_close(a, b, rtol=1e-6, atol=atol)


@functools.cache
def alone(tx, steps=3):
    """Parameters after some steps of a single worker, under jit."""
    params, grads, _, _ = problem(9, steps)
    update = jax.jit(step_alone, static_argnums=0, compiler_options=FAST)
    state = jax.jit(tx.init)(params)
    for t in range(steps):
        g = jax.tree.map(lambda x, t=t: x[t, 0], grads)
        params, state = update(tx, params, state, g)
    return params


def step_alone(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (efopt.optimizers.signum, {}),
        slow(efopt.ef_sgd, {"compressor": efopt.top_k(fraction=0.3)}),
        slow(efopt.ef_signsgd, {"momentum": 0.9}),
        slow(efopt.dist_ef_sgd, {"compressor": BLOCKED}),
        slow(efopt.power_sgd_momentum, {"rank": 2}),
        slow(efopt.optimizers.dion, {"rank": 2, "fallback": optax.sgd(0.1)}),
        slow(efopt.optimizers.distributed_lion, {}),
        slow(efopt.optimizers.one_bit_adam, {"warmup": 2, "compressor": BLOCKED}),
    ],
)
def test_partition_runs_each_leaf_by_its_own_optimizer(factory, options):
    mine = factory(learning_rate=schedule, **options)
    labels = {"b": "other", "w": "mine"}
    got = alone(optax.partition({"mine": mine, "other": optax.sgd(schedule)}, labels))
    close(got["w"], alone(mine)["w"])
    close(got["b"], alone(optax.sgd(schedule))["b"])


# By default tests/workers/test_placement.py stands for it.
@pytest.mark.parametrize(
    ("factory", "options"),
    [
        slow(efopt.ef_signsgd, {"momentum": 0.9}),
        slow(efopt.optimizers.dion, {"rank": 2, "fallback": optax.sgd(0.1)}),
        slow(efopt.optimizers.distributed_lion, {}),
        slow(efopt.optimizers.one_bit_adam, {"warmup": 2, "compressor": BLOCKED}),
    ],
)
def test_accumulate_takes_the_mean_of_mini_steps(factory, options):
    params, grads, _, _ = problem(10, 6)
    tx = factory(0.05, axis_name=AXIS, **options)
    twice, _ = simulate(efopt.accumulate(tx, every=2, axis_name=AXIS), params, grads)
    means = jax.tree.map(
        lambda x: x.reshape(3, 2, *x.shape[1:]).mean(1, dtype=np.float32), grads
    )
    once, _ = simulate(tx, params, means)
    close(jax.tree.map(lambda x: x[1::2], twice), once, atol=1e-5)


def test_identity_makes_ef_sgd_optax_sgd():
    ours = efopt.ef_sgd(
        efopt.compressors.identity(), schedule, momentum=0.9, weight_decay=DECAY
    )
    theirs = optax.chain(
        optax.add_decayed_weights(DECAY), optax.trace(0.9), optax.sgd(schedule)
    )
    close(alone(ours), alone(theirs))


def test_signum_of_one_worker_is_that_of_optax():
    close(alone(efopt.optimizers.signum(schedule)), alone(optax.signum(schedule)))


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, float("nan")])
@pytest.mark.parametrize(
    "factory",
    [
        lambda m: efopt.optimizers.signum(0.1, beta=m),
        lambda m: efopt.ef_sgd(efopt.top_k(k=1), 0.1, momentum=m),
        lambda m: efopt.ef_signsgd(0.1, momentum=m),
        lambda m: efopt.dist_ef_sgd(0.1, momentum=m),
        lambda m: efopt.power_sgd_momentum(0.1, momentum=m),
    ],
)
def test_momentum_out_of_range_is_refused(factory, value):
    with pytest.raises(ValueError, match=r"must be (in \[0, 1\), got|a finite)"):
        factory(value)


def test_power_sgd_momentum_needs_one():
    with pytest.raises(ValueError, match=r"momentum=\.\.\.\)` must be in \[0, 1\)"):
        efopt.power_sgd_momentum(0.1, momentum=None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: efopt.signsgd(0.1, exchange="median"), "got 'median'"),
        (
            lambda: efopt.ef_sgd(efopt.top_k(k=1), 0.1, momentum_at="home"),
            "'workers', 'server'",
        ),
        (
            lambda: efopt.dist_ef_sgd(
                0.1, compressor=efopt.scaled_sign(), axis_name=AXIS
            ),
            "give it a `block_size`",
        ),
    ],
)
def test_option_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("zero", ["positive", "fair"])
def test_a_vote_of_one_is_its_own_and_a_tie_is_a_zero(zero):
    sign = efopt.sign(zero="positive")  # the paper's letter
    letter = efopt.compress(sign, axis_name=AXIS, exchange="majority_vote")
    letter = optax.chain(letter, optax.scale_by_learning_rate(1.0))
    tx = letter if zero == "positive" else efopt.signsgd(1.0, axis_name=AXIS)
    update = jax.jit(jax.vmap(tx.update, axis_name=AXIS))
    for grads, clear in (
        (jnp.array([[-2.0, 3.0, 0.0]]), [1.0, -1.0]),
        (jnp.array([[5.0], [-1.0], [1.0], [-1.0]]), []),
    ):
        state = efopt.stack_workers(tx.init(grads[0]), len(grads))
        first, state = update(grads, state)
        second, _ = update(grads, state)
        for got in (*first, *second):
            np.testing.assert_array_equal(got[:-1], clear)
        last = np.stack([first, second])[..., -1]
        assert (np.abs(last) == 1).all() and (last == last[:, :1]).all()
        if zero == "positive":
            np.testing.assert_array_equal(last, -1)
        else:  # the second step takes the first one back
            np.testing.assert_array_equal(last[0], -last[1])


# --------------------------------------------------------------- wire and memory

LAYERS = [(4096, 2048), (1024, 1600), (777, 2)]  # 10 M


def compiled(tx, n):
    """The step on `n` workers, compiled for shapes alone."""
    mesh = make_mesh("auto", n)
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in LAYERS]
    state = efopt.distribute((params, jax.eval_shape(tx.init, params)), mesh)
    specs = efopt.partition_specs(state)
    spec = jax.sharding.PartitionSpec(AXIS)
    grads = [
        jax.ShapeDtypeStruct(
            (n, *s), jnp.float32, sharding=jax.NamedSharding(mesh, spec)
        )
        for s in LAYERS
    ]

    def step(state, grads):
        params, own = state
        updates, own = tx.update([g[0] for g in grads], own, params)
        return optax.apply_updates(params, updates), own

    fn = jax.shard_map(step, mesh=mesh, in_specs=(specs, spec), out_specs=specs)
    return jax.jit(fn, donate_argnums=0), state, grads


@pytest.mark.parametrize("n", [slow(2), 8])
@pytest.mark.parametrize(
    "tx",
    [
        slow(efopt.optimizers.signum(1e-3, axis_name=AXIS), id="majority_vote"),
        pytest.param(efopt.dist_ef_sgd(0.1, axis_name=AXIS), id="dist_ef_sgd"),
    ],
)
def test_one_bit_a_coordinate_each_way_for_any_number_of_workers(tx, n):
    size = sum(np.prod(s) for s in LAYERS)
    got = wire.measure(*compiled(tx, n))
    sent = {c.operation: c.operand_bytes for c in got.collectives}
    assert set(sent) == {"all-to-all", "all-gather"}
    assert 8 * sent["all-to-all"] / size <= 1.04
    assert 8 * n * sent["all-gather"] / size <= 1.04
    assert got.bytes_sent_per_worker <= 2 * 1.04 / 8 * size


def test_a_step_of_signum_needs_half_the_parameters_bytes_and_less_than_sgd():
    size = 4 * sum(np.prod(s) for s in LAYERS)
    dense = optax.chain(
        efopt.compress(efopt.compressors.identity(), axis_name=AXIS),
        optax.sgd(0.1, momentum=0.9),
    )

    def temporary(tx):
        fn, state, grads = compiled(tx, 8)
        stats = fn.lower(state, grads).compile().memory_analysis()
        return stats.temp_size_in_bytes / size

    vote = temporary(efopt.optimizers.signum(1e-3, axis_name=AXIS))
    assert vote <= 0.5
    assert vote < temporary(dense)
