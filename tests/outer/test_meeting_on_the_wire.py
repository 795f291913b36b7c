"""What crosses the axis of the workers, in the compiled program: meetings alone."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import FAST, make_mesh, slow

import efopt
from efopt import wire
from efopt.hlo.program import Program, names

AXIS = "data"
PARAMS = {"b": np.ones(40, np.float32), "w": np.ones((64, 33), np.float32)}
COMPRESSOR = efopt.top_k(k=16, block_size=256)


def tx(**options):
    feedback = efopt.error_feedback(COMPRESSOR, axis_name=AXIS)
    outer = optax.chain(feedback, optax.sgd(0.7, momentum=0.9, nesterov=True))
    options = {"every": 4, **options}
    return efopt.local_steps(optax.adamw(0.1), outer, axis_name=AXIS, **options)


def loss_fn(params, x):
    return ((x @ params["w"]) ** 2).mean() + (params["b"] ** 2).sum() * x.mean()


def compiled(tx, how):
    """A step of eight workers, or in the global entrance of two with four behind."""
    two_level = how == "global"
    mesh = make_mesh("two_d" if two_level else how, 2 if two_level else 8)
    specs = {"b": P(), "w": P("other")} if two_level else None
    whole = PARAMS, jax.tree.map(np.asarray, jax.jit(tx.init)(PARAMS))
    carry = efopt.distribute(whole, mesh, specs)
    x = jax.device_put(np.ones((16, 64), np.float32), jax.NamedSharding(mesh, P(AXIS)))

    def flat(carry, x):
        params, state = carry
        own = efopt.local_params(params, AXIS, state)
        updates, state = tx.update(jax.grad(loss_fn)(own, x), state, params)
        return optax.apply_updates(params, updates), state

    def whole_step(carry, x):
        params, state = carry
        grad = efopt.value_and_grad(loss_fn, axis_name=AXIS)
        _, grads = grad(efopt.local_params(params, AXIS, state), x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if not two_level:
        placed = efopt.partition_specs(carry)
        flat = jax.shard_map(
            flat, mesh=mesh, in_specs=(placed, P(AXIS)), out_specs=placed
        )
    step = jax.jit(whole_step if two_level else flat, compiler_options=FAST)
    return step.lower(carry, x).compile()


@functools.cache
def program(how, **options):
    return compiled(tx(**options), how)


CASES = [
    ("auto", {}),
    slow("explicit", {}),
    slow("auto", {"fragments": 2, "delay": 1, "alpha": 0.5}),
    ("global", {"fragments": 2}),
]


@pytest.mark.parametrize("how, options", CASES)
def test_nothing_crosses_the_axis_but_in_a_meeting(how, options):
    report = wire.measure(program(how, **options))
    found = report.over(AXIS).collectives
    assert found and all(c.executions is None for c in found), report


def test_a_meeting_sends_what_is_planned():
    report = wire.measure(program("auto"))
    planned = wire.plan(COMPRESSOR, PARAMS, num_workers=8, every=4)
    sent = sum(c.operand_bytes for c in report.collectives)
    assert sent == planned.operand_bytes
    assert planned.rounds.bytes_per_step == planned.bytes_sent_per_worker / 4


def test_fragments_send_what_is_planned():
    report = wire.measure(program("auto", fragments=2, delay=1, alpha=0.5))
    planned = wire.plan(COMPRESSOR, PARAMS, num_workers=8, every=4, fragments=2)
    sent = sorted(c.operand_bytes for c in report.collectives)
    meetings = [r.operand_bytes for r in planned.rounds.meetings]
    assert sent == sorted(meetings) and len(sent) == 2


def test_on_two_levels_a_device_sends_what_is_planned():
    report = wire.measure(program("global", fragments=2)).over(AXIS)
    planned = wire.plan(
        COMPRESSOR,
        PARAMS,
        mesh={AXIS: 2, "other": 4},
        axis_name=AXIS,
        params_specs={"b": P(), "w": P("other")},
        platform="cpu",
        every=4,
        fragments=2,
    )
    meetings = [m.bytes_over(AXIS).operand for m in planned.rounds.meetings]
    assert sorted(c.operand_bytes for c in report.collectives) == sorted(meetings)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_delayed_meeting_does_not_wait_for_the_gradients_of_its_step(delay):
    """What the meetings are given, traced back to the arguments of the program."""
    options = {"fragments": 2, "delay": 1, "alpha": 0.5} if delay else {}
    entry, reached = ancestors(program("auto", **options).as_text())
    (batch,) = [n for n, x in entry.items() if is_batch(x)]
    assert (batch in reached) == (delay == 0)


def is_batch(instruction):
    shape = instruction["type"].partition("{")[0]
    return instruction["opcode"] == "parameter" and shape == "f32[2,64]"


def ancestors(text):
    """The entry of a program, and all that its loops with meetings depend on."""
    found = Program.parse(text)
    (main,) = [name for name in found.bodies if name and name not in found.callers]
    entry = found.bodies[main]
    queue = [n for n, x in entry.items() if x["opcode"] == "while"]
    assert queue
    reached = set()
    while queue:
        name = queue.pop()
        if name in entry and name not in reached:
            reached.add(name)
            queue += names(entry[name]["operands"])
    return entry, reached
