"""A packed-sign step compiled ahead of time for TPU: what would cross its links."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt
from efopt import wire

SHAPES = [(1024, 1024), (1000, 37), (4096,), (11,), ()]


@pytest.fixture(scope="module")
def mesh():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    devices = np.array(topology.devices).reshape(-1)
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    ("compressor", "exchange", "expected"),
    [
        (efopt.scaled_sign(1024), "all_gather", ["all-gather"]),
        (efopt.scaled_sign(1024), "two_phase", ["all-gather", "all-to-all"]),
        (efopt.sign(), "majority_vote", ["all-gather", "all-to-all"]),
    ],
    ids=["gather", "two_phase", "vote"],
)
def test_signs_cross_the_links_as_words(compressor, exchange, expected, mesh):
    n = mesh.devices.size
    tx = efopt.error_feedback(compressor, axis_name="data", exchange=exchange)
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in SHAPES]
    placed = efopt.distribute(jax.eval_shape(tx.init, params), mesh)
    specs = efopt.partition_specs(placed)
    over = NamedSharding(mesh, P("data"))
    grads = [jax.ShapeDtypeStruct((n, *s), jnp.float32, sharding=over) for s in SHAPES]
    step = jax.shard_map(
        lambda g, s: tx.update([x[0] for x in g], s),
        mesh=mesh,
        in_specs=(P("data"), specs),
        out_specs=(P(), specs),
    )
    report = wire.measure(jax.jit(step), grads, placed)
    assert sorted(c.operation for c in report.collectives) == expected
    for c in report.collectives:
        assert set(c.element_types) == {"u32"}
    declared = sum(compressor.payload_bits(s) for s in SHAPES) // 8
    widest = max(c.operand_bytes for c in report.collectives)
    assert declared <= widest <= 1.02 * declared + 4096
