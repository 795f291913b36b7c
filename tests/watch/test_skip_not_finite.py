"""A step that is not finite on one worker: no worker takes it, and nothing is left."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from registry import AXIS, OPTIMIZERS, WORKERS
from test_schemes_and_optimizers import (
    PARAMS,
    ROWS,
    bits,
    each,
    here,
    make,
    on_mesh,
    one,
    start,
    step_of,
    turned,
)
from workers_under_test import FAST, make_mesh, slow

import efopt
from efopt import wire

BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
WORST = 2  # the worker, and the leaf and place of it
WHERE = "w", (3, 4)
# Bad steps first, in a row, and last; the numbers are the clean ones.
SEQUENCE = ("nan", 0, "inf", "-inf", 1, "nan", 2, "inf")


def guarded(inner, axis_name=AXIS, **options):
    return efopt.watch.skip_not_finite(inner, axis_name=axis_name, **options)


def poisoned(t, value):
    """The workers' optima, of which one has one coordinate that is not finite."""
    optima = {k: np.array(x) for k, x in turned(t).items()}
    name, place = WHERE
    optima[name][(WORST, *place)] = value
    return optima


class Training:
    """Steps of one row, mapped in one way; a state that can be looked at."""

    def __init__(self, row, tx, how):
        self.row, self.how = row, how
        whole = PARAMS, start(tx)
        if not row.over_workers:
            self.carry = whole
            step = jax.jit(step_of(row, tx))
            self.fn = lambda c, o: step(c, jax.tree.map(lambda x: x[WORST], o))
        elif how in ("pmap", "vmap"):
            step = step_of(row, tx, here)
            self.carry = efopt.stack_workers(whole, WORKERS)
            if how == "pmap":
                devices = jax.devices()[:WORKERS]
                self.fn = jax.pmap(step, axis_name=AXIS, devices=devices)
            else:
                self.fn = jax.jit(jax.vmap(step, axis_name=AXIS))
        else:
            mesh = make_mesh(how, WORKERS)
            self.carry = efopt.distribute(whole, mesh)
            fn, place = jax.jit(on_mesh(row, tx, mesh, self.carry)), P(AXIS)
            sharding = jax.NamedSharding(mesh, place)
            params = self.carry[0]

            def placed(carry, optima):
                carry, updates = fn(carry, jax.device_put(optima, sharding))
                # What is each worker's own cannot be added to the parameters.
                return carry if row.averages else (params, carry), updates

            self.fn = placed

        self.first = self.carry

    def anew(self):
        """The same program from the beginning."""
        other = copy.copy(self)
        other.carry = self.first
        return other

    def step(self, optima):
        self.carry, updates = self.fn(self.carry, optima)
        return jax.tree.map(np.asarray, updates)

    @property
    def params(self):
        return jax.tree.map(np.asarray, self.carry[0])

    @property
    def state(self):
        return jax.tree.map(np.asarray, self.carry[1])


def check_that_it_never_was(row, how):
    axis_name = AXIS if row.over_workers else None
    tx = make(row, axis_name)
    around = guarded(tx, axis_name, max_consecutive=9)
    plain, guard = Training(row, tx, how), Training(row, around, how)
    skipped = streak = 0
    for what in SEQUENCE:
        before = bits((guard.params, guard.state.inner))
        if what in BAD:
            updates = guard.step(poisoned(0, BAD[what]))
            for u in jax.tree.leaves(updates):
                np.testing.assert_array_equal(u, 0)
            assert bits((guard.params, guard.state.inner)) == before
            skipped, streak = skipped + 1, streak + 1
        else:
            updates, expected = guard.step(turned(what)), plain.step(turned(what))
            got = updates, guard.params, guard.state.inner
            expected = expected, plain.params, plain.state
            # What an optimizer adds is fused otherwise by every program.
            if row.exact and (row not in OPTIMIZERS or how == "auto"):
                assert bits(got) == bits(expected)
            else:
                for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
            streak = 0
        state = guard.state
        np.testing.assert_array_equal(state.skipped, skipped)
        np.testing.assert_array_equal(state.streak, streak)
        np.testing.assert_array_equal(state.exceeded, False)
        np.testing.assert_array_equal(state.leaf, list(PARAMS).index(WHERE[0]))
        np.testing.assert_array_equal(state.worker, WORST if row.over_workers else 0)
    clean = guard.anew()
    for what in SEQUENCE:
        if what not in BAD:
            clean.step(turned(what))
    ends = [(end.params, end.state.inner) for end in (guard, clean)]
    assert bits(ends[0]) == bits(ends[1])


