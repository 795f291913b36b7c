"""A state on another number of workers: every scheme, every layout, every way in."""

import dataclasses
import pickle

import flax.serialization
import jax
import numpy as np
import optax
import pytest
import test_schemes_and_optimizers as suite
from registry import AXIS, OPTIMIZERS, SCHEMES
from states import PARAMS, filled, is_own, make, of_workers, parts
from workers_under_test import FAST, make_mesh, slow

import efopt
from efopt.checkpoints import resize
from efopt.codecs.compressor import make as compressor_of
from efopt.feedback.landed import landed

MOVES = [(4, 3), (8, 4), (8, 16), (3, 8)]
ROWS = [row for row in (*SCHEMES, *OPTIMIZERS) if row.over_workers and row.own]


def lane(row, move):
    """Every run: a move of each kind. The slow lane: that of all rows, all of kinds."""
    first = move == MOVES[0]
    if row.kind and first:
        return []
    return [pytest.mark.slow if row.kind or first else pytest.mark.exhaustive]


EACH = [
    pytest.param(
        row, *move, marks=lane(row, move), id=f"{row.name}-{move[0]}-{move[1]}"
    )
    for row in ROWS
    for move in MOVES
]
each_move_of_each_row = pytest.mark.parametrize("row, n, m", EACH)


def paying(state):
    """What a residual takes that must be written anew."""
    stored = any(is_own(x) and x.rule == "stored" for x in parts(state))
    return {"params": PARAMS, "learning_rate": 0.1} if stored else {}


def resized(state, m):
    given = paying(state)
    found = resize(state, m, **given)
    return found if given else (PARAMS, found)


def mean(x):
    return np.mean(np.asarray(x, np.float64), axis=0)


def joined(x, split):
    return x.reshape(-1, *x.shape[2:])[:split]


def test_every_kind_of_state_says_what_becomes_of_it():
    silent = {
        row.name
        for row in ROWS
        for x in parts(jax.eval_shape(make(row).init, PARAMS))
        if is_own(x) and x.rule not in efopt.workers.node.RULES
    }
    assert silent == set(), "mark it with a rule: `link.wrap(tree, rule=...)`"


@each_move_of_each_row
def test_means_stay_and_so_does_all_that_workers_share(row, n, m):
    state = of_workers(make(row), n)
    _, new = resized(state, m)
    state = jax.tree.map(np.asarray, landed("resize", state))  # owed in its place
    pairs = list(zip(parts(state), parts(new), strict=True))
    assert any(is_own(x) for x, _ in pairs)
    for x, y in pairs:
        if not is_own(x):
            np.testing.assert_array_equal(x, y)
            continue
        assert (x.rule, x.split, x.axis_name) == (y.rule, y.split, y.axis_name)
        assert y.sizes == (m,) and x.rule is not None
        arrays = zip(jax.tree.leaves(x.value), jax.tree.leaves(y.value), strict=True)
        for (a, b), split in zip(arrays, x.splits(), strict=True):
            assert b.dtype == a.dtype and b.shape[0] == m
            if split is not None:
                np.testing.assert_array_equal(joined(a, split), joined(b, split))
            elif x.rule == "mean" and a.dtype == np.float32:
                unit = np.spacing(np.abs(b).max(0))
                assert (np.abs(mean(a) - mean(b)) <= 0.51 * unit / m).all()


def largest(tree):
    return max([np.abs(x).max() for x in jax.tree.leaves(tree)], default=0)


def feedbacks(state):
    is_feedback = lambda x: isinstance(x, efopt.feedback.ErrorFeedbackState)  # noqa: E731
    leaves = jax.tree.leaves(state, is_leaf=is_feedback)
    return [x for x in leaves if is_feedback(x)]


@each_move_of_each_row
def test_the_virtual_iterate_stays_to_one_unit(row, n, m):
    state = of_workers(make(row), n)
    params, new = resized(state, m)
    if paying(state):
        return  # of a stored residual: below
    assert params is PARAMS

    @jax.jit
    def virtual(feedback):
        compressor = compressor_of(feedback.link.home.link.codec)
        return efopt.virtual_params(
            PARAMS, feedback, learning_rate=0.1, compressor=compressor
        )

    for before, after in zip(feedbacks(state), feedbacks(new), strict=True):
        old, now = virtual(before), virtual(after)
        owed = before.residual.value
        for name, p in PARAMS.items():
            # Of float32, in which `virtual_params` sums parameters and residuals.
            terms = np.abs(owed[name]).max(0) + largest(before.link.server)
            unit = np.spacing(np.abs(p) + np.float32(0.1) * terms)
            assert (np.abs(np.subtract(old[name], now[name])) <= unit).all()
            assert np.abs(old[name] - p).max() > 1e-2


