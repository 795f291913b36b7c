"""A plan on a mesh is what the compiled step of a user sends over each axis."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from workers_under_test import FAST, slow

import efopt
from efopt import compressors, wire
from efopt.wire.__main__ import main

D, F, BATCH = 64, 128, 32
S = jax.ShapeDtypeStruct
TREE = {
    "w1": S((D, F), jnp.float32),
    "w2": S((F, D), jnp.float32),
    "b": S((F,), jnp.float32),
    "scale": S((), jnp.float32),
}
MESHES = {
    "2x4": ({"dcn": 2, "fsdp": 4}, {"w1": P("fsdp"), "w2": P(None, "fsdp")}),
    "4x2": ({"fsdp": 2, "dcn": 4}, {"w1": P("fsdp"), "w2": P(None, "fsdp")}),
    "2x2x2": (
        {"dcn": 2, "fsdp": 2, "tensor": 2},
        {"w1": P("fsdp", "tensor"), "w2": P("tensor"), "b": P("tensor")},
    ),
    "2x2x2, in the middle": (
        {"fsdp": 2, "dcn": 2, "tensor": 2},
        {"w1": P(None, ("fsdp", "tensor")), "w2": P(("fsdp", "tensor"), None)},
    ),
}
WAYS = {
    "dense": (compressors.identity(), None),
    "sign gather": (compressors.scaled_sign(64), "all_gather"),
    "sign two_phase": (compressors.scaled_sign(64), "two_phase"),
    "vote": (compressors.sign(), "majority_vote"),
    "int8 two_phase": (compressors.quantize(8, block_size=64), "two_phase"),
    "top_k": (compressors.top_k(fraction=0.02, block_size=256), None),
    "low rank": (compressors.power_sgd(rank=2), None),
    "random block": (compressors.random_block(fraction=0.1), None),
    "bf16": (compressors.cast("bfloat16"), None),
}
# Each entrance, one message and two rounds; all of them on two meshes by `-m slow`, on
# the others by `-m exhaustive`.
QUICK = {("sign two_phase", "2x4", "nested"), ("low rank", "2x4", "global")}
STEPS = [
    slow(
        *(way, mesh, how),
        when=(way, mesh, how) not in QUICK,
        rare=mesh in ("4x2", "2x2x2"),
    )
    for way in WAYS
    for mesh in MESHES
    for how in ("nested", "global")
]


def specs_on(mesh):
    return {name: P() for name in TREE} | MESHES[mesh][1]


def loss_fn(p, x):
    h = jax.nn.relu(x @ p["w1"] + p["b"][None])
    return jnp.mean((h @ p["w2"] * (1 + p["scale"]) - x) ** 2)


def compiled(way, mesh, how):
    """A user's step on the mesh, compiled for shapes alone."""
    compressor, exchange = WAYS[way]
    sizes, specs = MESHES[mesh][0], specs_on(mesh)
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange),
        optax.sgd(0.1),
    )
    init = jax.eval_shape(lambda p: {"params": p, "opt": tx.init(p)}, TREE)
    state = efopt.distribute(init, mesh, specs)
    rows = NamedSharding(mesh, P(("dcn", "fsdp")))
    x = S((BATCH, D), jnp.float32, sharding=rows)

    def update(state, grads):
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}

    def globally(state, x):
        loss, grads = efopt.value_and_grad(loss_fn, axis_name="dcn")(state["params"], x)
        return update(state, grads), loss

    def nested(state, x):
        local = efopt.local_params(state["params"], "dcn")
        loss, grads = jax.value_and_grad(loss_fn)(local, x)
        return update(state, grads), jax.lax.pmean(loss, "dcn")

    if how == "nested":
        manual = jax.tree.map(
            lambda s: P(*(a if a == "dcn" else None for a in s)),
            efopt.partition_specs(state, specs),
            is_leaf=lambda x: isinstance(x, P),
        )
        step = jax.shard_map(
            nested,
            mesh=mesh,
            in_specs=(manual, P("dcn")),
            out_specs=(manual, P()),
            axis_names={"dcn"},
        )
    else:
        step = globally
    return jax.jit(step).lower(state, x).compile(FAST)


def planned(way, mesh, **options):
    compressor, exchange = WAYS[way]
    return wire.plan(
        compressor,
        TREE,
        mesh=MESHES[mesh][0],
        axis_name="dcn",
        params_specs=specs_on(mesh),
        exchange=exchange,
        platform="cpu",
        **options,
    )


