"""The first steps uncompressed, and what an optimizer keeps in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from workers_under_test import AXIS, mapped, run, slow

import efopt

BLOCK = efopt.random_block(fraction=0.3)
STEPS = 2
SCHEMES = {
    "compress": lambda axis: efopt.compress(BLOCK, axis_name=axis),
    "error_feedback": lambda axis: efopt.error_feedback(
        efopt.scaled_sign(8), axis_name=axis, exchange="two_phase"
    ),
    "conef": lambda axis: efopt.contractive_error_feedback(
        BLOCK, memory=efopt.quantize(4), axis_name=axis
    ),
    "damped": lambda axis: efopt.feedback.damped_error_feedback(
        BLOCK, alpha=1.0, beta=0.9, axis_name=axis
    ),
}


def trees(seed, number, lead=()):
    rng = np.random.default_rng(seed)
    shapes = {"w": (19, 21), "b": (7,)}
    return [
        {
            k: jnp.asarray(rng.standard_normal((*lead, *s)), jnp.float32)
            for k, s in shapes.items()
        }
        for _ in range(number)
    ]


@pytest.mark.parametrize(
    "name, how",
    [
        ("compress", "vmap"),
        ("error_feedback", "auto"),
        ("conef", "auto"),
        slow("damped", "auto"),
        slow("conef", "vmap"),
        slow("conef", "pmap"),
        slow("error_feedback", "explicit"),
    ],
)
def test_first_dense_and_then_compressed(name, how):
    (start,), grads = trees(0, 1), trees(1, 2 * STEPS, (8,))
    scheme = SCHEMES[name](AXIS)
    tx = optax.chain(
        efopt.feedback.warm_up(scheme, STEPS, axis_name=AXIS), optax.sgd(0.1)
    )
    warm, state = run(how, tx, start, grads)
    dense = optax.chain(
        efopt.compress(efopt.compressors.identity(), axis_name=AXIS), optax.sgd(0.1)
    )
    expected, _ = run(how, dense, start, grads)
    one = (lambda p: p) if how in ("auto", "explicit") else (lambda p: p[0])
    for t in range(2 * STEPS):
        for a, b in zip(
            jax.tree.leaves(warm[t]), jax.tree.leaves(expected[t]), strict=True
        ):
            if t < STEPS:
                np.testing.assert_array_equal(a, b)
            elif t == 2 * STEPS - 1 and one(a).ndim > 1:
                assert (a != b).any()
    assert (state[0].count == 2 * STEPS).all()


def test_nothing_is_owed_until_then_and_the_scheme_goes_on_from_its_step():
    """After the warm-up: the scheme, at its own step, without a past."""
    rate = lambda t: 0.1 / (t + 1.0)  # noqa: E731
    scheme = efopt.error_feedback(BLOCK, learning_rate=rate)
    grads = trees(2, 5)
    tx = efopt.feedback.warm_up(scheme, STEPS)
    state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
    for t, g in enumerate(grads):
        updates, state = update(g, state)
        out.append(updates)
        if t < STEPS:
            assert not any(x.any() for x in jax.tree.leaves(state.residual))
    assert update._cache_size() == 1  # nothing is compiled anew
    later = scheme.init(grads[0])._replace(count=jnp.int32(STEPS))
    for g, got in zip(grads[STEPS:], out[STEPS:], strict=True):
        expected, later = jax.jit(scheme.update)(g, later)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_program_shows_both_exchanges(mesh):
    """And says of each that it stands in a branch."""
    (start,), (grads,) = trees(0, 1), trees(1, 1, (8,))
    tx = efopt.feedback.warm_up(SCHEMES["compress"](AXIS), STEPS, axis_name=AXIS)
    fn, state, place = mapped("auto", tx, start)
    report = efopt.wire.measure(fn, state, place(grads))
    sent = {c.operand_bytes for c in report.collectives}
    dense = 4 * (19 * 21 + 7)
    assert dense in sent and min(sent) < dense / 2
    assert all(c.loop for c in report.collectives)


# ------------------------------------------------------------------- memory reports

PARAMS = {
    "w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32),
    "half": jax.ShapeDtypeStruct((512, 512), jnp.bfloat16),
    "bias": jax.ShapeDtypeStruct((1000,), jnp.float32),
}
SIZE = 1_000_000 + 512 * 512 + 1000


def test_a_report_counts_what_a_worker_holds():
    sketch = efopt.compressors.count_sketch(fraction=0.2)
    feedback = efopt.contractive_error_feedback(BLOCK, memory=sketch, axis_name=AXIS)
    tx = optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS), feedback, optax.adam(1)
    )
    report = efopt.memory_report(tx, PARAMS)
    parts = {p.name: p for p in report.parts}
    small = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), PARAMS)
    state = tx.init(small)
    everything = sum(x.nbytes for x in jax.tree.leaves(state))
    assert report.per_worker_bytes + report.replicated_bytes == everything
    own = sum(x.nbytes for x in jax.tree.leaves((state[0], state[1].residual)))
    assert report.per_worker_bytes == own
    residual = parts["[1].residual"]
    stored = sum(x.nbytes for x in jax.tree.leaves(state[1].residual))
    assert residual.bytes == stored == report.residual_bytes
    assert residual.per_worker and residual.kind == "ContractiveErrorFeedbackState"
    assert residual.exact == 4000  # the bias
    assert parts["[0].trace"].per_worker and parts["[0].trace"].kind == "TraceState"
    assert not parts["[2][0].mu"].per_worker
    assert report.error_feedback_bytes == 4 * SIZE
    assert report.params_bytes == 4 * SIZE - 2 * 512 * 512
    text = str(report)
    assert "4,000 bytes of it are kept exact" in text
    for line in ("no feedback", "error_feedback", "total"):
        assert line in text
    assert f"{stored:,}" in text


@pytest.mark.parametrize(
    "tx",
    [
        efopt.error_feedback(
            efopt.scaled_sign(64), axis_name=AXIS, exchange="two_phase"
        ),
        efopt.accumulate(
            efopt.error_feedback(efopt.power_sgd(2), axis_name=AXIS),
            every=2,
            axis_name=AXIS,
        ),
        optax.partition(
            {
                "w": efopt.contractive_error_feedback(
                    BLOCK, memory=efopt.quantize(8), axis_name=AXIS
                ),
                "rest": efopt.compress(efopt.compressors.identity(), axis_name=AXIS),
            },
            {"w": "w", "half": "w", "bias": "rest"},
        ),
        efopt.power_sgd_momentum(0.1, axis_name=AXIS),
        optax.sgd(0.1),
    ],
    ids=["two_phase", "accumulate", "partition", "ready-made", "optax"],
)
def test_a_report_leaves_nothing_out(tx):
    report = efopt.memory_report(tx, PARAMS)
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, PARAMS))
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    assert report.per_worker_bytes + report.replicated_bytes == total
    assert str(report).count("\n") >= len(report.parts) + 3