@each(ROWS, by_default=lambda row: row.name == "error_feedback_two_phase")
def test_a_step_that_is_not_finite_never_was(row):
    """To the bit: NaN and infinities, of gradients and of functions of them."""
    check_that_it_never_was(row, "auto")


@pytest.mark.parametrize("how", ["explicit", "two_d", "pmap", "vmap"])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            r, marks=pytest.mark.slow if r.kind else pytest.mark.exhaustive, id=r.name
        )
        for r in ROWS
        if r.over_workers and not r.slow
    ],
)
def test_nor_was_it_however_workers_are_mapped(row, how):
    check_that_it_never_was(row, how)


def feedback(compressor=None, **options):
    compressor = compressor or efopt.top_k(k=3)
    return optax.chain(
        efopt.error_feedback(compressor, axis_name=AXIS, **options), optax.sgd(0.1)
    )


def run(tx, grads, params=None, how="vmap"):
    """Parameters and state after some steps, of gradients with one row a worker."""
    assert how == "vmap"
    params = jax.tree.map(lambda g: g[0] * 0, grads[0]) if params is None else params

    step, start = program(tx)
    carry = efopt.stack_workers((params, start(params)), WORKERS)
    for g in grads:
        carry = step(carry, g)
    return jax.tree.map(np.asarray, carry)


@functools.lru_cache(maxsize=4)
def program(tx):
    """A step and a start, once for all runs of a test."""

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    step = jax.jit(jax.vmap(step, axis_name=AXIS), compiler_options=FAST)
    return step, jax.jit(tx.init)


