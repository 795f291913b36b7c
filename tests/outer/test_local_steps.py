"""Local steps against loops by hand, and what they promise between meetings."""

import functools

import flax.serialization
import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from workers_under_test import FAST, copies, make_mesh, slow

import efopt

AXIS = "data"
SHAPES = {"b": (5,), "w": (6, 7)}
MEAN = efopt.compress(efopt.compressors.identity(), axis_name=AXIS)


def tree(seed, *lead):
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal((*lead, *s), np.float32) for k, s in SHAPES.items()}


PARAMS = tree(0)


def curvature(p):
    return np.linspace(0.1, 1, p.size, dtype=np.float32).reshape(p.shape)


def gradient(params, optimum):
    """Of a quadratic of this worker's own."""
    return jax.tree.map(lambda p, o: curvature(p) * (p - o), params, optimum)


def step_of(tx, axis_name=AXIS):
    def step(carry, optimum):
        params, state = carry
        own = efopt.local_params(params, axis_name, state)
        updates, state = tx.update(gradient(own, optimum), state, params)
        return optax.apply_updates(params, updates), state

    return step


def optima(workers, steps):
    """Those of all workers, for every step; no two are alike."""
    return [tree(10 + t, workers) for t in range(steps)]


def started(tx):
    return jax.tree.map(np.asarray, jax.jit(tx.init)(PARAMS))


@functools.cache
def _mapped(how, tx, workers):
    step = step_of(tx)
    whole = PARAMS, started(tx)
    if how in ("vmap", "pmap"):
        carry = efopt.stack_workers(whole, workers)
        if how == "vmap":
            return jax.jit(jax.vmap(step, axis_name=AXIS)), carry
        devices = jax.devices()[:workers]
        return jax.pmap(step, axis_name=AXIS, devices=devices), carry
    mesh = make_mesh(how, workers)
    carry = efopt.distribute(whole, mesh)
    specs = efopt.partition_specs(carry)

    def own(carry, optimum):
        return step(carry, jax.tree.map(lambda x: x[0], optimum))

    fn = jax.shard_map(own, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=specs)
    return jax.jit(fn, compiler_options=FAST), carry


def run(tx, how="auto", workers=4, steps=6, stop=None):
    """The carries after every step, as NumPy; each copy of what is replicated."""
    fn, carry = _mapped(how, tx, workers)
    out = []
    for optimum in optima(workers, steps)[:stop]:
        if how == "explicit":
            mesh = carry[1].count.sharding.mesh
            optimum = jax.device_put(optimum, jax.NamedSharding(mesh, P(AXIS)))
        carry = fn(carry, optimum)
        out.append(jax.tree.map(np.asarray, carry))
    return out


def close(got, expected, atol=1e-6):
    for name in SHAPES:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=atol)


# --------------------------------------------------------------- laws by hand


def test_meeting_at_every_step_with_nothing_compressed_is_sgd():
    tx = efopt.local_steps(
        optax.sgd(0.3), optax.chain(MEAN, optax.sgd(1.0)), every=1, axis_name=AXIS
    )
    params = PARAMS
    for (got, _), optimum in zip(run(tx), optima(4, 6), strict=True):
        mean = jax.tree.map(lambda o: o.mean(0), optimum)
        grads = gradient(params, mean)
        params = jax.tree.map(lambda p, g: p - np.float32(0.3) * g, params, grads)
        close(got, params)


def test_one_worker_and_an_outer_rate_of_one_is_the_inner_optimizer():
    inner = optax.adamw(0.1, weight_decay=0.1)
    tx = efopt.local_steps(inner, optax.sgd(1.0), every=3)
    step, carry = jax.jit(step_of(tx, None)), (PARAMS, started(tx))
    params, state = PARAMS, jax.jit(inner.init)(PARAMS)
    plain = jax.jit(lambda g, s, p: inner.update(g, s, p))
    for optimum in optima(1, 6):
        optimum = jax.tree.map(lambda x: x[0], optimum)
        carry = step(carry, optimum)
        updates, state = plain(gradient(params, optimum), state, params)
        params = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    close(carry[0], params)


class Adam:
    """A worker's optimizer by hand, in float64."""

    def __init__(self, rate, params):
        self.rate, self.t = rate, 0
        self.m = {k: np.zeros(x.shape) for k, x in params.items()}
        self.v = {k: np.zeros(x.shape) for k, x in params.items()}

    def step(self, params, grads):
        self.t += 1
        out = {}
        for k, g in grads.items():
            self.m[k] = 0.9 * self.m[k] + 0.1 * g
            self.v[k] = 0.95 * self.v[k] + 0.05 * g**2
            m, v = self.m[k] / (1 - 0.9**self.t), self.v[k] / (1 - 0.95**self.t)
            out[k] = params[k] - self.rate * m / (np.sqrt(v) + 1e-8)
        return out


def by_hand(workers, every, rounds, start=0, alpha=0.0):
    """DiLoCo, 2311.08105 Algorithm 1: parameters after every step, in float64."""
    wide = lambda t: {k: np.asarray(x, np.float64) for k, x in t.items()}  # noqa: E731
    common = wide(PARAMS)
    own = [dict(common) for _ in range(workers)]
    adams = [Adam(0.05, common) for _ in range(workers)]
    trace = {k: np.zeros(x.shape) for k, x in common.items()}
    for t, optimum in enumerate(optima(workers, start + every * rounds), 1):
        for i in range(workers):
            mine = {k: x[i] for k, x in optimum.items()}
            own[i] = adams[i].step(own[i], wide(gradient(own[i], mine)))
        if t <= start or (t - start) % every == 0:
            for k in common:
                delta = np.mean([common[k] - x[k] for x in own], axis=0)
                trace[k] = 0.9 * trace[k] + delta
                common[k] = common[k] - 0.7 * (delta + 0.9 * trace[k])
                for x in own:
                    x[k] = alpha * x[k] + (1 - alpha) * common[k]
        yield common, own


