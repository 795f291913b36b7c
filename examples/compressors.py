"""The catalogue of compressors: what each sends, and what it loses.

Compresses a Gaussian and a heavy-tailed matrix (Student's t, 2 degrees of freedom) of
65,536 coordinates with every compressor, and prints

  bits      per coordinate that a worker hands to the exchange
  gaussian  share of the squared length that is lost, mean over 5 steps
  heavy     the same for the heavy tails
  sends     collectives of a step of 8 workers, and the bits a coordinate that leave one
  time      of compressing and decoding, in additions of two such matrices

Above 1 the error is longer than the input: fit to be averaged over many workers if
unbiased, never for error feedback. Saves a picture of both, the chart to choose by.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import efopt
from efopt import compressors

SIDE = 256
STYLE = Path(__file__).with_name("pictures.mplstyle")
CATALOGUE = {
    "identity": compressors.identity(),
    "sign": compressors.sign(),
    "scaled_sign": compressors.scaled_sign(),
    "scaled_sign 64": compressors.scaled_sign(64),
    "quantize 8": compressors.quantize(8),
    "quantize 4": compressors.quantize(4),
    "quantize 4 nearest": compressors.quantize(4, stochastic=False),
    "quantize 2": compressors.quantize(2),
    "qsgd 7": compressors.qsgd(7),
    "terngrad 64": compressors.terngrad(block_size=64),
    "natural": compressors.natural(),
    "bfloat16": compressors.cast("bfloat16"),
    "float8_e4m3fn": compressors.cast("float8_e4m3fn"),
    "float8_e5m2": compressors.cast("float8_e5m2"),
    "top_k 10 %": compressors.top_k(fraction=0.1),
    "top_k 1 %": compressors.top_k(fraction=0.01),
    "top_k 1 % of 1024": compressors.top_k(fraction=0.01, block_size=1024),
    "threshold 3": compressors.threshold(3.0, fraction=0.01),
    "random_k 10 %": compressors.random_k(fraction=0.1),
    "random_block 10 %": compressors.random_block(fraction=0.1),
    "random_k 10 % unbiased": compressors.random_k(fraction=0.1, unbiased=True),
    "count_sketch 20 %": compressors.count_sketch(fraction=0.2),
    "power_sgd 4": compressors.power_sgd(4),
    "power_sgd 1": compressors.power_sgd(1),
    "top_k 10 % x 4 bits": compressors.compose(
        compressors.top_k(fraction=0.1), compressors.quantize(4)
    ),
    "power_sgd 4 x bfloat16": compressors.compose(
        compressors.power_sgd(4), compressors.cast("bfloat16")
    ),
}
SHORT = {"all-reduce": "reduce", "all-gather": "gather", "all-to-all": "to-all"}


def lost(compressor, x, steps=5):
    """Mean share of the squared length of ``x`` that the round trip loses."""
    update, state = jax.jit(compressor.update), compressor.init(x)
    shares = []
    for _ in range(steps):
        decoded, state = update(x, state)
        shares.append(float(jnp.sum((decoded - x) ** 2) / jnp.sum(x**2)))
    return statistics.mean(shares)


def additions(compressor, x, rounds=15):
    """Median time of a round trip, in times of an addition measured beside it."""
    update, state = jax.jit(compressor.update), compressor.init(x)
    add = jax.jit(jnp.add)
    jax.block_until_ready((update(x, state), add(x, x)))
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(update(x, state))
        middle = time.perf_counter()
        jax.block_until_ready(add(x, x))
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)


def sends(compressor, x):
    """Collectives of a step of 8 workers, and bits a coordinate that leave a worker."""
    plan = efopt.wire.plan(compressor, x, num_workers=8)
    names = [SHORT.get(c.operation, c.operation) for c in plan.report.collectives]
    return " + ".join(names), 8 * plan.bytes_sent_per_worker / x.size


def draw(rows, path):
    """Bits and losses of every compressor, a line each; the best of their size bold."""
    rows = {n: row for n, row in rows.items() if row["gaussian"] > 0}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["bits"]))
    names, kinds = list(rows), ("gaussian", "heavy")
    plt.style.use(STYLE)
    size = 9, 1.2 + 0.24 * len(rows)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=size, sharey=True, width_ratios=(2, 3)
    )
    left.barh(names, [row["bits"] for row in rows.values()], height=0.6)
    for name, row in rows.items():
        left.text(1.1 * row["bits"], name, f"{row['bits']:.2g}", va="center")
    left.set_ylim(-0.8, len(rows) - 0.2)
    left.set(xscale="log", xlim=(0.1, 60), xlabel="bits a coordinate")
    left.grid(axis="y", visible=False)
    both = [[row[kind] for row in rows.values()] for kind in kinds]
    right.hlines(names, *both, color="0.6", linewidth=1.5, zorder=1)
    right.scatter(both[0], names, marker="o", label="of a Gaussian matrix", zorder=2)
    right.scatter(both[1], names, marker="^", label="of heavy tails", zorder=2)
    right.axvline(1, color="0.5", linestyle="--", linewidth=0.8)
    right.set(xscale="log", xlabel="share of the squared length that is lost")
    right.legend(loc="upper left", bbox_to_anchor=(0, 1.07), ncols=2)
    for name, label in zip(names, left.get_yticklabels(), strict=True):
        # Nothing that sends as little loses less of either matrix.
        better = [r for r in rows.values() if r["bits"] <= rows[name]["bits"]]
        if any(rows[name][k] == min(r[k] for r in better) for k in kinds):
            label.set_fontweight("bold")
    figure.savefig(path)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    default = Path("compressors.png")
    parser.add_argument("--output", type=Path, default=default, help="the picture")
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0))
    gaussian = jax.random.normal(keys[0], (SIDE, SIDE))
    heavy = jax.random.t(keys[1], 2.0, (SIDE, SIDE))
    line = "{:24} {:>8} {:>9} {:>9}  {:34} {:>6}".format
    print(line("compressor", "bits", "gaussian", "heavy", "sends (bits)", "time"))
    rows = {}
    for name, compressor in CATALOGUE.items():
        bits = compressor.payload_bits(gaussian.shape) / gaussian.size
        losses = [lost(compressor, x) for x in (gaussian, heavy)]
        rows[name] = {"bits": bits, "gaussian": losses[0], "heavy": losses[1]}
        collectives, sent = sends(compressor, gaussian)
        numbers = [f"{bits:.3f}", *(f"{x:.2g}" for x in losses)]
        took = f"{additions(compressor, gaussian):.0f}"
        print(line(name, *numbers, f"{collectives} ({sent:.3g})", took), flush=True)
    draw(rows, args.output)
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
