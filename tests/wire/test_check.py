"""Promises about the wire: kept, broken in every way, and impossible to make."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from test_mesh import build, mapped
from test_read_and_measure import (
    ALL_8,
    DATA,
    KNOWN,
    LOOP,
    TPU_PADDED,
    UNKNOWN,
    X,
    collective,
    place,
    sharded,
)

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


MAYBE = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
}

%turn (p: (pred[], f32[4])) -> (pred[], f32[4]) {
  %p = (pred[], f32[4]{0}) parameter(0)
  %due = pred[] get-tuple-element(%p), index=0
  %given = f32[4]{0} get-tuple-element(%p), index=1
  %sum = f32[4]{0} all-reduce(%given), replica_groups={{0,1}}, to_apply=%add
  %over = pred[] constant(false)
  ROOT %after = (pred[], f32[4]{0}) tuple(%over, %sum)
}

%goes_on (q: (pred[], f32[4])) -> pred[] {
  %q = (pred[], f32[4]{0}) parameter(0)
  ROOT %test = pred[] get-tuple-element(%q), index=0
}

ENTRY %main (a: (pred[], f32[4])) -> (pred[], f32[4]) {
  %a = (pred[], f32[4]{0}) parameter(0)
  ROOT %while = (pred[], f32[4]{0}) while(%a), condition=%goes_on, body=%turn
}
"""


@pytest.mark.parametrize(
    "old, new, bounded",
    [
        ("", "", True),
        ("tuple(%over,", "tuple(%copied,", True),
        ("constant(false)", "constant(true)", False),
        ("tuple(%over,", "tuple(%due,", False),
        ("ROOT %test", "%test", False),
        ("ROOT %after", "%after", False),
    ],
    ids=["once", "a copy", "for ever", "as before", "no test", "no end"],
)
def test_a_loop_that_each_turn_ends_runs_at_most_once(old, new, bounded):
    text = MAYBE.replace(old, new) if old else MAYBE
    text = text.replace(
        "  ROOT %after", "  %copied = pred[] copy(%over)\n  ROOT %after"
    )
    (c,) = wire.read_hlo(text)
    assert (c.loop, c.executions, c.bounded) == (True, None, bounded)
    if bounded:
        wire.check(Text(text), carriers=["f32"], at_most=16)
        with pytest.raises(ValueError, match="16 bytes leave a worker"):
            wire.check(Text(text), carriers=["f32"], at_most=15)
    else:
        with pytest.raises(ValueError, match="an unknown number of times"):
            wire.check(Text(text), carriers=["f32"], at_most=1e9)


@pytest.mark.parametrize("loops", [False, True])
def test_a_branch_counts_as_if_it_were_taken(mesh, loops):
    def branch(x):
        mean = lambda x: jax.lax.pcast(jax.lax.pmean(x, "data"), "data", to="varying")  # noqa: E731
        return jax.lax.cond(jax.lax.pmax(x[0, 0], "data") > 0, mean, lambda x: x, x)

    def body(x):
        again = lambda x: jax.lax.pmax(x[0, 0], "data") > 1  # noqa: E731
        return jax.lax.while_loop(again, branch, x) if loops else branch(x)

    step, x = (
        sharded(body, mesh),
        place(jax.ShapeDtypeStruct((8, 500), "float32"), mesh),
    )
    promise = {"axis": "data", "carriers": ["f32"], "at_most": 2 * 4 * 501}
    if loops:
        with pytest.raises(ValueError, match="an unknown number of times"):
            wire.check(step, x, **promise)
        return
    report = wire.check(step, x, **promise)
    assert {c.executions for c in report.collectives} == {1, None}
    with pytest.raises(ValueError, match="bytes leave a worker"):
        wire.check(step, x, **(promise | {"at_most": 4 * 500}))


