"""Error feedback against the papers: Algorithm 1, virtual iterates, conservation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, FAST, make_mesh, slow

import efopt

SHAPES = {"w": (7, 5), "b": (11,), "s": ()}


def tree(rng, lead=(), dtype=np.float32):
    return {
        k: rng.standard_normal((*lead, *s)).astype(dtype) for k, s in SHAPES.items()
    }


def leaves(t):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(t)]


def drive(tx, params, grads):
    """Single worker: parameters and states after each step."""
    state, out = jax.jit(tx.init)(params), []
    update = jax.jit(tx.update, compiler_options=FAST)
    for g in grads:
        updates, state = update(g, state, params)
        params = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
        out.append((params, state))
    return out


def schedule(t):
    return 0.1 / (1.0 + 0.5 * t)


@pytest.mark.parametrize("rate", [0.1, schedule], ids=["constant", "schedule"])
def test_ef_signsgd_with_the_rate_inside_is_algorithm_1(rate):
    rng = np.random.default_rng(0)
    params, grads = tree(rng), [tree(rng) for _ in range(20)]
    tx = optax.chain(
        optax.scale_by_learning_rate(rate), efopt.error_feedback(efopt.scaled_sign())
    )
    got = drive(tx, params, grads)
    as_lists = [[leaves(g)] for g in grads]
    xs, residuals = oracle.ef_sgd_algorithm_2(
        leaves(params), as_lists, rate, oracle.scaled_sign
    )
    for t, (p, state) in enumerate(got):
        for a, b in zip(leaves(p), xs[t + 1], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
        # Updates are minus the steps of the paper, and so is what is owed.
        for a, b in zip(leaves(state[1].residual), residuals[t + 1][0], strict=True):
            np.testing.assert_allclose(-a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rate", [0.1, schedule], ids=["constant", "schedule"])
@pytest.mark.parametrize(
    "compressor",
    [
        slow(efopt.scaled_sign(), id="scaled_sign"),
        pytest.param(efopt.top_k(k=2), id="top_k"),
        slow(efopt.random_k(fraction=0.2), id="random_k"),
    ],
)
@pytest.mark.parametrize("inside", [True, False], ids=["rate_inside", "rate_behind"])
def test_parameters_minus_residual_follow_sgd(rate, compressor, inside):
    rng = np.random.default_rng(1)
    params, grads = tree(rng), [tree(rng) for _ in range(25)]
    if inside:
        tx = optax.chain(
            optax.scale_by_learning_rate(rate), efopt.error_feedback(compressor)
        )
    else:
        tx = optax.chain(
            efopt.error_feedback(compressor, learning_rate=rate),
            optax.scale_by_learning_rate(rate),
        )
    got = drive(tx, params, grads)
    path = oracle.sgd(leaves(params), [[leaves(g)] for g in grads], rate)
    for t, (p, state) in enumerate(got):
        last = rate(t) if callable(rate) else rate
        # What is owed is in units of updates inside, of gradients behind the rate.
        owed = state[1].residual if inside else state[0].residual
        factor = 1.0 if inside else -last
        for a, e, b in zip(leaves(p), leaves(owed), path[t + 1], strict=True):
            np.testing.assert_allclose(a + factor * e, b, rtol=0, atol=3e-5)


def test_without_the_rate_ratio_a_schedule_leaves_the_path():
    rng = np.random.default_rng(1)
    params, grads = tree(rng), [tree(rng) for _ in range(25)]
    tx = optax.chain(
        efopt.error_feedback(efopt.scaled_sign()),
        optax.scale_by_learning_rate(schedule),
    )
    p, state = drive(tx, params, grads)[-1]
    path = oracle.sgd(leaves(params), [[leaves(g)] for g in grads], schedule)[-1]
    owed = leaves(state[0].residual)
    gap = [
        np.abs(a - schedule(24) * e - b).max()
        for a, e, b in zip(leaves(p), owed, path, strict=True)
    ]
    assert max(gap) > 1e-2


def test_a_rate_of_zero_holds_the_residual():
    rng = np.random.default_rng(2)
    params, grads = tree(rng), [tree(rng) for _ in range(6)]
    rates = np.float32([0.1, 0.0, 0.0, 0.05, 0.0, 0.1])
    rate = lambda t: jnp.asarray(rates)[t]  # noqa: E731
    tx = optax.chain(
        efopt.error_feedback(efopt.top_k(k=1), learning_rate=rate),
        optax.scale_by_learning_rate(rate),
    )
    got = drive(tx, params, grads)
    for t in (1, 2, 4):
        for a, b in zip(*map(jax.tree.leaves, (got[t], got[t - 1])), strict=True):
            if a.dtype == jnp.int32:  # the counters go on
                continue
            np.testing.assert_array_equal(a, b)
    path = oracle.sgd(
        leaves(params), [[leaves(g)] for g in grads], lambda t: float(rates[t])
    )
    p, state = got[-1]
    for a, e, b in zip(leaves(p), leaves(state[0].residual), path[-1], strict=True):
        np.testing.assert_allclose(a - 0.1 * e, b, rtol=0, atol=1e-5)


CASES = [
    (efopt.compressors.identity(), "all_reduce"),
    (efopt.compressors.identity(), "all_gather"),
    (efopt.sign(), "all_gather"),
    (efopt.sign(), "two_phase"),
    (efopt.sign(), "majority_vote"),
    (efopt.scaled_sign(), "all_gather"),
    (efopt.scaled_sign(8), "two_phase"),
    (efopt.top_k(k=3), "all_gather"),
    (efopt.top_k(fraction=0.2, block_size=16), "two_phase"),
    (efopt.random_k(fraction=0.3), "all_reduce"),
    (efopt.random_k(fraction=0.3, block_size=16), "all_gather"),
    (efopt.random_k(fraction=0.3, block_size=16), "two_phase"),
    (efopt.power_sgd(2, min_compression=1), "all_reduce"),
    (efopt.quantize(4, block_size=16), "two_phase"),
    (
        efopt.compose(efopt.power_sgd(1), efopt.compressors.cast("bfloat16")),
        "all_gather",
    ),
    (
        efopt.compressors.partition(
            {"w": efopt.power_sgd(1, min_compression=0), "rest": efopt.scaled_sign(8)},
            {"w": "w", "b": "rest", "s": "rest"},
        ),
        "two_phase",
    ),
]
NAMES = [f"{c}-{e}" for c, e in CASES]


def tolerance(dtype, exchange):
    """Relative to the largest entry. float32: rounding of sums of n terms. Narrow
    dtypes under all_reduce: the network averages in the leaf's dtype, and nobody knows
    that rounding."""
    if exchange == "all_reduce" and dtype != "float32":
        return {"bfloat16": 2e-2, "float16": 3e-3}[dtype]
    return 3e-6


# By default what owners owe, and a sum, in narrow dtypes; the other exchanges have
# tests/exchanges/test_exchange_contract.py.
DEFAULT = {("bfloat16", 6), ("float16", 0)}
DTYPES = [
    slow(compressor, exchange, dtype, when=(dtype, i) not in DEFAULT)
    for dtype in ("bfloat16", "float32", "float16")
    for i, (compressor, exchange) in enumerate(CASES)
]


@pytest.mark.parametrize(
    ("compressor", "exchange", "dtype"), DTYPES, ids=lambda x: str(x)
)
def test_nothing_is_lost_between_workers(compressor, exchange, dtype):
    """mean(updates + old owed) = applied + mean(new owed), with the server's part."""
    rng = np.random.default_rng(3)
    mesh = make_mesh("auto")
    params = {k: np.zeros(s, jnp.dtype(dtype)) for k, s in SHAPES.items()}
    tx = efopt.error_feedback(
        compressor, axis_name=AXIS, exchange=exchange, learning_rate=schedule
    )
    state = placed(tx, params, mesh)
    specs = efopt.partition_specs(state)
    update = jax.jit(
        jax.shard_map(
            lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s),
            mesh=mesh,
            in_specs=(P(AXIS), specs),
            out_specs=(P(), specs),
        ),
        compiler_options=FAST,
    )
    for t in range(4):
        grads = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree(rng, lead=(8,)))
        ratio = schedule(t - 1) / schedule(t) if t else 1.0
        before = _owed(state)
        out, state = update(grads, state)
        after = _owed(state)
        for k in SHAPES:
            put_in = np.asarray(grads[k], np.float64).mean(0) + ratio * before[k]
            found = np.asarray(out[k], np.float64) + after[k]
            scale = np.abs(put_in).max() + 1
            np.testing.assert_allclose(
                found, put_in, rtol=0, atol=tolerance(dtype, exchange) * scale
            )


