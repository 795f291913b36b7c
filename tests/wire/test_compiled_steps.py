"""What the compiled program really sends: collectives, carriers and bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import AXIS, FAST, make_mesh, slow

import efopt
from efopt import wire

ROUNDS = {"all_reduce": 1, "all_gather": 1, "two_phase": 2, "majority_vote": 2}
CASES = [
    (efopt.compressors.identity(), "all_reduce"),
    (efopt.compressors.identity(), "all_gather"),
    (efopt.sign(), "all_gather"),
    (efopt.sign(), "two_phase"),
    (efopt.sign(), "majority_vote"),
    (efopt.scaled_sign(), "all_gather"),
    (efopt.scaled_sign(1024), "all_gather"),
    (efopt.scaled_sign(1024), "two_phase"),
    (efopt.top_k(fraction=0.01), "all_gather"),
    (efopt.top_k(fraction=0.05, block_size=256), "two_phase"),
    (efopt.random_k(fraction=0.05), "all_reduce"),
    (efopt.random_k(fraction=0.05), "all_gather"),
    (efopt.random_k(fraction=0.05, block_size=256), "two_phase"),
]
# By default one a exchange, in the order above: dense, chosen, one bit, a vote.
DEFAULT = (0, 4, 7, 8)
EACH = [
    slow(*case, when=i not in DEFAULT, id="{}-{}".format(*case))
    for i, case in enumerate(CASES)
]
SHAPES = [(64, 64), (64, 64), (100, 33), (4096,), (37,), (5,), (), (0,), (3, 3, 7, 5)]


def report(compressor, exchange, shapes=SHAPES, n=8, dtypes=None):
    mesh = make_mesh("auto", n)
    dtypes = dtypes or [jnp.float32] * len(shapes)
    params = list(map(jax.ShapeDtypeStruct, shapes, dtypes))
    tx = efopt.error_feedback(compressor, axis_name=AXIS, exchange=exchange)
    state = efopt.distribute(jax.eval_shape(tx.init, params), mesh)
    specs = efopt.partition_specs(state)
    sharding = jax.NamedSharding(mesh, P(AXIS))
    grads = [
        jax.ShapeDtypeStruct((n, *p.shape), p.dtype, sharding=sharding) for p in params
    ]
    fn = jax.shard_map(
        lambda g, s: tx.update([x[0] for x in g], s),
        mesh=mesh,
        in_specs=(P(AXIS), specs),
        out_specs=(P(), specs),
    )
    return wire.measure(jax.jit(fn, compiler_options=FAST), grads, state)


@pytest.mark.parametrize(("compressor", "exchange"), EACH)
def test_one_collective_a_round_and_the_bytes_declared(compressor, exchange):
    got = report(compressor, exchange)
    assert len(got.collectives) == ROUNDS[exchange]
    declared = sum(compressor.payload_bits(s) for s in SHAPES) // 8
    operations = [c.operation for c in got.collectives]
    if exchange == "all_reduce":
        assert operations == ["all-reduce"]
        assert got.operand_bytes == declared
        return
    for c in got.collectives:
        assert set(c.element_types) == {"u32"}
    if exchange == "all_gather":
        assert operations == ["all-gather"]
        slack = 4 * 2 * len(SHAPES)  # every array of a bucket in whole words
        assert declared <= got.operand_bytes <= declared + slack
        assert got.bytes_sent_per_worker == 7 * got.operand_bytes
        return
    assert sorted(operations) == ["all-gather", "all-to-all"]
    there, back = (
        next(c.operand_bytes for c in got.collectives if c.operation == o)
        for o in ("all-to-all", "all-gather")
    )
    # Each group of equal blocks is padded to a multiple of the workers.
    block = compressor.codec.block_size
    groups = {b for s in SHAPES if np.prod(s) for b in [_unit(block, s)]}
    slack = sum(8 * (compressor.payload_bits((b,)) // 8 + 8) for b in groups)
    assert declared <= there <= declared + slack
    assert back == there // 8


def _unit(block, shape):
    size = int(np.prod(shape))
    return min(block, max(16, 4 ** -(-(size - 1).bit_length() // 2)))


@pytest.mark.parametrize(
    ("compressor", "exchange"),
    [slow(*c, when=i != 8, id="{}-{}".format(*c)) for i, c in enumerate(CASES)],
)
def test_collectives_do_not_grow_with_leaves_or_dtypes(compressor, exchange):
    shapes = [(5, 8), (17,)] * 10
    dtypes = [jnp.float32, jnp.bfloat16] * 10
    got = report(compressor, exchange, shapes, dtypes=dtypes)
    limit = ROUNDS[exchange] * (2 if exchange == "all_reduce" else 1)
    assert len(got.collectives) <= limit


@pytest.mark.parametrize(
    "compressor",
    [
        efopt.power_sgd(2),
        efopt.compressors.partition(
            {"matrix": efopt.power_sgd(2), "vector": efopt.compressors.identity()},
            lambda params: ["matrix" if p.ndim > 1 else "vector" for p in params],
        ),
    ],
    ids=["power_sgd", "partition"],
)
def test_two_rounds_are_two_collectives_however_many_matrices(compressor):
    """Of different shapes, so that no two are one batch."""
    shapes = [(64, 64), (64,), (32, 48), (48,), (64, 65), (65,), (100, 33), (33,)]
    got = report(compressor, None, shapes)
    assert len(got.collectives) == 2


def test_packed_sign_is_thirty_times_smaller_than_dense():
    """20 leaves, 1 M coordinates, blocks of 1024, padding included."""
    shapes = [(100, 500)] * 19 + [(50_000,)]
    dense = report(efopt.compressors.identity(), "all_reduce", shapes).operand_bytes
    signs = report(efopt.scaled_sign(1024), "all_gather", shapes).operand_bytes
    assert dense == 4_000_000
    assert dense / signs >= 30


def test_bytes_of_two_phase_do_not_grow_with_workers():
    shapes = [(1024, 64)]
    sent = [
        report(efopt.scaled_sign(1024), "two_phase", shapes, n).bytes_sent_per_worker
        for n in (2, 8)
    ]
    payload = efopt.scaled_sign(1024).payload_bits(shapes[0]) // 8
    for n, b in zip((2, 8), sent, strict=True):
        assert b == pytest.approx(2 * payload * (n - 1) / n, rel=0.01)


def test_the_program_does_not_grow_with_leaves_as_a_decode_per_leaf_would():
    """Ten times the leaves: the decode loop stays one loop of the same few programs.

    Up to 32 leaves are joined in one of these.
    """

    def loops(leaves):
        mesh = make_mesh("auto")
        params = [
            jax.ShapeDtypeStruct((8, 8 + i % 5), "float32") for i in range(leaves)
        ]
        tx = efopt.error_feedback(efopt.scaled_sign(64), axis_name=AXIS)
        state = efopt.distribute(jax.eval_shape(tx.init, params), mesh)
        specs = efopt.partition_specs(state)
        fn = jax.shard_map(
            lambda g, s: tx.update([x[0] for x in g], s),
            mesh=mesh,
            in_specs=(P(AXIS), specs),
            out_specs=(P(), specs),
        )
        grads = [jax.ShapeDtypeStruct((8, *p.shape), p.dtype) for p in params]
        text = jax.jit(fn).lower(grads, state).as_text()
        return text.count("stablehlo.while"), text.count("stablehlo.shift_right")

    few, thirty, sixty = loops(3), loops(30), loops(60)
    assert thirty == few
    assert sixty[0] == few[0] and sixty[1] <= 2 * few[1]
