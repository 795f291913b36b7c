"""Steps over several TPU slices: what is read there against arithmetic.

Between slices a collective is a send and a recv by way of the hosts, and the text is
the program of one slice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from efopt import wire

ROWS = 16 * 1024 * 4  # bytes of a device's own 16 rows of 1024


@functools.cache
def devices(topology, num_slices):
    """The devices of a topology, a row a slice."""
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=num_slices
    )

    def slice_of(device):
        return getattr(device, "slice_index", 0)  # one slice says nothing of it

    found = sorted(described.devices, key=lambda d: (slice_of(d), d.id))
    return np.array(found).reshape(num_slices, -1)


def measured(body, grid, names, dtype=jnp.float32):
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    spec = P(names)
    step = jax.shard_map(
        body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    sharding = NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((grid.size * 16, 1024), dtype, sharding=sharding)
    return wire.measure(jax.jit(step), x)


def summary(report):
    return [
        (c.operation, c.axes, c.operand_bytes, c.link_bytes, c.between_slices)
        for c in report.collectives
    ]


BODIES = {  # operation: body, dtype, link bytes over n slices
    "all-reduce": (
        lambda x: jax.lax.psum(x, "dcn"),
        jnp.float32,
        lambda n: 2 * (n - 1) * ROWS // n,
    ),
    "all-gather": (
        lambda x: jax.lax.all_gather(x, "dcn").sum(0, dtype=x.dtype),
        jnp.uint32,
        lambda n: (n - 1) * ROWS,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x, "dcn", 0, 0, tiled=True),
        jnp.uint32,
        lambda n: (n - 1) * ROWS // n,
    ),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "dcn", tiled=True),
        jnp.float32,
        lambda n: (n - 1) * ROWS // n,
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "dcn", [(0, 1), (1, 0)]),
        jnp.float32,
        lambda n: ROWS,
    ),
}


@pytest.mark.parametrize(
    ("topology", "n"), [("v5e:2x4", 2), ("v5e:2x4", 4), ("v6e:2x4", 2), ("v4:2x2x1", 2)]
)
@pytest.mark.parametrize(
    ("operation", "body", "dtype", "sent"),
    [(operation, *row) for operation, row in BODIES.items()],
    ids=BODIES,
)
def test_what_crosses_slices_is_read(topology, n, operation, body, dtype, sent):
    report = measured(body, devices(topology, n), ("dcn", "fsdp"), dtype)
    assert summary(report) == [(operation, ("dcn",), ROWS, sent(n), True)]
    assert report.bytes_over("dcn") == wire.AxisBytes(ROWS, sent(n), sent(n))
    assert report.bytes_over("fsdp") == wire.AxisBytes(0, 0, 0)


@pytest.mark.parametrize("names", ["first", "last", "middle"])
def test_the_slices_may_be_any_axis(names):
    def body(x):
        both = jax.lax.psum(x, ("dcn", "fsdp"))
        words = jax.lax.all_gather(jax.lax.bitcast_convert_type(x, jnp.uint32), "dcn")
        return both * words.sum(0, dtype="u4").astype(jnp.float32)

    grid = devices("v5e:2x4", 2)
    grid, axes, others = {
        "first": (grid, ("dcn", "fsdp"), 8),
        "last": (grid.T, ("fsdp", "dcn"), 8),
        "middle": (
            grid.reshape(2, 4, 2).swapaxes(0, 1),
            ("fsdp", "dcn", "tensor"),
            4,
        ),
    }[names]
    report = measured(body, grid, axes)
    # the sum is formed within the slices first, and shared out for the way between
    between = [c for c in report.collectives if c.between_slices]
    assert {(c.operation, c.axes, c.operand_bytes) for c in between} == {
        ("all-reduce", ("dcn",), ROWS // others),
        ("all-gather", ("dcn",), ROWS),
    }
    inside = [c for c in report.collectives if not c.between_slices]
    assert {c.axes for c in inside} == {("fsdp",)}
    sent = ROWS // others + ROWS
    assert report.bytes_over("dcn") == wire.AxisBytes(sent, sent, sent)


def test_slices_in_another_order_and_devices_too():
    grid = devices("v5e:2x4", 4)[[2, 0, 3, 1]]
    grid = np.stack([row[np.roll(np.arange(8), i)] for i, row in enumerate(grid)])

    def body(x):
        return jax.lax.psum(x, "dcn") * jax.lax.psum(x, "tensor")

    report = measured(body, grid.reshape(4, 4, 2), ("dcn", "fsdp", "tensor"))
    assert sorted((c.axes, c.link_bytes) for c in report.collectives) == [
        (("dcn",), 3 * ROWS // 2),
        (("tensor",), ROWS),
    ]


def test_two_slow_axes_are_told_apart():
    grid = devices("v5e:2x4", 4).reshape(2, 2, 8)
    names = ("pods", "slices", "fsdp")
    for chosen, sent in [
        (("pods",), ROWS),
        (("slices",), ROWS),
        (("pods", "slices"), 3 * ROWS // 2),
    ]:
        report = measured(lambda x, chosen=chosen: jax.lax.psum(x, chosen), grid, names)
        assert summary(report) == [("all-reduce", chosen, ROWS, sent, True)]
        assert report.bytes_over(chosen).least == sent


def test_loops_are_counted_where_the_compiler_states_no_trips():
    def body(x):
        def step(x, _):
            return jax.lax.psum(x, "dcn") * 0.5 + jax.lax.psum(x, "fsdp"), None

        return jax.lax.scan(step, x, None, length=5)[0]

    report = measured(body, devices("v5e:2x4", 2), ("dcn", "fsdp"))
    assert {c.executions for c in report.collectives} == {5}
    assert report.bytes_over("dcn").link == 5 * ROWS
    assert report.bytes_over("fsdp").link == 5 * 7 * ROWS // 4


def test_an_axis_across_a_slice_boundary_is_told():
    """A flat axis of 16: a ring goes over the boundary at two places."""
    ring = [(i, (i + 1) % 16) for i in range(16)]
    report = measured(
        lambda x: jax.lax.ppermute(x, "data", ring),
        devices("v5e:2x4", 2).reshape(16),
        ("data",),
    )
    assert sorted(summary(report)) == [
        ("collective-permute", ("data",), ROWS, ROWS, False),
        ("collective-permute", ("data",), ROWS, ROWS, True),
    ]


def test_a_promise_about_what_crosses_slices():
    grid, names = devices("v5e:2x4", 2), ("dcn", "fsdp")
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P(names))
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=sharding)

    def step(x, *, packed):
        x = jax.lax.psum(x, "fsdp")
        if not packed:
            return jax.lax.psum(x, "dcn")
        bits = jax.lax.bitcast_convert_type(
            jnp.packbits(x > 0, axis=None).reshape(-1, 4), jnp.uint32
        )
        return x * jax.lax.all_gather(bits, "dcn").sum(dtype="u4").astype(x.dtype)

    dense, packed = (
        jax.jit(
            jax.shard_map(
                functools.partial(step, packed=packed),
                mesh=mesh,
                in_specs=P(names),
                out_specs=P(names),
                check_vma=False,
            )
        )
        for packed in (False, True)
    )
    limit = {"axis": "dcn", "at_most": ROWS // 32}
    report = wire.check(packed, x, **limit)
    assert report.bytes_over("dcn").link == ROWS // 32
    with pytest.raises(ValueError, match="over dcn"):
        wire.check(dense, x, **limit)
    wire.check(packed, x, axis="fsdp", beyond=wire.measure(dense, x))


def test_a_callback_is_no_traffic():
    def printing(x):
        jax.debug.print("{}", x.sum())
        return x

    report = measured(printing, devices("v5e:2x4", 2), ("dcn", "fsdp"))
    assert report.collectives == ()


def test_a_kernel_that_writes_to_its_neighbour_is_refused():
    def kernel(source, target, sent, received):
        copy = pltpu.make_async_remote_copy(
            src_ref=source,
            dst_ref=target,
            send_sem=sent,
            recv_sem=received,
            device_id=(jax.lax.rem(jax.lax.axis_index("data") + 1, 8),),
            device_id_type=pl.DeviceIdType.MESH,
        )
        copy.start()
        copy.wait()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    struct = jax.ShapeDtypeStruct((16, 1024), jnp.float32)
    remote = pl.pallas_call(
        kernel,
        out_shape=struct,
        in_specs=[anywhere],
        out_specs=anywhere,
        scratch_shapes=[pltpu.SemaphoreType.DMA] * 2,
    )

    def double(source, target):
        target[...] = source[...] * 2

    local = pl.pallas_call(double, out_shape=struct)
    grid = devices("v5e:2x4", 1).reshape(8)
    assert measured(local, grid, ("data",)).collectives == ()
    with pytest.raises(ValueError, match="how many bytes the custom-call tpu_custom_"):
        measured(remote, grid, ("data",))