@pytest.mark.parametrize(
    ("promise", "error", "says"),
    [
        ({"at_most": -1}, ValueError, "must not be negative, got -1"),
        ({"at_most": float("nan")}, ValueError, "must not be negative, got nan"),
        ({"carriers": "u8"}, TypeError, "got the string 'u8'"),
        ({"carriers": ["gather:u8"]}, ValueError, "names the operation 'gather'"),
        ({"beyond": 3}, TypeError, "must be a `WireReport`, such as `measure("),
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


# ----------------------------------------------------------- a promise about one axis


@pytest.fixture(scope="module")
def grid(mesh):
    return build((2, 4), ("dcn", "fsdp"))


def hybrid(grid, *, packed=True, extra=None):
    """A step that gathers weights inside and sends gradients between.

    On each device 512 bytes of f32: 1,536 of link bytes over fsdp, and over dcn 512 of
    f32, or 16 of their signs in u8 and 4 of a loss over both axes.
    """

    def body(w):
        x = jax.lax.all_gather(w, "fsdp").sum(0)
        loss = jax.lax.psum(x.sum(), ("dcn", "fsdp"))
        if packed:
            bits = jnp.packbits(x > 0)
            mean = jax.lax.all_gather(bits, "dcn").sum(0, dtype="u1").sum()
            x = x * mean.astype(jnp.float32)
        else:
            x = jax.lax.psum(x, "dcn")
        return (extra(x) if extra else x) + loss

    return mapped(body, grid)


SLOW = {
    "kept": ({}, {"axis": "dcn", "at_most": 16 + 7}),
    "kept over several": (
        {},
        {"axis": ("dcn",), "at_most": 16 + 7, "carriers": ["u8"]},
    ),
    "dense inside is another's affair": ({}, {"axis": "dcn"}),
}
SLOW_BROKEN = {
    "a byte too many": (
        {},
        {"axis": "dcn", "at_most": 16 + 6},
        "`check(at_most=22)`: 23 bytes leave a worker over 'dcn' in a step, most of "
        "them in the all-gather `",
    ),
    "dense": (
        {"packed": False},
        {"axis": "dcn"},
        "over dcn (512 operand bytes, 512 on",
    ),
    "dense, by bytes": (
        {"packed": False},
        {"axis": "dcn", "at_most": 23},
        "519 bytes leave a worker over 'dcn'",
    ),
    "inside": (
        {},
        {"axis": "fsdp"},
        "over fsdp (512 operand bytes, 1,536 on the link)",
    ),
    "all axes": ({}, {"at_most": 1536 + 22}, "1,559 bytes leave a worker in a step"),
    "no such axis": ({}, {"axis": "data"}, "got 'data'"),
}


@pytest.mark.parametrize(("step", "promise"), SLOW.values(), ids=SLOW)
def test_a_promise_about_one_axis_is_kept(grid, step, promise):
    step, x = hybrid(grid, **step)
    assert wire.check(step, x, **promise) == wire.measure(step, x)


@pytest.mark.parametrize(
    ("step", "promise", "says"), SLOW_BROKEN.values(), ids=SLOW_BROKEN
)
def test_a_broken_promise_about_one_axis(grid, step, promise, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        wire.check(*hybrid(grid, **step), **promise)


def test_a_promise_about_an_axis_needs_a_mesh(mesh):
    with pytest.raises(ValueError, match="needs to know the mesh"):
        wire.check(lambda x: x + 1, jnp.zeros(3), axis="dcn", at_most=0)
    data = wire.check(gathered(mesh), place(X, mesh), axis="data")
    assert data == wire.check(gathered(mesh), place(X, mesh), axis="data", mesh=mesh)


EXTRA = {
    "a gather": (
        lambda x: x * jax.lax.all_gather(x, "fsdp").sum(0),
        "1,536 bytes more",
        "the all-gather `",
    ),
    "a sum": (
        lambda x: x * jax.lax.psum(x * x, "fsdp"),
        "768 bytes more",
        "the all-reduce `",
    ),
    "a shift": (
        lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1)]),
        "512 bytes more",
        "the collective-permute `",
    ),
    "an integer": (
        lambda x: x * jax.lax.psum(jnp.int32(x), "fsdp").astype(jnp.float32),
        "768 bytes more",
        "the all-reduce `",
    ),
}


