"""Trains a Flax `nnx` network with one-bit gradients and error feedback.

An `nnx` model is a mutable object, and so is `nnx.Optimizer`; `nnx.split` of the latter
would take apart the nodes that mark what each worker owns. So the model alone is split,
once: its parameters become a pytree, which `tx.init` takes like any other, and the step
is a function from state to state that merges the model inside.

The workers are all devices where there are several, else 8 virtual devices of the CPU.
"""

import argparse
import os

# Before jax is imported: more threads, or the virtual devices of a CPU can deadlock.
os.environ.setdefault("NPROC", "32")

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import efopt


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def main():
    parser = argparse.ArgumentParser(description="Trains a Flax nnx network on digits.")
    parser.add_argument("--steps", type=int, default=200, help="default: 200")
    help = "at the end, whether all devices hold the same bits"
    parser.add_argument("--check", action="store_true", help=help)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"argument --steps: must be at least 1, got {args.steps}")

    jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("data",), auto, devices=devices)
    x, y = load_digits(return_X_y=True)
    x, y = (x / 8 - 1).astype(np.float32), y.astype(np.int32)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, random_state=0)

    graphdef, params = nnx.split(Network(nnx.Rngs(0)))
    tx = optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name="data"),
        efopt.error_feedback(efopt.scaled_sign(), axis_name="data"),
        optax.sgd(0.1),
    )
    state = efopt.distribute({"params": params, "opt_state": tx.init(params)}, mesh)
    specs = efopt.partition_specs(state)

    def train_step(state, batch):
        images, labels = batch

        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        params, opt_state = state["params"], state["opt_state"]
        local = efopt.local_params(params, "data")
        loss, grads = jax.value_and_grad(loss_fn)(local)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state}, jax.lax.pmean(loss, "data")

    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P())
    )
    step = jax.jit(step, donate_argnums=0)

    draws = np.random.default_rng(0)
    for i in range(1, args.steps + 1):
        pick = draws.integers(len(y), size=256 // mesh.size * mesh.size)
        state, loss = step(state, (x[pick], y[pick]))
        loss = float(loss)  # read at every step: devices stay together
        if i % 50 == 0 or i == args.steps:
            print(f"step {i}: loss {loss:.4f}")

    if args.check:  # once: what has parted stays parted
        efopt.watch.require_agreement(state)
        print(f"all {mesh.size} workers hold the same bits")
    model = nnx.merge(graphdef, state["params"])
    accuracy = np.mean(np.argmax(model(x_test), axis=-1) == y_test)
    print(f"test accuracy {accuracy:.1%}")
    print("What one worker sends in a step, from the compiled program:")
    print(efopt.wire.measure(step, state, (x[pick], y[pick])))


if __name__ == "__main__":
    main()
