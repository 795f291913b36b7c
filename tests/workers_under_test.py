"""One step function under every way of mapping it over workers.

``run(how, tx, params, grads)`` feeds ``grads``, one tree per step with a leading worker
axis, and returns the parameters after each step and the last state, both as NumPy with
a leading worker axis on parameters where workers could differ.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import efopt

AXIS = "data"
# For programs that are only looked at: cheaper machine code, the same collectives.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HOWS = ("auto", "explicit", "two_d", "pmap", "vmap")


def once(tx, updates, state=None):
    """One update under jit, from the first state unless another is given."""
    state = tx.init(updates) if state is None else state
    return jax.jit(tx.update, compiler_options=FAST)(updates, state)


def slow(*values, when=True, rare=False, **kwargs):
    """A case of `pytest -m slow`, or of `-m exhaustive` where others stand for it."""
    mark = pytest.mark.exhaustive if rare else pytest.mark.slow
    return pytest.param(*values, marks=[mark] if when else [], **kwargs)


def make_mesh(how, n=8):
    if how == "two_d":
        kinds = (AxisType.Auto, AxisType.Auto)
        return jax.make_mesh((n, 8 // n), (AXIS, "other"), axis_types=kinds)
    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    return jax.make_mesh((n,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:n])


def make_step(tx):
    """Applies this worker's gradients; the gradient of <g, p> is g, kept local."""

    def step(state, grads):
        params, opt_state = state
        local = efopt.local_params(params, AXIS)
        product = lambda p: sum(  # noqa: E731
            jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32))
            for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(grads), strict=True)
        )
        own = jax.grad(product)(local)
        own = jax.tree.map(lambda g, p: g.astype(p.dtype), own, params)
        updates, opt_state = tx.update(own, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def mapped(how, tx, params, n=8, **options):
    """The jitted step, its first state, and how to place one step's gradients."""
    step = make_step(tx)
    whole = (params, jax.tree.map(np.asarray, jax.jit(tx.init)(params)))
    if how in ("pmap", "vmap"):
        state = efopt.stack_workers(whole, n)
        if how == "pmap":
            return (
                jax.pmap(step, axis_name=AXIS, devices=jax.devices()[:n]),
                state,
                (lambda g: g),
            )
        step = jax.jit(jax.vmap(step, axis_name=AXIS), **options)
        return step, state, lambda g: g
    mesh = make_mesh(how, n)
    state = efopt.distribute(whole, mesh)
    specs = efopt.partition_specs(state)
    inner = lambda s, g: step(s, jax.tree.map(lambda x: x[0], g))  # noqa: E731
    fn = jax.jit(
        jax.shard_map(inner, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=specs),
        **options,
    )
    sharding = jax.NamedSharding(mesh, P(AXIS))
    return fn, state, lambda g: jax.device_put(g, sharding)


def run(how, tx, params, grads, n=8):
    steps = run_with_states(how, tx, params, grads, n)
    return [params for params, _ in steps], steps[-1][1]


def run_with_states(how, tx, params, grads, n=8):
    """As ``run``, with the state of every step beside its parameters."""
    fn, state, place = mapped(how, tx, params, n)
    steps = []
    for g in grads:
        state = fn(state, place(g))
        steps.append(jax.tree.map(np.asarray, state))
    return steps


def copies(x, n=8):
    """Every device's own copy of a replicated array."""
    return [np.asarray(s.data) for s in x.addressable_shards][:n]
