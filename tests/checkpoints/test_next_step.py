"""What a linear compressor does next, after a move: what it would have done without."""

import jax
import numpy as np
import optax
import pytest
from registry import AXIS
from states import of_workers
from workers_under_test import FAST

import efopt
from efopt.checkpoints import resize

PARAMS = {"w": np.random.default_rng(0).standard_normal((16, 17), np.float32)}
LINEAR = {
    "power_sgd": efopt.power_sgd(2, min_compression=0),
    "random_block": efopt.random_block(fraction=0.2),
    "count_sketch": efopt.compressors.count_sketch(fraction=0.4),
}


@pytest.mark.slow
@pytest.mark.parametrize("n, m", [(8, 4), (8, 16), (4, 3), (3, 8)])
@pytest.mark.parametrize("name", LINEAR)
def test_the_next_step_of_a_linear_compressor_is_the_same(name, n, m):
    """With gradients of the same mean: to float32's rounding of the sums."""
    tx = optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS),
        efopt.error_feedback(LINEAR[name], axis_name=AXIS),
        optax.sgd(0.1),
    )
    state = of_workers(tx, n, PARAMS)
    grads = np.random.default_rng(1).standard_normal((24, 16, 17), np.float32)

    def moved(state, n):
        own = {"w": grads.reshape(n, -1, 16, 17).mean(1, dtype=np.float64)}
        own = {"w": own["w"].astype(np.float32)}
        step = jax.vmap(lambda g, s: tx.update(g, s)[0], axis_name=AXIS)
        stacked = efopt.stack_workers(state, n)
        return np.asarray(jax.jit(step, compiler_options=FAST)(own, stacked)["w"][0])

    before = moved(state, n)
    if m == 16:  # 24 rows of data are no shares of 16
        grads = np.repeat(grads, 2, axis=0)
    after = moved(resize(state, m), m)
    assert np.abs(before).max() > 1e-2
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6 * np.abs(before).max())
