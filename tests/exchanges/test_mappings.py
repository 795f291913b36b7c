"""The same numbers everywhere: every way of mapping, every worker, every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from workers_under_test import AXIS, FAST, HOWS, copies, make_step, mapped, run, slow

import efopt

SHAPES = {"w": (9, 7), "b": (70,), "s": (), "e": (0, 3)}
CASES = {
    "identity": (efopt.compressors.identity(), None),
    "sign_gather": (efopt.sign(), "all_gather"),
    "sign_vote": (efopt.sign(), "majority_vote"),
    "scaled_gather": (efopt.scaled_sign(), None),
    "scaled_two_phase": (efopt.scaled_sign(32), "two_phase"),
    "top_k_gather": (efopt.top_k(fraction=0.1), None),
    "top_k_two_phase": (efopt.top_k(k=3, block_size=16), "two_phase"),
    "random_k_reduce": (efopt.random_k(fraction=0.2), None),
    "random_k_two_phase": (efopt.random_k(k=5, block_size=16), "two_phase"),
    "power_sgd": (efopt.power_sgd(2, min_compression=1), None),
}


def zeros():
    return {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}


def gradients(steps, n=8, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {k: rng.standard_normal((n, *s)).astype(np.float32) for k, s in SHAPES.items()}
        for _ in range(steps)
    ]


def chain(name):
    compressor, exchange = CASES[name]
    return optax.chain(
        efopt.per_worker(optax.trace(0.5), axis_name=AXIS),
        efopt.error_feedback(compressor, axis_name=AXIS, exchange=exchange),
        optax.sgd(0.1),
    )


BY_DEFAULT = "scaled_two_phase"  # whose state is all workers' own and all owners'


# By default tests/test_schemes_and_optimizers.py stands for it.
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_same_parameters_however_workers_are_mapped(name):
    grads = gradients(3)
    # Meshes of other kinds change nothing in how a compressor works: one per exchange.
    everywhere = ("scaled_gather", "scaled_two_phase")
    hows = HOWS if name in everywhere else ("auto", "pmap", "vmap")
    results = {how: run(how, chain(name), zeros(), grads)[0] for how in hows}
    reference = results["auto"]
    for how, history in results.items():
        for p, q in zip(history, reference, strict=True):
            for k in SHAPES:
                workers = p[k] if how in ("pmap", "vmap") else p[k][None]
                expected = np.broadcast_to(q[k], workers.shape)
                if how == "vmap":
                    # Sums over workers are added in another order there.
                    atol = 3e-5 if name == "power_sgd" else 1e-6
                    np.testing.assert_allclose(workers, expected, rtol=0, atol=atol)
                else:
                    np.testing.assert_array_equal(workers, expected, err_msg=how)


# By default three workers that exchange late stand for it, in test_in_flight.py.
@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["scaled_two_phase", "sign_vote", "top_k_gather"])
def test_any_number_of_workers(name, n):
    """Workers on devices and workers by vmap agree, also where ranges do not divide."""
    grads = gradients(2, n=n)
    hows = ("pmap", "vmap")
    a, b = (run(how, chain(name), zeros(), grads, n=n)[0][-1] for how in hows)
    for k in SHAPES:
        np.testing.assert_allclose(a[k], b[k], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [slow(n, when=n != BY_DEFAULT) for n in CASES])
def test_workers_stay_bit_identical_and_nothing_recompiles(name):
    fn, state, place = mapped("auto", chain(name), zeros(), compiler_options=FAST)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    structure = jax.tree.structure(state)
    for g in gradients(20, seed=1):
        state = fn(state, place(g))
        jax.block_until_ready(state)
    assert fn._cache_size() == 1
    assert jax.tree.structure(state) == structure
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == types
    for path, x in jax.tree_util.tree_flatten_with_path(state[0])[0]:
        first, *others = copies(x)
        assert np.all(np.isfinite(first)), path
        for other in others:
            np.testing.assert_array_equal(first, other)
    residuals = [e for e in jax.tree.leaves(state[1][1].residual) if e.size]
    if name != "identity":
        assert any(np.ptp(np.asarray(e), axis=0).max() > 0 for e in residuals)


@pytest.mark.parametrize(
    "name",
    [slow(n, when=n != BY_DEFAULT) for n in CASES if not n.startswith("sign")],
)
def test_zero_gradients_leave_everything_untouched(name):
    """Padding included: it is in the state only as server residual."""
    compressor, exchange = CASES[name]
    # What a codec remembers of a direction may go: zero has none.
    moves = ("count", "codec")
    tx = efopt.error_feedback(compressor, axis_name=AXIS, exchange=exchange)
    fn, state, place = mapped("auto", tx, zeros(), compiler_options=FAST)
    start = jax.tree.map(np.asarray, state)
    zero = {k: np.zeros((8, *s), np.float32) for k, s in SHAPES.items()}
    for _ in range(2):
        state = fn(state, place(zero))
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(state)[0],
        jax.tree.leaves(start),
        strict=True,
    ):
        if not any(field in jax.tree_util.keystr(path) for field in moves):
            np.testing.assert_array_equal(a, b, err_msg=str(path))


@pytest.mark.parametrize("exchange", ["all_gather", "two_phase"])
def test_padding_never_takes_a_share(exchange):
    """A leaf of 5 in a block of 16: its scale is the mean over 5, on the owner too."""
    tx = efopt.compress(efopt.scaled_sign(16), axis_name=AXIS, exchange=exchange)
    fn, state, place = mapped("auto", tx, {"w": np.zeros(5, np.float32)})
    state = fn(state, place({"w": np.full((8, 5), 2.0, np.float32)}))
    np.testing.assert_allclose(state[0]["w"], 2.0, rtol=1e-6)


def test_a_mixed_tree_keeps_its_dtypes_in_one_exchange():
    params = {
        "f": np.ones((4, 4), np.float32),
        "b": np.ones(33, jnp.bfloat16),
        "h": np.ones(5, np.float16),
    }
    tx = efopt.error_feedback(
        efopt.scaled_sign(16), axis_name=AXIS, exchange="two_phase"
    )
    rng = np.random.default_rng(3)
    grads = [
        jax.tree.map(
            lambda p: rng.standard_normal((8, *p.shape)).astype(p.dtype), params
        )
    ]
    history, state = run("auto", tx, params, grads)
    for k, p in params.items():
        assert history[0][k].dtype == p.dtype
        assert state.residual.value[k].dtype == jnp.float32


@pytest.mark.slow
def test_two_thousand_steps_do_not_starve_each_other():
    """Independent collectives of eight virtual devices share one pool of threads.

    Without the larger pool that conftest asks for, XLA aborts the process here.
    """
    fn, state, place = mapped("auto", chain("scaled_two_phase"), zeros())
    g = place(gradients(1)[0])
    for _ in range(2000):
        state = fn(state, g)
    assert int(state[1][1].count) == 2000
    assert np.all(np.isfinite(np.asarray(state[0]["w"])))


def test_the_step_that_everything_here_uses_keeps_gradients_local():
    """Guards the harness: reduced gradients would make every test above vacuous."""
    tx = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)
    step = make_step(tx)
    grads = {k: v for k, v in gradients(1)[0].items()}
    out, _ = jax.jit(jax.vmap(step, axis_name=AXIS))(
        efopt.stack_workers((zeros(), tx.init(zeros())), 8), grads
    )
    np.testing.assert_allclose(out["b"][0], grads["b"].mean(0), atol=1e-6)


def test_a_group_without_leaves_exchanges_nothing():
    one = efopt.error_feedback(
        efopt.scaled_sign(32), axis_name=AXIS, exchange="two_phase"
    )
    everything = jax.tree.map(lambda _: "all", zeros())
    tx = optax.partition({"all": one, "none": one}, everything)
    fresh = lambda params: efopt.stack_workers(tx.init(params), 2)  # noqa: E731
    state = jax.eval_shape(fresh, zeros())
    update = jax.vmap(tx.update, axis_name=AXIS)
    grads = {k: jax.ShapeDtypeStruct((2, *s), np.float32) for k, s in SHAPES.items()}
    updates, after = jax.eval_shape(update, grads, state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, grads)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_the_blocks_of_a_very_large_leaf_are_no_constant_of_the_program():
    tx = efopt.error_feedback(efopt.scaled_sign(1), axis_name=AXIS)
    leaf = jax.ShapeDtypeStruct((1 << 21,), np.float32)
    update = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name=AXIS)
    text = jax.jit(update).lower(jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype))
    assert len(text.as_text()) < 1e6
