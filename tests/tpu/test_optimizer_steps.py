"""One-bit optimizers compiled ahead of time for 64 TPUs: bits each way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt
from efopt import wire

SHAPES = [(4096, 2048), (1024, 1600), (777, 2)]  # 10 M
TOPOLOGY = "v5e:8x8"


@pytest.mark.parametrize(
    "tx",
    [
        efopt.optimizers.signum(1e-3, axis_name="data"),
        efopt.dist_ef_sgd(0.1, axis_name="data"),
    ],
    ids=["majority_vote", "dist_ef_sgd"],
)
def test_one_bit_a_coordinate_each_way(tx):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    devices = np.array(topology.devices).reshape(-1)
    mesh, n = Mesh(devices, ("data",), axis_types=(AxisType.Auto,)), devices.size
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in SHAPES]
    state = efopt.distribute((params, jax.eval_shape(tx.init, params)), mesh)
    specs = efopt.partition_specs(state)
    over = NamedSharding(mesh, P("data"))
    grads = [jax.ShapeDtypeStruct((n, *s), jnp.float32, sharding=over) for s in SHAPES]

    def step(state, grads):
        params, own = state
        updates, own = tx.update([g[0] for g in grads], own, params)
        return optax.apply_updates(params, updates), own

    fn = jax.shard_map(step, mesh=mesh, in_specs=(specs, P("data")), out_specs=specs)
    report = wire.measure(
        jax.jit(
            fn, donate_argnums=0, compiler_options=wire.tpu_compiler_options(TOPOLOGY)
        ),
        state,
        grads,
    )
    size = sum(np.prod(s) for s in SHAPES)
    sent = {c.operation: c.operand_bytes for c in report.collectives}
    assert set(sent) == {"all-to-all", "all-gather"}
    assert 8 * sent["all-to-all"] / size <= 1.04
    assert 8 * n * sent["all-gather"] / size <= 1.04
