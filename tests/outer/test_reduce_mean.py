"""The drop-in for loops that hold a worker axis: five lines of such a loop change."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from workers_under_test import FAST, make_mesh, slow

import efopt

AXIS = "data"
WORKERS = 4
PARAMS = {"b": np.zeros(8, np.float32), "w": np.ones((16, 5), np.float32)}
FEEDBACK = efopt.error_feedback(efopt.top_k(k=3), axis_name=AXIS)


def targets():
    rng = np.random.default_rng(0)
    return {
        k: rng.standard_normal((WORKERS, *x.shape), np.float32)
        for k, x in PARAMS.items()
    }


def outer_loop(average, state, place, rounds=5):
    """A loop of the usual shape: replicas train, deltas are averaged, SGD outside."""
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)

    @jax.jit
    def a_round(params, outer_state, state, goal):
        replicas = jax.tree.map(
            lambda p, g: p[None] + 0.5 * (g - p[None]), params, goal
        )
        delta = jax.tree.map(lambda p, x: p[None] - x, params, replicas)
        mean, state = average(delta, state)
        updates, outer_state = outer.update(mean, outer_state, params)
        return optax.apply_updates(params, updates), outer_state, state

    params, goal = place(PARAMS, targets())
    outer_state = outer.init(params)
    for _ in range(rounds):
        params, outer_state, state = a_round(params, outer_state, state, goal)
    return jax.tree.map(np.asarray, (params, state))


def compressed(delta, state):
    return efopt.outer.reduce_mean(FEEDBACK, delta, state=state, axis_name=AXIS)


def on_one_device():
    state = efopt.outer.init_mean(FEEDBACK, PARAMS, num_workers=WORKERS)
    return outer_loop(compressed, state, lambda *trees: trees)


def on_a_mesh(how, specs=None):
    mesh = make_mesh(how, WORKERS)
    state = efopt.outer.init_mean(FEEDBACK, PARAMS, mesh=mesh, params_specs=specs)

    def place(params, goal):
        rows = NamedSharding(mesh, P(AXIS))
        return efopt.distribute(params, mesh, specs), jax.device_put(goal, rows)

    return outer_loop(compressed, state, place)


@pytest.mark.parametrize("how", ["auto", slow("explicit")])
def test_a_mesh_and_one_device_agree_and_each_worker_keeps_its_debt(how):
    expected, state = on_one_device()
    got, other = on_a_mesh(how)
    for k, x in expected.items():
        np.testing.assert_allclose(got[k], x, rtol=0, atol=1e-5)
        owed = other.residual.value[k].reshape(state.residual.value[k].shape)
        np.testing.assert_allclose(owed, state.residual.value[k], rtol=0, atol=1e-5)
    assert all((x != PARAMS[k]).any() for k, x in expected.items())


def test_with_nothing_lost_it_is_the_mean():
    mean = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)
    state = efopt.outer.init_mean(mean, PARAMS, num_workers=WORKERS)
    reduce = functools.partial(efopt.outer.reduce_mean, mean, axis_name=AXIS)
    got, _ = jax.jit(lambda xs, state: reduce(xs, state=state))(targets(), state)
    for k, x in targets().items():
        np.testing.assert_allclose(got[k], x.mean(0), rtol=0, atol=1e-6)


def test_what_crosses_the_axis_is_small():
    mesh = make_mesh("two_d", WORKERS)
    specs = {"b": P(), "w": P("other")}
    sign = efopt.error_feedback(efopt.scaled_sign(), axis_name=AXIS)
    state = efopt.outer.init_mean(sign, PARAMS, mesh=mesh, params_specs=specs)
    place = lambda s, x: jax.device_put(x, NamedSharding(mesh, P(AXIS, *s)))  # noqa: E731
    deltas = {k: place(specs[k], x) for k, x in targets().items()}
    step = jax.jit(
        lambda delta, state: efopt.outer.reduce_mean(
            sign, delta, state=state, axis_name=AXIS
        ),
        compiler_options=FAST,
    )
    report = efopt.wire.measure(step, deltas, state)
    # 40 signs of a shard and 4 of a piece, together in whole words, and two scales.
    assert report.over(AXIS).operand_bytes == 8 + 2 * 4


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="exactly one of `num_workers`"):
        efopt.outer.init_mean(FEEDBACK, PARAMS)
    state = efopt.outer.init_mean(FEEDBACK, PARAMS, num_workers=WORKERS)

    def mapped(delta, state):
        return efopt.outer.reduce_mean(FEEDBACK, delta, state=state, axis_name=AXIS)

    with pytest.raises(ValueError, match="mapped over 'data' already"):
        jax.eval_shape(jax.vmap(mapped, axis_name=AXIS), targets(), state)
    two = efopt.error_feedback(efopt.sign(), axis_name=("a", "b"))
    with pytest.raises(ValueError, match="lie on no mesh"):
        efopt.outer.reduce_mean(
            two, targets(), state=two.init(PARAMS), axis_name=("a", "b")
        )


def no_exchange():
    """The first worker's delta would come out, and no error."""
    sgd = optax.sgd(1.0)
    return {"scheme": sgd, "state": efopt.outer.init_mean(sgd, PARAMS, num_workers=4)}


@pytest.mark.parametrize(
    "given, said",
    [
        (lambda: {"deltas": {**targets(), "b": np.ones((2, 8))}}, "has 2, and shape"),
        (lambda: {"deltas": {**targets(), "w": np.float32(1)}}, r"\(\) came in the d"),
        (lambda: {"deltas": PARAMS}, "has 8, and shape"),
        (
            lambda: {"state": FEEDBACK.init(PARAMS)},
            r"\(\) came in the state.*init_mean",
        ),
        (lambda: {"state": None}, "an exchange over this axis.*init_mean"),
        (lambda: {"axis_name": "other"}, "an exchange over this axis"),
        (no_exchange, "an exchange over this axis"),
        (lambda: {"deltas": {"w": targets()["w"]}}, "^`error_feedback.*structure"),
        (lambda: {"scheme": 3}, r"`reduce_mean\(scheme=...\)` must be"),
    ],
)
def test_what_does_not_fit_is_refused_in_our_words(given, said):
    state = efopt.outer.init_mean(FEEDBACK, PARAMS, num_workers=WORKERS)
    sound = {"scheme": FEEDBACK, "deltas": targets(), "state": state, "axis_name": AXIS}
    sound |= given()
    with pytest.raises(ValueError, match=said):
        efopt.outer.reduce_mean(sound.pop("scheme"), sound.pop("deltas"), **sound)
