"""A plan from shapes is what the compiler then does; and what a plan says of it."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from registry import ROWS
from workers_under_test import AXIS, make_mesh

import efopt
from efopt import wire

# Cheaper machine code; the collectives are the same.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TREE = {
    "matrix": jax.ShapeDtypeStruct((48, 40), jnp.float32),
    "half": jax.ShapeDtypeStruct((7, 9), jnp.bfloat16),
    "vector": jax.ShapeDtypeStruct((33,), jnp.float32),
    "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    "none": jax.ShapeDtypeStruct((0, 3), jnp.float32),
}
CASES = [(row.make(), exchange) for row in ROWS for exchange in row.exchanges]
NAMES = [f"{row.name}-{exchange}" for row in ROWS for exchange in row.exchanges]
MIXED = efopt.partition(
    {"signs": efopt.scaled_sign(64), "dense": efopt.identity()},
    {"matrix": "signs", "half": "dense", "vector": "signs", "scalar": "dense"}
    | {"none": "dense"},
)
CASES += [
    (MIXED, "two_phase"),
    (MIXED, None),
    (efopt.power_sgd(rank=2), None),
    (efopt.compose(efopt.power_sgd(rank=2), efopt.cast("bfloat16")), None),
    (efopt.compose(efopt.top_k(k=8, block_size=64), efopt.cast("bfloat16")), None),
]
NAMES += ["partition-two_phase", "partition", "power_sgd", "low_rank_cast", "top_cast"]


def compiled(compressor, exchange, n, tree=TREE):
    """The step that averages `tree` over `n` devices, compiled for shapes alone."""
    mesh = make_mesh("auto", n)
    tx = efopt.compress(compressor, AXIS, exchange)
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


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(("compressor", "exchange"), CASES, ids=NAMES)
def test_plan_agrees_with_the_compiled_step(compressor, exchange, n):
    planned = wire.plan(compressor, TREE, n, exchange, platform="cpu")
    measured = wire.measure(compiled(compressor, exchange, n))
    sizes = measured.operand_bytes, measured.bytes_sent_per_worker
    assert planned.operand_bytes == pytest.approx(sizes[0], rel=0.01)
    assert planned.bytes_sent_per_worker == pytest.approx(sizes[1], rel=0.01)

    def kinds(report):
        return sorted(
            (c.operation, set(c.element_types), c.group_size)
            for c in report.collectives
        )

    assert kinds(planned.report) == kinds(measured)
