"""What an update that is one step old costs: steps until the loss is low enough.

Eight workers, simulated by `jax.vmap`, train the network of `train_digits.py` on
scikit-learn's digits, with an exchange in the step and with one a step late
(`delay=1`), without momentum, with momentum in front of the exchange and behind it, at
three rates each. Prints the steps after which the training loss, over all images, is
first below the target, at the best of the rates for each: the mean over the seeds, and
how many times more that is with the delay.

    python examples/late_exchange.py
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import efopt

WORKERS, BATCH, EVERY = 8, 32, 5  # images of a worker; steps between looks at the loss
AXIS = "data"
MESSAGES = {
    "dense": (efopt.compressors.identity(), "all_reduce"),
    "signs": (efopt.scaled_sign(64), "two_phase"),
    "8 bits": (efopt.quantize(8), "two_phase"),
    "top-k 5 %": (efopt.top_k(fraction=0.05), "all_gather"),
}
MOMENTA = {  # what stands in front of the exchange and behind it, and the rates tried
    "none": (optax.identity(), optax.sgd, (0.1, 0.3, 1.0)),
    "in front": (optax.trace(0.9), optax.sgd, (0.01, 0.03, 0.1)),
    "behind": (
        optax.identity(),
        lambda rate: optax.sgd(rate, momentum=0.9),
        (0.01, 0.03, 0.1),
    ),
}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


def transformation(message, momentum, rate, delay):
    """The chain: momentum in front, feedback, and what stands behind."""
    compressor, exchange = MESSAGES[message]
    front, behind, _ = MOMENTA[momentum]
    feedback = efopt.error_feedback(
        compressor, axis_name=AXIS, exchange=exchange, delay=delay
    )
    return optax.chain(efopt.per_worker(front, axis_name=AXIS), feedback, behind(rate))


def curves(message, momentum, delay, args):
    """The rates tried, and the loss at every look: shape=(rates, seeds, looks)."""
    images, labels = load_digits(return_X_y=True)
    x, y = (images / 16).astype(np.float32), labels.astype(np.int32)
    model = Network()

    def loss_fn(params, x, y):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def one(key, rate):
        tx = transformation(message, momentum, rate, delay)
        key, first = jax.random.split(key)
        params = model.init(first, x[:1])

        def worker(params, state, key):
            index = jax.random.randint(key, (BATCH,), 0, len(x))
            grads = jax.grad(loss_fn)(params, jnp.take(x, index, 0), jnp.take(y, index))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def step(carry, key):
            keys = jax.random.split(key, WORKERS)
            return jax.vmap(worker, axis_name=AXIS)(*carry, keys), None

        def look(carry, key):
            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, EVERY))
            common = jax.tree.map(lambda leaf: leaf[0], carry[0])
            return carry, loss_fn(common, x, y)

        carry = efopt.stack_workers((params, tx.init(params)), WORKERS)
        keys = jax.random.split(key, args.steps // EVERY)
        return jax.lax.scan(look, carry, keys)[1]

    rates = np.float32(MOMENTA[momentum][2])
    seeds = jax.random.split(jax.random.key(0), args.seeds)
    every_rate = jax.vmap(jax.vmap(one, (0, None)), (None, 0))
    return rates, np.asarray(jax.jit(every_rate)(seeds, rates))


def best(message, momentum, delay, args):
    """Steps until the loss is below the target, the mean over seeds, at the best rate.

    Infinite, where some seed never gets there.
    """
    rates, losses = curves(message, momentum, delay, args)
    below = losses < args.target
    first = (below.argmax(axis=-1) + 1.0) * EVERY
    steps = np.where(below.any(axis=-1), first, np.inf).mean(axis=1)
    return min(zip(steps, rates, strict=True))


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--steps", type=int, default=1000, help="of every run, at most")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--messages", nargs="+", choices=MESSAGES, default=[*MESSAGES])
    parser.add_argument("--target", type=float, default=0.1, help="the loss to reach")
    args = parser.parse_args()

    line = "{:10} {:9} {:>16} {:>16} {:>6}".format
    print(line("message", "momentum", "steps (rate)", "late (rate)", "ratio"))
    for message in args.messages:
        for momentum in MOMENTA:
            now, late = (best(message, momentum, delay, args) for delay in (0, 1))
            cells = (f"{steps:.0f} ({rate:g})" for steps, rate in (now, late))
            print(
                line(message, momentum, *cells, f"{late[0] / now[0]:.2f}"), flush=True
            )


if __name__ == "__main__":
    main()
