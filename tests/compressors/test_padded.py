"""Matrices of many shapes in a few batches: what each says, and what travels."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import efopt
from efopt.codecs import padded
from efopt.codecs.blocks import Turn
from efopt.codecs.conversation import alone, converse
from efopt.codecs.layout import lay_out
from efopt.codecs.states import close_states, init_states, open_states

SHAPES = [(12, 20), (11, 20), (5,), (10, 20), (12, 20), (6, 2, 19), (0, 3), (11, 18)]


@pytest.mark.parametrize("warm_start", [True, False])
def test_matrices_that_zeros_fill_up_say_what_they_say_in_batches_of_a_shape(
    warm_start,
):
    codec = efopt.power_sgd(2, warm_start=warm_start, min_compression=0.5).codec
    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal(s).astype(np.float32) for s in SHAPES]
    codecs, dtypes = codec.assign(leaves), [x.dtype for x in leaves]
    filled = lay_out(codecs, SHAPES, dtypes)
    exact = lay_out(codecs, SHAPES, dtypes, side_by_side=False)
    assert len(filled.buckets) < len(exact.buckets)
    start = init_states(codec, leaves, "a test")
    treedef, turn = jax.tree.structure(leaves), Turn(jnp.uint32(5), jnp.uint32(3), 7)

    def run(layout, leaves, start):
        sent = []

        def meet(messages):
            given = [message.payload for message in messages.values()]
            sent.append(sum(x.nbytes for x in jax.tree.leaves(given)))
            return alone(messages)

        states = open_states(layout, treedef, start)
        xs, turns = layout.join(leaves), [turn] * len(layout.buckets)
        means, rests, states = converse(layout, xs, states, turns, meet)
        means = layout.part([mean.decode() for mean in means], leaves)
        states = close_states(layout, treedef, states, start)
        return (means, layout.part(rests, leaves), states), sent

    got, sent = jax.jit(run, static_argnums=0)(filled, leaves, start), []
    for layout in filled, exact:
        jax.eval_shape(
            lambda x, s, to=layout: sent.append(run(to, x, s)[1]), leaves, start
        )
    assert sent[0] == sent[1]
    expected = jax.jit(run, static_argnums=0)(exact, leaves, start)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        got[0],
        expected[0],
    )


def test_classes_hold_every_shape_once_and_add_few_zeros():
    rng = np.random.default_rng(1)
    for _ in range(20):
        sides = map(tuple, rng.integers(1, 90, (30, 2)).tolist())
        numbers = {side: int(rng.integers(1, 9)) for side in sides}
        found = padded.classes(numbers)
        assert sorted(s for _, members in found for s in members) == sorted(numbers)
        total = sum(n * math.prod(s) for s, n in numbers.items())
        filled = sum(numbers[s] * math.prod(top) for top, ss in found for s in ss)
        assert len(found) < len(numbers) and total < filled
        assert filled <= (1 + padded.SPARE) * total
        for top, members in found:
            assert top == tuple(max(sides) for sides in zip(*members, strict=True))


def test_a_program_grows_little_by_a_matrix_of_another_shape():
    def operations(sides):
        params = [jnp.zeros((side, 128)) for side in sides]
        tx = efopt.error_feedback(efopt.power_sgd(2))
        update = jax.jit(tx.update).lower(params, tx.init(params))
        return len(re.findall(r" = ", update.as_text()))

    few, many = operations(range(60, 64)), operations(range(56, 64))
    assert (many - few) / 4 <= 45, (few, many)
