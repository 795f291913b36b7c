"""Ten thousand steps: workers hold the same bits, and nothing is lost on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, copies, make_mesh

import efopt

WORKERS, SIZE, STEPS = 4, (6, 16), 10_000
SCHEMES = {
    "signs": (efopt.scaled_sign(16), {}),
    "two_phase": (efopt.scaled_sign(16), {"exchange": "two_phase"}),
    "bits": (efopt.quantize(4, stochastic=True), {"exchange": "two_phase"}),
    "largest": (efopt.top_k(fraction=0.05), {}),
    "low_rank": (efopt.power_sgd(2, min_compression=0), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_workers_agree_and_nothing_is_lost_in_ten_thousand_steps(name):
    compressor, options = SCHEMES[name]
    tx = efopt.error_feedback(compressor, axis_name=AXIS, **options)
    mesh = make_mesh("auto", WORKERS)
    x = np.zeros(SIZE, np.float32)
    carry = efopt.distribute((x, tx.init(x)), mesh)
    specs = efopt.partition_specs(carry)
    optima = np.random.default_rng(0).standard_normal((WORKERS, *SIZE), np.float32)

    def run(carry, optimum):
        def step(carry, count):
            x, state = carry
            key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index(AXIS))
            noise = jax.random.normal(jax.random.fold_in(key, count), SIZE)
            g = efopt.local_params(x, AXIS) - optimum[0] + noise
            u, state = tx.update(g, state)
            return (x - 0.02 * u, state), (jax.lax.pmean(g, AXIS), u)

        return jax.lax.scan(step, carry, jnp.arange(STEPS))

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=(specs, (P(), P()))
    )
    (x, state), (g, u) = jax.jit(mapped)(carry, optima)
    same = {c.tobytes() for c in copies(x, WORKERS)}
    assert len(same) == 1 and np.isfinite(x).all()
    assert len({c.tobytes() for c in copies(u, WORKERS)}) == 1

    # Parameters of zero minus what is owed, by a rate of one.
    zeros, host = np.zeros(SIZE, np.float32), jax.tree.map(np.asarray, state)
    owed = efopt.virtual_params(zeros, host, learning_rate=-1.0, compressor=compressor)
    sums = [np.sum(np.asarray(a, np.float64), axis=0) for a in (g, u)]
    off = np.abs(sums[0] - sums[1] - np.asarray(owed, np.float64)).max()
    travelled = np.abs(np.asarray(u, np.float64)).sum(0).max()
    assert off < 1e-7 * travelled, (off, travelled)
    assert np.abs(owed).max() > 1e-3 or name == "bits"
