"""Trees of labels that can be called, and reads that stay within their arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from workers_under_test import slow

import efopt
from efopt import compressors


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    """Like an Equinox module: a tree of arrays, or of labels, that can be called."""

    w: Any
    b: Any

    def __call__(self, x):
        return x @ self.w + self.b


LABELS = Net("matrix", "rest")
ASKED = {
    "tree": LABELS,
    "function": lambda params: LABELS,
    "partial": jax.tree_util.Partial(lambda params: LABELS),
}


@pytest.mark.parametrize("labels", ASKED.values(), ids=ASKED)
def test_labels_in_a_tree_that_can_be_called(labels):
    parts = {"matrix": efopt.top_k(k=1), "rest": compressors.identity()}
    tx = efopt.error_feedback(compressors.partition(parts, labels))
    params = Net(jnp.ones((4, 4)), jnp.ones(4))
    updates, _ = jax.jit(tx.update)(params, tx.init(params))
    assert (updates.w.sum(), updates.b.sum()) == (1, 4)


CASES = (
    efopt.sign(),
    efopt.scaled_sign(64),
    efopt.top_k(k=7, block_size=64),
    efopt.random_k(k=7, block_size=64, unbiased=True),
    efopt.random_block(k=7),
    compressors.threshold(0.5, k=30),
    efopt.quantize(8),
    compressors.natural(),
    compressors.count_sketch(width=7),
    compressors.count_sketch(width=7, block_size=64),
    compressors.count_sketch(width=300, rows=3),
    compressors.count_sketch(fraction=0.1, hash="random"),
    efopt.power_sgd(2),
    efopt.compose(efopt.top_k(k=7), efopt.quantize(4)),
)


BY_DEFAULT = {CASES[0]}


@pytest.mark.parametrize(
    "compressor", [slow(c, when=c not in BY_DEFAULT, id=repr(c)) for c in CASES]
)
def test_index_checks_find_nothing(compressor):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 50)), jnp.float32)
    checked = checkify.checkify(compressor.update, errors=checkify.all_checks)
    error, (updates, _) = jax.jit(checked)(x, compressor.init(x))
    error.throw()
    np.testing.assert_array_equal(
        updates, jax.jit(compressor.update)(x, compressor.init(x))[0]
    )
