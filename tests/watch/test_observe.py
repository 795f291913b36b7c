"""Telemetry as state: against NumPy, equal everywhere, in one sum, and free if off."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from registry import AXIS, WORKERS
from workers_under_test import FAST, make_mesh, run, run_with_states, slow

import efopt
from efopt import wire
from efopt.exchanges.owed import owed_by_owners
from efopt.watch import observe, report

SHAPES = {"b": (5,), "w": (16, 12)}
STEPS = 3
TOP = efopt.top_k(k=3)
SIGN = efopt.scaled_sign(8)
LOW_RANK = efopt.power_sgd(1, min_compression=0)


def feedback(compressor=SIGN, exchange="two_phase", **options):
    return efopt.error_feedback(
        compressor, axis_name=AXIS, exchange=exchange, **options
    )


def draw(workers=WORKERS, steps=STEPS):
    rng = np.random.default_rng(0)
    return [
        {k: rng.standard_normal((workers, *s), np.float32) for k, s in SHAPES.items()}
        for _ in range(steps)
    ]


def params():
    return {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}


def squares(tree, mean=True):
    """By leaf and in total, of arrays with one row a worker."""
    rows = [np.sum(np.square(np.asarray(x, np.float64))) for x in tree.values()]
    rows = np.array(rows) / (len(next(iter(tree.values()))) if mean else 1)
    return np.append(rows, rows.sum())


@pytest.mark.parametrize(
    ("compressor", "exchange", "how"),
    [
        (SIGN, "two_phase", "auto"),
        slow(TOP, "all_gather", "vmap"),
        slow(SIGN, "two_phase", "explicit"),
        slow(SIGN, "two_phase", "pmap"),
        slow(SIGN, "two_phase", "vmap"),
        slow(LOW_RANK, "all_reduce", "auto"),
        slow(efopt.random_k(k=2), "all_reduce", "auto"),
        slow(efopt.sign(), "majority_vote", "auto"),
    ],
)
def test_the_numbers_are_those_of_residuals_and_gradients(compressor, exchange, how):
    grads, tx = draw(), observe(feedback(compressor, exchange))
    states = [s for _, s in run_with_states(how, tx, params(), grads, WORKERS)]
    before, state = states[-2:]
    rows = lambda x: x.reshape(WORKERS, *x.shape[x.ndim - 2 :])  # noqa: E731

    def residual(state):
        value = state.residual.value
        return {k: value[k].reshape(WORKERS, *s) for k, s in SHAPES.items()}

    came, old, new = squares(grads[-1]), residual(before), residual(state)
    given = squares({k: grads[-1][k] + old[k] for k in SHAPES})
    seen = state.link.watched
    one = lambda x: np.asarray(x).reshape(-1, len(SHAPES) + 1)  # noqa: E731
    for got, expected in (
        (seen.residual_ratio, np.sqrt(squares(new) / came)),
        (seen.delta, 1 - squares(new) / given),
    ):
        for row in one(got):  # of every worker, where they are stacked
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    if before.link.server != ():
        owed = [rows(x) for x in before.link.server.value]
        total = sum(np.sum(np.square(x, dtype=np.float64)) for x in owed)
        ratio = one(seen.server_ratio)[0]
        np.testing.assert_allclose(ratio[-1], np.sqrt(total / came[-1]), rtol=1e-5)
        parts = np.sum(ratio[:-1] ** 2 * came[:-1])
        np.testing.assert_allclose(parts, total, rtol=1e-5)
        assert (ratio > 0).all()
    assert np.asarray(seen.steps).reshape(-1)[0] == STEPS
    deltas = [one(s.link.watched.delta)[0] for s in states]
    np.testing.assert_allclose(
        one(seen.mean_delta)[0], np.mean(deltas, 0), rtol=1e-5, atol=1e-6
    )


def test_what_owners_owe_is_told_by_leaf():
    """Blocks of one leaf alone: what they owe is of that leaf."""
    grads = draw(steps=2)
    for g in grads:
        g["b"][:] = 0
    _, state = run("vmap", observe(feedback()), params(), grads, WORKERS)
    ratio = np.asarray(state.link.watched.server_ratio)[0]
    assert ratio[0] == 0 and ratio[1] > 0
    # `whole` lays the ranges out by leaf.
    owed = owed_by_owners(state.link.home.link, params(), run_server(grads))
    expected = np.sum(np.square(np.asarray(owed["w"], np.float64)))
    came = squares(grads[-1])
    np.testing.assert_allclose(ratio[1], np.sqrt(expected / came[1]), rtol=1e-5)


def run_server(grads):
    _, state = run("auto", feedback(), params(), grads[:1], WORKERS)
    return state.link.server


def test_it_changes_no_update_and_costs_nothing_when_off():
    grads = draw()
    got, state = run("auto", observe(feedback()), params(), grads, WORKERS)
    expected, plain = run("auto", feedback(), params(), grads, WORKERS)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert plain.link.watched == ()
    more = len(jax.tree.leaves(state)) - len(jax.tree.leaves(plain))
    assert more == len(state.link.watched)


def collectives(tx):
    mesh = make_mesh("auto", WORKERS)
    structs = jax.eval_shape(params)
    state = efopt.distribute(jax.eval_shape(tx.init, structs), mesh)
    specs = efopt.partition_specs(state)
    step = jax.shard_map(
        lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s),
        mesh=mesh,
        in_specs=(P(AXIS), specs),
        out_specs=(P(), specs),
    )
    sharding = jax.NamedSharding(mesh, P(AXIS))
    grads = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((WORKERS, *x.shape), x.dtype, sharding=sharding),
        structs,
    )
    found = wire.measure(jax.jit(step), grads, state)
    return len(found.collectives), found.operand_bytes


def test_it_travels_with_the_payload_of_a_linear_compressor():
    tx = feedback(efopt.random_k(k=2), "all_reduce")
    number, size = collectives(tx)
    assert collectives(observe(tx)) == (number, size + 3 * 4 * len(SHAPES))


@pytest.mark.slow
def test_else_it_is_one_small_sum():
    for tx, numbers in ((feedback(), 4), (feedback(TOP, "all_gather"), 3)):
        number, size = collectives(tx)
        small = numbers * 4 * len(SHAPES)
        assert collectives(observe(tx)) == (number + 1, size + small)


def test_huge_and_empty_gradients_leave_it_finite():
    tx = observe(efopt.error_feedback(TOP))
    tree, step = (
        {"a": np.zeros(8, "f"), "none": np.zeros((0, 2), "f")},
        jax.jit(tx.update, compiler_options=FAST),
    )
    state = jax.jit(tx.init)(tree)
    for value in (0.0, 1e30, 0.0):
        _, state = step({**tree, "a": np.full(8, value, "f")}, state)
        for x in jax.tree.leaves(state.link.watched):
            assert np.isfinite(x).all()
    guarded = efopt.watch.skip_not_finite(tx)
    state = jax.jit(guarded.init)(tree)
    _, state = jax.jit(guarded.update)({**tree, "a": np.full(8, 1e30, "f")}, state)
    assert state.skipped == 0


@pytest.mark.parametrize("how", ["auto", slow("vmap")])
def test_a_report_names_leaves_of_every_part_and_the_steps_skipped(how):
    parts = {"ef": feedback(), "dense": efopt.compress(TOP, axis_name=AXIS)}
    tx = optax.partition(parts, {"b": "dense", "w": "ef"})
    tx = efopt.watch.skip_not_finite(
        observe(optax.chain(tx, optax.sgd(0.1))), axis_name=AXIS
    )
    bad = {k: np.full((WORKERS, *s), np.nan, "f") for k, s in SHAPES.items()}
    _, state = run(how, tx, params(), [*draw(), bad], WORKERS)
    got = report(state)
    names = [[row.name for row in part] for part in got.parts]
    assert names == [["['b']", "total"], ["['w']", "total"]]
    assert (got.skipped, got.streak) == (1, 1)
    text = str(got)
    assert "['w']" in text and "skipped steps: 1, in a row: 1" in text
    assert [part[0].server_ratio is None for part in got.parts] == [True, False]
    assert optax.tree.get_all_with_path(state, "residual_ratio")


@pytest.mark.slow
def test_within_accumulation_and_after_a_dense_start():
    tx = efopt.accumulate(
        optax.chain(feedback(start=1), optax.sgd(0.1)), every=2, axis_name=AXIS
    )
    _, state = run("vmap", observe(tx), params(), draw(steps=6), WORKERS)
    # Three steps, of which the first was averaged uncompressed.
    assert np.asarray(state.inner[0].link.watched.steps).tolist() == [2] * WORKERS


def test_what_compresses_nothing_is_refused():
    with pytest.raises(ValueError, match="found nothing that compresses"):
        jax.eval_shape(observe(optax.sgd(0.1)).init, params())
    with pytest.raises(TypeError, match="takes an `optax.GradientTransformation`"):
        observe(efopt.top_k)
    with pytest.raises(ValueError, match="found nothing that was observed"):
        report(jax.eval_shape(feedback().init, params()))


# ------------------------------------------------- what Optax has for the same


def test_a_snapshot_in_front_of_an_exchange_is_refused_with_the_cure():
    norm = optax.snapshot("norm", optax.tree.norm)
    mesh = make_mesh("auto", WORKERS)
    for front in (norm, optax.chain(optax.identity(), norm)):
        state = jax.eval_shape(optax.chain(front, feedback()).init, params())
        for see in (
            efopt.partition_specs,
            lambda s: efopt.distribute(s, mesh),
        ):
            with pytest.raises(ValueError, match=r"`efopt.per_worker\(optax.snapshot"):
                see(state)
    cured = optax.chain(
        efopt.per_worker(norm, axis_name=AXIS), feedback(), optax.sgd(0.1), norm
    )
    _, state = run("auto", cured, params(), draw(), WORKERS)
    assert state[0].value.measurement["norm"].shape == (WORKERS,)
    assert state[-1].measurement["norm"] > 0


def test_a_monitor_is_refused_with_the_cure():
    monitor = optax.monitor({"norm": optax.tree.norm})
    for chain in (optax.chain(feedback(), monitor), optax.chain(monitor, feedback())):
        with pytest.raises(ValueError, match=r"`optax.monitor`.*`optax.snapshot`"):
            efopt.partition_specs(jax.eval_shape(chain.init, params()))