@pytest.mark.parametrize(("way", "mesh", "how"), STEPS)
def test_a_plan_is_what_crosses_the_slow_axis(way, mesh, how):
    report = wire.measure(compiled(way, mesh, how))
    found, told = report.bytes_over("dcn"), planned(way, mesh).report.bytes_over("dcn")
    loss = 2 * 4  # bytes
    for name in ("operand", "link", "least"):
        assert getattr(told, name) == pytest.approx(
            getattr(found, name), rel=0.01, abs=loss
        ), (name, str(report))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_fast_axes_have_the_gathers_of_pieces(mesh):
    """Of the mean and of the residual, once for each kind of cut and dtype."""
    told = planned("sign two_phase", mesh).report
    sizes, specs = MESHES[mesh][0], specs_on(mesh)
    inner = tuple(name for name in sizes if name != "dcn")
    named = {name: str(spec) for name, spec in specs.items()}
    kinds = {}
    for name, x in TREE.items():
        spare = tuple(a for a in inner if a not in named[name])
        if spare:
            by = math.prod(sizes[a] for a in spare)
            kept = math.prod(sizes[a] for a in inner) // by
            kinds[spare] = kinds.get(spare, 0) + -(-math.prod(x.shape) // kept // by)
    gathers = [c for c in told.collectives if "dcn" not in c.axes]
    assert {c.operation for c in gathers} == {"all-gather"}
    assert sorted((c.axes, c.operand_bytes) for c in gathers) == sorted(
        (axes, 4 * n) for axes, n in kinds.items() for _ in range(2)
    )
    assert told.mesh == tuple(sizes.items())


def test_every_form_of_a_mesh_is_read_alike():
    sizes, specs = MESHES["2x4"]
    mesh = jax.make_mesh((2, 4), ("dcn", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = specs_on("2x4")
    plans = [
        wire.plan(compressors.sign(), TREE, mesh=m, axis_name="dcn", params_specs=specs)
        for m in (sizes, mesh, AbstractMesh((2, 4), ("dcn", "fsdp")))
    ]
    placed = efopt.distribute(TREE, mesh, specs)
    plans.append(wire.plan(compressors.sign(), placed, mesh=mesh, axis_name="dcn"))
    assert all(p == plans[0] for p in plans)
    assert len(set(map(hash, plans))) == 1


def test_a_mesh_of_one_axis_is_a_flat_axis():
    flat = wire.plan(compressors.scaled_sign(64), TREE, num_workers=8)
    mesh = wire.plan(
        compressors.scaled_sign(64), TREE, mesh={"data": 8}, axis_name="data"
    )
    assert mesh.leaves == flat.leaves
    assert mesh.bytes_per_device == flat.bytes_per_device == flat.bytes_per_card
    assert mesh.dense.bytes_sent_per_worker == flat.dense.bytes_sent_per_worker
    assert (mesh.slow, flat.slow, flat.devices_per_card) == (("data",), (), 1)


def test_two_slow_axes_count_as_one():
    way = compressors.scaled_sign(64), {"w": S((64, 64), jnp.float32)}
    one = wire.plan(*way, mesh={"dcn": 4, "fsdp": 2}, axis_name="dcn")
    two = wire.plan(
        *way,
        mesh={"pods": 2, "slices": 2, "fsdp": 2},
        axis_name=("pods", "slices"),
        networks={"pods": wire.Network(1e9), "slices": wire.Network(1e9)},
    )
    assert (two.num_workers, two.slow) == (4, ("pods", "slices"))
    assert two.bytes_per_device == one.bytes_per_device
    assert two.exchange_seconds == pytest.approx(8 * two.bytes_per_device / 1e9)


def test_time_is_that_of_cards_and_of_fast_links():
    networks = {"dcn": wire.Network(1e9, 1e-3), "fsdp": wire.Network(1e12, 1e-6)}
    p = planned("sign two_phase", "2x4", networks=networks, devices_per_card={"dcn": 4})
    over, fast = (p.report.bytes_over(a).link for a in ("dcn", "fsdp"))
    assert (p.bytes_per_device, p.bytes_per_card) == (over, 4 * over)
    seconds = 8 * 4 * over / 1e9 + 2e-3  # two collectives of two workers
    seconds += 8 * fast / 1e12 + 2 * 3e-6  # two gathers of four devices
    assert p.exchange_seconds == pytest.approx(seconds)
    dense = p.dense.bytes_over("dcn").link
    assert p.dense_step_seconds == pytest.approx(8 * 4 * dense / 1e9 + 2e-3)
    assert p.dense.bytes_over("fsdp").link == 0
    assert p.saved_bytes == 4 * (dense - over) and p.helps
    slower = p.exchange_seconds - 8 * 4 * over / 1e9 - 2e-3
    assert p.break_even_bandwidth == pytest.approx(8 * p.saved_bytes / slower)
    assert "a network card" in p.verdict
    text = str(p)
    assert "workers: 2 along dcn, mesh: dcn=2, fsdp=4, devices a net" in text
    assert re.search(rf"this +4 +{over:,} +{4 * over:,} ", text)


def test_nothing_crosses_a_slow_axis_of_one():
    p = wire.plan(compressors.sign(), TREE, mesh={"dcn": 1, "fsdp": 8}, axis_name="dcn")
    assert (p.bytes_per_device, p.dense.collectives) == (0, ())
    assert p.verdict == "This will not help: one worker sends nothing."


def test_leaves_are_told_as_one_device_compresses_them():
    p = planned("sign two_phase", "2x4")
    by_name = {leaf.name: leaf for leaf in p.leaves}
    shard = D * F // 4
    assert by_name["['w1']"].payload_bits == shard + 32 * shard // 64
    assert by_name["['b']"].payload_bits == 64 + 32  # a block, padded
    assert by_name["['w1']"].shape == (D, F)


def test_a_mesh_from_a_shell(capsys):
    main(
        [
            *("plan", "scaled_sign(64)", "--shapes", "64x128", "128"),
            *(
                "--mesh",
                "dcn=2,fsdp=4",
                "--slow",
                "dcn",
                "--specs",
                "none,fsdp",
                "none",
            ),
            *("--bandwidth", "dcn=1Gbit/s,fsdp=1Tbit/s", "--latency", "dcn=50us"),
            *("--devices-per-card", "dcn=2", "--compute", "1ms"),
        ]
    )
    expected = wire.plan(
        compressors.scaled_sign(64),
        [S((64, 128), jnp.float32), S((128,), jnp.float32)],
        mesh={"dcn": 2, "fsdp": 4},
        axis_name="dcn",
        params_specs=[P(None, "fsdp"), P()],
        networks={"dcn": wire.Network(1e9, 50e-6), "fsdp": wire.Network(1e12)},
        devices_per_card={"dcn": 2},
        compute_seconds=1e-3,
    )
    assert capsys.readouterr().out == f"{expected}\n"


def test_seventy_billion_parameters(capsys):
    main(
        [
            *("plan", "scaled_sign(1024)", "--parameters", "70e9", "--mesh"),
            *("dcn=4,fsdp=64", "--slow", "dcn", "--exchange", "two_phase"),
        ]
    )
    shard, n = 70_000_000_000 // 64, 4
    blocks = -(-shard // 1024)
    blocks = -(-blocks // n) * n
    words = blocks * (1024 // 32 + 1)  # signs, and a scale a block
    out = capsys.readouterr().out
    assert f"this                      2  {2 * 3 * words:,}".split() == next(
        line.split() for line in out.splitlines() if line.startswith("this")
    )


REFUSED = {
    "no size": ({"mesh": {"dcn": 2.5}}, ValueError, "ints of at least 1; got"),
    "a tuple": ({"mesh": (2, 4)}, TypeError, "must be sizes by axis"),
    "no such axis": ({"axis_name": "data"}, ValueError, "must name axes of the mesh"),
    "no axis": ({"axis_name": None}, TypeError, "`plan(axis_name=...)` must be"),
    "both": ({"num_workers": 2}, ValueError, "is of a flat axis; with `mesh`"),
    "a flat bandwidth": ({"bandwidth": 1e9}, ValueError, "give `networks="),
    "a link": (
        {"networks": {"dcn": 1e9}},
        TypeError,
        "must be a `Network` by axis, got",
    ),
    "a link's axis": (
        {"networks": {"data": wire.Network(1e9)}},
        ValueError,
        "must name axes of the mesh, 'dcn', 'fsdp'; got 'data'",
    ),
    "a link's bandwidth": (
        {"networks": {"dcn": wire.Network(-1.0)}},
        ValueError,
        "`plan(networks={'dcn': Network(bandwidth=...)})` must be a positive number",
    ),
    "a link's latency": (
        {"networks": {"dcn": wire.Network(1e9, -1.0)}},
        ValueError,
        "`plan(networks={'dcn': Network(latency=...)})` must be a number of seconds",
    ),
    "cards of the fast axis": (
        {"devices_per_card": {"fsdp": 2}},
        ValueError,
        "must name the slow axis, 'dcn'; got 'fsdp'",
    ),
    "cards that do not divide": (
        {"devices_per_card": {"dcn": 3}},
        ValueError,
        "divides the 4 devices of one position on the slow axis, got 3",
    ),
    "specs of another tree": (
        {"params_specs": {"w": P()}},
        ValueError,
        "or a tree of them like `params`",
    ),
    "specs of the workers' axis": (
        {"params_specs": P("dcn")},
        ValueError,
        "'dcn' is an axis of the workers",
    ),
    "specs of no axis": ({"params_specs": P("tp")}, ValueError, "has no axis 'tp'"),
    "specs of too many": (
        {"params_specs": P("fsdp")},
        ValueError,
        "['scale'] of shape () cannot be sharded by",
    ),
    "specs that do not divide": (
        {
            "params_specs": {**specs_on("2x4"), "b": P("fsdp")},
            "mesh": {"dcn": 2, "fsdp": 3},
        },
        ValueError,
        "['b'] of shape (128,) cannot be sharded by",
    ),
    "a slice's topology": (
        {"platform": "tpu", "topology": "v5e:2x4"},
        ValueError,
        "with `mesh` leave it out",
    ),
    "links without a mesh": (
        {"mesh": None, "axis_name": None, "networks": {}, "num_workers": 2},
        ValueError,
        "`plan(networks=...)` goes with `mesh`",
    ),
    "neither": (
        {"mesh": None, "axis_name": None},
        ValueError,
        "got None; or give `mesh`",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_say_what_is_wrong(options, error, message):
    good = {"mesh": {"dcn": 2, "fsdp": 4}, "axis_name": "dcn"}
    with pytest.raises(error, match=re.escape(message)):
        wire.plan(compressors.sign(), TREE, **good | options)


def test_unequal_links_of_two_slow_axes_are_refused():
    with pytest.raises(ValueError, match="count as one slow axis"):
        wire.plan(
            compressors.sign(),
            TREE,
            mesh={"pods": 2, "slices": 2},
            axis_name=("pods", "slices"),
            networks={"pods": wire.Network(1e9), "slices": wire.Network(1e10)},
        )


GOOD = ["plan", "sign()", "--shapes", "8x8", "--mesh", "dcn=2,fsdp=4"]
NO_COMMANDS = {
    "neither": (["plan", "sign()", "--parameters", "9"], "--workers and --mesh"),
    "both": ([*GOOD, "--slow", "dcn", "--workers", "2"], "--workers is of a flat"),
    "no slow axis": (GOOD, "--mesh needs --slow"),
    "a flat rate": ([*GOOD, "--slow", "dcn", "--bandwidth", "1Gbit/s"], "dcn=..."),
    "a rate by axis": (
        ["plan", "sign()", "--parameters", "9", "--workers", "2", "--bandwidth"]
        + ["dcn=1Gbit/s"],
        "--bandwidth by axis goes with --mesh",
    ),
    "specs": ([*GOOD, "--slow", "dcn", "--specs", "none", "fsdp"], "got 2"),
    "no spec": ([*GOOD, "--slow", "dcn", "--specs", "4,fsdp"], "is no spec such as"),
    "no sizes": ([*GOOD[:-1], "2x4", "--slow", "dcn"], "is not by axis"),
    "no number": ([*GOOD[:-1], "dcn=x", "--slow", "dcn"], "is no number"),
    "cards": (
        ["plan", "sign()", "--parameters", "9", "--workers", "2"]
        + ["--devices-per-card", "dcn=2"],
        "--devices-per-card goes with --mesh",
    ),
}


@pytest.mark.parametrize(("argv", "says"), NO_COMMANDS.values(), ids=NO_COMMANDS)
def test_a_command_that_cannot_be_is_refused(capsys, argv, says):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())