# ------------------------------------------------------------- stored residuals


def read(state):
    """What each worker's stored residual says, read by the step itself."""
    zeros = jax.tree.map(np.zeros_like, PARAMS)

    def one(payload):
        residual = state.residual
        turn = efopt.codecs.blocks.Turn(np.uint32(0), np.uint32(0))
        return residual.store.recall(zeros, payload, turn, None)

    return jax.jit(jax.vmap(one))(state.residual.value)


STORED = [
    slow(efopt.quantize(8, block_size=4), 4, 3, id="bits"),
    slow(efopt.quantize(8, block_size=4), 8, 16, id="bits-copied"),
    slow(efopt.top_k(fraction=0.2), 3, 8, id="largest"),
]


@pytest.mark.parametrize("memory, n, m", STORED)
def test_what_a_stored_residual_loses_is_paid_at_once(memory, n, m):
    """Bits and the largest: what writing them anew takes, parameters have at once."""
    tx = efopt.contractive_error_feedback(
        efopt.top_k(k=3), memory=memory, axis_name=AXIS
    )
    state = of_workers(tx, n)
    owed = lambda s: jax.tree.map(mean, read(s))  # noqa: E731
    rng = np.random.default_rng(1)
    given = {k: rng.standard_normal((n, *p.shape)) for k, p in PARAMS.items()}
    state = state._replace(residual=written(state.residual, given))
    params, new = resize(state, m, params=PARAMS, learning_rate=0.5)
    before, after = owed(state), owed(new)
    moved = 0
    for name, p in PARAMS.items():
        old, now = p - 0.5 * before[name], params[name] - 0.5 * after[name]
        np.testing.assert_allclose(now, old, rtol=0, atol=3e-7)
        moved += np.abs(params[name] - p).max()
    assert (moved > 1e-4) == (m % n != 0)


def written(node, given):
    """A stored residual that says what is given, as far as it can."""
    turn = efopt.codecs.blocks.Turn(np.uint32(0), np.uint32(0))
    zeros = jax.tree.map(np.zeros_like, PARAMS)

    def one(x, payload):
        return node.store.keeper(zeros, payload, turn, None)(x)

    wide = jax.tree.map(lambda x: x.astype(np.float32), given)
    value = jax.jit(jax.vmap(one))(wide, node.value)
    return node.with_value(jax.tree.map(np.asarray, value))


def test_a_stored_residual_asks_for_what_pays():
    tx = efopt.contractive_error_feedback(
        efopt.top_k(k=3), memory=efopt.quantize(8, block_size=4), axis_name=AXIS
    )
    state = of_workers(tx, 4)
    with pytest.raises(ValueError, match="stored by `contractive.*Pass the parameters"):
        resize(state, 3)
    with pytest.raises(ValueError, match="does not know what a stored residual is w"):
        resize(state, 3, params=PARAMS)
    resize(state, 8)  # copies lose nothing


# ------------------------------------------------------------------ a coin each


def test_points_of_their_own_have_their_gradients_evaluated_anew():
    """At a mixed point, of other data: in the next step, whatever the coins say."""
    tx = efopt.convex.lsvrg(1e-9, axis_name=AXIS, coin="per_worker")
    state = of_workers(tx, 4)
    state = state._replace(count=np.int32(7))
    new = resize(state, 3)
    assert new.stale.value.all() and not state.stale.value.all()
    assert new.count == 7
    optima = np.arange(15, dtype=np.float32).reshape(3, 5)
    params = {"b": PARAMS["b"]}
    state = resize(of_workers(tx, 4, params)._replace(count=np.int32(7)), 3)

    def step(state, optimum):
        grad = lambda p: {"b": p["b"] - optimum}  # noqa: E731
        updates, state = tx.update(
            grad(params), state, params, grad_fn=grad, full_grad_fn=grad
        )
        return updates, state

    step = jax.jit(jax.vmap(step, axis_name=AXIS))
    updates, after = step(efopt.stack_workers(state, 3), optima)
    point = state.reference.value["b"]
    np.testing.assert_allclose(after.gradient.value["b"][:, 0], point - optima)
    np.testing.assert_allclose(updates["b"], params["b"] - optima, atol=1e-5)
    assert not after.stale.value.any()


