"""Parameters and moments in ranges, the residual whole: examples/fully_sharded.py."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import efopt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fully_sharded.py"
WORKERS, STEPS = 8, 3
# Whole programs on eight devices: `pytest -m slow`.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example():
    """The module, without running it."""
    spec = importlib.util.spec_from_file_location("fully_sharded", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task(example):
    draws = np.random.default_rng(0)
    images = draws.normal(size=(STEPS, 64, 64)).astype(np.float32)
    labels = draws.integers(10, size=(STEPS, 64)).astype(np.int32)
    model = example.Network(200)
    return model, model.init(jax.random.key(0), images[0])["params"], images, labels


def prepared(example, task, name, mesh):
    model, params, images, labels = task
    feedback = example.METHODS[name]
    return example.prepare(model.apply, params, feedback, optax.adagrad(0.01), mesh)


def unsharded(example, task, name):
    """The same training, every worker with all parameters and moments, by vmap."""
    model, params, images, labels = task
    tx = optax.chain(example.METHODS[name], optax.adagrad(0.01))

    def step(state, batch):
        params, opt_state = state
        images, labels = batch

        def loss_fn(params):
            logits = model.apply({"params": params}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        local = efopt.local_params(params, "data")
        loss, grads = jax.value_and_grad(loss_fn)(local)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    state = efopt.stack_workers((params, tx.init(params)), WORKERS)
    step = jax.jit(jax.vmap(step, axis_name="data"))
    for x, y in zip(images, labels, strict=True):
        batch = x.reshape(WORKERS, -1, 64), y.reshape(WORKERS, -1)
        state, _ = step(state, batch)
    return jax.tree.map(lambda p: p[0], state[0])


def test_sharded_training_is_the_same_as_unsharded(example, task, mesh):
    state, step = prepared(example, task, "conef", mesh)
    for x, y in zip(*task[2:], strict=True):
        state, loss = step(state, (x, y))
        assert np.isfinite(loss)
    params = jax.tree.map(example.whole, state.params, task[1])
    expected = unsharded(example, task, "conef")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    for x in jax.tree.leaves((state.params, state.moments[0].sum_of_squares)):
        assert x.addressable_shards[0].data.shape[0] == 1  # a range a worker


def test_what_travels_is_the_parameters_and_a_tenth_of_the_gradient(
    example, task, mesh
):
    state, step = prepared(example, task, "conef", mesh)
    batch = task[2][0], task[3][0]
    carriers = "all-gather:f32", "all-reduce:f32"
    leaves = jax.tree.leaves(task[1])
    ranges = sum(4 * -(-p.size // WORKERS) for p in leaves)
    payload = sum(4 * -(-p.size // 10) for p in leaves)
    loss = 8
    efopt.wire.check(
        step,
        state,
        batch,
        carriers=carriers,
        at_most=ranges * (WORKERS - 1) + payload * 1.75 + loss,
    )


def test_peak_memory_is_less_by_most_of_a_residual(example, task, mesh):
    peaks, gradient = {}, sum(4 * p.size for p in jax.tree.leaves(task[1]))
    for name in ("ef", "conef-4"):
        state, step = prepared(example, task, name, mesh)
        compiled = step.lower(state, (task[2][0], task[3][0])).compile()
        memory = compiled.memory_analysis()
        peaks[name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        ranges = example.held((state.params, state.moments))
        assert ranges <= 2 * gradient / WORKERS + 1000
    assert peaks["ef"] - peaks["conef-4"] > 0.6 * gradient, (peaks, gradient)
