"""The small problems on which the papers show where signs fail, and where they do not.

  skewed noise    x / 4 on [-1, 1], whose gradient is 4 with probability 1/4, else -1
  kink            |x + y| / 2 + |x - y| from (1, 1)
  smooth          <a, x>^2 + <b, x>^2 from (1, 1), one term at a time
  least squares   1200 dimensions and 100 points (Wilson et al, 2017): loss on points
                  that are not trained on, and distance to the span of those that are
  sparse noise    |x|^2 / 2, noise of size 100 on one coordinate of 100

The first four are EF-SGD's (Karimireddy et al, 2019), the last is signSGD's (Bernstein
et al, 2018), at the authors' rates. Prints the last loss by method, mean over seeds,
smallest and largest, and writes small_problems.json. A minute on a CPU.

    python examples/paper/small_problems.py
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import efopt


def scaled_sign(rate):
    """The sign times the mean magnitude, and no feedback."""
    return optax.chain(efopt.compress(efopt.scaled_sign()), optax.sgd(rate))


METHODS = {
    "sgd": optax.sgd,
    "signsgd": efopt.signsgd,
    "scaled-sign": scaled_sign,
    "ef-signsgd": efopt.ef_signsgd,
}


def last(tx, gradient, x, steps, key, project=lambda x: x):
    """The last iterate; the gradient is a function of x and a random key."""

    def step(carry, key):
        x, state = carry
        updates, state = tx.update(gradient(x, key), state, x)
        return (project(optax.apply_updates(x, updates)), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (x, tx.init(x)), keys)[0][0]


def decaying(t):
    return 0.05 / jnp.sqrt(t + 1.0)


def skewed_noise(method, key):
    def gradient(x, key):
        return jnp.where(jax.random.bernoulli(key, 0.25, x.shape), 4.0, -1.0)

    clip = lambda x: jnp.clip(x, -1, 1)  # noqa: E731
    return last(method(0.01), gradient, jnp.zeros(1), 5000, key, clip)[0] / 4


def kink(method, key):
    plus = lambda x: jnp.where(x >= 0, 1.0, -1.0)  # noqa: E731

    def gradient(x, key):
        along, across = plus(x[0] + x[1]), plus(x[0] - x[1])
        return jnp.array([along / 2 + across, along / 2 - across])

    x = last(method(decaying), gradient, jnp.ones(2), 5000, key)
    return jnp.abs(x[0] + x[1]) / 2 + jnp.abs(x[0] - x[1])


def smooth(method, key):
    terms = jnp.array([[1.5, -0.5], [-0.5, 1.5]])

    def gradient(x, key):
        a = terms[jax.random.bernoulli(key).astype(int)]
        return 4 * jnp.dot(a, x) * a

    x = last(method(decaying), gradient, jnp.ones(2), 20_000, key)
    return jnp.sum((terms @ x) ** 2)


def sparse_noise(method, key):
    def gradient(x, key):
        return x.at[0].add(100 * jax.random.normal(key))

    rate = 1e-2 if method in (efopt.signsgd, scaled_sign) else 1e-3
    start = jax.random.normal(key, (100,))
    return jnp.sum(last(method(rate), gradient, start, 10_000, key) ** 2) / 2


def wilson(n, rng):
    """Points to train on and to test with: half of 2 n, in 12 n dimensions.

    After Wilson et al, 2017. Column 0 is the label, 1 and 2 are constant, and every
    point has a block of its own: one 1 for a positive label, five for a negative one.
    Training on n of the points never touches the private columns of the others.
    """
    y = rng.choice([-1.0, 1.0], 2 * n)
    a = np.zeros((2 * n, 12 * n))
    a[:, 0], a[:, 1:3] = y, 1
    for r in range(2 * n):
        a[r, 3 + 5 * r : 3 + 5 * r + (1 if y[r] > 0 else 5)] = 1
    order = rng.permutation(2 * n)
    a, y = a[order].astype(np.float32), y[order].astype(np.float32)
    return a[:n], y[:n], a[n:], y[n:]


def least_squares(method, seed):
    """Loss on the other points, and distance to the span, after 80 full gradients."""
    a, y, b, z = wilson(100, np.random.default_rng(seed))
    rate = 0.5 if method is optax.sgd else 10.0
    tx = method(rate)

    def gradient(x, _):
        return a.T @ (a @ x - y) / len(y)

    key = jax.random.key(seed)
    run = jax.jit(lambda key: last(tx, gradient, jnp.zeros(1200), 80, key))
    x = np.asarray(run(key), np.float64)
    basis = np.linalg.qr(a.astype(np.float64).T)[0]
    off = np.linalg.norm(x - basis @ (basis.T @ x))
    return float(np.mean((b @ x - z) ** 2)), float(off)


PROBLEMS = {
    "skewed noise": skewed_noise,
    "kink": kink,
    "smooth": smooth,
    "sparse noise": sparse_noise,
}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--seeds", type=int, default=10, help="default: 10")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("argument --seeds: must be at least 1")
    if not args.output.is_dir():
        parser.error(f"argument --output: no folder: {args.output}")

    jax.config.update("jax_default_matmul_precision", "highest")
    keys = jax.random.split(jax.random.key(0), args.seeds)
    results = {}
    for problem, end in PROBLEMS.items():
        for name, method in METHODS.items():
            ends = jax.jit(jax.vmap(lambda k, e=end, m=method: e(m, k)))(keys)
            results.setdefault(problem, {})[name] = np.asarray(ends).tolist()
    for name, method in METHODS.items():
        if name != "signsgd":
            pairs = [least_squares(method, seed) for seed in range(args.seeds)]
            for i, what in enumerate(("test loss", "distance")):
                values = [pair[i] for pair in pairs]
                results.setdefault(f"least squares, {what}", {})[name] = values
    line = "{:26} {:12} {:>10} {:>10} {:>10}".format
    print(line("problem", "method", "mean", "smallest", "largest"))
    for problem, rows in results.items():
        for name, ends in rows.items():
            cells = (f"{f(ends):.3g}" for f in (np.mean, np.min, np.max))
            print(line(problem, name, *cells))
    path = args.output / "small_problems.json"
    path.write_text(json.dumps({"seeds": args.seeds, "results": results}, indent=1))
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
