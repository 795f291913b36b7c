"""What single methods are for: one small run each, three seeds, an order with a margin.

A network of tanh on scikit-learn's digits, four workers, every method at the best of
its rates. The rate is a factor on the updates of a schedule from one to zero, so that
one program serves all rates and seeds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import efopt

AXIS, WORKERS, BATCH, WIDTH, DEPTH = "data", 4, 32, 64, 4
HEAD = f"w{DEPTH}"
SEEDS = range(3)


@functools.cache
def data():
    from sklearn.datasets import load_digits  # slowly: for those who run it

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


def task(seed, steps, alike=True):
    """Parameters and the workers' batches; not alike: each sees some digits alone."""
    rng = np.random.default_rng(seed)
    sizes = [64, *[WIDTH] * DEPTH, 10]
    params = {
        f"w{i}": (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32)
        for i, s in enumerate(zip(sizes, sizes[1:], strict=False))
    }
    images, labels = data()
    order = np.argsort(labels, kind="stable")
    shares = np.array_split(order, WORKERS)
    draws = [
        rng.integers(0, len(labels), (steps, BATCH))
        if alike
        else shares[i][rng.integers(0, len(shares[i]), (steps, BATCH))]
        for i in range(WORKERS)
    ]
    chosen = np.stack(draws, axis=1)
    return params, images[chosen], labels[chosen]


def loss(params, images, labels):
    for i in range(DEPTH):
        images = jnp.tanh(images @ params[f"w{i}"])
    logits = images @ params[HEAD]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnums=0)
def _trained(make, rate, params, images, labels):
    tx = make(optax.cosine_decay_schedule(1.0, images.shape[0]))
    state = efopt.stack_workers((params, tx.init(params)), WORKERS)

    def step(state, batch):
        def own(state, *batch):
            params, opt = state
            updates, opt = tx.update(jax.grad(loss)(params, *batch), opt, params)
            return jax.tree.map(lambda p, u: p + rate * u, params, updates), opt

        return jax.vmap(own, axis_name=AXIS)(state, *batch), None

    params = jax.lax.scan(step, state, (images, labels))[0][0]
    return loss(jax.tree.map(lambda p: p[0], params), *data())


def best(make, rates, given):
    """The lowest training loss at any of the rates."""
    losses = [float(_trained(make, np.float32(rate), *given)) for rate in rates]
    print(make.__name__, [f"{x:.4f}" for x in losses])  # for `pytest -s`
    return min(x for x in losses if np.isfinite(x))


def dion(schedule):
    return efopt.optimizers.dion(
        schedule,
        rank=16,
        matrices={f"w{i}": i < DEPTH for i in range(DEPTH + 1)},
        fallback=optax.sgd(lambda t: 3 * schedule(t), momentum=0.9),
        axis_name=AXIS,
    )


def power_sgd(schedule):
    return efopt.power_sgd_momentum(
        schedule, rank=16, min_compression=1, axis_name=AXIS
    )


def dense_sgd(schedule):
    return optax.chain(
        efopt.compress(efopt.compressors.identity(), axis_name=AXIS),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_dion_trains_faster_than_error_feedback_at_the_same_bytes(seed):
    """2504.05295's claim, in steps: also faster than dense SGD, at half its bytes."""
    given = task(seed, steps=100)
    mine = best(dion, (0.03, 0.1, 0.3), given)
    assert mine < 0.6 * best(power_sgd, (0.03, 0.1, 0.3), given)
    assert mine < 0.6 * best(dense_sgd, (0.03, 0.1, 0.3), given)


def dense(optimizer):
    identity = efopt.compressors.identity()
    return optax.chain(efopt.compress(identity, axis_name=AXIS), optimizer)


def lion(schedule):
    return efopt.optimizers.distributed_lion(schedule, axis_name=AXIS)


def lion_cub(schedule):
    return efopt.optimizers.distributed_lion(
        schedule, compressor=efopt.quantize(4), average_momentum=10, axis_name=AXIS
    )


def dense_lion(schedule):
    return dense(optax.lion(schedule))


def signs_with_feedback(schedule):
    return efopt.dist_ef_sgd(schedule, axis_name=AXIS)


SMALL, LARGE = (0.001, 0.003, 0.01, 0.03), (0.1, 0.3, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_votes_of_lion_are_as_good_as_lion_where_workers_are_alike(seed):
    """2404.00438's claim; and better than error feedback of as many bits."""
    given = task(seed, steps=150)
    mine = best(lion, SMALL, given)
    assert mine < 1.6 * best(dense_lion, SMALL, given)
    assert mine < 0.9 * best(signs_with_feedback, LARGE, given)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_few_bits_of_lion_cub_hold_where_workers_differ_and_votes_do_not(seed):
    """2411.16462's claim. Each worker sees some of the digits alone."""
    given = task(seed, steps=150, alike=False)
    cub = best(lion_cub, SMALL, given)
    assert cub < 0.1 * best(lion, SMALL, given)
    assert cub < 2.5 * best(dense_lion, SMALL, given)


def one_bit_adam(schedule):
    return efopt.optimizers.one_bit_adam(schedule, warmup=30, axis_name=AXIS)


def zero_one_adam(schedule):
    return efopt.optimizers.zero_one_adam(
        schedule, freeze=75, refresh=8, axis_name=AXIS
    )


def zero_one_adam_local(schedule):
    """From step 50 on meetings one, two, and then four steps apart."""
    return efopt.optimizers.zero_one_adam(
        schedule, freeze=50, refresh=8, longest=4, doubling=25, axis_name=AXIS
    )


def dense_adam(schedule):
    return dense(optax.adam(schedule))


def adam_behind_feedback(schedule):
    feedback = efopt.error_feedback(
        efopt.scaled_sign(1024), axis_name=AXIS, exchange="two_phase"
    )
    return optax.chain(feedback, optax.adam(schedule))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_one_bit_momentum_trains_as_adam_and_one_bit_gradients_do_not(seed):
    """2102.02888's claim and 2202.06009's: 30 dense steps of 150, and 26."""
    given = task(seed, steps=150)
    adam = best(dense_adam, SMALL, given)
    behind = best(adam_behind_feedback, SMALL, given)
    for method in (one_bit_adam, zero_one_adam):
        mine = best(method, SMALL, given)
        assert mine < 1.6 * adam
        assert mine < 0.4 * behind
    mine = best(zero_one_adam_local, SMALL, given)  # 2202.06009's local steps
    assert mine < 2 * adam
    assert mine < 0.4 * behind