@pytest.mark.parametrize(("extra", "size", "names"), EXTRA.values(), ids=EXTRA)
def test_nothing_crosses_an_axis_beyond_the_dense_step(grid, extra, size, names):
    dense = wire.measure(*hybrid(grid, packed=False))
    kept = wire.check(*hybrid(grid), axis="fsdp", beyond=dense)
    assert kept.bytes_over("fsdp") == dense.bytes_over("fsdp")
    wire.check(*hybrid(grid, packed=False), beyond=dense)  # over any axis
    with pytest.raises(ValueError, match=re.escape(names)) as raised:
        wire.check(*hybrid(grid, extra=extra), axis="fsdp", beyond=dense)
    says = f"{size} than in `beyond` leave a worker over 'fsdp' in a step"
    assert says in str(raised.value)


def test_what_is_beyond_may_be_allowed_to_the_byte(grid):
    dense = wire.measure(*hybrid(grid, packed=False))
    step = hybrid(grid, extra=EXTRA["a gather"][0])
    promise = {"axis": "fsdp", "beyond": dense}
    wire.check(*step, **promise, at_most=1536, carriers=["f32"])
    with pytest.raises(ValueError, match=re.escape("`check(at_most=1,535)`: 1,536 by")):
        wire.check(*step, **promise, at_most=1535, carriers=["f32"])
    with pytest.raises(ValueError, match="carries f32"):  # at most, and in integers
        wire.check(*step, **promise, at_most=1536)


def test_a_collective_may_be_cut_and_merged_within_its_bytes():
    def text(*sizes):
        texts = [collective("all-gather", ALL_8, f"f32[{n}]{{0}}") for n in sizes]
        return "\n".join(t.replace("%", f"%n{i}") for i, t in enumerate(texts))

    whole, parts = text(48), text(16, 32)
    measured = wire.measure(Text(parts))
    assert len(measured.collectives) == 2
    wire.check(Text(whole), beyond=measured)
    wire.check(Text(parts), beyond=wire.measure(Text(whole)))
    with pytest.raises(ValueError, match="28 bytes more than in `beyond`"):
        wire.check(Text(text(16, 33)), beyond=measured)
    integers = whole.replace("f32", "s32")
    with pytest.raises(ValueError, match="1,344 bytes more than in `beyond`"):
        wire.check(Text(integers), beyond=measured)
    summed = whole.replace("all-gather", "all-reduce")  # fewer bytes, another operation
    with pytest.raises(ValueError, match="336 bytes more than in `beyond`"):
        wire.check(Text(summed), beyond=measured)


def test_a_loop_of_unknown_length_may_be_beyond_only_if_it_is_there():
    text = LOOP.replace("OUTER", UNKNOWN).replace("INNER", UNKNOWN)
    wire.check(Text(text), beyond=wire.measure(Text(text)))
    once = LOOP.replace("OUTER", KNOWN.format(1)).replace("INNER", KNOWN.format(1))
    with pytest.raises(ValueError, match="runs an unknown number of times"):
        wire.check(Text(text), beyond=wire.measure(Text(once)))


def test_a_gradient_averaged_in_every_microbatch_is_found(mesh):
    """No efopt in it: the average may wait for the sum of 4 microbatches."""

    def step(batch, *, wait):
        def microbatch(total, x):
            gradient = jnp.square(x)
            mean = gradient if wait else jax.lax.pmean(gradient, "data")
            return total + mean, None

        zeros = jnp.zeros(1000)
        if wait:
            zeros = jax.lax.pcast(zeros, "data", to="varying")
        total, _ = jax.lax.scan(microbatch, zeros, batch[0])
        return jax.lax.pmean(total, "data") if wait else total

    batch = place(jax.ShapeDtypeStruct((8, 4, 1000), jnp.float32), mesh)
    often, once = (
        sharded(functools.partial(step, wait=wait), mesh, P()) for wait in (False, True)
    )
    promise = {"axis": "data", "carriers": ["f32"], "at_most": 2 * 4 * 1000}
    wire.check(once, batch, **promise)
    report = wire.measure(often, batch)
    (c,) = (c for c in report.over("data").collectives if c.executions != 1)
    assert (c.operation, c.executions, c.operand_bytes) == ("all-reduce", 4, 16000)
    with pytest.raises(ValueError, match="28,000 bytes leave .* on the link, 4 times"):
        wire.check(often, batch, **promise)


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
