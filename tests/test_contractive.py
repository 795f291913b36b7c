"""Contractive error feedback: what a compressed memory keeps, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, run

import efopt

SHAPES = {"w": (7, 5), "b": (11,), "s": ()}
FIVE_BITS = functools.partial(efopt.quantize, 5, stochastic=False)
MEMORIES = {
    "sketch": efopt.count_sketch(fraction=0.2),
    "sketch_rows": efopt.count_sketch(fraction=0.1, rows=2, block_size=16),
    "int8": efopt.quantize(8, block_size=16),
    "int4": efopt.quantize(4, block_size=16),
    "bfloat16": efopt.cast("bfloat16"),
    "top_k": efopt.top_k(fraction=0.2),
    "identity": efopt.identity(),
    "mixed": efopt.partition(
        {"sketch": efopt.count_sketch(fraction=0.2), "rest": efopt.identity()},
        {"w": "sketch", "b": "rest", "s": "rest"},
    ),
}
each_memory = pytest.mark.parametrize("name", MEMORIES)


def scheme(memory, **options):
    return efopt.contractive_error_feedback(
        efopt.random_block(fraction=0.3), memory, **options
    )


def tree(rng, lead=(), dtype=np.float32):
    return {
        k: jnp.asarray(rng.standard_normal((*lead, *s))).astype(dtype)
        for k, s in SHAPES.items()
    }


def decay(t):
    return 0.1 / (1.0 + 0.5 * t)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# ---------------------------------------------------------------- what is conserved


@pytest.mark.parametrize("damping", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("memory", ["sketch", "sketch_rows", "identity", "mixed"])
def test_a_linear_memory_holds_the_sum_of_what_was_not_paid(memory, damping):
    """S_T = encode(sum of (g - q)): derived in the notes, for every damping."""
    memory = MEMORIES[memory]
    tx = scheme(memory, damping=damping)
    rng = np.random.default_rng(0)
    state = tx.init(tree(rng))
    update, unpaid = jax.jit(tx.update), jax.tree.map(np.zeros, SHAPES, is_leaf=_shape)
    for _ in range(100):
        grads = tree(rng)
        out, state = update(grads, state)
        unpaid = jax.tree.map(lambda s, g, q: s + np.float64(g) - q, unpaid, grads, out)
    # The same sums, by a memory that starts from nothing and recalls nothing.
    once = scheme(memory, damping=1.0)
    codec = efopt.contractive_error_feedback(efopt.sign(), memory, damping=1.0)
    del once
    unpaid = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), unpaid)
    ones, first = codec.update(unpaid, codec.init(unpaid))
    rest = jax.tree.map(jnp.add, ones, unpaid)  # encode(x - sign) + encode(sign) = ...
    _, second = codec.update(rest, codec.init(rest))
    del first, second
    expected = sums(memory, unpaid)
    for got, want in zip(
        jax.tree.leaves(state.residual), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(want).max() + 1
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * scale)
