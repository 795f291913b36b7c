"""Error-compensated methods on logistic regression, to the last digit.

Minimises the mean logistic loss plus (l2 / 2) |x|^2 over the data of all workers, by
methods and compressors given by name, and draws f - f* against rounds, bits and passes
over the data:

  gd                   gradient descent, uncompressed
  ec-gd                error feedback, full gradients: stalls where workers differ
  ec-gd-star           the same, the workers' gradients at the optimum given
  ec-gd-diana          the same, their differences learned
  ec-sgd               error feedback, minibatches
  ecq-sgd              a stochastic quantiser with damped feedback, minibatches
  ec-lsvrg             variance reduction: stalls where workers differ
  ec-lsvrg-diana       variance reduction, differences learned
  ec-lsvrg-shifted     the same by Qian et al (2109.10049)
  loopless-katyusha    acceleration, uncompressed
  eclk                 acceleration with error feedback (2010.00091)

The settings are those of Gorbunov et al (2020): 20 workers with random shares of the
data, l2 = L / 10^4, rate 1 / (L + l2), start at x* + 1, Top-1. Data: any file in LIBSVM
format with two classes, .bz2 and .gz accepted; default: scikit-learn's breast cancer
set, standardised. Sparse data stay sparse where that is faster. `jax.vmap` simulates
the workers, or `jax.shard_map` runs them where there are as many devices
(`JAX_NUM_CPU_DEVICES=8 ... --workers 8`).

f* comes from SciPy's L-BFGS-B and a few steps of Newton's method, and with a proof of
its error: f(x) - f* <= |gradient|^2 / (2 l2). All rounds of a method are one compiled
program. Bits are what each worker sends, in the mean over coins, the uncompressed
gradients at reference points included.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "32")  # see the README: virtual devices

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import efopt
from efopt import compressors, convex, optimizers

AXIS = "workers"
CHUNK = 32  # non-zeros of a column that are summed together
# Share of non-zeros. A full gradient of 20 workers on two cores, dense and sparse, ms:
# a9a (0.11, 32 MB dense) 3.8 and 2.7, a5a (0.11, 6 MB) 0.5 and 0.6, mushrooms (0.19)
# 1.1 and 1.3, 8000 random rows of 300 (0.02) 1.3 and 0.8.
SPARSE_BELOW = 0.15


# ------------------------------------------------------------------------- data


def load(path):
    """Features as CSR and labels of -1 and 1."""
    from sklearn.datasets import load_breast_cancer, load_svmlight_file

    if path is not None:
        features, labels = load_svmlight_file(str(path))
    else:
        features, labels = load_breast_cancer(return_X_y=True)
        features = (features - features.mean(axis=0)) / features.std(axis=0)
    kinds = np.unique(labels)
    if len(kinds) != 2:
        raise ValueError(f"two classes are needed, {path} has {len(kinds)}")
    features = scipy.sparse.csr_matrix(features, dtype=np.float64)
    return features, np.where(labels == kinds[1], 1.0, -1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Rows of features times labels."""

    rows: Any

    def margins(self, x):
        return self.rows @ x

    def combine(self, weights):
        return weights @ self.rows

    def pick(self, index):
        return Dense(self.rows[index])

    @classmethod
    def stack(cls, shares):
        return cls(np.stack([share.toarray() for share in shares]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse:
    """The same without the zeros, twice: by row, and by column in short chunks.

    Both products then only read from scattered places, which a CPU does several times
    faster than it adds to them.
    """

    columns: Any  # (rows, most non-zeros of a row), padded by values of zero
    values: Any
    members: Any  # (chunks, CHUNK): the rows of some non-zeros of one column
    parts: Any  # (chunks, CHUNK): their values
    owner: Any  # (chunks,): their column, ascending
    size: int = dataclasses.field(metadata={"static": True})

    def margins(self, x):
        return (self.values * x[self.columns]).sum(axis=-1)

    def combine(self, weights):
        # Else XLA computes a margin anew wherever it is read.
        weights = jax.lax.optimization_barrier(weights)
        chunks = (self.parts * weights[self.members]).sum(axis=-1)
        return jax.ops.segment_sum(
            chunks, self.owner, self.size, indices_are_sorted=True
        )

    def pick(self, index):
        return Few(self.columns[index], self.values[index], self.size)

    @classmethod
    def stack(cls, shares):
        """One such object with a leading worker axis."""
        by_row = [
            _padded(s, max(np.diff(s.indptr).max() for s in shares)) for s in shares
        ]
        by_column = [_chunks(share.tocsc()) for share in shares]
        most = max(len(owner) for *_, owner in by_column)
        last = shares[0].shape[1] - 1
        filled = [
            (
                np.pad(members, ((0, most - len(owner)), (0, 0))),
                np.pad(parts, ((0, most - len(owner)), (0, 0))),
                np.pad(owner, (0, most - len(owner)), constant_values=last),
            )
            for members, parts, owner in by_column
        ]
        arrays = [np.stack(x) for x in zip(*by_row, strict=True)]
        arrays += [np.stack(x) for x in zip(*filled, strict=True)]
        return cls(*arrays, last + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Few:
    """A minibatch of sparse rows."""

    columns: Any
    values: Any
    size: int = dataclasses.field(metadata={"static": True})

    def margins(self, x):
        return (self.values * x[self.columns]).sum(axis=-1)

    def combine(self, weights):
        spread = weights[:, None] * self.values
        return jnp.zeros(self.size, spread.dtype).at[self.columns].add(spread)


def _padded(share, width):
    """Column numbers and values of each row, `(rows, width)`."""
    lengths = np.diff(share.indptr)
    place = np.arange(width) < lengths[:, None]
    columns, values = np.zeros(place.shape, np.int32), np.zeros(place.shape)
    columns[place], values[place] = share.indices, share.data
    return columns, values


def _chunks(share):
    """Row numbers and values of each column, cut and padded to CHUNK of them."""
    lengths = np.diff(share.indptr)
    counts = -(-lengths // CHUNK)
    owner = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    first = np.cumsum(counts) - counts  # of each column
    number = np.arange(share.nnz) - np.repeat(share.indptr[:-1], lengths)
    chunk = np.repeat(first, lengths) + number // CHUNK
    members = np.zeros((len(owner), CHUNK), np.int32)
    parts = np.zeros((len(owner), CHUNK))
    members[chunk, number % CHUNK] = share.indices
    parts[chunk, number % CHUNK] = share.data
    return members, parts, owner


def gradient(x, data, count, l2):
    """Of the mean loss of `count` rows."""
    return l2 * x - data.combine(jax.nn.sigmoid(-data.margins(x))) / count


# ---------------------------------------------------------------------- problem


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised, and its solution.

    Attributes:
      data: The workers' rows, with a leading worker axis.
      workers: How many there are.
      rows: Of each worker.
      l2: Strong convexity.
      smoothness: Of the whole objective.
      optimum: Where it is least, float64.
      value: How much that is.
      error: What `value` is too large by, at most.
      optimum_grads: Each worker's gradient there.
    """

    data: Any
    workers: int
    rows: int
    l2: float
    smoothness: float
    optimum: np.ndarray
    value: float
    error: float
    optimum_grads: np.ndarray


def make_problem(features, labels, workers, condition=1e4, layout="auto", seed=0):
    """Shares the rows out, at random and equally, and solves the whole."""
    rows = len(labels) // workers
    if rows == 0:
        raise ValueError(f"{len(labels)} rows are too few for {workers} workers")
    signed = scipy.sparse.diags(labels) @ features
    signed = scipy.sparse.csr_matrix(signed[: rows * workers])
    signed.eliminate_zeros()
    order = np.random.default_rng(seed).permutation(rows * workers)
    signed = signed[order]
    curvature = largest_eigenvalue(signed) / 4
    l2 = curvature / condition
    x, value, error = solve(signed, l2)
    shares = [signed[i * rows : (i + 1) * rows] for i in range(workers)]
    density = signed.nnz / math.prod(signed.shape)
    if layout == "auto":
        layout = "sparse" if density < SPARSE_BELOW else "dense"
    grads = [l2 * x - share.T @ _sigmoid(-(share @ x)) / rows for share in shares]
    return Problem(
        data=(Sparse if layout == "sparse" else Dense).stack(shares),
        workers=workers,
        rows=rows,
        l2=l2,
        smoothness=curvature + l2,
        optimum=x,
        value=value,
        error=error,
        optimum_grads=np.stack(grads),
    )


def largest_eigenvalue(a):
    """Of A'A / rows."""
    if min(a.shape) <= 2000:
        small = a.T @ a if a.shape[1] <= a.shape[0] else a @ a.T
        return float(np.linalg.eigvalsh(small.toarray())[-1]) / a.shape[0]
    top = scipy.sparse.linalg.svds(a, k=1, return_singular_vectors=False)
    return float(top[0]) ** 2 / a.shape[0]


def _sigmoid(t):
    return 0.5 + 0.5 * np.tanh(t / 2)


def solve(a, l2):
    """The optimum, its value and the most by which that is too large."""
    n, d = a.shape

    def f(x):
        return np.logaddexp(0, -(a @ x)).mean() + l2 / 2 * x @ x

    def grad(x):
        return l2 * x - a.T @ _sigmoid(-(a @ x)) / n

    def curve(x):
        s = _sigmoid(a @ x)
        weights = s * (1 - s) / n
        return lambda v: a.T @ (weights * (a @ v)) + l2 * v

    found = scipy.optimize.minimize(
        f,
        np.zeros(d),
        jac=grad,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "maxfun": 20_000, "ftol": 0, "gtol": 1e-7},
    )
    x = found.x
    for _ in range(10):  # Newton steps, to the last digit
        operator = scipy.sparse.linalg.LinearOperator((d, d), curve(x), dtype=float)
        step, _ = scipy.sparse.linalg.cg(operator, grad(x), rtol=1e-10)
        if np.linalg.norm(grad(x - step)) >= np.linalg.norm(grad(x)):
            break
        x = x - step
    error = float(grad(x) @ grad(x)) / (2 * l2)
    if error > 1e-15:
        raise RuntimeError(f"f* is known to {error:.1e} only, 1e-15 is needed")
    return x, float(f(x)), error


# ---------------------------------------------------------------------- methods

COMPRESSORS = {
    "top-1": lambda d: efopt.top_k(k=1),
    "top-10%": lambda d: efopt.top_k(fraction=0.1),
    "random-1": lambda d: efopt.random_k(k=1),
    "scaled-sign": lambda d: efopt.scaled_sign(),
    "natural": lambda d: compressors.natural(),
    "dithering": lambda d: compressors.qsgd(
        min(127, math.ceil(d**0.5)), block_size=None
    ),
    "identity": lambda d: compressors.identity(),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
      make: (problem, compressor, options) to an Optax transformation.
      batch: Whether gradients are of minibatches.
      messages: What is sent in each round: names of `compressor`, `shift`, `dense`.
      refresh: Whether it sends a dense gradient when the reference point moves.
      reference: Whether it has a reference point.
      compressed: Whether it has a compressor.
    """

    make: Any
    batch: bool = False
    messages: tuple[str, ...] = ("compressor",)
    refresh: bool = False
    reference: bool = False
    compressed: bool = True


def shift():
    """Unbiased, one coordinate a round, drawn by all alike."""
    return efopt.random_k(k=1, unbiased=True, seed=1)


def rate(problem, options):
    return options.rate / problem.smoothness


def moves(problem, name, compressor, options):
    """The probability of the reference point to move."""
    if METHODS[name].batch:
        return options.batch / problem.rows
    if options.probability is not None:
        return options.probability
    if name == "loopless-katyusha":
        return 0.3  # the fewest bits to 1e-8 on mushrooms, of 0.02, 0.1, 0.3 and 1
    shape, dtype = problem.optimum.shape, jnp.zeros(()).dtype
    payload = compressor.payload_bits(shape, dtype)
    return min(1.0, 2 * payload / compressors.identity().payload_bits(shape, dtype))


def gd(problem, compressor, options):
    del compressor
    return convex.ec_sgd(compressors.identity(), rate(problem, options), axis_name=AXIS)


def ec_sgd(problem, compressor, options):
    return convex.ec_sgd(compressor, rate(problem, options), axis_name=AXIS)


def ec_gd_star(problem, compressor, options):
    grads = jnp.asarray(problem.optimum_grads)
    return convex.ec_gd_star(
        compressor, rate(problem, options), reference_grads=grads, axis_name=AXIS
    )


def ec_sgd_diana(problem, compressor, options):
    return convex.ec_sgd_diana(
        compressor, rate(problem, options), shift_compressor=shift(), axis_name=AXIS
    )


def ecq_sgd(problem, compressor, options):
    del compressor
    return optimizers.ecq_sgd(rate(problem, options), axis_name=AXIS)


def ec_lsvrg(problem, compressor, options):
    # One coin for all workers, the default: under `vmap` full gradients are then
    # evaluated only when it falls.
    p = moves(problem, "ec-lsvrg", compressor, options)
    return convex.ec_lsvrg(
        compressor, rate(problem, options), probability=p, axis_name=AXIS
    )


def ec_lsvrg_diana(problem, compressor, options):
    return convex.ec_lsvrg_diana(
        compressor,
        rate(problem, options),
        probability=moves(problem, "ec-lsvrg-diana", compressor, options),
        shift_compressor=shift(),
        axis_name=AXIS,
    )


def ec_lsvrg_shifted(problem, compressor, options):
    return convex.ec_lsvrg_shifted(
        compressor,
        rate(problem, options),
        probability=moves(problem, "ec-lsvrg-shifted", compressor, options),
        axis_name=AXIS,
    )


def eclk(problem, compressor, options):
    return convex.eclk(
        compressor,
        smoothness=problem.smoothness,
        strong_convexity=problem.l2,
        probability=moves(problem, "eclk", compressor, options),
        axis_name=AXIS,
    )


def loopless_katyusha(problem, compressor, options):
    p = moves(problem, "loopless-katyusha", compressor, options)
    return convex.loopless_katyusha(
        smoothness=problem.smoothness,
        strong_convexity=problem.l2,
        probability=p,
        axis_name=AXIS,
    )


DIANA = ("compressor", "shift")
METHODS = {
    "gd": Method(gd, messages=("dense",), compressed=False),
    "ec-gd": Method(ec_sgd),
    "ec-gd-star": Method(ec_gd_star),
    "ec-gd-diana": Method(ec_sgd_diana, messages=DIANA),
    "ec-sgd": Method(ec_sgd, batch=True),
    "ecq-sgd": Method(ecq_sgd, batch=True, messages=("quantiser",), compressed=False),
    "ec-lsvrg": Method(ec_lsvrg, batch=True, reference=True),
    "ec-lsvrg-diana": Method(
        ec_lsvrg_diana, batch=True, messages=DIANA, reference=True
    ),
    "ec-lsvrg-shifted": Method(
        ec_lsvrg_shifted,
        batch=True,
        messages=("compressor", "compressor"),
        reference=True,
    ),
    "loopless-katyusha": Method(
        loopless_katyusha,
        messages=("dense",),
        refresh=True,
        reference=True,
        compressed=False,
    ),
    "eclk": Method(eclk, refresh=True, reference=True),
}
DEFAULT = ["ec-gd", "ec-gd-star", "ec-gd-diana", "loopless-katyusha", "eclk"]


# -------------------------------------------------------------------------- run


def make_step(tx, problem, batch, seed):
    """One round of one worker, to be mapped over the workers."""

    def step(carry, data, round_number):
        x, state = carry
        full = functools.partial(gradient, data=data, count=problem.rows, l2=problem.l2)
        grad_fn = full
        if batch is not None:
            worker = jax.lax.axis_index(AXIS)
            key = jax.random.fold_in(jax.random.key(seed), round_number)
            key = jax.random.fold_in(key, worker)
            rows = data.pick(jax.random.randint(key, (batch,), 0, problem.rows))
            grad_fn = functools.partial(gradient, data=rows, count=batch, l2=problem.l2)
        grads = grad_fn(efopt.local_params(x, AXIS))
        updates, state = tx.update(grads, state, x, grad_fn=grad_fn, full_grad_fn=full)
        return optax.apply_updates(x, updates), state

    return step


def map_step(step, carry, workers):
    """The step over all workers, and its first carry, placed for it.

    `shard_map` if there is a device for every worker. Else `vmap`, in which only what
    differs between the workers has a worker axis: a branch that all take alike, such as
    evaluating a full gradient now and then, stays a branch.
    """
    if jax.device_count() == workers > 1:
        mesh = jax.make_mesh(
            (workers,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
        )
        carry = efopt.distribute(carry, mesh)
        specs = efopt.partition_specs(carry)

        def local(carry, data, k):
            return step(carry, jax.tree.map(lambda a: a[0], data), k)

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(specs, P(AXIS), P()), out_specs=specs
        )
        return mapped, carry

    def own(x):
        return isinstance(x, efopt.PerWorker)

    carry = jax.tree.map(
        lambda x: efopt.stack_workers(x, workers) if own(x) else x, carry, is_leaf=own
    )
    axes = jax.tree.map(lambda x: 0 if own(x) else None, carry, is_leaf=own)
    mapped = jax.vmap(step, in_axes=(axes, 0, None), out_axes=axes, axis_name=AXIS)
    return mapped, carry


def run(problem, name, compressor_name, options):
    """The curves of one method: a dict of lists and numbers."""
    check_tolerance(options.tolerance)
    method = METHODS[name]
    compressor = COMPRESSORS[compressor_name](len(problem.optimum))
    tx = method.make(problem, compressor, options)
    data = jax.tree.map(jnp.asarray, problem.data)
    optimum = jnp.asarray(problem.optimum)
    x = optimum + options.shift
    batch = options.batch if method.batch else None
    step = make_step(tx, problem, batch, options.seed)
    step, carry = map_step(step, (x, tx.init(x)), problem.workers)

    def losses(x, data):
        return jax.nn.softplus(-jax.vmap(lambda rows: rows.margins(x))(data))

    def gap(x, data, least):
        """f(x) - f*, as a mean of differences: smaller than f* itself is rounded."""
        square = jnp.dot(x - optimum, x + optimum)
        return jnp.mean(losses(x, data) - least) + problem.l2 / 2 * square

    @jax.jit
    def rounds(carry, data):
        least = losses(optimum, data)

        def one(carry, k):
            return step(carry, data, k), None

        def several(carry, ks):
            carry, _ = jax.lax.scan(one, carry, ks)
            return carry, gap(carry[0], data, least)

        numbers = jnp.arange(options.rounds).reshape(-1, options.every)
        first = gap(carry[0], data, least)
        return first, jax.lax.scan(several, carry, numbers)[1]

    compiled = rounds.lower(carry, data).compile()
    begin = time.perf_counter()
    first, gaps = jax.block_until_ready(compiled(carry, data))
    seconds = time.perf_counter() - begin
    bits, start_bits, passes = costs(problem, method, name, compressor, options)
    number = np.arange(0, options.rounds + 1, options.every)
    return {
        "method": name,
        "compressor": compressor_name if method.compressed else None,
        "seconds": seconds,
        "bits_per_round": bits,
        "passes_per_round": passes,
        "rounds": number.tolist(),
        "bits": (start_bits + bits * number).tolist(),
        "passes": (passes * number).tolist(),
        "gap": [float(first), *map(float, gaps)],
    }


def costs(problem, method, name, compressor, options):
    """Bits each worker sends in a round, expected, and at the start; and its passes."""
    shape, dtype = problem.optimum.shape, jnp.zeros(()).dtype
    dense = compressors.identity().payload_bits(shape, dtype)
    each = {
        "compressor": compressor.payload_bits(shape, dtype),
        "shift": shift().payload_bits(shape, dtype),
        "quantiser": efopt.quantize(4).payload_bits(shape, dtype),
        "dense": dense,
    }
    bits = sum(each[message] for message in method.messages)
    share = options.batch / problem.rows if method.batch else 1.0
    if not method.reference:
        return bits, 0, share
    p = moves(problem, name, compressor, options)
    # Of full gradients the one at the reference point is remembered.
    passes = p + share * (2 if method.batch else 1)
    return (bits + p * dense, dense, passes) if method.refresh else (bits, 0, passes)


def check_tolerance(tolerance):
    """Raises if float32 cannot resolve it."""
    if tolerance < 1e-7 and not jax.config.jax_enable_x64:
        raise ValueError(
            f"a tolerance of {tolerance} needs float64: below 1e-7 float32 has no "
            "digits left. Leave out `--float32`, or set "
            "`jax.config.update('jax_enable_x64', True)`."
        )


# ----------------------------------------------------------------------- report


def first_below(curve, tolerance):
    """The first recorded point of a curve below a tolerance, or nothing."""
    for i, gap in enumerate(curve["gap"]):
        if gap <= tolerance:
            return {key: curve[key][i] for key in ("rounds", "bits", "passes")}
    return None


def label(curve):
    return " ".join(filter(None, (curve["method"], curve["compressor"])))


def report(curves, tolerance):
    head = f"f - f* <= {tolerance:g} after"
    print(f"\n{'':36}{'':>10}  {head}")
    print(f"{'method':36}{'last gap':>10}{'rounds':>9}{'Mbit':>9}{'passes':>9}{'s':>8}")
    for curve in curves:
        found = first_below(curve, tolerance)
        cells = f"{'-':>9}{'-':>9}{'-':>9}"
        if found is not None:
            bits, passes = found["bits"] / 1e6, found["passes"]
            cells = f"{found['rounds']:9,}{bits:9.3f}{passes:9.0f}"
        last = f"{curve['gap'][-1]:10.1e}"
        print(f"{label(curve):36}{last}{cells}{curve['seconds']:8.1f}")


def draw(curves, title, path):
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, key in zip(axes, ("rounds", "bits", "passes"), strict=True):
        for curve in curves:
            # What is below rounding is drawn at rounding.
            gap = np.maximum(curve["gap"], 1e-16)
            axis.semilogy(curve[key], gap, label=label(curve))
        axis.set(xlabel=key)
        axis.grid(alpha=0.3)
    axes[1].set(xscale="log", xlabel="bits sent by each worker")
    axes[2].set(xlabel="passes over the data")
    axes[0].set(ylabel="f - f*")
    figure.suptitle(title)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------ command line


def number_from(least, kind=float, strict=False):
    def convert(text):
        value = kind(text)
        if not (value > least if strict else value >= least):
            how = "above" if strict else "at least"
            raise argparse.ArgumentTypeError(f"must be {how} {least}, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    count, positive = number_from(1, int), number_from(0.0, strict=True)
    add("--data", type=Path, help="a file in LIBSVM format; default: breast cancer")
    add("--limit", type=count, help="rows to use, the first of the file; default: all")
    add("--workers", type=count, default=20, help="default: 20")
    add("--methods", nargs="+", choices=METHODS, default=DEFAULT, metavar="METHOD")
    add(
        "--compressors",
        nargs="+",
        choices=COMPRESSORS,
        default=["top-1"],
        metavar="COMPRESSOR",
        help=f"of {', '.join(COMPRESSORS)}; default: top-1".replace("%", "%%"),
    )
    add("--rounds", type=count, default=10_000, help="default: 10000")
    add("--points", type=count, default=200, help="of every curve, default: 200")
    add("--tolerance", type=positive, default=1e-8, help="f - f*, default: 1e-8")
    add("--condition", type=positive, default=1e4, help="L / l2, default: 1e4")
    add("--rate", type=positive, default=1.0, help="times 1 / (L + l2), default: 1")
    add("--batch", type=count, default=1, help="rows of a minibatch, default: 1")
    add("--probability", type=positive, help="of eclk and loopless-katyusha")
    add("--shift", type=float, default=1.0, help="start at x* plus this, default: 1")
    add("--layout", choices=["auto", "dense", "sparse"], default="auto")
    add("--float32", action="store_true", help="instead of float64")
    add("--seed", type=number_from(0, int), default=0, help="default: 0")
    add("--output", default="logistic_regression", help="PATH.json and PATH.png")
    args = parser.parse_args()
    # `--output curves.png` means curves.png, and curves.json beside it.
    args.output = re.sub(r"\.(json|png)$", "", args.output)
    jax.config.update("jax_enable_x64", not args.float32)
    try:
        check_tolerance(args.tolerance)
    except ValueError as error:
        parser.error(f"argument --tolerance: {error}")
    if not Path(args.output).absolute().parent.is_dir():
        parser.error(f"argument --output: no folder for {args.output}")
    args.every = max(1, args.rounds // args.points)
    args.rounds = args.every * -(-args.rounds // args.every)
    return args, parser


def main():
    args, parser = parse_args()
    try:
        features, labels = load(args.data)
        problem = make_problem(
            features[: args.limit],
            labels[: args.limit],
            args.workers,
            args.condition,
            args.layout,
            args.seed,
        )
    except (OSError, ValueError) as error:
        parser.error(f"argument --data: {error}")
    name = args.data.name.partition(".")[0] if args.data else "breast cancer"
    layout = type(problem.data).__name__.lower()
    how = "shard_map" if jax.device_count() == args.workers > 1 else "vmap"
    print(
        f"{name}: {problem.workers} workers with {problem.rows} {layout} rows each, "
        f"{len(problem.optimum)} features, by {how}\n"
        f"L + l2 = {problem.smoothness:.6g}, l2 = {problem.l2:.6g}, "
        f"f* = {problem.value:.16g}, too large by at most {problem.error:.0e}"
    )
    curves = []
    for method in args.methods:
        chosen = args.compressors if METHODS[method].compressed else ["identity"]
        for compressor in chosen:
            curve = run(problem, method, compressor, args)
            curves.append(curve)
            print(f"{label(curve)}: {curve['seconds']:.1f} s", flush=True)
    report(curves, args.tolerance)
    about = {
        "data": name,
        "workers": problem.workers,
        "rows_per_worker": problem.rows,
        "smoothness": problem.smoothness,
        "l2": problem.l2,
        "optimal_value": problem.value,
        "optimal_value_error": problem.error,
    }
    Path(f"{args.output}.json").write_text(json.dumps({**about, "curves": curves}))
    draw(curves, f"{name}, {problem.workers} workers", f"{args.output}.png")
    print(f"\nwrote {args.output}.json and {args.output}.png")


if __name__ == "__main__":
    main()
