"""Trains with everything sharded over the workers but what cannot be: the residual.

Parameters and Adagrad's sums are cut into one range a worker (as ZeRO and FSDP do). In
a step every worker gathers the parameters, computes the gradient of its own part of the
batch, averages it with the others, compressed, keeps its range of the average, and
updates its range of the parameters. What a worker owes is its own, and as long as the
whole gradient: beside a few ranges it is most of what a worker holds.
`efopt.contractive_error_feedback` keeps it in a quarter, an eighth or less:

  none      no feedback, a random tenth of the gradient sent
  ef        with error feedback
  conef     with its residual in eight bits
  conef-4   in four
  sketch    in a count sketch of a fifth

Feedback pays what it owes in bursts: a coordinate waits for ten steps, then gets all of
them at once. Adagrad minds little; momentum behind the feedback, Adam's too, counts a
burst many times over, and with it these methods end below `none`. (In front of the
feedback it would be one more array on every worker, as long as the gradient.)

The workers are 8 virtual devices on a CPU, and all devices where there are several. A
network of four layers learns handwritten digits from scikit-learn.
"""

import argparse
import os
from typing import NamedTuple

# This has to stand before jax is imported: see train_digits.py.
os.environ.setdefault("NPROC", "32")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import efopt

BATCH = 256
BLOCK = efopt.random_block(fraction=0.1)


def conef(memory):
    return efopt.contractive_error_feedback(BLOCK, memory=memory, axis_name="data")


METHODS = {
    "none": efopt.compress(BLOCK, axis_name="data"),
    "ef": efopt.error_feedback(BLOCK, axis_name="data"),
    "conef": conef(efopt.quantize(8, stochastic=True)),
    "conef-4": conef(efopt.quantize(4)),
    "sketch": conef(efopt.compressors.count_sketch(fraction=0.2)),
}


class Network(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class State(NamedTuple):
    params: dict  # ranges of every leaf, (workers, coordinates)
    moments: tuple  # Adagrad's sums, of the same ranges
    feedback: NamedTuple  # each worker's own, whole


def cut(x, workers):
    """A leaf as one range a worker, the last ones padded with zeros."""
    width = -(-x.size // workers)
    return jnp.pad(x.reshape(-1), (0, workers * width - x.size)).reshape(workers, width)


def whole(ranges, like):
    """Inverse of :func:`cut`."""
    return ranges.reshape(-1)[: like.size].reshape(like.shape)


def make_step(apply, params, feedback, optimizer):
    """The step of one worker; ``params`` tells the shapes."""

    def step(state, batch):
        images, labels = batch

        def loss_fn(params):
            logits = apply({"params": params}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        # Gathered parameters count as each worker's own, so gradients stay local.
        gathered = jax.tree.map(
            lambda x, p: whole(lax.all_gather(x[0], "data"), p), state.params, params
        )
        loss, grads = jax.value_and_grad(loss_fn)(gathered)
        average, owed = feedback.update(grads, state.feedback)
        workers, mine = lax.axis_size("data"), lax.axis_index("data")
        average = jax.tree.map(lambda u: cut(u, workers)[mine][None], average)
        updates, moments = optimizer.update(average, state.moments, state.params)
        ranges = optax.apply_updates(state.params, updates)
        return State(ranges, moments, owed), lax.pmean(loss, "data")

    return step


def specs_of(state):
    """Ranges over the workers, the residual by what efopt says, counters everywhere."""
    ranges = jax.tree.map(lambda x: P("data") if x.ndim else P(), state)
    return ranges._replace(feedback=efopt.partition_specs(state.feedback))


def prepare(apply, params, feedback, optimizer, mesh):
    """The placed state and the jitted step of all workers."""
    ranges = jax.tree.map(lambda p: cut(p, mesh.size), params)
    state = State(ranges, optimizer.init(ranges), feedback.init(params))
    state = state._replace(feedback=efopt.distribute(state.feedback, mesh))
    specs = specs_of(state)
    place = lambda x, spec: jax.device_put(jnp.copy(x), NamedSharding(mesh, spec))  # noqa: E731
    state = jax.tree.map(place, state, specs)
    step = jax.shard_map(
        make_step(apply, params, feedback, optimizer),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=(specs, P()),
    )
    return state, jax.jit(step, donate_argnums=0)


def held(state):
    """Bytes of a state on one worker."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))


def train(name, params, apply, data, mesh, steps, lr):
    images, labels = data
    state, step = prepare(apply, params, METHODS[name], optax.adagrad(lr), mesh)
    draws = np.random.default_rng(0)
    picks = draws.integers(len(labels), size=(steps, BATCH // mesh.size * mesh.size))
    compiled = step.lower(state, (images[picks[0]], labels[picks[0]])).compile()
    memory = compiled.memory_analysis()
    sizes = {
        "shards": held((state.params, state.moments)),
        "residual": held(state.feedback),
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
    }
    losses = []
    for pick in picks:
        state, loss = step(state, (images[pick], labels[pick]))
        losses.append(float(loss))  # read at every step: devices stay together
    return state, losses, sizes


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="default: 100")
    add("--width", type=int, default=1024, help="of a layer, default: 1024")
    add("--lr", type=float, default=0.02, help="learning rate, default: 0.02")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add(
        "--check",
        action="store_true",
        help="at the end, whether all devices hold the same bits",
    )
    args = parser.parse_args()

    jax.config.update("jax_num_cpu_devices", 8)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    x, y = load_digits(return_X_y=True)
    x, y = (x / 8 - 1).astype(np.float32), y.astype(np.int32)
    images, test_images, labels, test_labels = train_test_split(
        x, y, test_size=0.2, random_state=0, stratify=y
    )
    model = Network(args.width)
    params = model.init(jax.random.key(0), images[:1])["params"]
    size = sum(p.size for p in jax.tree.leaves(params))
    print(f"{mesh.size} workers, {size:,} parameters, bytes on each worker:")
    line = "{:8} {:>12} {:>12} {:>12} {:>12} {:>8} {:>9}".format
    columns = "shards", "residual", "temporary", "peak", "loss", "accuracy"
    print(line("method", *columns))
    for name in args.methods:
        data = images, labels
        state, losses, sizes = train(
            name, params, model.apply, data, mesh, args.steps, args.lr
        )
        if args.check:  # what each holds of its own is left out
            efopt.watch.require_agreement(state)
        trained = jax.tree.map(whole, state.params, params)
        logits = model.apply({"params": trained}, test_images)
        accuracy = float(np.mean(np.argmax(logits, axis=-1) == test_labels))
        numbers = [f"{n:,}" for n in sizes.values()]
        print(line(name, *numbers, f"{losses[-1]:.4f}", f"{accuracy:.1%}"))
    if args.check:
        print("all workers hold the same bits of what is equal")


if __name__ == "__main__":
    main()