def _owed(state):
    """What all workers owe together, per leaf: mean residual and the server's part."""
    owed = {
        k: np.asarray(v, np.float64).mean(0) for k, v in state.residual.value.items()
    }
    groups = [np.asarray(x, np.float64) for x in jax.tree.leaves(state.link.server)]
    for k, blocks in _server_parts(groups).items():
        owed[k] = owed[k] + blocks
    return owed


def _server_parts(groups):
    """The server residual of each leaf, leaves in order, blocks of one size a group."""
    used: dict[int, int] = {}
    parts = {}
    for k in sorted(SHAPES) if groups else ():
        size = int(np.prod(SHAPES[k]))
        for g in groups:
            block = g.shape[-1]
            limit = max(g.shape[-1] for g in groups)
            unit = min(limit, max(16, 4 ** -(-(size - 1).bit_length() // 2)))
            if limit < 16:
                unit = limit
            if block == unit:
                n, start = -(-size // block), used.get(block, 0)
                flat = g.reshape(-1, block)[start : start + n].reshape(-1)[:size]
                parts[k] = flat.reshape(SHAPES[k])
                used[block] = start + n
    return parts


ORACLES = {
    "scaled": (efopt.scaled_sign(), "all_gather", oracle.scaled_sign),
    "scaled_blocks": (
        efopt.scaled_sign(8),
        "all_gather",
        lambda x: oracle.scaled_sign(x, 8),
    ),
    "sign": (efopt.sign(), "all_gather", oracle.sign),
    "top_k": (efopt.top_k(k=3), "all_gather", lambda x: oracle.top_k(x, k=3)),
    "identity": (efopt.compressors.identity(), "all_reduce", oracle.identity),
}


def placed(tx, params, mesh):
    """The first state on a mesh, without eager operations."""
    return efopt.distribute(jax.tree.map(np.asarray, jax.jit(tx.init)(params)), mesh)


def _step_fn(tx, mesh, params):
    state = placed(tx, params, mesh)
    specs = efopt.partition_specs(state)
    fn = jax.shard_map(
        lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s),
        mesh=mesh,
        in_specs=(P(AXIS), specs),
        out_specs=(P(), specs),
    )
    return jax.jit(fn, compiler_options=FAST), state


def _per_worker(t, i):
    return [np.asarray(x[i], np.float64) for x in jax.tree.leaves(t)]


@pytest.mark.parametrize("name", [slow(n, when=n != "scaled") for n in ORACLES])
def test_error_feedback_is_its_oracle(name, mesh):
    compressor, exchange, compress = ORACLES[name]
    rng = np.random.default_rng(4)
    update, state = _step_fn(
        efopt.error_feedback(compressor, axis_name=AXIS, exchange=exchange),
        mesh,
        tree(rng),
    )
    for _ in range(5):
        grads = tree(rng, lead=(8,))
        old = [_per_worker(state.residual.value, i) for i in range(8)]
        out, state = update(grads, state)
        average, residuals = oracle.error_feedback_step(
            [_per_worker(grads, i) for i in range(8)], old, compress
        )
        for a, b in zip(leaves(out), average, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        for i in range(8):
            new = _per_worker(state.residual.value, i)
            for a, b in zip(new, residuals[i], strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_two_phase_is_its_oracle(mesh):
    """One leaf, so that the server's blocks are the leaf's blocks."""
    rng = np.random.default_rng(5)
    compress = lambda x: oracle.scaled_sign(x, 16)  # noqa: E731
    update, state = _step_fn(
        efopt.error_feedback(
            efopt.scaled_sign(16), axis_name=AXIS, exchange="two_phase"
        ),
        mesh,
        {"w": np.zeros(150, np.float32)},
    )
    for _ in range(6):
        grads = {"w": rng.standard_normal((8, 150)).astype(np.float32)}
        old = [_per_worker(state.residual.value, i) for i in range(8)]
        server = np.asarray(state.link.server.value[0], np.float64).reshape(-1)[:150]
        out, state = update(grads, state)
        average, residuals, new_server = oracle.two_phase_step(
            [_per_worker(grads, i) for i in range(8)], old, [server], compress
        )
        np.testing.assert_allclose(leaves(out)[0], average[0], rtol=0, atol=1e-5)
        flat = np.asarray(state.link.server.value[0], np.float64).reshape(-1)
        np.testing.assert_allclose(flat[:150], new_server[0], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(flat[150:], 0)
        for i in range(8):
            np.testing.assert_allclose(
                _per_worker(state.residual.value, i)[0],
                residuals[i][0],
                rtol=0,
                atol=1e-5,
            )


@pytest.mark.parametrize("feedback", [slow(False), True], ids=["plain", "feedback"])
def test_majority_vote_is_its_oracle_and_ties_are_positive(feedback, mesh):
    rng = np.random.default_rng(6)
    scheme = efopt.error_feedback if feedback else efopt.compress
    sign = efopt.sign(zero="positive")  # the paper's letter
    update, state = _step_fn(
        scheme(sign, axis_name=AXIS, exchange="majority_vote"), mesh, tree(rng)
    )
    for _ in range(3):
        grads = tree(rng, lead=(8,))
        grads["b"][:4], grads["b"][4:] = 1.0, -1.0  # four against four, at first
        lists = [_per_worker(grads, i) for i in range(8)]
        old = None
        if feedback:
            old = [_per_worker(state.residual.value, i) for i in range(8)]
        out, state = update(grads, state)
        vote, residuals = oracle.majority_vote_step(lists, old)
        for a, b in zip(leaves(out), vote, strict=True):
            np.testing.assert_array_equal(a, b)
        if feedback:
            for i in range(8):
                new = _per_worker(state.residual.value, i)
                for a, b in zip(new, residuals[i], strict=True):
                    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(out["b"], np.ones(11))


def test_identity_with_feedback_is_pmean_bit_for_bit(mesh):
    rng = np.random.default_rng(7)
    params = {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}
    params["h"] = np.zeros(9, jnp.bfloat16)
    update, state = _step_fn(
        efopt.error_feedback(efopt.compressors.identity(), axis_name=AXIS), mesh, params
    )
    pmean = jax.jit(
        jax.shard_map(
            lambda g: jax.lax.pmean(jax.tree.map(lambda x: x[0], g), AXIS),
            mesh=mesh,
            in_specs=P(AXIS),
            out_specs=P(),
        )
    )
    for _ in range(3):
        grads = tree(rng, lead=(8,))
        grads["h"] = rng.standard_normal((8, 9)).astype(jnp.bfloat16)
        out, state = update(grads, state)
        expected = pmean(grads)
        chex.assert_trees_all_equal_dtypes(out, expected)
        chex.assert_trees_all_equal(out, expected)
        for e in jax.tree.leaves(state.residual):
            np.testing.assert_array_equal(e, 0)


def test_residual_dtype_is_kept_and_loses_what_it_must(mesh):
    rng = np.random.default_rng(8)
    tx = efopt.error_feedback(
        efopt.top_k(k=2), axis_name=AXIS, residual_dtype=jnp.bfloat16
    )
    update, state = _step_fn(tx, mesh, tree(rng))
    _, after = update(tree(rng, lead=(8,)), state)
    dtypes = lambda t: [x.dtype for x in jax.tree.leaves(t)]  # noqa: E731
    assert dtypes(after) == dtypes(state)
    assert all(e.dtype == jnp.bfloat16 for e in jax.tree.leaves(after.residual))
