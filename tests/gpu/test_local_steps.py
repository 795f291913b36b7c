"""What a step between two meetings runs on an H100: nothing to pass a meeting by."""

import re
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt
from efopt.hlo.program import Program

DESCRIPTION = Path(__file__).parent / "h100.txtpb"
SHAPE = (1024, 4096)


def test_a_step_copies_nothing_on_its_way_past_a_meeting():
    """Neither residual nor momentum, which stand still: they stay in their places."""
    feedback = efopt.error_feedback(efopt.scaled_sign(1024), axis_name="data")
    outer = optax.chain(feedback, optax.sgd(0.7, momentum=0.9, nesterov=True))
    tx = efopt.local_steps(optax.adamw(0.1), outer, every=30, axis_name="data")

    def step(carry, x):
        params, state = carry
        own = efopt.local_params(params, "data", state)
        updates, state = tx.update(jax.tree.map(lambda p: p * x[0], own), state, params)
        return optax.apply_updates(params, updates), state

    params = {name: np.zeros(SHAPE, np.float32) for name in "ab"}
    here = jax.make_mesh((1,), ("data",), (AxisType.Auto,))
    carry = efopt.distribute((params, tx.init(params)), here)
    specs = efopt.partition_specs(carry)
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="two",
        target_config=DESCRIPTION.read_text(),
        topology="1x1x2",
    )
    mesh = jax.sharding.Mesh(
        np.array(topology.devices), ("data",), axis_types=(AxisType.Auto,)
    )

    def of_two(x, spec):
        shape = (2 * x.shape[0], *x.shape[1:]) if spec and spec[0] else x.shape
        placed = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=placed)

    given = jax.tree.map(of_two, carry, specs)
    x = jax.ShapeDtypeStruct((2,), "float32", sharding=NamedSharding(mesh, P("data")))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, P("data")), out_specs=specs
    )
    program = jax.jit(mapped, donate_argnums=0).lower(given, x).compile()
    found = Program.parse(program.as_text())
    (main,) = [name for name in found.bodies if name and name not in found.callers]
    entry = found.bodies[main]
    assert {"while", "conditional"} & {x["opcode"] for x in entry.values()}
    whole = re.compile(rf"\[(1,)?{SHAPE[0]},{SHAPE[1]}\]")
    copied = [n for n, x in entry.items() if x["opcode"] == "copy"]
    assert not [n for n in copied if whole.search(entry[n]["type"])]
