"""Plans for TPU slices against what the TPU compiler makes of the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt
from efopt import wire

TREE = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(256, 256), (1000,), (11,), ()]]
CASES = {
    "identity": (efopt.compressors.identity(), "all_reduce"),
    "gather": (efopt.scaled_sign(1024), "all_gather"),
    "two_phase": (efopt.scaled_sign(64), "two_phase"),
    "vote": (efopt.sign(), "majority_vote"),
    "top_k": (efopt.top_k(fraction=0.01, block_size=1024), "all_gather"),
    "low rank": (efopt.power_sgd(rank=2), "all_reduce"),
    "four bits": (efopt.quantize(4), "two_phase"),
    "cosines": (efopt.compressors.dct_top_k(k=4, tile=16), "all_gather"),
    "arc": (efopt.compressors.arc_top_k(fraction=0.1), "all_reduce"),
}


@functools.cache
def mesh(topology):
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = np.array(described.devices).reshape(-1)
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def measured(compressor, exchange, topology, tree=TREE, options=None):
    tx = efopt.compress(compressor, axis_name="data", exchange=exchange)
    placed = efopt.distribute(jax.eval_shape(tx.init, tree), mesh(topology))
    specs = efopt.partition_specs(placed)
    over, n = NamedSharding(mesh(topology), P("data")), mesh(topology).size
    grads = [jax.ShapeDtypeStruct((n, *x.shape), x.dtype, sharding=over) for x in tree]
    step = jax.shard_map(
        lambda g, s: tx.update([x[0] for x in g], s),
        mesh=mesh(topology),
        in_specs=(P("data"), specs),
        out_specs=(P(), specs),
    )
    return wire.measure(jax.jit(step, compiler_options=options), grads, placed)


def kinds(report):
    return sorted((c.operation, c.instead_of or "") for c in report.collectives)


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:8x8"])
@pytest.mark.parametrize(("compressor", "exchange"), CASES.values(), ids=CASES)
def test_plan_agrees_with_the_tpu_compiler(compressor, exchange, topology):
    n = mesh(topology).size
    planned = wire.plan(
        compressor,
        TREE,
        num_workers=n,
        exchange=exchange,
        platform="tpu",
        topology=topology,
    )
    got = measured(compressor, exchange, topology)
    assert planned.operand_bytes == pytest.approx(got.operand_bytes, rel=0.01)
    sent = got.bytes_sent_per_worker
    assert planned.bytes_sent_per_worker == pytest.approx(sent, rel=0.01)
    assert kinds(planned.report) == kinds(got)


@pytest.mark.parametrize("topology", ["v5e:8x8", "v4:2x4x4"])
def test_compiler_options_restore_the_gather(topology):
    case = efopt.scaled_sign(1024), "two_phase", topology
    doubled = measured(*case)
    assert ("all-reduce", "all-gather") in kinds(doubled)
    restored = measured(*case, options=wire.tpu_compiler_options(topology))
    assert kinds(restored) == [("all-gather", ""), ("all-to-all", "")]
    n = mesh(topology).size
    planned = wire.plan(
        efopt.scaled_sign(1024), TREE, num_workers=n, exchange="two_phase"
    )
    assert restored.bytes_sent_per_worker == planned.bytes_sent_per_worker
    assert doubled.bytes_sent_per_worker > 1.45 * planned.bytes_sent_per_worker


@pytest.mark.parametrize(
    ("topology", "replaced"), [("v6e:8x8", True), ("v6e:4x8", False)]
)
def test_a_large_slice_is_planned_as_it_compiles(topology, replaced):
    case, n = (efopt.sign(), "all_gather"), mesh(topology).size
    got = measured(*case, topology)
    assert any(c.instead_of for c in got.collectives) == replaced
    planned = wire.plan(
        case[0],
        TREE,
        num_workers=n,
        exchange=case[1],
        platform="tpu",
        topology=topology,
    )
    assert kinds(planned.report) == kinds(got)
