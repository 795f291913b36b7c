"""What is watched on a mesh of two levels: whole leaves, from every entrance."""

import meshes
import numpy as np
import pytest
from test_schemes import chained

import efopt

MESH = meshes.TWO_BY_FOUR
PARTS = {
    "two_phase": efopt.scaled_sign(8),
    "all_reduce": efopt.power_sgd(1, min_compression=0),  # leaves in no pieces
}


def mean_squares(tree):
    """By leaf and in total, of arrays with one row a worker."""
    rows = [np.sum(np.square(np.asarray(x, np.float64))) for _, x in sorted(tree)]
    return np.array([*rows, sum(rows)]) / MESH.workers


@pytest.mark.parametrize(
    ("exchange", "entrance"),
    [
        pytest.param(x, e, marks=[] if first else [pytest.mark.slow])
        for x in PARTS
        for e in meshes.ENTRANCES
        for first in [(x, e) == ("two_phase", "global")]
    ],
)
def test_the_numbers_are_those_of_whole_leaves(exchange, entrance):
    """Of a shard its device tells, and of what several hold alike each its part."""
    params, specs, grads = meshes.task(MESH, steps=3)
    scheme = efopt.error_feedback(
        PARTS[exchange], axis_name=MESH.slow, exchange=exchange
    )
    tx = efopt.watch.observe(chained(scheme))
    step, state, place = meshes.make(entrance, tx, MESH, params, specs)
    for g in grads:
        before, state = state, step(state, place(g))
    meshes.copies_equal(state)
    feedback, came = state["opt"][0], mean_squares(grads[-1].items())
    seen = feedback.link.watched
    owed = mean_squares(feedback.residual.value.items())
    ratio = np.sqrt(owed / np.where(came, came, 1))
    np.testing.assert_allclose(seen.residual_ratio, ratio, rtol=1e-5)
    server = before["opt"][0].link.server
    if server != ():
        total = sum(np.sum(np.square(np.asarray(x, np.float64))) for x in server.value)
        np.testing.assert_allclose(
            seen.server_ratio[-1], np.sqrt(total / came[-1]), rtol=1e-5
        )
        parts = np.asarray(seen.server_ratio[:-1], np.float64) ** 2 * came[:-1]
        np.testing.assert_allclose(parts.sum(), total, rtol=1e-5)
