"""The image experiments of EF-SGD (Karimireddy et al, 2019) at full scale.

A ResNet-18 on CIFAR-10 or CIFAR-100 by the paper's four methods:

  sgdm         SGD with momentum 0.9
  scaled-sign  the sign times its mean magnitude, no memory, no momentum
  signum       the sign of a running mean
  ef-signsgd   the sign with error feedback

Learning rates are those that the authors tuned for ResNet-18 at batch 128, in
proportion to the batch; weight decay 5e-4 is added to the gradient, and the rate falls
tenfold after one half and three quarters of the epochs. In the paper there is one
worker; here several may share a batch, simulated by `jax.vmap` on one accelerator. The
network computes in bfloat16.

Data: `--data DIR` with `x_train.npy` (50000, 32, 32, 3) uint8, `y_train.npy`,
`x_test.npy` and `y_test.npy`, as made from the original archives. Without it, noise on
a pattern for each label stands in: right for timing, and for nothing else.
"""

import argparse
import functools
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import efopt

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2023, 0.1994, 0.2010], np.float32)
DECAY = 5e-4


def sgdm(rate):
    mean = efopt.compress(efopt.compressors.identity(), axis_name="data")
    decay = optax.add_decayed_weights(DECAY)
    return optax.chain(mean, decay, optax.sgd(rate, momentum=0.9))


def scaled_sign(rate):
    signs = efopt.compress(efopt.scaled_sign(), axis_name="data")
    return optax.chain(optax.add_decayed_weights(DECAY), signs, optax.sgd(rate))


def signum(rate):
    decay = optax.add_decayed_weights(DECAY)
    return optax.chain(decay, efopt.optimizers.signum(rate, axis_name="data"))


def ef_signsgd(rate):
    return efopt.ef_signsgd(rate, weight_decay=DECAY, axis_name="data")


METHODS = {  # and the rate at batch 128
    "sgdm": (sgdm, 0.01),
    "scaled-sign": (scaled_sign, 0.056),
    "signum": (signum, 3.2e-4),
    "ef-signsgd": (ef_signsgd, 0.056),
}


class Block(nn.Module):
    features: int
    stride: int
    norm: type

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        y = conv(self.features, (3, 3), self.stride)(x)
        y = conv(self.features, (3, 3))(nn.relu(self.norm()(y)))
        y = self.norm()(y)
        if x.shape != y.shape:
            x = self.norm()(conv(self.features, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    classes: int
    width: int = 64

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(
            nn.BatchNorm, not train, momentum=0.9, dtype=jnp.bfloat16
        )
        x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
        x = nn.relu(norm()(x))
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(self.width * 2**stage, stride, norm)(x)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)).astype(jnp.float32))


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


def trainer(model, tx, images, labels):
    """One epoch over the stacked state of all workers, compiled once."""

    def worker(state, batch):
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

    def epoch(state, picks, keys):
        steps = jax.vmap(worker, axis_name="data")
        return jax.lax.scan(steps, state, (picks, keys))

    return jax.jit(epoch, donate_argnums=0)


def evaluator(model, images, labels, size):
    def accuracy(params, stats):
        def count(total, pick):
            x = normalise(images[pick])
            out = model.apply({"params": params, "batch_stats": stats}, x, False)
            return total + (out.argmax(-1) == labels[pick]).sum(), None

        picks = jnp.arange(len(labels) // size * size).reshape(-1, size)
        return jax.lax.scan(count, 0, picks)[0] / picks.size

    return jax.jit(accuracy)


def run(name, args, data):
    x, y, test_x, test_y = data
    make, rate = METHODS[name]
    steps = len(y) // args.batch
    rate = args.lr or rate * args.batch / 128
    cuts = {args.epochs * steps // 2: 0.1, args.epochs * steps * 3 // 4: 0.1}
    tx = make(optax.piecewise_constant_schedule(rate, cuts))
    model = ResNet18(int(y.max()) + 1, args.width)
    variables = model.init(jax.random.key(args.seed), normalise(x[:1]), False)
    params, stats = variables["params"], variables["batch_stats"]
    state = efopt.stack_workers((params, stats, tx.init(params)), args.workers)
    epoch = trainer(model, tx, jnp.asarray(x), jnp.asarray(y))
    test = jnp.asarray(test_x), jnp.asarray(test_y)
    accuracy = evaluator(model, *test, min(500, len(test_y)))
    draws, best = np.random.default_rng(args.seed), 0.0
    for i in range(args.epochs):
        start = time.perf_counter()
        picks = draws.permutation(len(y))[: steps * args.batch]
        picks = picks.reshape(steps, args.workers, -1)
        key = jax.random.fold_in(jax.random.key(args.seed), i)
        state, loss = epoch(state, picks, jax.random.split(key, picks.shape[:2]))
        loss = float(loss.mean())
        seconds = time.perf_counter() - start
        params, stats, _ = state
        params = jax.tree.map(lambda p: p[0], params)  # all workers hold the same
        stats = jax.tree.map(lambda s: s.mean(axis=0), stats)
        now = float(accuracy(params, stats))
        best = max(best, now)
        print(
            f"{name:12} {i + 1:4} {loss:8.4f} {now:8.2%} {seconds:8.1f} s", flush=True
        )
    return now, best


def load(args):
    if args.data:
        files = "x_train", "y_train", "x_test", "y_test"
        return [np.load(args.data / f"{f}.npy").squeeze() for f in files]
    rng = np.random.default_rng(0)
    sizes = args.limit or 50_000, (args.limit or 50_000) // 5
    patterns = rng.integers(0, 40, (10, 32, 32, 3))
    data = []
    for n in sizes:
        y = rng.integers(0, 10, n).astype(np.int32)
        noise = rng.integers(0, 216, (n, 32, 32, 3))
        data += [(noise + patterns[y]).astype(np.uint8), y]
    return data


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of the four arrays; default: a stand-in")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--epochs", type=int, default=200, help="default: 200")
    add("--batch", type=int, default=128, help="of all workers, default: 128")
    add("--workers", type=int, default=1, help="simulated, default: 1, as in the paper")
    add("--lr", type=float, help="default: the paper's, in proportion to the batch")
    add(
        "--width", type=int, default=64, help="channels of the first stage, default: 64"
    )
    add("--limit", type=int, help="images of the stand-in, default: 50000")
    add("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    if args.batch % args.workers:
        parser.error("argument --batch: must be a multiple of --workers")
    return args


def main():
    args = parse_args()
    data = load(args)
    print(f"{jax.devices()[0].device_kind}, {args.workers} workers, batch {args.batch}")
    print("method       epoch     loss     test     time")
    results = {name: run(name, args, data) for name in args.methods}
    print("\nmethod          last      best")
    for name, (last, best) in results.items():
        print(f"{name:12} {last:8.2%}  {best:8.2%}")


if __name__ == "__main__":
    main()
