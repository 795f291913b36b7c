"""Learning rates near zero between ordinary ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import slow

import efopt

TINY = {
    "subnormal": [0.1, 1e-40, 0.2],
    "negative": [0.1, -1e-40, 0.1],
    "first": [1e-40, 0.1, 0.1],
    "least normal": [0.1, 2e-38, 0.1],
    "infinite beside the last": [0.1, 1e-30, 0.1],
    "zero": [0.1, 0.0, 0.1],
}


@pytest.mark.parametrize("rates", TINY.values(), ids=TINY)
@pytest.mark.parametrize("jit", [slow(False, id="eager"), pytest.param(True, id="jit")])
def test_parameters_minus_what_is_owed_follow_sgd(rates, jit):
    schedule = lambda count: jnp.asarray(rates, jnp.float32)[count]  # noqa: E731
    tx = efopt.error_feedback(efopt.top_k(k=1), learning_rate=schedule)
    update = jax.jit(tx.update) if jit else tx.update
    state, grads, x = tx.init(jnp.zeros(3)), jnp.array([1e10, 2e10, 0.0]), np.zeros(3)
    for rate in rates:
        updates, state = update(grads, state)
        assert np.isfinite(updates).all()
        x = x - rate * np.asarray(updates, np.float64)
        assert np.isfinite(state.residual).all()
    iterate = x - float(state.last_rate) * np.asarray(state.residual, np.float64)
    np.testing.assert_allclose(
        iterate, -sum(rates) * np.array([1e10, 2e10, 0]), rtol=1e-6
    )