# ------------------------------------------------------------------- the ways in


def chained():
    return optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS),
        efopt.error_feedback(
            efopt.scaled_sign(16), axis_name=AXIS, exchange="two_phase"
        ),
        optax.sgd(0.1),
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("way", ["mesh", "stack", "pickle", "flax"])
def test_a_state_may_come_from_anywhere(way):
    tx = chained()
    state = of_workers(tx, 8)
    expected = resize(state, 3)
    if way == "mesh":
        given = efopt.distribute(state, make_mesh("auto", 8))
    elif way == "stack":
        given = efopt.stack_workers(state, 8)
    elif way == "pickle":
        given = pickle.loads(pickle.dumps(state))
    else:
        fresh = filled(jax.eval_shape(tx.init, PARAMS))
        given = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    found = resize(given, 3)
    equal(found, expected)
    placed = efopt.distribute(found, make_mesh("auto", 3))
    equal(jax.tree.map(np.asarray, placed), expected)


def test_leaves_without_coordinates_come_from_a_stack_too():
    params = {"a": np.zeros((0, 2), np.float32), "b": np.ones(2, np.float32)}
    tx = optax.chain(
        efopt.error_feedback(efopt.sign(), axis_name=AXIS), optax.trace(0.9)
    )
    state = resize(efopt.stack_workers(tx.init(params), 3), 5)
    assert state[0].residual.value["a"].shape == (5, 0, 2)
    assert state[1].trace["a"].shape == (0, 2)


def test_as_many_workers_change_nothing():
    """Not even gradients at the reference points are asked for anew."""
    tx = efopt.convex.lsvrg(0.5, axis_name=AXIS, coin="per_worker")
    state = of_workers(tx, 4)
    equal(resize(state, 4), state)
    assert not resize(state, 4).stale.value.any()
    equal(resize(efopt.stack_workers(state, 4), 4), state)


def test_axes_may_be_several_and_named():
    axes = ("slow", "fast")
    tx = efopt.error_feedback(efopt.top_k(k=3), axis_name=axes)
    rng = np.random.default_rng(0)
    one = {"b": rng.standard_normal((6, 5)).astype(np.float32)}
    state = efopt.stack_workers(filled(jax.eval_shape(tx.init, {"b": one["b"][0]})), 6)
    residual = state.residual.with_value({"b": one["b"].reshape(2, 3, 1, 5)})
    residual = dataclasses.replace(residual, sizes=(2, 3))
    tile = lambda x: np.broadcast_to(np.asarray(x)[0], (2, 3, *x.shape[1:]))  # noqa: E731
    state = state._replace(residual=residual, count=tile(state.count))
    for given, sizes in ((4, (4,)), ((2, 2), (2, 2)), ({"slow": 1, "fast": 4}, (1, 4))):
        new = resize(state, given).residual
        assert new.sizes == sizes and new.value["b"].shape == (4, 5)
        np.testing.assert_allclose(mean(new.value["b"]), mean(one["b"]), atol=1e-7)


# --------------------------------------------------------------------- bad input


def test_a_kind_of_state_that_nobody_has_described_is_refused():
    tx = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    state = dataclasses.replace(of_workers(tx, 4), rule=None)
    with pytest.raises(ValueError, match=r"4 workers: .*does not say what becomes"):
        resize({"mine": state}, 3)


def test_counters_that_differ_are_refused_by_name():
    tx = efopt.per_worker(optax.scale_by_adam(), axis_name=AXIS)
    state = of_workers(tx, 4)
    state.value.count[2] = 9
    with pytest.raises(ValueError, match="such as 3 of worker 0 and 9 of worker 2"):
        resize(state, 3)


