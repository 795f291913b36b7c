"""What an update runs on an H100, compiled without one: a pass too many fails here.

The numbers are those of the program that XLA makes, so that another version of it may
need others: fewer are welcome, more are to be looked at. What they cost in time is in
`docs/howto/speed.md`.
"""

import math
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

import efopt
from efopt.hlo.kernels import count_kernels

DESCRIPTION = Path(__file__).parent / "h100.txtpb"
# A stack of layers, beyond the size from which XLA sooner keeps a sum than computes it
# again; a table whose rows split into no power of two; and two leaves that are joined.
SHAPES = [(24, 1024, 4096), (50257, 1024), (1024,), (3072,)]
COORDINATES = sum(map(math.prod, SHAPES))
BLOCK = efopt.random_block(fraction=0.01)


@pytest.fixture(scope="module")
def placed():
    """Structs on a card that is described, and not there."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="one",
        target_config=DESCRIPTION.read_text(),
        topology="1x1x1",
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def put(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return lambda tree: jax.tree.map(put, tree)


def compiled(tx, placed):
    grads = [jax.ShapeDtypeStruct(shape, "float32") for shape in SHAPES]

    def update(state, grads):  # the state first: it takes the place of the old one
        updates, state = tx.update(grads, state)
        return state, updates

    given = placed((jax.eval_shape(tx.init, grads), grads))
    return jax.jit(update, donate_argnums=0).lower(*given).compile()


# Bytes a coordinate: gradient and residual are read, update and residual written, 16;
# and read once more, 8, where a pass over a block has to end before the next begins.
@pytest.mark.parametrize(
    ("compressor", "memory", "kernels", "moved", "temporary"),
    [
        pytest.param(efopt.sign(), None, 15, 24.3, 13, id="sign"),
        pytest.param(efopt.scaled_sign(1024), None, 21, 29.3, 14, id="scaled_sign"),
        pytest.param(efopt.quantize(8), None, 16, 26.2, 156, id="quantize"),
        pytest.param(efopt.quantize(4), None, 21, 27.2, 156, id="in-4-bits"),
        pytest.param(efopt.power_sgd(4), None, 156, 32.3, 404, id="power_sgd"),
        pytest.param(BLOCK, efopt.quantize(8), 25, 20.4, 12, id="in-8-bits"),
    ],
)
def test_no_pass_too_many(compressor, memory, kernels, moved, temporary, placed):
    program = compiled(efopt.error_feedback(compressor, memory=memory), placed)
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None and memory is not None
    found = count_kernels(text)
    assert found.bytes / COORDINATES <= moved
    assert found.number <= kernels
    assert memory.temp_size_in_bytes <= 1e6 * temporary
