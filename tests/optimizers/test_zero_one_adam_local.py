"""0/1 Adam's local steps: the paper, its laws, its bytes, and bad input."""

import functools

import jax
import numpy as np
import optax
import oracle_methods
import pytest
from jax.sharding import PartitionSpec as P
from methods_under_test import DECAY, WORKERS, compiled
from test_one_bit_adam import B1, B2, EPS, OPTIONS, blocked, refreshes, small
from workers_under_test import AXIS, FAST, make_mesh, slow

import efopt
from efopt import wire
from efopt.hlo.program import Program

SHAPES = {"b": (11,), "w": (12, 10)}
FREEZE, DOUBLING, LONGEST, STEPS = 9, 8, 5, 60
LOCAL = dict(freeze=FREEZE, refresh=3, longest=LONGEST, doubling=DOUBLING)


def meetings(first, longest, every, steps):
    """T_u: all steps before ``first``; then a distance doubles, up to the longest."""
    out, distance = set(range(first)), 1
    for local in range(steps - first):
        distance = min(longest, 2 ** (local // every))
        if (local + 1) % distance == 0:
            out.add(first + local)
    return out


def test_meetings_are_ever_more_seldom_and_never_farther_than_allowed():
    from efopt.optimizers.zero_one_adam import _meets

    steps = np.arange(400)
    for longest, every in ((1, 9), (2, 1), (12, 7), (16, 30)):
        fn = functools.partial(_meets, first=20, longest=longest, every=every)
        got = np.flatnonzero(jax.jit(jax.vmap(fn))(steps))
        assert set(got) == meetings(20, longest, every, 400)
        assert np.diff(got).max() == longest


RNG = np.random.default_rng(5)
CURVED = {k: RNG.uniform(0.2, 1, s).astype(np.float32) for k, s in SHAPES.items()}
START = {k: RNG.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
GOALS = {
    k: RNG.standard_normal((STEPS, WORKERS, *s)).astype(np.float32)
    for k, s in SHAPES.items()
}


@functools.cache
def run(scale=small, **options):
    """Common and own parameters and states, `[t, worker, ...]`, on quadratics."""
    tx = efopt.optimizers.zero_one_adam(scale, **{**OPTIONS, **LOCAL, **options})

    def one(carry, goal):
        params, state = carry
        own = efopt.local_params(params, AXIS, state)
        grads = jax.tree.map(lambda c, p, g: c * (p - g), CURVED, own, goal)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, efopt.local_params(params, AXIS, state), state)

    @functools.partial(jax.jit, compiler_options=FAST)
    def all_steps(params, goals):
        carry = efopt.stack_workers((params, tx.init(params)), WORKERS)
        return jax.lax.scan(jax.vmap(one, axis_name=AXIS), carry, goals)[1]

    return jax.tree.map(np.asarray, all_steps(START, GOALS))


@functools.cache
def by_hand():
    curved = [c.astype(np.float64) for c in jax.tree.leaves(CURVED)]
    goals = [x.astype(np.float64) for x in jax.tree.leaves(GOALS)]

    def at(t):
        def gradients(own):
            return [
                [c * (p - g[t, i]) for c, p, g in zip(curved, x, goals, strict=True)]
                for i, x in enumerate(own)
            ]

        return gradients

    return oracle_methods.zero_one_adam(
        [x.astype(np.float64) for x in jax.tree.leaves(START)],
        [at(t) for t in range(STEPS)],
        WORKERS,
        small,
        blocked,
        refreshes(3, FREEZE, STEPS).__contains__,
        meetings(FREEZE, LONGEST, DOUBLING, STEPS).__contains__,
        B1,
        B2,
        EPS,
        DECAY,
    )


def test_it_is_its_oracle():
    """Each worker's own parameters, the common ones, and what all owe, every step."""
    common, own, state = run()
    paths = by_hand()
    for t in range(STEPS):
        for k, name in enumerate(sorted(SHAPES)):
            for i in range(WORKERS):
                for got, want in (
                    (common[name][t, i], paths[0][t][k]),
                    (own[name][t, i], paths[1][t][i][k]),
                ):
                    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
                owed = state[0].residual.value[name][t, i, 0] * state[0].last_rate[t, i]
                want = paths[3][t][i][k]
                np.testing.assert_allclose(owed, want, rtol=0, atol=1e-5)


LATER = sorted(meetings(FREEZE, LONGEST, DOUBLING, STEPS) - set(range(FREEZE)))


def test_common_parameters_move_at_meetings_alone_where_nobody_is_apart():
    common, own, _ = run()
    for name in SHAPES:
        shared = common[name].view(np.uint32)
        np.testing.assert_array_equal(shared, shared[:, :1].repeat(WORKERS, axis=1))
        moved = common[name][1:] != common[name][:-1]
        for t in range(FREEZE, STEPS):
            apart = (own[name][t] != common[name][t]).any()
            assert moved[t - 1].any() == (t in LATER) != apart, t


@pytest.mark.slow
def test_what_was_applied_and_what_is_owed_is_what_workers_moved_by():
    """In steps, whatever the rates: u_i + E_i are the average applied and the new E_i.

    By all-gather, where owners keep nothing.
    """
    common, own, state = run(exchange="all_gather", weight_decay=0.0)
    state = state[0]
    for name, curved in CURVED.items():
        root = np.sqrt(state.nu[name][-1, 0].astype(np.float64)) + EPS
        for last, t in zip([FREEZE - 1, *LATER], LATER, strict=False):
            u = np.zeros((WORKERS, *curved.shape))
            m = state.local.own.value.inner[name][last, :, 0].astype(np.float64)
            x = own[name][last].astype(np.float64)
            rates = sum(small(s) for s in range(last + 1, t + 1))
            for s in range(last + 1, t + 1):
                m = B1 * m + (1 - B1) * curved * (x - GOALS[name][s])
                x, u = x - small(s) * m / root, u + small(s) * m
            applied = (common[name][last, 0] - common[name][t, 0]) * root
            before = state.residual.value[name][last, :, 0] * state.last_rate[last, 0]
            after = state.residual.value[name][t, :, 0] * state.last_rate[t, 0]
            np.testing.assert_allclose(state.last_rate[t, 0], rates, rtol=1e-5)
            np.testing.assert_allclose(
                (u + before).mean(0), applied + after.mean(0), rtol=0, atol=2e-6
            )


@pytest.mark.slow
def test_a_distance_of_one_is_no_local_steps_at_all():
    """Beyond the last doubling of one nothing else changes: the same iterates."""
    never = run(longest=2, doubling=STEPS)[0]
    plain = run(longest=1, doubling=None)[0]
    for name in SHAPES:
        np.testing.assert_allclose(never[name], plain[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_rates_of_zero_move_nobody_and_pay_nothing():
    """A schedule that is zero for several rounds, and goes on."""
    last = min(t for t in LATER if t >= 30)  # at which rates before were summed

    def pause(t):
        return small(t) * ((t < 30) | (t >= 50))

    common, own, state = run(pause)
    for name in SHAPES:
        still = own[name][last:50]
        np.testing.assert_array_equal(still, still[:1].repeat(len(still), axis=0))
        owed = state[0].residual.value[name][last:50]
        np.testing.assert_array_equal(owed, owed[:1].repeat(len(owed), axis=0))
        assert np.isfinite(common[name]).all()
        assert (common[name][-1] != common[name][49]).any()


LAYERS = {"a": np.zeros((256, 128), np.float32), "b": np.zeros(8192, np.float32)}


@pytest.mark.parametrize("n", [slow(2), slow(3), 8])
def test_one_branch_of_three_sends_nothing_and_the_others_what_is_planned(n):
    tx = efopt.optimizers.zero_one_adam(
        1e-3, freeze=100, longest=16, doubling=100, axis_name=AXIS
    )
    step, *arguments = compiled(tx, LAYERS, n)
    program = step.lower(*arguments).compile()
    measured = wire.measure(program).collectives
    assert all(c.executions is None for c in measured)  # none outside of a branch
    both = {"all-reduce": 0, "all-to-all": 0, "all-gather": 0}
    for c in measured:
        both[c.operation] += c.operand_bytes
    options = dict(num_workers=n, platform="cpu")
    signs = wire.plan(efopt.scaled_sign(1024), LAYERS, exchange="two_phase", **options)
    dense = wire.plan(efopt.compressors.identity(), LAYERS, **options)
    assert both["all-reduce"] == dense.operand_bytes
    assert both["all-to-all"] + both["all-gather"] == signs.operand_bytes
    assert sorted(branches(program.as_text())) == [
        set(),
        {"all-gather", "all-to-all"},
        {"all-reduce"},
    ]


def branches(text):
    """The collectives under each branch of the program's widest conditional."""
    found = Program.parse(text)

    def under(computation):
        out = set()
        for x in found.bodies[computation].values():
            code = x["opcode"].removesuffix("-start")
            out |= {code} & {"all-reduce", "all-gather", "all-to-all"}
            for name, _ in found.called(x):
                out |= under(name)
        return out

    choices = [
        [name for name, role in found.called(x) if role == "branch_computations"]
        for body in found.bodies.values()
        for x in body.values()
        if x["opcode"] == "conditional"
    ]
    return [under(name) for name in max(choices, key=len)]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"longest": 0}, ValueError, "must be at least 1, got 0"),
        ({"longest": 4}, ValueError, "together; got longest=4 and doubling=None"),
        ({"doubling": 4}, ValueError, "together; got longest=1 and doubling=4"),
        ({"longest": 2, "doubling": 0}, ValueError, "must be at least 1, got 0"),
        ({"longest": 2.0, "doubling": 4}, TypeError, "must be a Python int"),
        (
            {
                "longest": 2,
                "doubling": 4,
                "axis_name": ("slow", "fast"),
                "exchange": efopt.exchanges.hierarchical("fast"),
            },
            ValueError,
            "Give it the inner exchange",
        ),
    ],
)
def test_option_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        efopt.optimizers.zero_one_adam(0.1, freeze=5, **options)


def test_parameters_of_a_worker_are_refused():
    tx = efopt.optimizers.zero_one_adam(0.1, **LOCAL, axis_name=AXIS)
    mesh = make_mesh("auto", 2)
    state = efopt.distribute((START, jax.eval_shape(tx.init, START)), mesh)

    def step(state, grads):
        own = efopt.local_params(state[0], AXIS, state[1])
        return tx.update(jax.tree.map(lambda g: g[0], grads), state[1], own)[1]

    specs = efopt.partition_specs(state)
    fn = jax.shard_map(step, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=specs[1])
    grads = jax.tree.map(lambda x: np.stack([x, x]), START)
    with pytest.raises(ValueError, match="takes the common parameters"):
        jax.eval_shape(fn, state, grads)
