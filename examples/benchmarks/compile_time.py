"""How long a step takes to compile when a tree has hundreds of leaves.

Prints, for every compressor and exchange, the seconds that tracing and compiling one
``error_feedback`` update take, next to a plain addition of two such trees compiled in
the same run. Compile seconds of a CPU are those of all its cores: compare within one
run.

    python examples/benchmarks/compile_time.py --leaves 300 --shapes 30
"""

import argparse
import os
import time

os.environ.setdefault("NPROC", "32")  # virtual devices share one pool of threads

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import efopt

CASES = [
    (efopt.compressors.identity(), "all_reduce"),
    (efopt.compressors.identity(), "all_gather"),
    (efopt.sign(), "all_gather"),
    (efopt.sign(), "two_phase"),
    (efopt.sign(), "majority_vote"),
    (efopt.scaled_sign(), "all_gather"),
    (efopt.scaled_sign(1024), "all_gather"),
    (efopt.scaled_sign(1024), "two_phase"),
    (efopt.top_k(fraction=0.01), "all_gather"),
    (efopt.top_k(fraction=0.01, block_size=1024), "all_gather"),
    (efopt.top_k(fraction=0.01, block_size=1024), "two_phase"),
    (efopt.random_k(fraction=0.01), "all_reduce"),
    (efopt.random_k(fraction=0.01), "all_gather"),
    (efopt.random_k(fraction=0.01, block_size=1024), "all_reduce"),
    (efopt.random_k(fraction=0.01, block_size=1024), "two_phase"),
    (efopt.random_block(fraction=0.01), "all_reduce"),
    (efopt.quantize(8), "all_gather"),
    (efopt.quantize(4), "two_phase"),
    (efopt.compressors.qsgd(), "two_phase"),
    (efopt.compressors.terngrad(), "all_gather"),
    (efopt.compressors.natural(), "two_phase"),
    (efopt.compressors.cast("float8_e4m3fn"), "two_phase"),
    (efopt.compressors.count_sketch(fraction=0.2), "all_reduce"),
    (efopt.power_sgd(2, min_compression=0.5), "all_reduce"),
    (efopt.compose(efopt.top_k(fraction=0.1), efopt.quantize(4)), "all_gather"),
]


def seconds(fn, *args):
    """Wall seconds of tracing and of compiling ``fn``."""
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leaves", type=int, default=300)
    parser.add_argument("--shapes", type=int, default=30, help="different shapes")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    if args.leaves < 1 or args.shapes < 1:
        parser.error("--leaves and --shapes must be at least 1")
    jax.config.update("jax_num_cpu_devices", 8)  # where there is nothing but a CPU

    shapes = [(i + 3, 2 * i + 5) if i % 3 else (7 * i + 2,) for i in range(args.shapes)]
    params = [jnp.ones(shapes[i % args.shapes]) for i in range(args.leaves)]
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    over = jax.NamedSharding(mesh, P("data"))
    grads = [
        jax.ShapeDtypeStruct((jax.device_count(), *p.shape), p.dtype, sharding=over)
        for p in params
    ]

    print(f"{args.leaves} leaves of {args.shapes} shapes, {jax.device_count()} devices")
    print(f"{'':58}  trace s  compile s")
    add = seconds(
        lambda a, b: [x + y for x, y in zip(a, b, strict=True)], params, params
    )
    print(f"{'plain addition':58} {add[0]:8.1f} {add[1]:10.1f}", flush=True)
    for compressor, exchange in CASES:
        name = f"{compressor} {exchange}"
        if args.only not in name:
            continue
        tx = efopt.error_feedback(compressor, axis_name="data", exchange=exchange)
        state = efopt.distribute(jax.eval_shape(tx.init, params), mesh)
        specs = efopt.partition_specs(state)
        step = jax.shard_map(
            lambda g, s, tx=tx: tx.update([x[0] for x in g], s),
            mesh=mesh,
            in_specs=(P("data"), specs),
            out_specs=(P(), specs),
        )
        traced, compiled = seconds(step, grads, state)
        print(f"{name[:58]:58} {traced:8.1f} {compiled:10.1f}", flush=True)


if __name__ == "__main__":
    main()
