"""A plan from shapes is what the compiler then does: bytes, collectives, types."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from registry import COMPRESSORS
from workers_under_test import AXIS, FAST, make_mesh, slow

import efopt
from efopt import wire

TREE = {
    "matrix": jax.ShapeDtypeStruct((24, 20), jnp.float32),
    "vector": jax.ShapeDtypeStruct((33,), jnp.bfloat16),
    "none": jax.ShapeDtypeStruct((0, 3), jnp.float32),
}
MIXED = efopt.compressors.partition(
    {"signs": efopt.scaled_sign(64), "dense": efopt.compressors.identity()},
    {"matrix": "signs", "vector": "dense", "none": "dense"},
)
# By default a vote, and what is drawn, summed or mixed: of each exchange there are the
# bytes in tests/wire/test_compiled_steps.py. All rows by `pytest -m slow`, and four
# workers, between two and eight, by `-m exhaustive`.
DEFAULT = {
    ("sign", "majority_vote"),
    ("random_block_10pct", "all_gather"),
    ("power_sgd", "all_gather"),
}
CASES = [
    slow(
        *(row.make(), exchange, n),
        when=(row.name, exchange) not in DEFAULT or n < 8,
        rare=n == 4,
        id=f"{row.name}-{exchange}-{n}",
    )
    for row in COMPRESSORS
    for exchange in row.exchanges
    for n in (2, 4, 8)
]
CASES += [
    pytest.param(MIXED, "two_phase", 4, id="partition-two_phase-4"),
    slow(MIXED, None, 8, id="partition-8"),
    slow(efopt.power_sgd(rank=2), None, 2, id="power_sgd-2"),
    slow(
        efopt.compose(efopt.power_sgd(rank=2), efopt.compressors.cast("bfloat16")),
        *(None, 8),
        id="low_rank_cast-8",
    ),
]


def lowered(compressor, exchange, n, tree=TREE):
    """The step that averages `tree` over `n` devices, lowered for shapes alone."""
    mesh = make_mesh("auto", n)
    tx = efopt.compress(compressor, axis_name=AXIS, exchange=exchange)
    state = efopt.distribute(jax.eval_shape(tx.init, tree), mesh)
    specs = efopt.partition_specs(state)
    over = jax.NamedSharding(mesh, P(AXIS))
    grads = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype, sharding=over), tree
    )
    step = jax.shard_map(
        lambda g, s: tx.update(jax.tree.map(lambda x: x[0], g), s),
        mesh=mesh,
        in_specs=(P(AXIS), specs),
        out_specs=(P(), specs),
    )
    return jax.jit(step, compiler_options=FAST).lower(grads, state)


def agree(compressor, exchange, n):
    """Bytes to 1 %, padding included, and the same collectives of the same types."""
    planned = wire.plan(
        compressor, TREE, num_workers=n, exchange=exchange, platform="cpu"
    )
    measured = wire.measure(lowered(compressor, exchange, n))
    sizes = measured.operand_bytes, measured.bytes_sent_per_worker
    assert planned.operand_bytes == pytest.approx(sizes[0], rel=0.01)
    assert planned.bytes_sent_per_worker == pytest.approx(sizes[1], rel=0.01)

    def kinds(report):
        return sorted(
            (c.operation, set(c.element_types), c.group_size)
            for c in report.collectives
        )

    assert kinds(planned.report) == kinds(measured)


@pytest.mark.parametrize(("compressor", "exchange", "n"), CASES)
def test_plan_agrees_with_the_compiled_step(compressor, exchange, n):
    agree(compressor, exchange, n)
