"""Sums in float16: finite where the mean is, and else those of pmean to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import slow

import efopt

AXIS = "data"
LINEAR = {
    "identity": efopt.compressors.identity(),
    "random_block": efopt.random_block(fraction=1.0),
    "random_k": efopt.random_k(fraction=1.0),
    "count_sketch": efopt.compressors.count_sketch(fraction=1.0),
    "power_sgd": efopt.power_sgd(2),
}


def averaged(compressor, grads, **options):
    tx = efopt.error_feedback(compressor, axis_name=AXIS, **options)
    state = efopt.stack_workers(tx.init(jax.tree.map(lambda g: g[0], grads)), 4)
    return jax.jit(jax.vmap(tx.update, axis_name=AXIS))(grads, state)[0]


@pytest.mark.parametrize(
    "name, start",
    # A dense start is the same program for all of them.
    [slow(n, s, when=s and n != "identity") for n in LINEAR for s in (0, 1)],
)
def test_the_mean_of_30000_is_30000(name, start):
    grads = {"w": jnp.full((4, 16, 32), 30000, jnp.float16)}
    grads["b"] = jnp.full((4, 7), -60000, jnp.float16)
    out = averaged(LINEAR[name], grads, start=start)
    assert out["w"].dtype == jnp.float16
    rough = 0 if start or name != "power_sgd" else 1e-3
    np.testing.assert_allclose(out["w"], np.full((4, 16, 32), 30000), rtol=rough)
    np.testing.assert_array_equal(out["b"], np.full((4, 7), -60000))


def test_the_identity_is_pmean_to_the_bit_where_that_is_finite(mesh):
    """Subnormal numbers, those that overflow, and what is not finite, side by side."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(8, 999)) * 2.0 ** rng.integers(-24, 15, 999)
    grads = np.clip(grads, -65504, 65504).astype(np.float16)
    grads[:, :2] = 49152  # a sum of them is exact
    grads[3, 2], grads[3, 3] = np.inf, np.nan
    tx = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)
    state, spec = tx.init(grads[0]), jax.P(AXIS)

    def both(g):
        return tx.update(g[0], state)[0], jax.lax.pmean(g[0], AXIS)

    step = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=jax.P())
    got, pmean = map(np.asarray, jax.jit(step)(grads))
    finite = np.isfinite(pmean)
    assert finite.sum() < 999 - 4
    np.testing.assert_array_equal(got[finite], pmean[finite])
    np.testing.assert_array_equal(got[:2], 49152)
    assert np.isinf(got[2]) and np.isnan(got[3])
    assert np.isfinite(got[4:]).all()
    right = grads.astype(np.float64).mean(axis=0)[4:]
    np.testing.assert_allclose(got[4:], right, rtol=4e-3, atol=1.0)
