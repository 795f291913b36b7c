"""The first steps of a scheme, uncompressed: `start=`."""

import chex
import jax
import numpy as np
import optax
import pytest
from workers_under_test import AXIS, mapped, run, slow

import efopt

BLOCK = efopt.random_block(fraction=0.3)
STEPS = 2
SCHEMES = {
    "compress": (efopt.compress, {"compressor": BLOCK}),
    "error_feedback": (
        efopt.error_feedback,
        {"compressor": efopt.scaled_sign(8), "exchange": "two_phase"},
    ),
    "conef": (
        efopt.contractive_error_feedback,
        {"compressor": BLOCK, "memory": efopt.quantize(4)},
    ),
    "damped": (
        efopt.feedback.damped_error_feedback,
        {"compressor": BLOCK, "alpha": 1.0, "beta": 0.9},
    ),
}


def scheme(name, start=STEPS):
    factory, options = SCHEMES[name]
    return factory(**options, axis_name=AXIS, start=start)


def trees(seed, number, lead=()):
    rng = np.random.default_rng(seed)
    shapes = {"w": (19, 21), "b": (7,)}
    return [
        {
            k: rng.standard_normal((*lead, *s)).astype(np.float32)
            for k, s in shapes.items()
        }
        for _ in range(number)
    ]


@pytest.mark.parametrize(
    "name, how",
    [
        ("compress", "vmap"),
        ("error_feedback", "auto"),
        slow("conef", "auto"),
        slow("damped", "auto"),
        slow("conef", "vmap"),
        slow("conef", "pmap"),
        slow("error_feedback", "explicit"),
    ],
)
def test_first_dense_and_then_compressed(name, how):
    (start,), grads = trees(0, 1), trees(1, 2 * STEPS, (8,))
    tx = optax.chain(scheme(name), optax.sgd(0.1))
    warm, state = run(how, tx, start, grads)
    dense = optax.chain(
        efopt.compress(efopt.compressors.identity(), axis_name=AXIS), optax.sgd(0.1)
    )
    expected, _ = run(how, dense, start, grads)
    one = (lambda p: p) if how in ("auto", "explicit") else (lambda p: p[0])
    for t in range(2 * STEPS):
        for a, b in zip(
            jax.tree.leaves(warm[t]), jax.tree.leaves(expected[t]), strict=True
        ):
            if t < STEPS:
                np.testing.assert_array_equal(a, b)
            elif t == 2 * STEPS - 1 and one(a).ndim > 1:
                assert (a != b).any()
    assert (state[0].count == 2 * STEPS).all()


def test_nothing_is_owed_until_then_and_the_scheme_goes_on_from_its_step():
    """After the warm-up: the scheme, at its own step, without a past."""
    rate = lambda t: 0.1 / (t + 1.0)  # noqa: E731
    plain = efopt.error_feedback(BLOCK, learning_rate=rate)
    grads = trees(2, 5)
    tx = efopt.error_feedback(BLOCK, learning_rate=rate, start=STEPS)
    state, update, out = jax.jit(tx.init)(grads[0]), jax.jit(tx.update), []
    for t, g in enumerate(grads):
        updates, state = update(g, state)
        out.append(updates)
        if t < STEPS:
            assert not any(x.any() for x in jax.tree.leaves(state.residual))
    later = jax.jit(plain.init)(grads[0])._replace(count=np.int32(STEPS))
    again = jax.jit(plain.update)
    for g, got in zip(grads[STEPS:], out[STEPS:], strict=True):
        expected, later = again(g, later)
        chex.assert_trees_all_equal(got, expected)


def test_the_program_shows_both_exchanges(mesh):
    """And says of each that it stands in a branch."""
    (start,), (grads,) = trees(0, 1), trees(1, 1, (8,))
    tx = scheme("compress")
    fn, state, place = mapped("auto", tx, start)
    report = efopt.wire.measure(fn, state, place(grads))
    sent = {c.operand_bytes for c in report.collectives}
    dense = 4 * (19 * 21 + 7)
    assert dense in sent and min(sent) < dense / 2
    assert all(c.loop for c in report.collectives)
