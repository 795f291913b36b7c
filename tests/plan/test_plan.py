"""A plan from shapes is what the compiler then does; and what a plan says of it."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from workers_under_test import slow

import efopt
from efopt import wire

TREE = {
    "matrix": jax.ShapeDtypeStruct((24, 20), jnp.float32),
    "vector": jax.ShapeDtypeStruct((33,), jnp.bfloat16),
    "none": jax.ShapeDtypeStruct((0, 3), jnp.float32),
}
MIXED = efopt.compressors.partition(
    {"signs": efopt.scaled_sign(64), "dense": efopt.compressors.identity()},
    {"matrix": "signs", "vector": "dense", "none": "dense"},
)
S = jax.ShapeDtypeStruct
MATRIX = {"w": S((1024, 1024), jnp.float32), "b": S((1024,), jnp.float32)}


def test_leaves_share_what_travels_with_them():
    p = wire.plan(MIXED, TREE, num_workers=4, exchange="two_phase")
    by_name = {leaf.name: leaf for leaf in p.leaves}
    assert set(by_name) == {"['matrix']", "['vector']", "['none']"}
    matrix, vector = by_name["['matrix']"], by_name["['vector']"]
    assert (matrix.exchange, vector.exchange) == ("two_phase", "all_reduce")
    assert matrix.compressor == "scaled_sign(block_size=64)"
    # alone in its exchange: blocks of 64 for 480 coordinates, a scale for each
    assert matrix.payload_bits == 8 * (64 + 32)
    assert (vector.payload_bits, vector.operand_bytes) == (33 * 16, 66)
    assert vector.bytes_sent_per_worker == 99
    assert by_name["['none']"].payload_bits == 0
    assert sum(x.operand_bytes for x in p.leaves) == pytest.approx(p.operand_bytes)
    sent = sum(x.bytes_sent_per_worker for x in p.leaves)
    assert sent == pytest.approx(p.bytes_sent_per_worker)
    assert p.payload_bits == sum(x.payload_bits for x in p.leaves)


def test_plan_takes_arrays_and_structs_alike():
    arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), TREE)
    compressor = efopt.top_k(k=3)
    assert wire.plan(compressor, arrays, num_workers=4) == wire.plan(
        compressor, TREE, num_workers=4
    )


@pytest.mark.parametrize("n", [slow(2), 3, slow(100)])
def test_time_is_messages_by_latency_and_bytes_by_bandwidth(n):
    link = {"bandwidth": 8e6, "latency": 1e-3}  # a byte a microsecond
    p = wire.plan(
        efopt.scaled_sign(1024), MATRIX, num_workers=n, exchange="two_phase", **link
    )
    messages = (n - 1) + (n - 1)  # there and back
    expected = 1e-3 * messages + 1e-6 * p.bytes_sent_per_worker
    assert p.exchange_seconds == pytest.approx(expected)
    p = wire.plan(
        efopt.compressors.identity(),
        MATRIX,
        num_workers=n,
        **link,
        compute_seconds=5,
        compress_seconds=7,
    )
    sent = 2 * (n - 1) / n * 4 * 1025 * 1024
    dense = 1e-3 * 2 * (n - 1) + 1e-6 * sent
    assert p.exchange_seconds == pytest.approx(dense)
    assert p.step_seconds == pytest.approx(5 + 7 + dense)
    assert p.dense_step_seconds == pytest.approx(5 + dense)


def test_dense_is_the_all_reduce_of_every_coordinate():
    p = wire.plan(efopt.sign(), MATRIX, num_workers=4)
    size = 1025 * 1024
    assert p.dense_float32.operand_bytes == 4 * size
    assert p.dense_bfloat16.operand_bytes == 2 * size
    assert p.dense_float32.bytes_sent_per_worker == 6 * size
    assert (p.baseline, p.dense) == ("float32", p.dense_float32)
    half = jax.tree.map(lambda s: S(s.shape, jnp.bfloat16), MATRIX)
    p = wire.plan(efopt.sign(), half, num_workers=4)
    assert (p.baseline, p.dense.operand_bytes) == ("bfloat16", 2 * size)
    p = wire.plan(
        efopt.sign(), half, num_workers=4, platform="cpu"
    )  # has no sums in bfloat16
    assert p.dense_bfloat16.operand_bytes == 4 * size


def test_break_even_is_where_both_take_equally_long():
    options = {"compress_seconds": 2e-3, "latency": 1e-5}
    even = wire.plan(efopt.top_k(fraction=0.01), MATRIX, num_workers=8, **options)
    bandwidth = even.break_even_bandwidth
    for factor, helps in ((0.99, True), (1.01, False)):
        p = wire.plan(
            efopt.top_k(fraction=0.01),
            MATRIX,
            num_workers=8,
            bandwidth=factor * bandwidth,
            **options,
        )
        assert p.helps == helps
        assert p.break_even_bandwidth == bandwidth
        assert ("will not help" in str(p)) != helps
    p = wire.plan(
        efopt.top_k(fraction=0.01),
        MATRIX,
        num_workers=8,
        bandwidth=bandwidth,
        **options,
    )
    assert p.step_seconds == pytest.approx(p.dense_step_seconds)
    assert f"slower than {bandwidth / 1e9:.3g} Gbit/s" in p.verdict


def test_break_even_at_the_ends():
    assert (
        wire.plan(efopt.sign(), MATRIX, num_workers=2).break_even_bandwidth == math.inf
    )
    many = wire.plan(
        efopt.scaled_sign(), MATRIX, num_workers=100
    )  # 99 payloads and more than dense
    assert many.saved_bytes < 0 and many.break_even_bandwidth is None
    assert not many.helps and "no less than dense float32" in many.verdict
    # More bytes in half the messages: only a fast link makes up for them.
    many = wire.plan(
        efopt.scaled_sign(), MATRIX, num_workers=100, latency=1.0, bandwidth=1e12
    )
    assert many.helps and "on links faster than" in many.verdict
    slow = wire.plan(
        efopt.scaled_sign(), MATRIX, num_workers=100, latency=1.0, bandwidth=1e3
    )
    assert not slow.helps


def test_links_of_any_speed_are_planned_from_one_trace(monkeypatch):
    options = dict(compressor=efopt.sign(), params=S((77, 3), jnp.float32))
    wire.plan(**options, num_workers=3, bandwidth=1e9)
    monkeypatch.setattr(jax, "make_jaxpr", None)
    assert wire.plan(**options, num_workers=3, bandwidth=1e6, latency=1.0).helps
    with pytest.raises(TypeError):  # which is another one for other workers
        wire.plan(**options, num_workers=4)
    with pytest.raises(TypeError), jax.enable_x64(True):
        wire.plan(**options, num_workers=3)


def test_a_plan_that_does_not_help_names_what_would():
    text = str(wire.plan(efopt.scaled_sign(), MATRIX, num_workers=100, bandwidth=1e9))
    assert "This will not help." in text
    would = 'This would: scaled_sign(block_size=1024) with exchange="two_phase"'
    assert would in text
    text = str(wire.plan(efopt.sign(), MATRIX, num_workers=100, exchange="all_gather"))
    assert 'This would: sign() with exchange="two_phase"' in text
    text = str(
        wire.plan(efopt.compressors.identity(), MATRIX, num_workers=8, bandwidth=1e9)
    )
    assert "This would: power_sgd(rank=4" in text
    text = str(
        wire.plan(
            efopt.compressors.identity(),
            MATRIX,
            num_workers=8,
            bandwidth=1e9,
            compress_seconds=9.0,
        )
    )
    assert "Nor would anything else that was tried: stay with dense float32." in text
    text = str(wire.plan(efopt.scaled_sign(), MATRIX, num_workers=60))
    assert "But dense bfloat16 is better still." in text
    assert "one worker sends nothing" in str(
        wire.plan(efopt.sign(), MATRIX, num_workers=1)
    )


def test_plan_prints_tables_and_a_verdict():
    p = wire.plan(
        efopt.scaled_sign(1024),
        MATRIX,
        num_workers=8,
        exchange="two_phase",
        bandwidth=1e9,
        latency=5e-5,
        compute_seconds=0.02,
        compress_seconds=1e-3,
    )
    assert str(p).splitlines() == [
        "scaled_sign(block_size=1024), workers: 8",
        "scaled_sign(block_size=1024) by two_phase, leaves: 2",
        "",
        "leaf   shape        payload bits  operand bytes  link bytes",
        "['b']  [1024]              1,056            150         233",
        "['w']  [1024,1024]     1,081,344        153,102     238,159",
        "total                  1,082,400        153,252     238,392",
        "",
        "operation   type  shape     count  group  operand bytes  link bytes",
        "all-to-all  u32   [8,4257]      1      8        136,224     119,196",
        "all-gather  u32   [4257]        1      8         17,028     119,196",
        "total                                           153,252     238,392",
        "",
        "                collectives  link bytes  exchange     step",
        "this                      2     238,392   2.61 ms  23.6 ms",
        "dense float32             1   7,347,200   59.5 ms  79.5 ms",
        "dense bfloat16            1   3,673,600   30.1 ms  50.1 ms",
        "",
        "A step is 3.4 times as fast as dense float32. It pays on links slower than 56.9 Gbit/s.",  # noqa: E501
    ]


def test_long_trees_print_their_largest_leaves():
    tree = [S((i + 1,), jnp.float32) for i in range(40)]
    p = wire.plan(efopt.compressors.identity(), tree, num_workers=4)
    assert len(p.leaves) == 40
    text = str(p)
    assert "and 28 smaller" in text and "[39]" in text and "[27]" not in text


def test_an_empty_tree_sends_nothing():
    p = wire.plan(efopt.sign(), {}, num_workers=8, bandwidth=1e9)
    assert (p.leaves, p.report.collectives) == ((), ())
    assert "no collectives" in str(p)


def test_plans_are_hashable():
    p = wire.plan(efopt.sign(), MATRIX, num_workers=4)
    assert hash(p) == hash(wire.plan(efopt.sign(), MATRIX, num_workers=4))


# --------------------------------------------------------------- what a TPU makes of it


@pytest.mark.parametrize(
    ("topology", "n", "size", "replaced"),
    [
        slow("v5e:2x4", 8, 1024, False),
        slow("v5e:4x8", 32, 1024, False),
        ("v5e:8x8", 64, 1024, True),
        ("v5e:8x8", 32, 1024, False),  # a part of the slice
        slow("v5e:8x8", 64, 2**21, True),  # results of 16 MiB
        ("v5e:8x8", 64, 2**21 + 64, False),
        ("v4:2x4x4", 64, 2**22, True),  # two devices a chip
        slow("v5p:2x4x4", 32, 2**22, False),
        ("v5p:4x4x4", 64, 2**22, True),
    ],
)
def test_a_gather_over_a_large_slice_becomes_a_reduction(topology, n, size, replaced):
    asked = wire.plan(
        efopt.sign(), S((size,), jnp.float32), num_workers=n, exchange="all_gather"
    )
    (gather,) = asked.report.collectives
    planned = wire.plan(
        efopt.sign(),
        S((size,), jnp.float32),
        num_workers=n,
        exchange="all_gather",
        platform="tpu",
        topology=topology,
    )
    (c,) = planned.report.collectives
    if not replaced:
        assert c == gather
        return
    assert (c.operation, c.instead_of) == ("all-reduce", "all-gather")
    assert c.operand_bytes == n * gather.operand_bytes
    assert c.link_bytes == 2 * gather.link_bytes
    options = wire.tpu_compiler_options(topology)
    assert ("tpu_compiler_options(" in str(planned)) == bool(options)
    assert ("No compiler option" in str(planned)) != bool(options)


def test_compiler_options_for_a_slice():
    prefer = {"xla_tpu_prefer_async_allgather_to_allreduce": "true"}
    assert wire.tpu_compiler_options("v5e:16x16") == prefer
    assert wire.tpu_compiler_options("v5e:4x8") == {}
    assert wire.tpu_compiler_options("v6e:8x8") == {}
    v4 = wire.tpu_compiler_options("v4:4x4x4")
    assert v4 == prefer | {"xla_enable_async_all_gather": "true"}
    v4.clear()  # a copy
    assert wire.tpu_compiler_options("v4:4x4x4")


@pytest.mark.parametrize("fsdp, mentioned", [(256, True), (32, False)])
def test_large_slices_of_a_mesh_are_mentioned(fsdp, mentioned):
    """Where something is gathered inside them: a bias, in pieces."""
    tree = {"w": S((1024, 512), jnp.float32), "b": S((512,), jnp.float32)}
    for chosen, expected in ((tree, mentioned), ({"w": tree["w"]}, False)):
        specs = {name: jax.P("fsdp") if name == "w" else jax.P() for name in chosen}
        plan = wire.plan(
            efopt.scaled_sign(1024),
            chosen,
            mesh={"dcn": 4, "fsdp": fsdp},
            axis_name="dcn",
            params_specs=specs,
            exchange="two_phase",
            platform="tpu",
        )
        assert (f"slice of {fsdp} devices" in str(plan)) == expected


def test_an_unnamed_slice_is_mentioned():
    text = str(
        wire.plan(
            efopt.sign(), MATRIX, num_workers=64, exchange="all_gather", platform="tpu"
        )
    )
    assert "with `topology=` this is planned" in text


# -------------------------------------------------------------------------- bad input

ERRORS = {
    "no compressor": ({"compressor": "sign"}, TypeError, "takes an `efopt.Compressor`"),
    "integers": (
        {"params": {"n": S((3,), jnp.int32)}},
        TypeError,
        "got int32 at ['n']",
    ),
    "no workers": ({"num_workers": 0}, ValueError, "below 2**31, got 0"),
    "half a worker": ({"num_workers": 1.5}, ValueError, "2**31, got 1.5"),
    "true workers": ({"num_workers": True}, ValueError, "got True"),
    "unknown exchange": (
        {"exchange": "ring"},
        ValueError,
        "must be one of 'all_reduce', 'all_gather', 'two_phase', 'majority_vote'",
    ),
    "wrong exchange": ({"exchange": "all_reduce"}, ValueError, "not linear"),
    "negative bandwidth": (
        {"bandwidth": -1e9},
        ValueError,
        "`plan(bandwidth=...)` must be a positive number of bits a second",
    ),
    "no bandwidth": ({"bandwidth": 0}, ValueError, "got 0"),
    "endless bandwidth": (
        {"bandwidth": math.inf},
        ValueError,
        "got inf",
    ),
    "negative latency": (
        {"latency": -1.0},
        ValueError,
        "`plan(latency=...)` must be a number of seconds",
    ),
    "undefined compute": (
        {"compute_seconds": math.nan},
        ValueError,
        "`plan(compute_seconds=...)`",
    ),
    "negative compress": (
        {"compress_seconds": -1},
        ValueError,
        "`plan(compress_seconds=...)`",
    ),
    "unknown platform": (
        {"platform": "npu"},
        ValueError,
        "must be one of 'cpu', 'gpu', 'tpu' or None, got 'npu'",
    ),
    "topology of a cpu": (
        {"platform": "cpu", "topology": "v5e:2x4"},
        ValueError,
        'needs `platform="tpu"`',
    ),
    "unknown topology": (
        {"platform": "tpu", "topology": "v99:2x4"},
        ValueError,
        "got 'v99:2x4'",
    ),
    "slice too small": (
        {"num_workers": 9, "platform": "tpu", "topology": "v5e:2x4"},
        ValueError,
        "more than the devices of 'v5e:2x4', 8",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong(options, error, message):
    default = {"compressor": efopt.sign(), "params": TREE, "num_workers": 2}
    with pytest.raises(error, match=re.escape(message)):
        wire.plan(**{**default, **options})


@pytest.mark.parametrize("topology", ["v5e", "8x8", "v5e:8", "v7:2x2", 8, "v5e:8x"])
def test_topologies_that_are_none(topology):
    with pytest.raises(ValueError, match=re.escape(f"got {topology!r}")):
        wire.tpu_compiler_options(topology)
