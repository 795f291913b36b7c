"""Random inputs for every compressor of the registry: what it promises, of all of them.

    python tests/fuzz_compressors.py --cases 100000

takes every row through that many leaves, of which no two are alike, and prints one line
a row: cases, and what did not hold, each with what it takes to see it again. Few
programs are compiled: a batch of leaves is one call.

Of every leaf, behind error feedback of a single worker: what comes out is finite and
has the leaf's dtype; nothing is lost, `u + e' = g` to float32's rounding; zeros stay
zero where the wire can say so; and the declared contraction holds, for random
compressors in the mean over draws, to six standard errors.
"""

import argparse
import functools
import math
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from registry import COMPRESSORS, Row
from workers_under_test import FAST

import efopt

BATCH = 256
SHAPES = ((1,), (13,), (64,), (33, 5), (4, 3, 7))
DTYPES = ("float32", "bfloat16")
SIGMAS, SLACK = 6, 1e-5
SMALLEST = 1e-30  # below, squares and products leave float32's normal numbers


# ------------------------------------------------------------------------- inputs


def bits(rng, shape):
    """Any finite number, every exponent as likely as another."""
    words = rng.integers(0, 2**32, shape, dtype=np.uint32)
    x = words.view(np.float32)
    return np.where(np.isfinite(x), x, 0)


def one_hot(rng, shape):
    flat = np.zeros((shape[0], math.prod(shape[1:])))
    flat[np.arange(len(flat)), rng.integers(flat.shape[1], size=len(flat))] = 1
    return flat.reshape(shape) * rng.standard_normal((len(flat),) + (1,) * (flat.ndim))


def scaled(draw):
    """Leaves of very different magnitude."""

    def made(rng, shape):
        scale = 10.0 ** rng.uniform(-25, 37, (shape[0], *(1 for _ in shape[1:])))
        return draw(rng, shape) * scale

    return made


FAMILIES = {
    "gaussian": scaled(lambda rng, shape: rng.standard_normal(shape)),
    "cauchy": scaled(lambda rng, shape: rng.standard_cauchy(shape)),
    "ties": scaled(lambda rng, shape: rng.integers(-2, 3, shape)),
    "signs": scaled(lambda rng, shape: rng.choice([-1.0, 1.0], shape)),
    "powers": scaled(lambda rng, shape: 2.0 ** rng.integers(-9, 10, shape)),
    "sparse": scaled(
        lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1)
    ),
    "constant": scaled(lambda rng, shape: np.ones(shape) * rng.standard_normal()),
    "huge beside tiny": lambda rng, shape: 10.0 ** rng.uniform(-38, 38.5, shape),
    "largest": lambda rng, shape: rng.choice([-1, 1, 0.5], shape) * 3.4028e38,
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-40,
    "zeros": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "bits": bits,
}


def inputs(rng, shape, family, largest):
    x = np.clip(FAMILIES[family](rng, (BATCH, *shape)), -largest, largest)
    return x.astype(np.float32)


# ------------------------------------------------------------------------- checks


@functools.cache
def program(name: str, shape: tuple[int, ...], dtype: str):
    """A batch of leaves and steps: what comes out, and what is owed."""
    (row,) = (row for row in COMPRESSORS if row.name == name)
    tx = efopt.error_feedback(row.make())
    state = jax.jit(tx.init)(jnp.zeros(shape, dtype))

    def one(x, count):
        updates, after = tx.update(x, state._replace(count=count))
        return updates, after.residual

    return jax.jit(jax.vmap(one), compiler_options=FAST)


def fuzz(row: Row, cases: int, seed: int = 0) -> tuple[int, list[str]]:
    """At least so many cases of one row: how many there were, and what failed."""
    rng, done, failed = np.random.default_rng(seed), 0, []
    while done < cases:
        for shape in SHAPES:
            for dtype in DTYPES:
                family = list(FAMILIES)[rng.integers(len(FAMILIES))]
                again = int(rng.integers(2**31))
                where = f"{row.name} {shape} {dtype} {family} seed {again}"
                failed += [
                    f"{where}: {x}" for x in one_batch(row, shape, dtype, family, again)
                ]
                done += BATCH
    return done, failed


def one_batch(row, shape, dtype, family, seed) -> Iterator[str]:
    """What does not hold of one batch."""
    rng = np.random.default_rng(seed)
    # Rounded to the leaf's dtype it must not get beyond what the row promises.
    largest = min(row.largest, float(jnp.finfo(dtype).max)) * (1 - 2.0**-8)
    x = inputs(rng, shape, family, largest).astype(jnp.dtype(dtype))
    draws = row.random and rng.random() < 0.5
    if draws:  # one leaf, as often as there are steps
        x = np.broadcast_to(x[:1], x.shape)
    count = np.arange(BATCH, dtype=np.int32) + np.int32(rng.integers(1000))
    u, e = program(row.name, shape, dtype)(x, count)
    if u.dtype != x.dtype or u.shape != x.shape:
        yield f"{u.dtype}{u.shape} came out"
    flat = lambda a: np.asarray(a, np.float64).reshape(BATCH, -1)  # noqa: E731
    x, u, e = flat(x), flat(u), flat(e)
    finite = (np.isfinite(u) & np.isfinite(e)).all(1)
    if not finite.all():
        yield f"not finite in case {np.argmin(finite)}"
        return
    largest = np.maximum(np.abs(u), np.maximum(np.abs(x), np.abs(e)))
    off = np.abs(u + e - x) - 2.0**-22 * largest.max(1, keepdims=True)
    if (off > 1e-37).any():
        yield f"loses {off.max():.1e} in case {np.argmax(off.max(1))}"
    zero = ~x.any(1)
    if row.says_zero and u[zero].any():
        yield "zeros do not stay zero"
    delta = row.make().delta(shape)
    seen = np.abs(x).max(1) > SMALLEST
    if delta is None or dtype != "float32" or not seen.any():
        return
    x, e = (a[seen] / np.abs(x[seen]).max(1, keepdims=True) for a in (x, e))
    shares = np.sum(e**2, 1) / np.sum(x**2, 1)
    if not row.random:
        if shares.max() > 1 - delta + SLACK:
            yield f"keeps {1 - shares.max():.3g} of at least {delta:.3g}"
    elif draws:
        spread = max(shares.var(), delta * (1 - delta))
        bound = 1 - delta + SIGMAS * math.sqrt(spread / len(shares)) + SLACK
        if shares.mean() > bound:
            yield f"keeps {1 - shares.mean():.3g} in the mean, of {delta:.3g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*", help="names in the registry; default: all")
    options = parser.parse_args()
    bad = 0
    for row in COMPRESSORS:
        if options.rows and row.name not in options.rows:
            continue
        done, failed = fuzz(row, options.cases, options.seed)
        print(f"{row.name:24} {done:>9,} cases  {len(failed)} failed", flush=True)
        print(*(f"  {x}" for x in failed[:5]), sep="\n", end="\n" if failed else "")
        bad += len(failed)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
