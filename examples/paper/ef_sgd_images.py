"""The image experiments of EF-SGD (Karimireddy et al, 2019) at full scale.

VGG-19 with batch norm on CIFAR-10, or a ResNet-18, by the paper's four methods:

  sgdm         SGD with momentum 0.9
  scaled-sign  the sign times its mean magnitude, no memory, no momentum
  signum       the sign of a running mean
  ef-signsgd   the sign with error feedback

Learning rates are those that the authors tuned for the network at batch 128, in
proportion to the batch; weight decay 5e-4 is added to the gradient, and the rate falls
tenfold after one half and three quarters of the epochs. In the paper there is one
worker; here several may share a batch, simulated by `jax.vmap` on one accelerator.
Weights begin as PyTorch's do. The network computes in bfloat16, its statistics and the
weights are float32; convolutions have no bias, which batch norm would take away again.

No epoch is chosen by the test images, as the authors' code does: the result is the last
one's accuracy. The best stands beside it, to compare with the paper's. What error
feedback owes is kept where the rate falls.

Seeds are trained one after another, or with `--together` side by side, for batches that
are too small to fill a card. After every epoch the results of a method are in a file of
`--output`, and every `--save-every` epochs, and before `--budget` seconds are over, all
that is needed to go on in `--state`. The same command goes on from there, to the same
numbers (on a GPU but for rounding: there the compiler chooses by the clock how to
convolve); other processes may train other methods and seeds into the same folders.

    python examples/paper/ef_sgd_images.py --data cifar10 --seeds 0 1 --budget 560
    python examples/paper/ef_sgd_images.py --table .

The second makes one file and a table of the results in a folder.

Data: `--data DIR`, as `cifar10.py` reads it, or with `x_train.npy` (50000, 32, 32, 3)
uint8, `y_train.npy`, `x_test.npy` and `y_test.npy`. Without it, noise on a pattern for
each label stands in: right for timing, and for nothing else.
"""

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import cifar10
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import efopt

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2023, 0.1994, 0.2010], np.float32)
DECAY = 5e-4


def sgdm(rate, axis):
    mean = efopt.compress(efopt.compressors.identity(), axis_name=axis)
    decay = optax.add_decayed_weights(DECAY)
    return optax.chain(mean, decay, optax.sgd(rate, momentum=0.9))


def scaled_sign(rate, axis):
    signs = efopt.compress(efopt.scaled_sign(), axis_name=axis)
    return optax.chain(optax.add_decayed_weights(DECAY), signs, optax.sgd(rate))


def signum(rate, axis):
    decay = optax.add_decayed_weights(DECAY)
    return optax.chain(decay, efopt.optimizers.signum(rate, axis_name=axis))


def ef_signsgd(rate, axis):
    return efopt.ef_signsgd(rate, weight_decay=DECAY, axis_name=axis)


METHODS = {  # and the rate at batch 128, of VGG-19 and of ResNet-18
    "sgdm": (sgdm, {"vgg19": 0.01, "resnet18": 0.01}),
    "scaled-sign": (scaled_sign, {"vgg19": 0.056, "resnet18": 0.056}),
    "signum": (signum, {"vgg19": 5.6e-5, "resnet18": 3.2e-4}),
    "ef-signsgd": (ef_signsgd, {"vgg19": 0.056, "resnet18": 0.056}),
}


class Conv(nn.Module):
    """Without bias; with ``together``, a product of matrices.

    That is what `jax.vmap` over weights leaves whole; a convolution it makes a grouped
    one, for which no library is fast.
    """

    features: int
    together: bool
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        begin = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        shape = self.size, self.size, x.shape[-1], self.features
        kernel = self.param("kernel", begin, shape).astype(jnp.bfloat16)
        x, pad, step = x.astype(jnp.bfloat16), (self.size // 2,) * 2, self.stride
        if not self.together:
            names = "NHWC", "HWIO", "NHWC"
            return jax.lax.conv_general_dilated(
                x, kernel, (step, step), (pad, pad), dimension_numbers=names
            )
        high, wide = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
        corners = itertools.product(range(self.size), repeat=2)
        seen = [x[:, i : i + high : step, j : j + wide : step] for i, j in corners]
        return jnp.concatenate(seen, -1) @ kernel.reshape(-1, self.features)


class Block(nn.Module):
    features: int
    stride: int
    norm: Callable
    conv: Callable

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, stride=self.stride)(x)
        y = self.conv(self.features)(nn.relu(self.norm()(y)))
        y = self.norm()(y)
        if x.shape != y.shape:
            x = self.norm()(self.conv(self.features, size=1, stride=self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    classes: int
    width: int = 64
    together: bool = False

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(
            nn.BatchNorm, not train, momentum=0.9, dtype=jnp.bfloat16
        )
        conv = functools.partial(Conv, together=self.together)
        x = nn.relu(norm()(conv(self.width)(x)))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(self.width * 2**stage, stride, norm, conv)(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)).astype(jnp.float32))


