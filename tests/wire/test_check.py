"""Promises about the wire: kept, broken in every way, and impossible to make."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from test_read_and_measure import DATA, LOOP, TPU_PADDED, UNKNOWN, X, place, sharded

import efopt
from efopt import wire

# The text of a TPU, with the buffer that it updates.
PADDED = TPU_PADDED.replace(
    "  %dynamic",
    "  %constant = u32[] constant(0)\n"
    "  %broadcast = u32[262144]{0:T(1024)S(1)} broadcast(%constant), dimensions={}\n"
    "  %dynamic",
)


def gathered(mesh):
    """4096 bytes of u32 to each of 7 others, beside a mean of one f32."""

    def body(x):
        loss = jax.lax.pmean(jax.lax.axis_index("data") * jnp.float32(1), "data")
        return jax.lax.all_gather(x, "data", to="invarying"), loss

    return sharded(body, mesh, (P(), P()))


def summed(dtype):
    def build(mesh):
        return sharded(lambda x: jax.lax.psum(x.astype(dtype), "data"), mesh, P())

    return build


KEPT = {
    "by default": (gathered, {}),
    "to the byte": (gathered, {"at_most": 7 * 4096 + 7}),
    "by name": (gathered, {"carriers": ["u32"]}),
    "by operation": (gathered, {"carriers": ["all-gather:u32"]}),
    "of linear payloads": (
        summed("float32"),
        {"carriers": ["u32", "all-reduce:f32"], "at_most": 7168},
    ),
    "of all floats": (summed("float32"), {"carriers": ["f32"]}),
}
BROKEN = {
    "one byte too many": (
        gathered,
        {"at_most": 7 * 4096 + 6},
        "`check(at_most=28,678)`: 28,679 bytes leave a worker in a step, most of them "
        "in the all-gather `",
    ),
    "small ones count": (gathered, {"at_most": 0}, "28,679 bytes leave a worker"),
    "no small ones": (gathered, {"small": 0}, "(4 operand bytes, 7 on the link)"),
    "too wide": (
        gathered,
        {"carriers": ["u8", "u16"]},
        "`check(carriers=...)` allows u16, u8, and the all-gather `",
    ),
    "floats by default": (summed("float32"), {}, "carries f32."),
    "another operation": (
        gathered,
        {"carriers": ["all-reduce:u32", "f32"]},
        "the all-gather `",
    ),
    "widened by the compiler": (
        summed("bfloat16"),
        {"carriers": ["bf16"]},
        "carries f32.",
    ),
}


@pytest.mark.parametrize(("build", "promise"), KEPT.values(), ids=KEPT)
def test_a_promise_is_kept(mesh, build, promise):
    x = place(X, mesh)
    report = wire.check(build(mesh), x, **promise)
    assert report == wire.measure(build(mesh), x)


@pytest.mark.parametrize(("build", "promise", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_promise_names_the_collective(mesh, build, promise, says):
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        wire.check(build(mesh), place(X, mesh), **promise)
    assert "operand bytes  link bytes" in str(raised.value)  # the whole table


class Text:
    """A step whose program is this text."""

    def __init__(self, text):
        self.text = text

    def __call__(self): ...

    def lower(self):
        return self

    def compile(self):
        return self

    def as_text(self):
        return self.text


def test_a_replaced_collective_is_said_to_be_one():
    (c,) = wire.read_hlo(PADDED)
    assert (c.operation, c.instead_of) == ("all-reduce", "all-gather")
    assert (c.operand_bytes, c.link_bytes) == (1048576, 2064384)
    text = str(wire.WireReport((c,)))
    assert "all-reduce+" in text
    assert "+ the compiler's, in place of an all-gather of 16,384 bytes" in text
    with pytest.raises(ValueError, match="put in place of an all-gather"):
        wire.check(Text(PADDED), at_most=64 * 16384)


def test_a_reduction_of_anything_else_is_itself():
    for line in ("%broadcast = u32[262144]{0} add(%a, %b)", "%other = u32[] add(%a)"):
        text = TPU_PADDED.replace("  %dynamic", f"  {line}\n  %dynamic")
        assert [c.instead_of for c in wire.read_hlo(text)] == [None]


def test_no_limit_can_be_promised_for_a_loop_of_unknown_length():
    text = LOOP.replace("OUTER", UNKNOWN).replace("INNER", UNKNOWN)
    assert wire.check(Text(text), carriers=["f32"]).bytes_sent_per_worker > 0
    with pytest.raises(ValueError, match="runs an unknown number of times"):
        wire.check(Text(text), carriers=["f32"], at_most=1e9)


@pytest.mark.parametrize(
    ("promise", "error", "says"),
    [
        ({"at_most": -1}, ValueError, "must not be negative, got -1"),
        ({"at_most": float("nan")}, ValueError, "must not be negative, got nan"),
        ({"carriers": "u8"}, TypeError, "got the string 'u8'"),
        ({"carriers": ["gather:u8"]}, ValueError, "names the operation 'gather'"),
    ],
)
def test_promises_that_make_no_sense(promise, error, says):
    with pytest.raises(error, match=re.escape(says)):
        wire.check(lambda x: x, jnp.zeros(3), **promise)


def test_a_plan_is_a_promise(mesh):
    compressor, n = efopt.scaled_sign(64), 8
    tx = efopt.compress(compressor, axis_name="data")
    x = jax.ShapeDtypeStruct((n, 1000), jnp.float32)
    state = tx.init(jnp.zeros(1000))
    step = sharded(lambda g, s: tx.update(g[0], s)[0], mesh, P(), (DATA, P()))
    planned = wire.plan(compressor, jnp.zeros(1000), num_workers=n)
    limit = planned.bytes_sent_per_worker
    wire.check(step, place(x, mesh), state, at_most=limit)
    with pytest.raises(ValueError, match="at_most"):
        wire.check(step, place(x, mesh), state, at_most=limit - 1)


# ---------------------------------------------------- what `measure` and `check` take


def test_lowered_and_compiled_steps_are_measured_as_they_are(mesh):
    step, x = gathered(mesh), place(X, mesh)
    lowered = jax.jit(step).lower(x)
    expected = wire.measure(step, x)
    assert wire.measure(lowered) == expected
    assert wire.measure(lowered.compile()) == expected
    assert wire.check(lowered.compile(), at_most=1e6) == expected
    for stage in (lowered, lowered.compile()):
        name = type(stage).__name__
        with pytest.raises(TypeError, match=f"takes no arguments.*`jax.stages.{name}`"):
            wire.measure(stage, x)


def test_unplaced_abstract_arguments_are_mentioned(mesh):
    report = wire.measure(lambda x: x + 1, X)
    assert str(report).startswith("no collectives: nothing travels between workers\n")
    assert "the abstract arguments have no `sharding`" in str(report)
    for x in (place(X, mesh), jnp.zeros(3)):
        assert "\n" not in str(wire.measure(lambda x: x + 1, x))