def draw(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [{"w": rng.standard_normal((WORKERS, 12), np.float32)} for _ in range(steps)]


def with_nan(grads, worker=1):
    g = {"w": grads["w"].copy()}
    g["w"][worker, 5] = np.nan
    return g


@pytest.mark.parametrize("exchange", [slow("all_gather"), "all_reduce"])
def test_finite_gradients_that_overflow_with_what_is_owed_are_seen(exchange):
    """3e38 and 3e38 again, on one worker; where nothing is sent of it, too."""
    large = draw(1)[0]
    large["w"][1] = 3e38
    compressor = {
        "all_gather": efopt.top_k(k=3),
        "all_reduce": efopt.random_block(fraction=0.1),
    }[exchange]
    tx = guarded(feedback(compressor, exchange=exchange))
    once, _ = run(tx, [large])
    params, state = run(tx, [large, large])
    assert state.skipped.tolist() == [1] * WORKERS
    assert state.worker.tolist() == state.leaf.tolist() == [-1] * WORKERS
    assert bits(params) == bits(once)
    assert np.isfinite(state.inner[0].residual.value["w"]).all()


def test_zero_updates_keep_the_sign_of_a_zero():
    params = {"w": np.full(12, -0.0, np.float32)}
    params, _ = run(guarded(feedback()), [with_nan(draw(1)[0])], params)
    assert np.signbit(params["w"]).all()


def test_around_accumulation_a_bad_mini_batch_is_dropped_and_within_all_of_them():
    grads = draw(6)
    bad = [grads[0], with_nan(grads[1]), *grads[1:]]
    tx = efopt.accumulate(feedback(), every=3, axis_name=AXIS)
    params, state = run(tx, grads)
    got, seen = run(guarded(tx), bad)
    assert bits(got) == bits(params) and bits(seen.inner) == bits(state)
    assert seen.skipped.tolist() == [1] * WORKERS

    inside = efopt.accumulate(guarded(feedback()), every=3, axis_name=AXIS)
    got, seen = run(inside, [*bad[:3], *grads[3:]])
    expected, _ = run(tx, grads[3:])
    assert bits(got) == bits(expected)
    assert seen.inner.skipped.tolist() == [1] * WORKERS


def test_values_that_were_never_finite_are_nobodys_fault():
    """The best loss of `reduce_on_plateau` starts at infinity."""
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = guarded(optax.chain(plateau, optax.sgd(0.1)), None)
    params = {"w": np.ones(3, np.float32)}
    start = jax.jit(tx.init)(params)
    assert np.isinf(start.inner[0].best_value)
    update = jax.jit(lambda g, s: tx.update(g, s, params, value=jnp.inf))
    _, state = update(params, start)
    assert state.skipped == 0


def test_random_keys_stay_when_a_step_is_skipped():
    noise = optax.add_noise(0.1, 0.5, jax.random.key(0))
    tx = guarded(optax.chain(efopt.per_worker(noise, axis_name=AXIS), feedback()))
    key = lambda s: jax.random.key_data(s.inner[0].value.rng_key)  # noqa: E731
    grads = draw(2)
    step = jax.jit(jax.vmap(lambda g, s: tx.update(g, s), axis_name=AXIS))
    clean, expected = run_keys(tx, step, grads)
    got, state = run_keys(tx, step, [grads[0], with_nan(grads[1]), grads[1]])
    assert bits(got) == bits(clean)
    np.testing.assert_array_equal(key(state), key(expected))


def run_keys(tx, step, grads):
    """As ``run``; NumPy has no arrays of keys."""
    params = jax.tree.map(lambda g: g[0], grads[0])
    state = efopt.stack_workers(jax.jit(tx.init)(params), WORKERS)
    out = []
    for g in grads:
        updates, state = step(g, state)
        out.append(jax.tree.map(np.asarray, updates))
    return [u for u in out if u["w"].any()], state


# ------------------------------------------------------------------ what it costs


def collectives(tx, loss=False):
    """Of a compiled step on a mesh; with the loss averaged, as programs do."""
    mesh = make_mesh("auto", WORKERS)
    params = {"w": jax.ShapeDtypeStruct((64, 32), "float32")}
    state = efopt.distribute(jax.eval_shape(tx.init, params), mesh)
    specs = efopt.partition_specs(state)

    def step(state, g):
        updates, state = tx.update({"w": g[0]}, state)
        seen = jax.lax.pmean(jnp.sum(jnp.square(g)), AXIS) if loss else 0.0
        return updates, state, seen

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=(P(), specs, P())
    )
    sharding = jax.NamedSharding(mesh, P(AXIS))
    grads = jax.ShapeDtypeStruct((WORKERS, 64, 32), "float32", sharding=sharding)
    found = wire.measure(jax.jit(mapped), state, grads)
    return len(found.collectives), found.operand_bytes


@pytest.mark.parametrize(
    ("compressor", "exchange", "loss"),
    [
        (efopt.random_block(fraction=0.1), "all_reduce", False),
        slow(efopt.scaled_sign(64), "two_phase", True),
        slow(efopt.top_k(fraction=0.1), "all_gather", True),
        slow(efopt.power_sgd(2), "all_reduce", True),
    ],
)
def test_the_flag_travels_in_a_sum_that_is_there_anyway(compressor, exchange, loss):
    tx = feedback(compressor, exchange=exchange)
    number, size = collectives(tx, loss)
    assert collectives(guarded(tx), loss) == (number, size + 16)


# ---------------------------------------------------------------------- the host


def sgd(**options):
    return guarded(optax.sgd(0.1), None, **options)


def after(tx, *grads):
    params = {"a": np.zeros(2, np.float32), "b": {"c": np.zeros(3, np.float32)}}
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for value in grads:
        g = jax.tree.map(np.array, params)
        g["b"]["c"][1] = value
        _, state = update(g, state)
    return params, state