class VGG19(nn.Module):
    """With batch norm; a stage is layers and width, and ends in a pooling."""

    stages: ClassVar = ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8))
    classes: int
    width: int = 64
    together: bool = False

    @nn.compact
    def __call__(self, x, train):
        for layers, wide in self.stages:
            for _ in range(layers):
                x = Conv(wide * self.width, self.together)(x)
                x = nn.relu(
                    nn.BatchNorm(not train, momentum=0.9, dtype=jnp.bfloat16)(x)
                )
            n, high, across, channels = x.shape
            x = x.reshape(n, high // 2, 2, across // 2, 2, channels).max(axis=(2, 4))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)).astype(jnp.float32))


NETWORKS = {"vgg19": VGG19, "resnet18": ResNet18}


def normalise(images):
    return (images.astype(jnp.float32) / 255 - MEAN) / STD


def augment(key, images):
    """A crop of the padded image, and a reflection for every other one."""
    n, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    crop, flip = jax.random.split(key)
    corners = jax.random.randint(crop, (n, 3), 0, 9) * jnp.array([[1, 1, 0]])
    images = jax.vmap(lambda x, c: jax.lax.dynamic_slice(x, c, shape))(padded, corners)
    flipped = jax.random.bernoulli(flip, 0.5, (n, 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def trainer(model, tx, axis):
    """One epoch over the stacked state of seeds, compiled once."""

    def worker(state, batch, images, labels):
        params, stats, opt_state = state
        pick, key = batch

        def loss_fn(params):
            x = normalise(augment(key, images[pick]))
            out, new = model.apply(
                {"params": params, "batch_stats": stats}, x, True, mutable="batch_stats"
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(out, labels[pick])
            return loss.mean(), new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    workers = jax.vmap(worker, (0, 0, None, None), axis_name=axis) if axis else worker

    def epoch(state, picks, key, images, labels):
        keys = jax.random.split(key, picks.shape[:-1])
        step = lambda state, batch: workers(state, batch, images, labels)  # noqa: E731
        state, loss = jax.lax.scan(step, state, (picks, keys))
        return state, loss.mean()

    return jax.jit(over_seeds(epoch, 3, 2), donate_argnums=0)


def evaluator(model, size, axis):
    """Accuracy of each seed's network."""

    def accuracy(state, images, labels):
        params, stats, _ = state
        if axis:  # all workers hold the same parameters
            params = jax.tree.map(lambda p: p[0], params)
            stats = jax.tree.map(lambda s: s.mean(axis=0), stats)

        def count(total, pick):
            x = normalise(images[pick])
            out = model.apply({"params": params, "batch_stats": stats}, x, False)
            return total + (out.argmax(-1) == labels[pick]).sum(), None

        picks = jnp.arange(len(labels) // size * size).reshape(-1, size)
        return jax.lax.scan(count, 0, picks)[0] / picks.size

    return jax.jit(over_seeds(accuracy, 1, 2))


def over_seeds(function, own, common):
    """Its first arguments are stacked; a single seed is not mapped at all."""
    many = jax.vmap(function, (0,) * own + (None,) * common)

    def mapped(*args):
        if jax.tree.leaves(args[0])[0].shape[0] > 1:
            return many(*args)
        one = jax.tree.map(lambda x: x[0], args[:own])
        return jax.tree.map(lambda x: x[None], function(*one, *args[own:]))

    return mapped


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def save(path, state, record):
    """The state and what was found so far, in one file that is there or is not."""
    leaves = (
        jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)
    )
    arrays = {f"leaf_{i}": np.asarray(x) for i, x in enumerate(leaves)}
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.savez(file, record=json.dumps(record), **arrays)
    os.replace(unfinished, path)


def restore(path, state):
    """What `save` has written, in the form of ``state``."""
    with np.load(path) as file:
        record, leaves = json.loads(str(file["record"])), []
        for i, x in enumerate(jax.tree.leaves(state)):
            found = jnp.asarray(file[f"leaf_{i}"])
            leaves.append(jax.random.wrap_key_data(found) if is_key(x) else found)
    return jax.tree.unflatten(jax.tree.structure(state), leaves), record


def run(name, seeds, args, data, deadline, note):
    """Trains until the epochs or the time are over; whether all epochs are."""
    x, y, test_x, test_y = data
    make, rates = METHODS[name]
    steps, axis = len(y) // args.batch, "data" if args.workers > 1 else None
    rate = args.lr or rates[args.network] * args.batch / 128
    cuts = {args.epochs * steps // 2: 0.1, args.epochs * steps * 3 // 4: 0.1}
    tx = make(optax.piecewise_constant_schedule(rate, cuts), axis)
    classes = int(max(y.max(), test_y.max())) + 1
    model = NETWORKS[args.network](classes, args.width, args.together)

    def start(seed):
        key = jax.random.fold_in(jax.random.key(0), seed)
        variables = model.init(key, normalise(x[:1]), False)
        params, stats = variables["params"], variables["batch_stats"]
        state = params, stats, tx.init(params)
        return efopt.stack_workers(state, args.workers) if axis else state

    which = jnp.asarray(seeds)
    state = jax.jit(jax.vmap(start))(which)
    record = {"rate": rate, "done": 0, "loss": [], "test": [], "seconds": []}
    about = args.network, name, args.batch, args.workers, args.epochs, *seeds
    about = "-".join(map(str, about))
    path = args.state / f"{about}.npz"
    if path.exists():
        state, record = restore(path, state)
    epoch = trainer(model, tx, axis)
    accuracy = evaluator(model, min(1000, len(test_y)), axis)
    longest, kept, compiled = 0.0, record["done"], record["done"] + 1
    for i in range(record["done"], args.epochs):
        if time.monotonic() + 1.5 * longest > deadline:
            break
        begin = time.monotonic()
        draws = [np.random.default_rng([seed, i]) for seed in seeds]
        picks = np.stack([d.permutation(len(y))[: steps * args.batch] for d in draws])
        share = (args.workers, -1) if axis else (-1,)
        picks = picks.reshape(len(seeds), steps, *share).astype(np.int32)
        keys = jax.vmap(lambda s, i=i: jax.random.fold_in(jax.random.key(s), i))(which)
        state, loss = epoch(state, picks, keys, x, y)
        test = accuracy(state, test_x, test_y)
        record["loss"].append([round(v, 5) for v in np.asarray(loss, float).tolist()])
        record["test"].append([round(v, 5) for v in np.asarray(test, float).tolist()])
        took = time.monotonic() - begin
        record["seconds"].append(round(took, 3))
        record["done"] = i + 1
        if record["done"] % args.save_every == 0:
            save(path, state, record)
            kept = record["done"]
        if len(record["seconds"]) > compiled:  # which will not come again
            longest = max(longest, time.monotonic() - begin)
        means = np.mean(record["loss"][-1]), np.mean(record["test"][-1])
        cells = f"{name:12} {i + 1:4} {means[0]:8.4f} {means[1]:8.2%} {took:8.2f} s"
        print(f"{cells}  seed {', '.join(map(str, seeds))}", flush=True)
        note(about, name, seeds, record)
    if kept < record["done"]:
        save(path, state, record)
    note(about, name, seeds, record)
    return record["done"] == args.epochs


def load(args):
    if args.data and (args.data[0] / "x_train.npy").exists():
        files = "x_train", "y_train", "x_test", "y_test"
        return [np.load(args.data[0] / f"{f}.npy").squeeze() for f in files]
    if args.data:
        data = cifar10.load(*args.data)
        cifar10.check(*data)
        return list(data)
    rng = np.random.default_rng(0)
    sizes = args.limit or 50_000, (args.limit or 50_000) // 5
    patterns = rng.integers(0, 40, (10, 32, 32, 3))
    data = []
    for n in sizes:
        y = rng.integers(0, 10, n).astype(np.int32)
        noise = rng.integers(0, 216, (n, 32, 32, 3))
        data += [(noise + patterns[y]).astype(np.uint8), y]
    return data


def table(folder, picture):
    """One file, a table and a picture of all results that lie in a folder."""
    found, runs = [], {}
    for path in sorted(folder.glob("*-*.json")):
        result = json.loads(path.read_text())
        for column, seed in enumerate(result["seeds"]):
            parts = {k: [row[column] for row in result[k]] for k in ("loss", "test")}
            found.append({**result, **parts, "seed": seed})
            del found[-1]["seeds"]
    found.sort(key=lambda r: (-r["batch"], list(METHODS).index(r["method"]), r["seed"]))
    lines = ",\n".join(json.dumps(r) for r in found)
    (folder / "ef_sgd_images.json").write_text(f"[\n{lines}\n]\n")
    for r in found:
        if r["done"]:
            key = r["network"], r["batch"], r["epochs"], r["method"]
            runs.setdefault(key, []).append(r)
    print(
        "network   batch  epochs  method       seeds      last  smallest   largest",
        end="",
    )
    print("      best      loss  seconds")
    for (network, batch, epochs, method), group in runs.items():
        last = [r["test"][-1] for r in group]
        best = np.mean([max(r["test"]) for r in group])
        loss = np.mean([r["loss"][-1] for r in group])
        cells = " ".join(f"{f(last):9.2%}" for f in (np.mean, min, max))
        seconds = np.median(np.concatenate([r["seconds"] for r in group]))
        done = min(r["done"] for r in group)
        epochs = str(epochs) if done == epochs else f"{done}/{epochs}"
        print(f"{network:9} {batch:5} {epochs:>7}  {method:12} {len(group):5}", end=" ")
        print(f"{cells} {best:9.2%} {loss:9.5f} {seconds:8.2f}")
    if picture:
        draw(runs, picture)


def draw(runs, path):
    """Wrong test images by epoch: of each seed pale, of their mean strong."""
    import matplotlib.pyplot as plt

    plt.style.use(Path(__file__).parents[1] / "pictures.mplstyle")
    tables = list(dict.fromkeys(key[:3] for key in runs))
    figure, panels = plt.subplots(
        1, len(tables), figsize=(4.6 * len(tables), 3.4), squeeze=False
    )
    for table, panel in zip(tables, panels[0], strict=True):
        shown = []
        for i, method in enumerate(METHODS):
            group = runs.get((*table, method), ())
            shown += group
            wrong = [100 - 100 * np.array(r["test"]) for r in group]
            for line in wrong:
                panel.plot(range(1, len(line) + 1), line, f"C{i}", alpha=0.25, lw=0.7)
            if wrong:
                mean = np.mean([w[: min(map(len, wrong))] for w in wrong], axis=0)
                panel.plot(range(1, len(mean) + 1), mean, f"C{i}", label=method)
        panel.set(title=f"batch {table[1]}", yscale="log")
        panel.set(xlabel="epoch", ylabel="wrong test images, %")
        panel.set_yticks([5, 7, 10, 15, 20, 30, 50, 90], [5, 7, 10, 15, 20, 30, 50, 90])
        panel.minorticks_off()
        panel.set_ylim(0.93 * min(100 - 100 * max(r["test"]) for r in shown), None)
    panels[0, 0].legend()
    figure.savefig(path)
    plt.close(figure)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", help="folder, see above; default: a stand-in")
    add("--network", choices=NETWORKS, default="vgg19", help="default: vgg19")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD")
    add("--epochs", type=int, default=200, help="default: 200")
    add("--batch", type=int, default=128, help="of all workers, default: 128")
    add("--workers", type=int, default=1, help="simulated, default: 1, as in the paper")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--together", action="store_true", help="all seeds side by side")
    add("--lr", type=float, help="default: the paper's, in proportion to the batch")
    add(
        "--width", type=int, default=64, help="channels of the first stage, default: 64"
    )
    add("--limit", type=int, help="images of the stand-in, default: 50000")
    add("--budget", type=float, default=1e9, help="seconds after which to save and end")
    add("--save-every", type=int, default=25, help="epochs, default: 25")
    add("--state", type=Path, default=Path("."), help="folder to go on from")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    add("--table", type=Path, help="folder of results to show; nothing is trained")
    add("--picture", type=Path, help="file of their picture; default: none")
    args = parser.parse_args()
    if args.batch % args.workers:
        parser.error("argument --batch: must be a multiple of --workers")
    if min(args.epochs, args.workers, args.save_every) < 1:
        parser.error("numbers must be at least 1")
    for folder in (args.state, args.output, args.table or args.output):
        if not folder.is_dir():
            parser.error(f"no folder: {folder}")
    return args


def main():
    args, began = parse_args(), time.monotonic()
    if args.table:
        return table(args.table, args.picture)
    data = [jax.device_put(a) for a in load(args)]
    kind = jax.devices()[0].device_kind
    options = "network", "batch", "workers", "epochs", "width"
    common = {k: getattr(args, k) for k in options}
    common |= {"device": kind, "data": "CIFAR-10" if args.data else "a stand-in"}

    def note(about, name, seeds, record):
        result = {"method": name, "seeds": seeds, **common, **record}
        (args.output / f"{about}.json").write_text(json.dumps(result))

    print(f"{kind}, {args.workers} workers, batch {args.batch}")
    print("method       epoch     loss     test       time")
    deadline = began + args.budget
    groups = [args.seeds] if args.together else [[seed] for seed in args.seeds]
    runs = itertools.product(groups, args.methods)
    done = [run(name, seeds, args, data, deadline, note) for seeds, name in runs]
    if not all(done):
        print("Not all epochs are over: the same command goes on.")


if __name__ == "__main__":
    main()
