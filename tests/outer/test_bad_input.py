"""What local steps refuse, and the cure that they name."""

import jax
import numpy as np
import optax
import pytest
from workers_under_test import make_mesh

import efopt

AXIS = "data"
PARAMS = {"b": np.ones(4, np.float32), "w": np.ones((4, 6), np.float32)}
MEAN = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)


def make(outer=MEAN, inner=None, **options):
    inner = optax.sgd(0.1) if inner is None else inner
    options = {"every": 2, "axis_name": AXIS, **options}
    return efopt.local_steps(inner, outer, **options)


def state_of(tx):
    return jax.tree.map(np.asarray, jax.jit(tx.init)(PARAMS))


@pytest.mark.parametrize("every", [0, -3])
def test_rounds_of_no_steps_are_refused(every):
    with pytest.raises(ValueError, match=r"every=\.\.\.\)` must be at least 1"):
        make(every=every)


@pytest.mark.parametrize("every", [2.0, "2", True, optax.constant_schedule(2)])
def test_rounds_that_are_not_static_are_refused(every):
    with pytest.raises(TypeError, match="every.*Python int"):
        make(every=every)


@pytest.mark.parametrize("name", ["sparse_loco", "muloco"])
def test_a_decay_that_grows_is_refused_by_its_name(name):
    first = {"sparse_loco": optax.sgd(0.1), "muloco": 0.1}[name]
    with pytest.raises(ValueError, match=rf"`{name}\(decay=...\)` must be in \[0, 1\]"):
        getattr(efopt.outer, name)(first, axis_name=AXIS, decay=1.5)


def test_a_traced_length_is_refused_by_inject_hyperparams():
    tx = optax.inject_hyperparams(efopt.outer.diloco)(optax.sgd(0.1), every=2)
    with pytest.raises(TypeError, match=r"static_args=\('every',\)"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    "outer, leaf",
    [
        (optax.sgd(0.7), "'b'"),
        (efopt.compress(efopt.sign(), axis_name="other"), "'b'"),
        (optax.masked(MEAN, {"b": True, "w": False}), "'w'"),
        (
            optax.partition({"a": MEAN, "b": optax.sgd(1.0)}, {"b": "a", "w": "b"}),
            "'w'",
        ),
    ],
    ids=["none", "axis", "masked", "partition"],
)
def test_an_outer_chain_without_an_exchange_for_a_leaf_is_refused(outer, leaf):
    with pytest.raises(ValueError, match="would drift apart") as seen:
        jax.eval_shape(make(outer).init, PARAMS)
    assert f"has none at [{leaf}]" in str(seen.value)
    assert "`efopt.error_feedback(compressor, axis_name=...)`" in str(seen.value)


def test_an_outer_part_that_makes_workers_differ_again_is_refused():
    """It has an exchange, and behind it each worker goes on its own."""
    apart = optax.stateless(
        lambda u, p: jax.tree.map(lambda x: x * jax.lax.axis_index(AXIS), u)
    )
    tx, mesh = make(optax.chain(MEAN, apart)), make_mesh("auto", 4)
    carry = efopt.distribute((PARAMS, state_of(tx)), mesh)
    with pytest.raises(ValueError, match="would drift apart"):
        jax.eval_shape(flat(tx, mesh, carry), carry)


def flat(tx, mesh, carry, params_of=lambda params: params):
    def step(carry):
        params, state = carry
        own = efopt.local_params(params_of(params), AXIS, state)
        return tx.update(own, state, params)[1]

    specs = efopt.partition_specs(carry)
    return jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=specs[1])


def test_an_inner_chain_with_an_exchange_is_refused():
    inner = efopt.ef_signsgd(0.1, axis_name=AXIS)
    with pytest.raises(ValueError, match="Put it in `outer`"):
        jax.eval_shape(make(inner=inner).init, PARAMS)


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_what_is_no_transformation_is_refused(name):
    with pytest.raises(TypeError, match=rf"local_steps\({name}"):
        make(**{name: optax.sgd})


@pytest.mark.parametrize("name", ["inner", "outer"])
def test_mini_steps_of_optax_are_a_transformation(name):
    """Which optax gives no class of one."""
    part = {"inner": optax.sgd(0.1), "outer": optax.chain(MEAN, optax.sgd(1.0))}[name]
    jax.eval_shape(make(**{name: optax.MultiSteps(part, 2)}).init, PARAMS)


def test_a_step_without_the_common_parameters_is_refused():
    tx = efopt.local_steps(optax.sgd(0.1), optax.sgd(1.0), every=2)
    with pytest.raises(ValueError, match="needs the common parameters"):
        tx.update(PARAMS, state_of(tx))


def test_parameters_that_are_a_workers_own_are_refused():
    tx, mesh = make(), make_mesh("auto", 4)
    carry = efopt.distribute((PARAMS, state_of(tx)), mesh)
    twice = lambda params: efopt.local_params(params, AXIS)  # noqa: E731
    with pytest.raises(ValueError, match="differ from worker to worker along 'data'"):
        jax.eval_shape(flat(tx, mesh, carry, twice), carry)

    def own(carry):
        params, state = carry
        local = efopt.local_params(params, AXIS, state)
        return tx.update(local, state, local)[1]

    specs = efopt.partition_specs(carry)
    step = jax.shard_map(own, mesh=mesh, in_specs=(specs,), out_specs=specs[1])
    with pytest.raises(ValueError, match="`local_steps.*takes the common parameters"):
        jax.eval_shape(step, carry)


def test_gradients_that_are_nobodys_own_are_refused():
    """Outside of mapped functions, and not from `efopt.value_and_grad`."""
    with pytest.raises(ValueError, match="none of that name is bound") as seen:
        jax.eval_shape(make().update, PARAMS, state_of(make()), PARAMS)
    said = str(seen.value)
    assert said.count("in a plain jitted step") == 1
    assert "as they are, at `efopt.local_params(params, 'data', state)`" in said


def test_a_single_worker_refuses_the_gradients_of_several():
    tx = efopt.local_steps(optax.sgd(0.1), optax.sgd(1.0), every=2)
    grads = efopt.PerWorker(jax.tree.map(lambda p: p[None], PARAMS), AXIS)
    with pytest.raises(ValueError, match="pass `axis_name='data'`"):
        tx.update(grads, state_of(tx), PARAMS)


def test_a_drift_of_another_mesh_or_axis_is_refused():
    tx = make()
    here, there = make_mesh("auto", 4), make_mesh("auto", 2)
    params = efopt.distribute(PARAMS, here)
    state = efopt.distribute(state_of(tx), there)
    with pytest.raises(ValueError, match="placed together, on a mesh with 4 workers"):
        efopt.local_params(params, AXIS, state)
    with pytest.raises(ValueError, match=r"Place the state with `efopt.distribute"):
        efopt.local_params(params, AXIS, state_of(tx))
    with pytest.raises(ValueError, match="drift apart along 'data'.*same `axis_name`"):
        efopt.local_params(params, "other", state)
    with pytest.raises(ValueError, match="none of them lies on one"):
        efopt.local_params(PARAMS, AXIS, state_of(tx))


def test_a_share_of_a_drift_is_refused():
    tx, mesh = make(), make_mesh("auto", 4)
    params, state = efopt.distribute((PARAMS, state_of(tx)), mesh)
    one = jax.tree.map(lambda x: x.addressable_data(0), state)
    with pytest.raises(ValueError, match="share of one worker"):
        efopt.local_params(params, AXIS, one)