BAD_NUMBERS = [
    (0, ValueError, "at least 1, got 0"),
    ((2, 0), ValueError, "at least 1"),
    (True, TypeError, "takes a Python int"),
    (2.0, TypeError, "takes a Python int"),
    ("4", TypeError, "takes a Python int"),
    ({"other": 4}, ValueError, r"residual is over the axis 'data'.*\['other'\]"),
    ((2, 2), ValueError, "residual is over 'data'"),
]


@pytest.mark.parametrize("number, error, says", BAD_NUMBERS)
def test_a_number_that_is_none_is_refused(number, error, says):
    tx = efopt.error_feedback(efopt.top_k(k=3), axis_name=AXIS)
    with pytest.raises(error, match=says):
        resize(of_workers(tx, 4), number)


def test_two_axes_need_their_names():
    txs = [efopt.per_worker(optax.trace(0.9), axis_name=a) for a in ("a", "b")]
    state = [filled(jax.eval_shape(tx.init, PARAMS)) for tx in txs]
    with pytest.raises(ValueError, match=r"several axes, \['a', 'b'\]: say how long"):
        resize(state, 3)
    found = resize(state, {"a": 2, "b": 3, "c": 4})
    assert [x.sizes for x in found] == [(2,), (3,)]


def test_a_share_of_one_worker_is_no_state():
    tx = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    share = jax.tree.map(lambda x: x[:1], of_workers(tx, 4))
    with pytest.raises(ValueError, match="`resize` got the share of one worker"):
        resize(share, 3)


def test_a_state_is_laid_out_once():
    tx = chained()
    stacked = efopt.stack_workers(of_workers(tx, 4), 4)
    with pytest.raises(ValueError, match="got a state that `stack_workers` laid out"):
        efopt.distribute(stacked, make_mesh("auto", 4))
    with pytest.raises(
        ValueError, match="at .*laid out neither for one worker nor for 8"
    ):
        efopt.distribute(of_workers(tx, 4), make_mesh("auto", 8))


def test_a_stack_whose_copies_differ_is_refused_by_name():
    stacked = efopt.stack_workers(of_workers(chained(), 4), 4)
    count = np.asarray(stacked[1].count).copy()
    count[1] = 8
    feedback = stacked[1]._replace(count=count)
    with pytest.raises(
        ValueError, match=r"which \[1\]\.count differs between worker 0"
    ):
        resize((stacked[0], feedback, stacked[2]), 2)


def test_a_stack_that_might_be_placed_has_to_be_told():
    """Parameters whose first axis is 1, and nothing but what is each worker's own."""
    tx = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    state = of_workers(tx, 4, {"x": np.zeros((1, 5), np.float32)})
    with pytest.raises(ValueError, match="cannot tell whether this state is stacked"):
        resize(state, 2)
    assert resize(state, 2, stacked=False).value.trace["x"].shape == (2, 1, 5)
    assert resize(state, 2, stacked=True).value.trace["x"].shape == (2, 5)


# ------------------------------------------------------------------ and then on


# The gradients of all workers at the optimum are those of so many workers.
GO_ON = [r for r in ROWS if r.averages and r.name != "ec_gd_star"]


@pytest.mark.slow
@pytest.mark.parametrize("row", GO_ON, ids=lambda r: r.name)
def test_the_run_goes_on_on_another_number_of_workers(row):
    """4 workers, then 3: what comes out is equal on all of them, bit for bit."""
    tx = suite.make(row, AXIS)
    optima = suite.tree(1, 12)
    params, state, n = suite.PARAMS, jax.jit(tx.init)(suite.PARAMS), None
    for m in (4, 3):
        if n is not None:
            kwargs = {**paying(state), "params": params} if paying(state) else {}
            found = resize(state, m, **kwargs)
            params, state = found if kwargs else (params, found)
        step = jax.jit(
            jax.vmap(suite.step_of(row, tx, suite.here), axis_name=AXIS),
            compiler_options=FAST,
        )
        mine = jax.tree.map(lambda x: x[:m], optima)  # noqa: B023
        carry = efopt.stack_workers((params, state), m)
        for _ in range(3):
            carry, _ = step(carry, mine)
        rows = jax.tree.map(np.asarray, carry[0])
        for x in jax.tree.leaves(rows):
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
        params, state, n = jax.tree.map(lambda x: x[0], rows), carry[1], m
