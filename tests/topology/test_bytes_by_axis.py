"""What crosses the slow axis, and that nothing crosses the fast ones for it."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import meshes
import optax
import pytest
from workers_under_test import slow

import efopt
from efopt import wire

MESH = meshes.TWO_BY_FOUR
FOUR_BY_FOUR = meshes.Mesh((4, 4))
# Cheap machine code: these programs are only looked at.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SHARDED = {
    "rows": ((256, 512), jax.P("fsdp", None)),
    "columns": ((512, 256), jax.P(None, "fsdp")),
}
BIAS = {"bias": ((8192,), jax.P())}
LEAST = {
    "sign-gather": (efopt.scaled_sign(1024), "all_gather", 30),
    "sign-two_phase": (efopt.scaled_sign(1024), "two_phase", 30),
    "top_k-gather": (efopt.top_k(fraction=0.01, block_size=1024), "all_gather", 60),
    "bits-two_phase": (efopt.quantize(8, block_size=1024), "two_phase", 3.9),
    "power_sgd": (efopt.power_sgd(4, per_shard=True), "all_reduce", 14),  # of 64 x 512
    # 128 rows of 256: a sketch of 4 x 128, and two of the rows
    "arc_top_k": (efopt.compressors.arc_top_k(fraction=0.01), "all_reduce", 31),
}
VARIANTS = {"sign-gather", "bits-two_phase", "arc_top_k"}


def step_of(entrance, compressor, exchange, shapes, mesh=MESH):
    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange),
        optax.sgd(meshes.RATE),
    )
    params, specs, grads = meshes.task(mesh, steps=1, shapes=shapes)
    step, state, place = meshes.make(
        entrance, tx, mesh, params, specs, compiler_options=FAST
    )
    return step, state, place(grads[0])


@functools.cache
def dense(entrance, bias=False, mesh=MESH):
    shapes = SHARDED | (BIAS if bias else {})
    identity = efopt.compressors.identity()
    return wire.measure(*step_of(entrance, identity, None, shapes, mesh))


cases = pytest.mark.parametrize(
    "case, entrance",
    [
        pytest.param(c, e, marks=meshes.NIGHTLY)
        if (c, e) == ("power_sgd", "global")
        else slow(c, e, when=e != "global" or c in VARIANTS)
        for c in LEAST
        for e in meshes.ENTRANCES
    ],
)


@cases
def test_sharded_parameters_send_nothing_inside(case, entrance):
    compressor, exchange, least = LEAST[case]
    before = dense(entrance)
    assert before.bytes_over("fsdp").link == 0
    report = wire.check(
        *step_of(entrance, compressor, exchange, SHARDED), axis="fsdp", beyond=before
    )
    sent, whole = report.bytes_over("dcn").link, before.bytes_over("dcn").link
    assert whole >= least * sent > 0, report


@pytest.mark.parametrize(
    "entrance",
    [
        pytest.param(e, marks=[] if e == "nested" else [pytest.mark.slow])
        for e in meshes.ENTRANCES
    ],
)
def test_what_is_equal_behind_a_worker_is_sent_once(entrance):
    """Each device sends a quarter of a bias; the rest of it comes on the fast axis."""
    case = step_of(entrance, efopt.scaled_sign(1024), "two_phase", SHARDED | BIAS)
    bias = 4 * 8192
    report = wire.check(
        *case,
        axis="fsdp",
        beyond=dense(entrance, bias=True),
        carriers=["all-gather:u32"],
        at_most=2 * bias * 3 / 4,  # its average and what was lost of it
    )
    sent = report.bytes_over("dcn").link
    alone = wire.measure(
        *step_of(entrance, efopt.scaled_sign(1024), "two_phase", SHARDED)
    )
    added = sent - alone.bytes_over("dcn").link
    assert added == 2 * (1024 // 8 + 4), report  # two blocks of signs and a scale


def check_on(mesh, case):
    """What is planned crosses the slow axis, and a device owes its part alone."""
    compressor, exchange, _ = LEAST[case]
    step, state, batch = step_of("global", compressor, exchange, SHARDED, mesh)
    report = wire.check(
        step, state, batch, axis="fsdp", beyond=dense("global", mesh=mesh)
    )
    planned = wire.plan(
        compressor,
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), state["params"]),
        mesh=dict(zip(mesh.names, mesh.sizes, strict=True)),
        axis_name="dcn",
        params_specs={name: spec for name, (_, spec) in SHARDED.items()},
        exchange=exchange,
        platform="cpu",
    )
    sent = report.bytes_over("dcn").link
    assert planned.report.bytes_over("dcn").link == pytest.approx(sent, rel=0.01)
    whole = sum(x.nbytes for x in jax.tree.leaves(state["params"]))
    owed = jax.tree.leaves(state["opt"][0].residual)
    held = sum(x.addressable_shards[0].data.nbytes for x in owed)
    assert held * mesh.size("fsdp") == whole
    meshes.copies_equal(step(state, batch))


@pytest.mark.parametrize("case", [slow(c, when=c != "sign-gather") for c in LEAST])
def test_a_device_owes_its_part_and_sends_what_is_planned(case):
    check_on(MESH, case)


@pytest.mark.slow
def test_so_it_is_on_sixteen_devices():
    """Four by four, in a process of its own: this one has eight."""
    tests = Path(__file__).parents[1]
    program = (
        "import test_bytes_by_axis as t\n"
        "for case in t.LEAST: t.check_on(t.FOUR_BY_FOUR, case)\n"
        "print(len(t.LEAST), t.jax.device_count())"
    )
    path = os.pathsep.join(map(str, [tests / "topology", tests, tests.parent]))
    env = os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "16"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | {"JAX_PLATFORMS": "cpu", "NPROC": "32"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.split() == [f"{len(LEAST)}", "16"], done.stderr
