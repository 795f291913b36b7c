"""What an optimizer keeps in memory, said before anything is allocated."""

import jax
import jax.numpy as jnp
import optax
import pytest
from workers_under_test import AXIS

import efopt

BLOCK = efopt.random_block(fraction=0.3)

PARAMS = {
    "w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32),
    "half": jax.ShapeDtypeStruct((512, 512), jnp.bfloat16),
    "bias": jax.ShapeDtypeStruct((1000,), jnp.float32),
}
SIZE = 1_000_000 + 512 * 512 + 1000


def size(structs):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(structs))


def test_a_report_counts_what_a_worker_holds():
    sketch = efopt.compressors.count_sketch(fraction=0.2)
    feedback = efopt.contractive_error_feedback(BLOCK, memory=sketch, axis_name=AXIS)
    tx = optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS), feedback, optax.adam(1)
    )
    report = efopt.memory_report(tx, PARAMS)
    parts = {p.name: p for p in report.parts}
    state = jax.eval_shape(tx.init, PARAMS)
    everything = size(state)
    assert report.per_worker_bytes + report.replicated_bytes == everything
    own = size((state[0], state[1].residual))
    assert report.per_worker_bytes == own
    residual = parts["[1].residual"]
    stored = size(state[1].residual)
    assert residual.bytes == stored == report.residual_bytes
    assert residual.per_worker and residual.kind.endswith("ErrorFeedbackState")
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
    everything = size(jax.eval_shape(tx.init, PARAMS))
    assert report.per_worker_bytes + report.replicated_bytes == everything
    assert str(report).count("\n") >= len(report.parts) + 3
