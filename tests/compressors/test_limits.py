"""What a compressor says of leaves, options and residuals at the edge of its reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import once

import efopt

HUGE = jax.ShapeDtypeStruct((65536, 32784), jnp.bfloat16)  # 2**31 coordinates and more


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)])
def test_low_rank_leaves_an_empty_leaf_alone(shape):
    tx = efopt.power_sgd(1, min_compression=0)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    out, _ = jax.eval_shape(tx.update, x, jax.eval_shape(tx.init, x))
    assert out == x
    assert tx.payload_bits(shape) == 0


@pytest.mark.parametrize(
    "make",
    [efopt.top_k, efopt.random_k, efopt.random_block, efopt.compressors.count_sketch],
    ids=lambda make: make.__name__,
)
def test_a_block_that_32_bits_cannot_number_is_refused_with_the_cure(make):
    whole, blocked = make(fraction=0.01), make(fraction=0.01, block_size=2**20)
    with pytest.raises(ValueError, match=rf"`{make.__name__}\(.*block_size`, such as"):
        jax.eval_shape(whole.update, HUGE, jax.eval_shape(whole.init, HUGE))
    out, _ = jax.eval_shape(blocked.update, HUGE, jax.eval_shape(blocked.init, HUGE))
    assert out == HUGE


def test_an_option_by_position_is_refused_by_its_keyword():
    with pytest.raises(TypeError, match=r"`top_k\(fraction=0\.01\)`"):
        efopt.top_k(0.01)  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"`quantize\(\.\.\., block_size=64\)`"):
        efopt.quantize(8, 64)  # type: ignore[misc]


def test_only_what_loses_too_much_keeps_no_residual():
    nearest = efopt.quantize(4, stochastic=False)
    for bad, reason in (
        (nearest, "4 bits lose the small coordinates"),
        (efopt.compose(efopt.top_k(k=8), nearest), "4 bits lose the small coordinates"),
        (efopt.sign(), "forgets all magnitudes"),
        (efopt.compose(efopt.top_k(k=8), efopt.sign()), "forgets all magnitudes"),
    ):
        assert reason in (bad.codec.keeps_no_residual() or "")
    for good in (efopt.quantize(4), efopt.quantize(8), efopt.top_k(k=8)):
        assert good.codec.keeps_no_residual() is None
    assert efopt.compressors.identity().codec.exact and not nearest.codec.exact


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_no_finite_number_becomes_infinite_in_eight_bits(dtype):
    """Not even where rounding up leaves float32's range; the contraction holds too."""
    tx = efopt.compressors.cast(dtype, block_size=4)
    largest = float(np.finfo(np.float32).max)
    x = np.float32([[3.1e38, -3.2e38, 3.3e38, largest], [-largest, 1, 0, 2.0**127]])
    got, _ = once(tx, x)
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all()
    lost = np.sum((got - x.astype(np.float64)) ** 2, axis=1)
    square = np.sum(x.astype(np.float64) ** 2, axis=1)
    assert (lost <= (1 - tx.delta((4,))) * square).all()
    bad, _ = once(tx, np.float32([np.inf, 1, 2, 3]))
    assert not np.isfinite(bad).any()


def test_cold_low_rank_refuses_a_leaf_from_init():
    tx = efopt.power_sgd(3, warm_start=False, min_compression=0)
    for transformation in (tx, efopt.error_feedback(tx)):
        with pytest.raises(ValueError, match="not exceed the smaller side"):
            jax.eval_shape(transformation.init, np.zeros((2, 509), np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_kept_keeps_its_sign_under_any_mapping(dtype):
    tx = efopt.top_k(k=3)
    x = np.array([[-0.0, 0.0, -0.0, 1.0, 0.0]]).astype(jnp.dtype(dtype))
    one = lambda x: tx.update(x, tx.init(x))[0]  # noqa: E731
    for got in (jax.jit(jax.vmap(one))(x), jax.jit(one)(x[0])[None]):
        assert np.signbit(np.asarray(got, np.float32)).tolist()[0][:4] == [1, 0, 0, 0]
