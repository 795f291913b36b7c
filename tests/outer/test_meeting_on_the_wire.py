"""What crosses the axis of the workers, in the compiled program: meetings alone."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import FAST, make_mesh, slow

import efopt
from efopt import wire

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


def in_branches(report):
    """Whether each collective over the axis stands in a branch; no bytes elsewhere."""
    return [c.executions is None for c in report.over(AXIS).collectives]


@pytest.mark.parametrize(
    "how, options",
    [
        ("auto", {}),
        slow("explicit", {}),
        slow("auto", {"fragments": 2, "delay": 1, "alpha": 0.5}),
        ("global", {"fragments": 2}),
    ],
)
def test_nothing_crosses_the_axis_but_in_the_branch_of_a_meeting(how, options):
    report = wire.measure(compiled(tx(**options), how))
    found = [c for c in report.over(AXIS).collectives if c.operand_bytes > 8]
    assert found and all(c.executions is None for c in found)
