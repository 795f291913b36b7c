"""Which axes of a mesh a compiled step crosses, and with how many bytes.

Real compiles on 8 devices, on meshes of every shape, with the slow axis `dcn` first,
last and in the middle, and with devices in another order than their ids.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_read_and_measure import TPU_SLICES, collective
from workers_under_test import slow

from efopt import wire

MESHES = {
    "2x4, first": ((2, 4), ("dcn", "fsdp")),
    "4x2, first": ((4, 2), ("dcn", "fsdp")),
    "4x2, last": ((4, 2), ("fsdp", "dcn")),
    "2x4, last": ((2, 4), ("fsdp", "dcn")),
    "2x2x2, first": ((2, 2, 2), ("dcn", "fsdp", "tensor")),
    "2x2x2, middle": ((2, 2, 2), ("fsdp", "dcn", "tensor")),
    "2x2x2, last": ((2, 2, 2), ("fsdp", "tensor", "dcn")),
    "with an axis of one": ((2, 1, 4), ("dcn", "tensor", "fsdp")),
    "flat": ((8,), ("dcn",)),
}
OTHER = 3, 1, 7, 0, 2, 6, 4, 5
ORDERS = {"by id": range(8), "in another order": OTHER}


def build(shape, names, order=range(8), kind=AxisType.Auto):
    devices = np.array(jax.devices())[list(order)].reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(names))


def mapped(body, mesh, shape=(64, 16), dtype=jnp.float32):
    """A step in which each device has its own rows, and a struct for it."""
    spec = P(mesh.axis_names)
    fn = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    sharding = NamedSharding(mesh, spec)
    return jax.jit(fn), jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def some(names):
    """Every choice of axes, in the order of the mesh and in another."""
    for n in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, n):
            yield chosen
            if n > 1:
                yield chosen[::-1]


@pytest.mark.parametrize(
    "order", [slow(range(8), id="by id"), pytest.param(OTHER, id="in another order")]
)
@pytest.mark.parametrize(("shape", "names"), MESHES.values(), ids=MESHES)
def test_a_sum_over_axes_crosses_these(shape, names, order):
    mesh = build(shape, names, order)
    for chosen in some(names):
        step, x = mapped(lambda x, chosen=chosen: jax.lax.psum(x, chosen), mesh)
        report = wire.measure(step, x)
        sizes = {name: mesh.shape[name] for name in chosen}
        crossed = tuple(a for a in names if sizes.get(a, 1) > 1)
        if not crossed:  # left out by some compilers
            assert all(c.axes == () for c in report.collectives)
            continue
        (c,) = report.collectives
        assert c.axes == crossed
        assert c.spans == tuple(sizes[a] for a in crossed)
        assert c.group_size == math.prod(sizes.values())
        assert {len(group) for group in c.groups} == {c.group_size}
        assert sorted(sum(c.groups, ())) == list(range(8))
        assert report.mesh == tuple(zip(names, shape, strict=True))


BODIES = {
    "all-gather": lambda x: jax.lax.all_gather(x, "dcn").sum(0),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "dcn", 0, 0, tiled=True),
    "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "dcn", tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "dcn", [(0, 1), (1, 0)]),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("mesh", ["2x4, first", "2x2x2, middle", "4x2, last"])
@pytest.mark.parametrize(("operation", "body"), BODIES.items(), ids=BODIES)
def test_every_collective_knows_its_axis(operation, body, mesh, order):
    step, x = mapped(body, build(*MESHES[mesh], order))
    (c,) = wire.measure(step, x).collectives
    assert (c.operation, c.axes, c.spans) == (operation, ("dcn",), (2,))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("mesh", ["2x4, first", "4x2, last", "2x2x2, middle"])
def test_a_plain_jitted_step_tells_its_axes(mesh, kind, order):
    """Batch over both axes, weights over one: gathered there, summed over all."""
    shape, names = MESHES[mesh]
    mesh = build(shape, names, order, kind)
    m = mesh.shape["fsdp"]

    def step(w, x):
        if kind is AxisType.Explicit:
            w = jax.reshard(w, P())
        else:
            w = jax.lax.with_sharding_constraint(w, P())
        return jnp.mean(jnp.square(x @ w))

    def place(shape, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    x, w = place((64, 32), ("dcn", "fsdp")), place((32, 16), "fsdp")
    with jax.set_mesh(mesh):
        report = wire.measure(jax.jit(step), w, x)
    gathers = [c for c in report.collectives if c.operation == "all-gather"]
    assert [(c.axes, c.operand_bytes) for c in gathers] == [(("fsdp",), 4 * 512 // m)]
    sums = [c for c in report.collectives if c.operation == "all-reduce"]
    assert {a for c in sums for a in c.axes or ()} == {"dcn", "fsdp"}
    assert len(gathers) + len(sums) == len(report.collectives)
    assert report.bytes_over("dcn").operand == 4 * len(report.over("dcn").collectives)


def test_groups_that_are_no_axes_cross_what_they_straddle():
    groups = [[0, 1], [2, 3]]  # halves of fsdp
    step, x = mapped(
        lambda x: jax.lax.psum(x, "fsdp", axis_index_groups=groups),
        build((2, 4), ("dcn", "fsdp")),
    )
    (c,) = wire.measure(step, x).collectives
    assert (c.axes, c.spans, c.group_size) == (("fsdp",), (2,), 2)


def test_a_ring_through_a_mesh_crosses_both_axes():
    ring = [(i, (i + 1) % 8) for i in range(8)]
    step, x = mapped(
        lambda x: jax.lax.ppermute(x, ("dcn", "fsdp"), ring),
        build((2, 4), ("dcn", "fsdp")),
    )
    report = wire.measure(step, x)
    (c,) = report.collectives
    assert c.axes == ("dcn", "fsdp")
    assert report.bytes_over("dcn") == wire.AxisBytes(512, 512, 512)


# ----------------------------------------------------------------- where a mesh is from


def test_the_mesh_is_known_from_wherever_it_is():
    mesh = build((2, 4), ("dcn", "fsdp"), ORDERS["in another order"])
    step, struct = mapped(lambda x: jax.lax.psum(x, "dcn"), mesh)
    plain = jax.ShapeDtypeStruct(struct.shape, struct.dtype)
    array = jax.device_put(jnp.zeros(struct.shape), struct.sharding)
    lowered = step.lower(struct)
    reports = [
        wire.measure(step, struct),
        wire.measure(step, array),
        wire.measure(step, plain),  # from the results
        wire.measure(lambda x: step(x["x"]), {"x": array, "rate": 0.1}),
        wire.measure(lowered),
        wire.measure(lowered.compile()),
        wire.measure(step, plain, mesh=mesh),
    ]
    for report in reports:
        assert [c.axes for c in report.collectives] == [("dcn",)]


def test_the_mesh_of_the_arguments_goes_before_that_of_the_results():
    step, x = mapped(lambda x: jax.lax.psum(x, "dcn"), build((2, 4), ("dcn", "fsdp")))
    flat = NamedSharding(build((8,), ("data",)), P("data"))
    ending = jax.jit(lambda x: jax.lax.with_sharding_constraint(step(x), flat))
    assert [c.axes for c in wire.measure(ending, x).collectives] == [("dcn",)]


def test_the_mesh_that_is_given_wins():
    step, x = mapped(lambda x: jax.lax.psum(x, "dcn"), build((2, 4), ("dcn", "fsdp")))
    finer = build((2, 2, 2), ("hosts", "cards", "chips"))
    (c,) = wire.measure(step, x, mesh=finer).collectives
    assert c.axes == ("hosts",)
    step, x = mapped(lambda x: jax.lax.psum(x, "fsdp"), build((2, 4), ("dcn", "fsdp")))
    (c,) = wire.measure(step, x, mesh=finer).collectives
    assert c.axes == ("cards", "chips")


def test_without_one_mesh_axes_are_not_known():
    one, other = build((2, 4), ("dcn", "fsdp")), build((8,), ("data",))
    step, x = mapped(lambda x: jax.lax.psum(x, "dcn"), one)
    y = jax.ShapeDtypeStruct(
        (8,), jnp.float32, sharding=NamedSharding(other, P("data"))
    )
    report = wire.measure(jax.jit(lambda x, y: (step(x), y * 2)), x, y)
    assert report.mesh == ()
    assert {c.axes for c in report.collectives} == {None}
    assert "axes" not in str(report).splitlines()[0]
    with pytest.raises(ValueError, match="needs to know the mesh"):
        report.over("dcn")
    with pytest.raises(ValueError, match="needs to know the mesh"):
        report.bytes_over("dcn")
    both = wire.measure(jax.jit(lambda x, y: (step(x), y * 2)), x, y, mesh=one)
    assert {c.axes for c in both.collectives} == {("dcn",)}


@pytest.mark.parametrize(
    ("mesh", "error", "says"),
    [
        ("data", TypeError, "must be a `jax.sharding.Mesh` with devices, got str"),
        ("four", ValueError, "compiled for 8 devices (of one slice, on TPU slices)"),
    ],
)
def test_a_mesh_that_is_none(mesh, error, says):
    step, x = mapped(lambda x: jax.lax.psum(x, "dcn"), build((2, 4), ("dcn", "fsdp")))
    if mesh == "four":
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    with pytest.raises(error, match=re.escape(says)):
        wire.measure(step, x, mesh=mesh)


@pytest.mark.parametrize(
    ("axis", "got"), [("data", "'data'"), (("dcn", "x"), "'dcn', 'x'"), ((), "none")]
)
def test_an_axis_that_the_mesh_does_not_have(axis, got):
    step, x = mapped(lambda x: jax.lax.psum(x, "dcn"), build((2, 4), ("dcn", "fsdp")))
    says = f"must name an axis of the mesh, dcn=2, fsdp=4; got {got}."
    with pytest.raises(ValueError, match=re.escape(says)):
        wire.measure(step, x).bytes_over(axis)


class Device:
    """A device of a TPU slice that is not there."""

    def __init__(self, slice_index, number):
        self.id = 100_000 * (slice_index + 1) + number
        self.slice_index = slice_index


class Slices:
    """As much of a mesh as a layout needs."""

    def __init__(self, devices, names):
        self.devices, self.axis_names = devices, names


def slices():
    return np.array([[Device(s, n) for n in range(8)] for s in range(2)])


@pytest.mark.parametrize(
    ("devices", "names", "between", "inside"),
    [
        (slices(), ("dcn", "fsdp"), "dcn", "fsdp"),
        (slices()[::-1], ("dcn", "fsdp"), "dcn", "fsdp"),
        (slices().T, ("fsdp", "dcn"), "dcn", "fsdp"),
        (
            slices().reshape(2, 4, 2).swapaxes(0, 1),
            ("fsdp", "dcn", "tensor"),
            "dcn",
            "fsdp",
        ),
        # an axis that goes on across the slices
        (slices().reshape(2, 2, 4).swapaxes(0, 1).reshape(2, 8), ("a", "b"), "b", "a"),
    ],
    ids=["first", "swapped", "last", "middle", "across"],
)
def test_the_program_of_a_slice_is_read_on_the_whole_mesh(
    devices, names, between, inside
):
    """Its groups count the devices of the slice; what crosses names devices by id."""
    from efopt.hlo.mesh import Layout

    layout = Layout(Slices(devices, names), 8)  # pyright: ignore[reportArgumentType]
    crossing = [layout.placed(c).axes for c in wire.read_hlo(TPU_SLICES)]
    assert crossing == [(between,)] * 2
    halves = collective("all-reduce", "replica_groups={{0,4},{1,5},{2,6},{3,7}}")
    (c,) = wire.read_hlo(halves)
    assert layout.placed(c).axes == (inside,)


def test_slices_that_share_a_mesh_unequally_are_refused():
    from efopt.hlo.mesh import Layout

    devices = np.array([Device(0, n) for n in range(9)] + [Device(1, 0)])
    with pytest.raises(ValueError, match="compiled for 8 devices"):
        Layout(Slices(devices, ("x",)), 8)  # pyright: ignore[reportArgumentType]


def test_a_device_that_the_mesh_does_not_have_is_named():
    from efopt.hlo.mesh import Layout

    layout = Layout(Slices(slices(), ("dcn", "x")), 8)  # pyright: ignore[reportArgumentType]
    text = TPU_SLICES.replace('"{1,2}x{0:7}"', '"{1,3}x{0:7}"')
    with pytest.raises(ValueError, match="`send` joins a device, 300000, that it does"):
        layout.placed(wire.read_hlo(text)[0])


# ------------------------------------------------------------------------------- bytes


def found(operation, nbytes, sizes):
    """A collective of `nbytes` over axes of these sizes, once."""
    n = math.prod(sizes.values())
    text = collective(operation, f"replica_groups=[1,{n}]<=[{n}]", f"u8[{nbytes}]{{0}}")
    (c,) = wire.read_hlo(text)
    return wire.Collective(
        **{f: getattr(c, f) for f in ("operation", "name", "element_types", "shapes")},
        group_size=c.group_size,
        operand_bytes=c.operand_bytes,
        link_bytes=c.link_bytes,
        axes=tuple(sizes),
        spans=tuple(sizes.values()),
    )


@pytest.mark.parametrize(
    ("operation", "sizes", "link", "least"),
    [  # 960 bytes a device; least: across dcn, the other axes helping
        ("all-reduce", {"dcn": 2}, 960, 960),
        ("all-reduce", {"dcn": 2, "fsdp": 4}, 1680, 240),  # 2 * 1/2 * 960/4
        ("all-reduce", {"dcn": 4, "fsdp": 2}, 1680, 720),  # 2 * 3/4 * 960/2
        ("reduce-scatter", {"dcn": 2, "fsdp": 4}, 840, 120),
        ("all-gather", {"dcn": 2, "fsdp": 4}, 6720, 960),  # once to the other slice
        ("all-gather", {"dcn": 4, "fsdp": 2}, 6720, 2880),
        ("all-to-all", {"dcn": 2, "fsdp": 4}, 840, 480),  # half of it is for the other
        ("collective-permute", {"dcn": 2, "fsdp": 4}, 960, 960),
        ("collective-broadcast", {"dcn": 2, "fsdp": 4}, 960, 240),
        ("all-reduce", {"fsdp": 4}, 1440, 0),
    ],
)
def test_the_bytes_that_have_to_cross_an_axis(operation, sizes, link, least):
    c = found(operation, 960, sizes)
    assert c.link_bytes == link
    assert c.bytes_across("dcn") == least
    assert c.bytes_across(tuple(sizes)) == link  # every device a position of its own
    assert c.bytes_across("tensor") == 0


def test_sums_by_axis_count_a_collective_whole_for_each():
    mesh = build((2, 4), ("dcn", "fsdp"))

    def body(x):  # 512 bytes on each device
        both = jax.lax.psum(x, ("dcn", "fsdp"))  # 896 on the link, 128 across dcn
        inside = jax.lax.all_gather(x, "fsdp").sum(0)  # 1536
        slow = jax.lax.ppermute(x, "dcn", [(0, 1), (1, 0)])  # 512
        return both + inside + slow

    report = wire.measure(*mapped(body, mesh))
    assert report.bytes_over("dcn") == wire.AxisBytes(1024, 896 + 512, 128 + 512)
    # over fsdp: 2 * 3/4 * 512/2 of the sum
    assert report.bytes_over("fsdp") == wire.AxisBytes(1024, 896 + 1536, 384 + 1536)
    assert report.bytes_over(("dcn", "fsdp")) == wire.AxisBytes(1536, 2944, 2944)
    assert len(report.over("dcn").collectives) == 2
    assert len(report.over(("dcn", "fsdp")).collectives) == 3
    assert report.over("dcn").bytes_sent_per_worker == 896 + 512


@pytest.mark.parametrize("times", [1, 3])
def test_bytes_by_axis_count_the_trips_of_a_loop(times):
    def body(x):
        def step(x, _):
            return jax.lax.psum(x, ("dcn", "fsdp")) * 0.5, None

        return jax.lax.scan(step, x, None, length=times)[0]

    report = wire.measure(*mapped(body, build((2, 4), ("dcn", "fsdp"))))
    assert report.bytes_over("dcn") == wire.AxisBytes(
        512 * times, 896 * times, 128 * times
    )


def test_a_report_on_a_mesh_prints_axes_and_sums():
    mesh = build((2, 4, 1), ("dcn", "fsdp", "one"))
    slow = [(0, 1), (1, 0)]
    report = wire.measure(
        *mapped(
            lambda x: jax.lax.ppermute(jax.lax.psum(x, ("dcn", "fsdp")), "dcn", slow),
            mesh,
        )
    )
    assert str(report).splitlines() == [
        "operation           type  shape   count  axes      group  operand bytes  link bytes",  # noqa: E501
        "all-reduce          f32   [8,16]      1  dcn,fsdp      8            512         896",  # noqa: E501
        "collective-permute  f32   [8,16]      1  dcn           2            512         512",  # noqa: E501
        "total                                                             1,024       1,408",  # noqa: E501
        "over dcn                                                          1,024       1,408",  # noqa: E501
        "over fsdp                                                           512         896",  # noqa: E501
        "over one                                                              0           0",  # noqa: E501
        "dcn: 640 of its link bytes have to cross it",
        "fsdp: 384 of its link bytes have to cross it",
    ]