def diloco(every, axis_name=AXIS, **options):
    mean = efopt.compress(efopt.compressors.identity(), axis_name=axis_name)
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    return efopt.local_steps(
        optax.adam(0.05, b2=0.95),
        optax.chain(mean, nesterov),
        every=every,
        axis_name=axis_name,
        **options,
    )


@pytest.mark.parametrize(
    "how, workers, options",
    [
        ("auto", 4, {}),
        slow("explicit", 4, {}),
        slow("two_d", 2, {}),
        slow("pmap", 3, {}),
        ("vmap", 3, {"start": 2, "alpha": 0.5}),
    ],
)
def test_it_is_diloco_by_hand(how, workers, options):
    got = run(diloco(3, **options), how, workers, options.get("start", 0) + 18)
    expected = by_hand(workers, 3, 6, **options)
    for (params, state), (common, own) in zip(got, expected, strict=True):
        for k, p in params.items():
            p = p[0] if how in ("vmap", "pmap") else p
            np.testing.assert_allclose(p, common[k], rtol=0, atol=1e-5)
            drift = state.local.value.drift[k].reshape(workers, *SHAPES[k])
            rows = np.stack([x[k] for x in own])
            np.testing.assert_allclose(p + drift, rows, rtol=0, atol=1e-5)


# ------------------------------------------------------------ between meetings


SIGN = efopt.local_steps(
    optax.adam(0.05),
    optax.chain(
        efopt.error_feedback(efopt.scaled_sign(), axis_name=AXIS), optax.sgd(1.0)
    ),
    every=3,
    axis_name=AXIS,
)


def test_common_parameters_move_at_meetings_alone_and_nobody_drifts_then():
    before = PARAMS
    for t, (params, state) in enumerate(run(SIGN), 1):
        for k, x in params.items():
            assert (x.tobytes() == before[k].tobytes()) == (t % 3 != 0)
            assert (state.local.value.drift[k] != 0).any() == (t % 3 != 0)
        before = params


def test_after_a_meeting_every_device_has_the_same_bits():
    fn, carry = _mapped("auto", SIGN, 4)
    for optimum in optima(4, 3):
        carry = fn(carry, optimum)
    common = carry[0], carry[1].count, carry[1].outer[1:]
    for x in jax.tree.leaves(common):
        assert len({c.tobytes() for c in copies(x)}) == 1


def test_a_worker_keeps_its_drift_its_optimizer_and_what_it_owes():
    """Beside the common parameters; nothing else that grows with them."""
    report = efopt.memory_report(SIGN, PARAMS)
    whole = sum(x.nbytes for x in PARAMS.values())
    adam, few = 2 * whole, 64  # and some counters
    assert whole + adam + whole <= report.per_worker_bytes <= 4 * whole + few
    assert report.replicated_bytes <= few


@pytest.mark.parametrize("decay", [slow(1.0), 0.5])
def test_what_the_outer_message_does_not_say_is_owed(decay):
    """Mean (pseudo-gradient + decay * owed) = what was applied + the mean owed."""
    feedback = efopt.feedback.damped_error_feedback(
        efopt.top_k(k=3), alpha=decay, beta=decay, axis_name=AXIS
    )
    tx = efopt.local_steps(optax.sgd(0.1), feedback, every=2, axis_name=AXIS)
    before = (PARAMS, started(tx))
    for t, (after, optimum) in enumerate(
        zip(run(tx, steps=8), optima(4, 8), strict=True), 1
    ):
        for k in SHAPES if t % 2 == 0 else ():
            drift = np.asarray(before[1].local.value.drift[k], np.float64)
            own = before[0][k] + drift
            delta = -(drift - 0.1 * curvature(PARAMS[k]) * (own - optimum[k]))
            old = np.asarray(before[1].outer.residual.value[k], np.float64)
            new = np.asarray(after[1].outer.residual.value[k], np.float64)
            applied = after[0][k] - before[0][k]
            left = (delta + decay * old).mean(0) - applied - new.mean(0)
            np.testing.assert_allclose(left, 0, rtol=0, atol=1e-6)
            assert np.abs(new).max() > 1e-3
        before = after


@pytest.mark.parametrize("how", ["auto", slow("vmap")])
def test_a_checkpoint_within_a_round_goes_on_to_the_same_bits(how):
    fn, carry = _mapped(how, SIGN, 4)
    expected = run(SIGN, how)[-1]
    stored = run(SIGN, how, stop=4)[-1]
    data = flax.serialization.to_bytes(stored)
    fresh = jax.tree.map(np.zeros_like, stored)
    restored = flax.serialization.from_bytes(fresh, data)
    place = lambda x, like: jax.device_put(x, like.sharding)  # noqa: E731
    if how == "auto":
        carry = jax.tree.map(place, restored, carry)
    else:
        carry = restored
    for optimum in optima(4, 6)[4:]:
        carry = fn(carry, optimum)
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == b.tobytes()
