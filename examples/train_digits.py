"""Trains a small Flax network on handwritten digits with compressed gradients.

Every method trains the same network, from the same start, on the same batches of
scikit-learn's digits (1797 images of 8 x 8 pixels, which come with the package):

  dense                 SGD with momentum; gradients are averaged uncompressed
  signsgd               one bit a coordinate, averaged by majority vote, no memory
  ef-signsgd            one bit a coordinate and error feedback
  ef-signsgd-two-phase  the same, sent so that bytes do not grow with the workers
  ef-top-k              the largest 1 % of the coordinates and error feedback

The workers are 8 virtual devices on a CPU, and all devices where there are several. On
a single accelerator 8 workers are simulated by `jax.vmap`.
"""

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

# This has to stand before jax is imported. The virtual devices of a CPU share one pool
# of threads, one for each of them, in which the collectives of a step can starve each
# other until XLA gives up and aborts. XLA takes the size of the pool from NPROC.
os.environ.setdefault("NPROC", "32")

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P
from matplotlib.ticker import EngFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import efopt

BATCH = 32  # images per worker and step


def with_feedback(lr, compressor, exchange=None):
    return optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name="data"),  # each worker's momentum
        efopt.error_feedback(compressor, axis_name="data", exchange=exchange),
        optax.sgd(lr),
    )


METHODS = {
    "dense": lambda lr: optax.chain(
        efopt.compress(efopt.identity(), axis_name="data"),
        optax.sgd(lr, momentum=0.9),
    ),
    "signsgd": lambda lr: optax.chain(
        efopt.compress(efopt.sign(), axis_name="data", exchange="majority_vote"),
        optax.sgd(lr / 50),  # signs forget magnitudes: the rate alone sets the step
    ),
    "ef-signsgd": lambda lr: with_feedback(lr, efopt.scaled_sign()),
    "ef-signsgd-two-phase": lambda lr: with_feedback(
        lr, efopt.scaled_sign(block_size=1024), exchange="two_phase"
    ),
    "ef-top-k": lambda lr: with_feedback(lr, efopt.top_k(fraction=0.01)),
}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(256)(x))
        x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


def train_step(state, batch):
    """One step of one worker; every collective is in the optimizer but the loss's."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"]
        ).mean()

    local = efopt.local_params(state.params, "data")  # gradients stay this worker's own
    loss, grads = jax.value_and_grad(loss_fn)(local)
    return state.apply_gradients(grads=grads), jax.lax.pmean(loss, "data")


def on_mesh(state, mesh):
    """The state laid out over the devices of a mesh, and the compiled step."""
    state = efopt.distribute(state, mesh)
    specs = efopt.partition_specs(state)
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P())
    )
    return state, jax.jit(step, donate_argnums=0)


def simulated(state, workers):
    """The same on a single device, which plays all the workers."""

    def step(state, batch):
        batch = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), batch)
        mapped = jax.vmap(train_step, axis_name="data", out_axes=(0, None))
        return mapped(state, batch)

    return efopt.stack_workers(state, workers), jax.jit(step, donate_argnums=0)


class Result(NamedTuple):
    wire: efopt.wire.WireReport
    losses: list[float]
    accuracy: float
    compile_seconds: float
    seconds: float


def train(name, tx, data, mesh, simulate, steps, seed):
    train_set, test_set = data
    model = Network()
    params = model.init(jax.random.key(seed), test_set["image"])["params"]
    fresh = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    shape = (steps, mesh.size * BATCH)
    picks = np.random.default_rng(seed).integers(len(train_set["label"]), size=shape)
    batches = ({key: x[pick] for key, x in train_set.items()} for pick in picks)

    start = time.perf_counter()
    batch = next(batches)
    state, step = on_mesh(fresh, mesh)
    wire = efopt.wire.measure(step, state, batch)
    if simulate:
        state, step = simulated(fresh, mesh.size)
    state, loss = step(state, batch)
    losses = [float(loss)]
    compiled = time.perf_counter()
    with tqdm(batches, name, steps, initial=1, unit=" steps") as bar:
        for batch in bar:
            state, loss = step(state, batch)
            losses.append(float(loss))  # read at every step: devices stay together
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    end = time.perf_counter()

    params = state.params
    if simulate:
        params = jax.tree.map(lambda x: x[0], params)  # equal on all workers
    logits = model.apply({"params": params}, test_set["image"])
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == test_set["label"]))
    return Result(wire, losses, accuracy, compiled - start, end - compiled)


def print_table(results):
    line = "{:20}  {:>8}  {:>13}  {:>6}  {:>10}  {:>6}  {:>7}  {:>7}".format
    sizes = "operand bytes", "ratio", "link bytes", "ratio"
    print(line("method", "accuracy", *sizes, "seconds", "compile"))
    for name, result in results.items():
        sizes = []
        for kind in ("operand_bytes", "bytes_sent_per_worker"):
            size = getattr(result.wire, kind)
            dense = getattr(results["dense"].wire, kind) if "dense" in results else None
            sizes += [f"{size:,}", f"{dense / size:.1f}" if dense else "-"]
        times = f"{result.seconds:.1f}", f"{result.compile_seconds:.1f}"
        print(line(name, f"{result.accuracy:.1%}", *sizes, *times))
    print(
        "Bytes per worker and step, read from the compiled program: operand bytes enter"
    )
    print("its collectives, link bytes leave the worker. The loss is 4 of the former.")


def draw(results, path):
    """The loss against the bytes that it took, smoothed over ten steps."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        window = min(10, len(result.losses))
        loss = np.convolve(result.losses, np.ones(window) / window, mode="valid")
        steps = np.arange(window, len(result.losses) + 1)
        sent = result.wire.bytes_sent_per_worker * steps
        axes.plot(sent, loss, label=f"{name} ({result.accuracy:.1%})")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("bytes that have left each worker (log scale)")
    axes.set_ylabel("training loss (log scale)")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("Handwritten digits: loss against communication")
    axes.legend(title="method (test accuracy)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--steps", type=int, default=300, help="default: 300")
    add("--workers", type=int, help="default: all accelerators if several, or else 8")
    add("--lr", type=float, default=0.1, help="learning rate, default: 0.1")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--seed", type=int, default=0, help="default: 0")
    add(
        "--output", type=Path, default="train_digits.png", help="where the picture goes"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.workers is not None and args.workers < 2:
        parser.error(f"--workers must be at least 2, got {args.workers}")
    if not args.lr > 0:
        parser.error(f"--lr must be positive, got {args.lr}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error(
            f"--output must be a .png in an existing folder, got {args.output}"
        )
    return args


def main():
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", args.workers or 8)
    devices = jax.devices()
    workers = args.workers or (len(devices) if len(devices) > 1 else 8)
    simulate = len(devices) < workers
    where = "simulated by vmap on one of" if simulate else "on as many of"
    print(f"{workers} workers, {where} {len(devices)} x {devices[0].device_kind}")
    if simulate:
        devices = jax.devices("cpu")  # the step is compiled for them to read its bytes
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((workers,), ("data",), auto, devices=devices[:workers])

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 8 - 1).astype(np.float32), labels.astype(np.int32)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=0.2, random_state=args.seed, stratify=labels
    )
    data = {"image": x, "label": y}, {"image": x_test, "label": y_test}

    results = {}
    for name in args.methods:
        tx = METHODS[name](args.lr)
        results[name] = train(name, tx, data, mesh, simulate, args.steps, args.seed)
    print_table(results)
    draw(results, args.output)
    print(f"Loss against bytes: {args.output}")


if __name__ == "__main__":
    main()
