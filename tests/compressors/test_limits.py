"""What a compressor says of leaves, options and residuals at the edge of its reach."""

import jax
import jax.numpy as jnp
import pytest

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
