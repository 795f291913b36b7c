"""Dion, Distributed Lion and 1-bit Adam for 64 TPUs: what their plans say."""

import jax
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from methods_under_test import stepped

import efopt
from efopt import wire

TOPOLOGY = "v5e:8x8"
TOP, SIGNS = efopt.top_k(fraction=0.01, block_size=1024), efopt.scaled_sign(1024)
ARC = efopt.compressors.arc_top_k(fraction=0.01)
DCT = efopt.compressors.dct_top_k(k=32)
SHAPES = {"a": (1024, 512), "b": (512, 512), "c": (4096,)}
PARAMS = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in SHAPES.items()}


def measured(tx):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY)
    devices = np.array(topology.devices).reshape(-1)
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    state = efopt.distribute((PARAMS, jax.eval_shape(tx.init, PARAMS)), mesh)
    options = wire.tpu_compiler_options(TOPOLOGY)
    return wire.measure(*stepped(tx, mesh, state, PARAMS, compiler_options=options))


def planned(compressor, **options):
    # Under the compiler options no all-gather is replaced: no topology here.
    return wire.plan(compressor, PARAMS, num_workers=64, platform="tpu", **options)


def test_dion_sends_its_factors():
    report = measured(
        efopt.optimizers.dion(0.01, rank=16, fallback=optax.sgd(0.1), axis_name="data")
    )
    plan = planned(efopt.power_sgd(rank=16, min_compression=1))
    assert report.operand_bytes == plan.operand_bytes
    assert report.bytes_sent_per_worker == plan.bytes_sent_per_worker
    assert {c.operation for c in report.collectives} == {"all-reduce"}


def test_lion_votes():
    report = measured(efopt.optimizers.distributed_lion(0.01, axis_name="data"))
    plan = planned(efopt.sign(), exchange="majority_vote")
    assert report.operand_bytes == plan.operand_bytes
    assert report.bytes_sent_per_worker == plan.bytes_sent_per_worker


def test_one_bit_adam_holds_both_branches():
    report = measured(efopt.optimizers.one_bit_adam(0.01, warmup=9, axis_name="data"))
    dense = [c for c in report.collectives if c.operation == "all-reduce"]
    one_bit = [c for c in report.collectives if c.operation != "all-reduce"]
    signs = planned(efopt.scaled_sign(1024), exchange="two_phase")
    whole = planned(efopt.compressors.identity())
    assert sum(c.operand_bytes for c in dense) == whole.operand_bytes
    assert sum(c.operand_bytes for c in one_bit) == signs.operand_bytes


@pytest.mark.parametrize(
    ("tx", "compressor", "exchange"),
    [
        (efopt.feedback.ef21(TOP, beta=0.9, axis_name="data"), TOP, None),
        (
            efopt.feedback.ef21(SIGNS, axis_name="data", exchange="two_phase"),
            SIGNS,
            "two_phase",
        ),
        (efopt.feedback.econtrol(ARC, axis_name="data"), ARC, None),
        (efopt.feedback.loco(axis_name="data"), efopt.quantize(4), "two_phase"),
        (efopt.optimizers.demo(0.1, axis_name="data"), DCT, None),
    ],
    ids=["ef21", "ef21 both ways", "econtrol", "loco", "demo"],
)
def test_estimates_and_presets_send_payloads_alone(tx, compressor, exchange):
    report = measured(tx)
    plan = planned(compressor, exchange=exchange)
    assert report.operand_bytes == plan.operand_bytes
    assert report.bytes_sent_per_worker == plan.bytes_sent_per_worker
