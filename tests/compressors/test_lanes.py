"""Leaves of many sizes side by side: the same bits, and a program that stays small."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workers_under_test import slow

import efopt
from efopt.codecs.blocks import Turn
from efopt.codecs.layout import lay_out

# By default one of signs and one of what is drawn.
COMPRESSORS = [
    efopt.scaled_sign(),
    efopt.random_k(k=9, unbiased=True),
    slow(efopt.compressors.two_magnitudes()),
    slow(efopt.compressors.count_sketch(fraction=0.3)),
    slow(efopt.random_block(fraction=0.3)),
    slow(efopt.compressors.count_sketch(width=2)),
]
SHAPES = [(1,), (9, 7), (), (23,), (0, 3), (8,), (129,), (23,), (40, 5)]


def spoken(layout, codecs, leaves, valid):
    """What each leaf's message says and leaves unsaid, at a step that is not the first.

    The end of some leaves is padding, as on the last devices of a worker.
    """
    turn = Turn(jnp.uint32(5), jnp.uint32(3), 7)
    said, unsaid = [], []
    for b, x in zip(layout.buckets, layout.join(leaves), strict=True):
        message = b.codec.write(x, b.blocks(valid), turn)
        said.append(message.decode())
        unsaid.append(message.rest(x))
    return layout.part(said, leaves), layout.part(unsaid, leaves)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_a_leaf_side_by_side_says_what_it_says_in_a_batch_of_its_size(compressor):
    rng = np.random.default_rng(0)
    short = {1: 50, 6: 0}
    leaves = []
    for i, shape in enumerate(SHAPES):
        x = rng.standard_normal(shape).astype(np.float32)
        x = x * (rng.random(shape) < 0.8)  # zeros toss coins
        x = np.where(np.arange(x.size).reshape(shape) < short.get(i, x.size), x, 0)
        leaves.append(x.astype(np.float32))
    codecs = compressor.codec.assign(leaves)
    dtypes = [np.dtype("float32")] * len(leaves)
    lanes = lay_out(codecs, SHAPES, dtypes)
    alone = lay_out(codecs, SHAPES, dtypes, side_by_side=False)
    assert len(lanes.buckets) < len(alone.buckets)

    def both(leaves, valid):
        ways = [spoken(layout, codecs, leaves, valid) for layout in (lanes, alone)]
        whole = [spoken(layout, codecs, leaves, {}) for layout in (lanes, alone)]
        return ways, whole

    valid = {i: np.int32(n) for i, n in short.items()}
    for given, expected in jax.jit(both)(leaves, valid):
        jax.tree.map(np.testing.assert_array_equal, given, expected)


@pytest.mark.parametrize("compressor", COMPRESSORS[:5], ids=str)
def test_a_program_grows_little_by_a_leaf_of_another_size(compressor):
    def operations(sizes):
        params = [jnp.zeros(size) for size in sizes]
        tx = efopt.error_feedback(compressor)
        update = jax.jit(tx.update).lower(params, tx.init(params))
        return len(re.findall(r" = ", update.as_text()))

    few, many = operations(range(50, 54)), operations(range(50, 62))
    # Added, padded, cut twice, and rounded or reshaped between.
    assert (many - few) / 8 <= 45, (few, many)


@pytest.mark.parametrize(
    ("compressor", "programs"),
    [(COMPRESSORS[0], 1), (COMPRESSORS[1], 1), (efopt.scaled_sign(64), 11)],
    ids=str,
)
def test_hundreds_of_leaves_of_many_shapes_are_a_few_programs(compressor, programs):
    """Each is to be compiled; of equal blocks it is 32 leaves, and a short one here."""
    shapes = [(i % 50 + 3, 2 * (i % 50) + 5) for i in range(300)]
    codecs = compressor.codec.assign([np.zeros(s, np.float32) for s in shapes])
    buckets = lay_out(codecs, shapes, [np.dtype("float32")] * 300).buckets
    assert len(buckets) == programs
    assert sorted(i for b in buckets for i in b.leaves) == list(range(300))


def test_small_leaves_are_joined_past_a_large_one():
    """Their random numbers are those of their places in the tree all the same."""
    sizes = [100, 1 << 20, 100, 200, 1 << 20, 100]
    codecs = [efopt.scaled_sign(16).codec] * len(sizes)
    dtypes = [np.dtype("float32")] * len(sizes)
    layout = lay_out(codecs, [(size,) for size in sizes], dtypes)
    assert sorted(b.leaves for b in layout.buckets) == [(0, 2, 3, 5), (1,), (4,)]
    numbers = {
        i: n for b in layout.buckets for i, n in zip(b.leaves, b.numbers, strict=True)
    }
    blocks = [-(-size // 16) for size in sizes]
    assert [numbers[i] for i in range(len(sizes))] == [
        0,
        *np.cumsum(blocks)[:-1].tolist(),
    ]
