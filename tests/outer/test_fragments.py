"""Which leaves meet together, and when: fragments, delay and blending by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efopt

AXIS = "data"
WORKERS = 3
# By name `layer_10` stands in front of `layer_9`; by depth behind it.
SHAPES = {"layer_10": (4, 6), "layer_9": (24,), "layer_1": (3, 8), "layer_2": (5, 5)}
PARAMS = {
    k: np.random.default_rng(0).standard_normal(s, np.float32)
    for k, s in SHAPES.items()
}
DEPTH = {"layer_1": 0, "layer_2": 0, "layer_9": 1, "layer_10": 1}


def optima(steps):
    rng = np.random.default_rng(1)
    for _ in range(steps):
        yield {
            k: rng.standard_normal((WORKERS, *s), np.float32) for k, s in SHAPES.items()
        }


def streamed(every, **options):
    mean = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)
    outer = optax.chain(mean, optax.sgd(0.7, momentum=0.5, nesterov=True))
    inner = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.2))
    return efopt.local_steps(inner, outer, every=every, axis_name=AXIS, **options)


def run(tx, steps):
    def step(carry, optimum):
        params, state = carry
        own = efopt.local_params(params, AXIS, state)
        grads = jax.tree.map(lambda p, o: p - o, own, optimum)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    whole = PARAMS, jax.tree.map(np.asarray, jax.jit(tx.init)(PARAMS))
    carry = efopt.stack_workers(whole, WORKERS)
    fn = jax.jit(jax.vmap(step, axis_name=AXIS))
    for optimum in optima(steps):
        carry = fn(carry, optimum)
        params, state = jax.tree.map(np.asarray, carry)
        yield {k: x[0] for k, x in params.items()}, state


def by_hand(steps, every, of, number, delay, alpha):
    """2501.18512, leaf by leaf: workers' parameters, and the common ones.

    What was sent comes back ``delay`` steps later; each worker mixes it with its own.
    """
    own = {k: np.stack([x] * WORKERS).astype(np.float64) for k, x in PARAMS.items()}
    common = {k: x.astype(np.float64) for k, x in PARAMS.items()}
    trace = {k: np.zeros(s) for k, s in SHAPES.items()}
    under_way = {}
    for t, optimum in enumerate(optima(steps), 1):
        for k, x in own.items():
            own[k] = x - 0.2 * (x - optimum[k] + 0.3 * x)
            offset = (of[k] + 1) * every // number
            if (t - offset) % every == 0 and t >= offset:
                delta = (common[k] - own[k]).mean(0)
                trace[k] = 0.5 * trace[k] + delta
                new = common[k] - 0.7 * (delta + 0.5 * trace[k])
                under_way[k] = (t + delay, new)
            if k in under_way and under_way[k][0] == t:
                _, common[k] = under_way.pop(k)
                own[k] = alpha * own[k] + (1 - alpha) * common[k]
        yield dict(own), dict(common)


@pytest.mark.parametrize(
    "every, fragments, delay, alpha",
    [
        (4, 2, 0, 0.0),
        (4, 2, 3, 0.5),
        pytest.param(5, 3, 1, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 1, 0, 0.5, marks=pytest.mark.slow),
    ],
)
def test_workers_go_the_way_of_streaming_diloco_by_hand(every, fragments, delay, alpha):
    labels = {"layer_1": 0, "layer_2": 1, "layer_9": 2, "layer_10": 1}
    of = {k: j % fragments for k, j in labels.items()}
    tx = streamed(every, fragments=of, delay=delay, alpha=alpha)
    got = run(tx, 3 * every + 2)
    hand = by_hand(3 * every + 2, every, of, fragments, delay, alpha)
    for (params, state), (own, common) in zip(got, hand, strict=True):
        drift = state.local.value.drift
        for k in SHAPES:
            rows = params[k] + drift[k].reshape(own[k].shape)
            np.testing.assert_allclose(rows, own[k], rtol=0, atol=1e-5)
            if not delay:  # else the common ones are a little ahead of the workers
                np.testing.assert_allclose(params[k], common[k], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workers_stay_where_they_are_when_rounded_parameters_move(dtype):
    """What a narrow dtype rounds of the common parameters is no step of a worker."""
    mean = efopt.compress(efopt.compressors.identity())
    outer = optax.chain(mean, optax.sgd(0.3))
    tx = efopt.local_steps(optax.sgd(2.0**-7), outer, every=4, delay=2)
    params = jnp.asarray([1.0, 3.0], dtype)
    grads = jnp.asarray([0.5, 0.75], dtype)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, 6):
        updates, state = update(grads, state, params)
        params = params + updates
        own = np.float32(params) + np.asarray(state.local.drift)
        expected = np.float32([1.0, 3.0]) - t * 2.0**-7 * np.float32(grads)
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-6)
    assert np.float32(params)[0] < 1


def test_a_number_parts_leaves_by_depth_into_equal_sizes():
    before, moved = PARAMS, []
    for params, _ in run(streamed(4, fragments=2), 4):
        moved.append({k for k in SHAPES if (params[k] != before[k]).any()})
        before = params
    first = {k for k, j in DEPTH.items() if j == 0}
    assert moved == [set(), first, set(), set(SHAPES) - first]


# ------------------------------------------------------------------- bad input

make = functools.partial(streamed, 4)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"delay": 4}, r"delay=\.\.\.\)` must be below `every`"),
        ({"delay": -1}, r"delay=\.\.\.\)` must be at least 0"),
        ({"delay": 1, "start": 2}, "start=2, delay=1"),
        ({"fragments": 5}, "are 5, each with a step of its own"),
        ({"fragments": 0}, "fragments=.*at least 1"),
        ({"alpha": 1.0}, r"alpha=\.\.\.\)` .*\[0, 1\)"),
        ({"alpha": -0.5}, "alpha=.*at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


@pytest.mark.parametrize("options", [{"fragments": 2.0}, {"delay": 1.0}])
def test_options_of_another_type_are_refused(options):
    with pytest.raises(TypeError):
        make(**options)


@pytest.mark.parametrize(
    "fragments",
    [
        {"layer_1": 0, "layer_2": 1},
        {**DEPTH, "layer_1": None},
        {**DEPTH, "layer_1": [0, 1]},
        lambda params: {**DEPTH, "layer_11": 1},
    ],
    ids=["missing", "none", "shared", "invented"],
)
def test_labels_that_miss_share_or_invent_leaves_are_refused(fragments):
    tx = make(fragments=fragments)
    with pytest.raises(ValueError, match="every leaf of the parameters one label"):
        jax.eval_shape(tx.init, PARAMS)


def test_labels_of_another_kind_and_more_fragments_than_leaves_are_refused():
    with pytest.raises(TypeError, match="ints or strings, got 0.5"):
        jax.eval_shape(make(fragments=dict.fromkeys(SHAPES, 0.5)).init, PARAMS)
    with pytest.raises(ValueError, match="more than there are leaves, 4"):
        jax.eval_shape(streamed(8, fragments=5).init, PARAMS)
