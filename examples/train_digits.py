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

BATCH = 256  # images per step, dealt out to the workers


def dense(lr):
    mean = efopt.compress(efopt.compressors.identity(), axis_name="data")
    return optax.chain(mean, optax.sgd(lr, momentum=0.9))


def signsgd(lr):
    vote = efopt.compress(efopt.sign(), axis_name="data", exchange="majority_vote")
    return optax.chain(vote, optax.sgd(lr / 100))  # the rate alone sets the step


def with_feedback(compressor, lr, exchange=None):
    return optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name="data"),  # each worker's momentum
        efopt.error_feedback(compressor, axis_name="data", exchange=exchange),
        optax.sgd(lr),
    )


METHODS = {
    "dense": dense,
    "signsgd": signsgd,
    "ef-signsgd": lambda lr: with_feedback(efopt.scaled_sign(), lr),
    "ef-signsgd-two-phase": lambda lr: with_feedback(
        efopt.scaled_sign(block_size=1024), lr, exchange="two_phase"
    ),
    "ef-top-k": lambda lr: with_feedback(efopt.top_k(fraction=0.01), lr),
}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(256)(x))
        x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(10)(x)


def train_step(state, batch):
    """The step of one worker, on its own part of the batch."""
    images, labels = batch

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    local = efopt.local_params(state.params, "data")  # gradients stay this worker's own
    loss, grads = jax.value_and_grad(loss_fn)(local)
    return state.apply_gradients(grads=grads), jax.lax.pmean(loss, "data")


def on_mesh(state, mesh):
    """The state laid out over the devices, and the step of all workers."""
    state = efopt.distribute(state, mesh)
    specs = efopt.partition_specs(state)
    step = jax.shard_map(
        train_step, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P())
    )
    return state, jax.jit(step, donate_argnums=0)


def on_one_device(state, workers):
    """The same on a single device, which plays all the workers."""

    def step(state, batch):
        batch = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), batch)
        each = jax.vmap(train_step, axis_name="data", out_axes=(0, None))
        return each(state, batch)

    return efopt.stack_workers(state, workers), jax.jit(step, donate_argnums=0)


class Result(NamedTuple):
    accuracy: float
    losses: list[float]
    wire: efopt.wire.WireReport
    seconds: float
    compile_seconds: float


def train(name, tx, data, mesh, simulate, steps, seed, check=False):
    images, test_images, labels, test_labels = data
    model = Network()
    params = model.init(jax.random.key(seed), images[:1])["params"]
    fresh = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    size = max(1, BATCH // mesh.size) * mesh.size
    picks = np.random.default_rng(seed).integers(len(labels), size=(steps, size))

    start = time.perf_counter()
    state, step = on_mesh(fresh, mesh)
    wire = efopt.wire.measure(step, state, (images[picks[0]], labels[picks[0]]))
    if simulate:
        state, step = on_one_device(fresh, mesh.size)
    losses, first = [], start
    with tqdm(picks, name, unit="step") as bar:
        for pick in bar:
            state, loss = step(state, (images[pick], labels[pick]))
            losses.append(float(loss))  # read at every step: devices stay together
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if len(losses) == 1:
                first = time.perf_counter()
    seconds = time.perf_counter() - first
    if check:  # once, at the end: what has parted stays parted
        efopt.watch.require_agreement(state, stacked=int(simulate))

    params = state.params
    if simulate:
        params = jax.tree.map(lambda x: x[0], params)  # all workers hold the same
    logits = model.apply({"params": params}, test_images)
    accuracy = float(np.mean(np.argmax(logits, axis=-1) == test_labels))
    return Result(accuracy, losses, wire, seconds, first - start)


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
    print(
        "its collectives, link bytes leave the worker. Averaging the loss is included."
    )


def draw(results, path):
    """Saves the loss, averaged over ten steps, against the bytes sent until then."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, result in results.items():
        window = min(10, len(result.losses))
        loss = np.convolve(result.losses, np.ones(window) / window, mode="valid")
        sent = result.wire.bytes_sent_per_worker * np.arange(1, len(result.losses) + 1)
        label = f"{name} ({result.accuracy:.1%})"
        axes.plot(sent[window - 1 :], loss, label=label, marker=".", markevery=[-1])
    axes.set_title("Handwritten digits: loss against communication")
    axes.set(xscale="log", yscale="log", ylabel="training loss")
    axes.set_xlabel("bytes sent by each worker since the start")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, title="method (test accuracy)")
    figure.savefig(path, dpi=110)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add, output = parser.add_argument, Path("train_digits.png")
    add("--steps", type=int, default=200, help="default: 200")
    add("--workers", type=int, help="default: all devices if several, otherwise 8")
    add("--lr", type=float, default=0.1, help="learning rate, default: 0.1")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--seed", type=int, default=0, help="default: 0")
    add("--output", type=Path, default=output, help=f"picture, default: {output}")
    add(
        "--check",
        action="store_true",
        help="at the end, whether all devices hold the same bits",
    )
    args = parser.parse_args()
    for name, least in {"steps": 1, "workers": 2, "seed": 0}.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")
    if not args.lr > 0:
        parser.error(f"argument --lr: must be positive, got {args.lr}")
    if args.output.suffix != ".png" or not args.output.parent.is_dir():
        parser.error(
            f"argument --output: no .png in a folder that exists: {args.output}"
        )
    return args


def main():
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", args.workers or 8)
    devices = jax.devices()
    workers = args.workers or (len(devices) if len(devices) > 1 else 8)
    simulate = len(devices) < workers
    how = "simulated by vmap on one device" if simulate else "each on its own device"
    print(f"{workers} workers, {how} ({devices[0].device_kind})")
    if simulate:
        devices = jax.devices("cpu")  # for them the step is compiled to read its bytes
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((workers,), ("data",), auto, devices=devices[:workers])

    x, y = load_digits(return_X_y=True)
    x, y = (x / 8 - 1).astype(np.float32), y.astype(np.int32)
    data = train_test_split(x, y, test_size=0.2, random_state=args.seed, stratify=y)
    results = {}
    for name in args.methods:
        tx = METHODS[name](args.lr)
        options = simulate, args.steps, args.seed, args.check
        results[name] = train(name, tx, data, mesh, *options)
    print_table(results)
    if args.check:
        print(f"{len(results)} runs: all {workers} workers hold the same bits")
    draw(results, args.output)
    print(f"Loss against bytes: {args.output}")


if __name__ == "__main__":
    main()