def test_the_host_is_told_from_the_limit_on_and_for_ever():
    inf, nan = np.inf, np.nan
    tx = sgd(max_consecutive=3)
    for good in ((nan, nan, 1.0, inf), (1.0,), (nan, inf)):
        _, state = after(tx, *good)
        assert not state.exceeded
        efopt.watch.require_finite(state)
    params, state = after(tx, nan, 1.0, nan, nan, nan)
    assert state.exceeded
    with pytest.raises(FloatingPointError) as seen:
        efopt.watch.require_finite({"opt": state}, params)
    for words in ("4 steps", "the last 3 of", "of worker 0, at ['b']['c']"):
        assert words in str(seen.value)
    with pytest.raises(FloatingPointError, match="at leaf 1 of "):
        efopt.watch.require_finite(state)
    _, state = after(tx, nan, nan, nan, 1.0)  # read too late
    assert state.exceeded and state.streak == 0
    with pytest.raises(FloatingPointError):
        efopt.watch.require_finite(state)


def test_several_workers_are_not_blamed_for_one():
    grads = draw(1)[0]
    grads = with_nan(with_nan(grads, 1), 3)
    _, state = run(guarded(feedback(), max_consecutive=1), [grads])
    assert state.worker.tolist() == [-1] * WORKERS
    with pytest.raises(FloatingPointError, match="not that of one worker alone"):
        efopt.watch.require_finite(state)


def test_a_state_without_a_guard_is_refused():
    with pytest.raises(ValueError, match="there is none in it"):
        efopt.watch.require_finite({"w": np.zeros(2)})


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("known", [None, "model", ("fast", "model")])
def test_axes_of_workers_that_it_does_not_name_are_refused(known):
    tx = guarded(efopt.per_worker(optax.trace(0.9), axis_name=("data", "fast")), known)
    with pytest.raises(ValueError, match="'data' is one.*`axis_name=") as seen:
        jax.eval_shape(tx.init, PARAMS)
    assert repr(known) in str(seen.value)
    tx = guarded(efopt.compress(efopt.sign(), axis_name=AXIS), known)
    with pytest.raises(ValueError, match="'data' is one"):
        jax.eval_shape(tx.init, PARAMS)


@pytest.mark.parametrize(
    "inner", [feedback(), efopt.compress(efopt.sign(), axis_name=AXIS)]
)
def test_apply_if_finite_around_an_exchange_is_refused_where_it_is_seen(inner):
    tx = optax.chain(optax.apply_if_finite(inner, 3), optax.sgd(0.1))
    described = jax.eval_shape(tx.init, PARAMS)
    words = r"`optax.apply_if_finite`.*`efopt.watch.skip_not_finite\(\.\.\., axis_name"
    for see in (
        efopt.partition_specs,
        lambda state: efopt.distribute(state, make_mesh("auto", WORKERS)),
        lambda state: efopt.stack_workers(state, WORKERS),
        lambda state: jax.eval_shape(guarded(tx).init, PARAMS),
    ):
        with pytest.raises(ValueError, match=words):
            see(described)
    # Of one worker, or behind the exchange, all decide alike.
    alone = optax.apply_if_finite(efopt.error_feedback(efopt.sign()), 3)
    efopt.partition_specs(jax.eval_shape(alone.init, PARAMS))
    behind = optax.chain(inner, optax.apply_if_finite(optax.sgd(0.1), 3))
    efopt.partition_specs(jax.eval_shape(behind.init, PARAMS))


def test_bad_options_are_refused():
    with pytest.raises(TypeError, match="must be an Optax gradient transformation"):
        guarded(optax.sgd)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        sgd(max_consecutive=0)
    with pytest.raises(TypeError, match="must be a Python int"):
        sgd(max_consecutive=jnp.int32)
    with pytest.raises(ValueError, match="`skip_not_finite` works over the mapped"):
        jax.eval_shape(guarded(optax.sgd(0.1)).update, one(), start(sgd()))
