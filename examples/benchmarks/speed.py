"""What compressing and keeping the residual cost on one core, next to an addition.

Times one jitted ``error_feedback`` update of a single array for every compressor, and
beside it, in the same round, one ``jnp.add`` over an array of the same size. Prints
medians over the rounds and their ratio; single times say little on a shared machine.

    python examples/benchmarks/speed.py --coordinates 16777216 --rounds 7
"""

import argparse
import json
import os
import statistics
import time

if hasattr(os, "sched_setaffinity"):  # one core, before jax counts them
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp

import efopt

CASES = {
    "sign": efopt.sign(),
    "scaled_sign, whole": efopt.scaled_sign(),
    "scaled_sign, 1024": efopt.scaled_sign(1024),
    "quantize 8 bits, nearest": efopt.quantize(8),
    "quantize 8 bits, stochastic": efopt.quantize(8, stochastic=True),
    "quantize 4 bits, stochastic": efopt.quantize(4),
    "qsgd": efopt.compressors.qsgd(),
    "terngrad": efopt.compressors.terngrad(),
    "natural": efopt.compressors.natural(),
    "cast bfloat16": efopt.compressors.cast("bfloat16"),
    "cast float8_e4m3fn": efopt.compressors.cast("float8_e4m3fn"),
    "random_k 1 %": efopt.random_k(fraction=0.01),
    "random_block 1 %": efopt.random_block(fraction=0.01),
    "count_sketch 20 %": efopt.compressors.count_sketch(fraction=0.2),
    "top_k 1 % of 4096": efopt.top_k(fraction=0.01, block_size=4096),
    "top_k 1 %, whole": efopt.top_k(fraction=0.01),
    "power_sgd rank 4": efopt.power_sgd(4),
}


def seconds(fn, *args):
    """Wall seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--coordinates", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--output", help="a JSON file to write")
    args = parser.parse_args()
    if args.coordinates < 1 or args.rounds < 1:
        parser.error("--coordinates and --rounds must be at least 1")

    rows = 1 << max(0, (args.coordinates.bit_length() - 1) // 2)
    shape = (rows, -(-args.coordinates // rows))  # a matrix, for PowerSGD
    key = jax.random.key(0)
    x, y = (jax.random.normal(k, shape) for k in jax.random.split(key))
    add = jax.jit(jnp.add)
    seconds(add, x, y)

    print(f"{x.size} float32 coordinates, {jax.devices()[0].device_kind}")
    print(f"{'':30} {'ms':>8} {'add ms':>8} {'ratio':>7}")
    results = {}
    for name, compressor in CASES.items():
        if args.only not in name:
            continue
        tx = efopt.error_feedback(compressor)
        update = jax.jit(tx.update)
        state = tx.init(x)
        _, state = jax.block_until_ready(update(x, state))
        pairs = []
        for _ in range(args.rounds):
            pairs.append((seconds(update, x, state), seconds(add, x, y)))
        took, added = (statistics.median(p) for p in zip(*pairs, strict=True))
        ratio = statistics.median(t / a for t, a in pairs)
        results[name] = {"seconds": took, "add_seconds": added, "ratio": ratio}
        line = f"{name:30} {1e3 * took:8.1f} {1e3 * added:8.1f} {ratio:7.1f}"
        print(line, flush=True)
    if args.output:
        with open(args.output, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
