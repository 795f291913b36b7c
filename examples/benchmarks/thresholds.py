"""What the library's constants were chosen by: each at several values, beside itself.

Runs `kernels.py` on the case that a constant matters to, once for every value of it,
each in a process of its own, and prints what an update then takes. The value in use is
marked, but where a function decides. `--rounds` goes through all values several times,
of which the least time counts.

    python examples/benchmarks/thresholds.py --output thresholds.json    # this device
    python examples/benchmarks/thresholds.py --size --layers 8 --width 512 \
        --vocabulary 8192                                                # a small one
    XLA_FLAGS=--xla_gpu_autotune_level=0 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
        python examples/benchmarks/thresholds.py --size --target tests/gpu/h100.txtpb

Columns: milliseconds of an update (of its kernels alone, where there is a profiler of
the device), kernels, bytes a coordinate they move, temporary megabytes, and seconds to
compile.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KERNELS = Path(__file__).with_name("kernels.py")
NEVER = 1 << 62
# The constant, the case, the tree, and values; a function is replaced by the value.
CHOICES = [
    ("efopt.compressors.top_k._chunk", "top_k 1 % of 1024", "stacked", [1, 4, 8, 16]),
    ("efopt.compressors.top_k.FEW", "top_k 1 % of 1024", "stacked", [0, 64]),
    ("efopt.compressors.top_k.LONG", "top_k 1 % of 4096", "stacked", [1 << 12, NEVER]),
    ("efopt.codecs.layout.FEW", "top_k 1 % of 1024", "many", [8, 32, NEVER]),
    ("efopt.ground.sums.LARGE", "scaled_sign, 1024", "stacked", [1 << 16, NEVER]),
    ("efopt.exchanges.exchange.AT_ONCE", "mean of 8 signs", "stacked", [1, 2, 8]),
    ("efopt.exchanges.exchange.TOGETHER", "mean of 8 signs", "many", [0, 1 << 26]),
    ("efopt.compressors.power_sgd.UNROLLED", "power_sgd", "many", [0, 8]),
    ("efopt.compressors.count_sketch.UNROLLED", "in a sketch", "many", [0, 16]),
    ("efopt.compressors.count_sketch.LANE", "in a sketch", "many", [0, 1 << 13]),
    ("efopt.feedback.stored.PIECE", "in 8 bits", "many", [1 << 15, 1 << 19, NEVER]),
    ("efopt.feedback.stored.PIECES", "in 8 bits", "stacked", [1, 8, 32, 128]),
    ("efopt.compressors.scaled_sign.LANE", "scaled_sign, whole", "many", [0, 1 << 16]),
    ("efopt.codecs.sparse.LANE", "random_k", "many", [0, 1 << 13, 1 << 16]),
]


def run(name, value, case, tree, options):
    """The row of `kernels.py`."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        given = ["--only", case, "--trees", tree, "--output", str(found), *options]
        command = [sys.executable, str(KERNELS), "--set", f"{name}={value}", *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        told = json.loads(found.read_text())
    (row,) = told["rows"].values()
    return told["device"], row


def in_use(name, values):
    """The value that the library has, or ``None`` for what a function decides."""
    module, _, name = name.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    return value if value in values else None


def line(value, used, row):
    shown = "none" if value == NEVER else f"{value:,}"
    seconds = row.get("busy_seconds", row.get("wall_seconds"))
    took = f"{1e3 * seconds:9.2f}" if seconds else " " * 9
    return (
        f"  {shown + ' *' * used:>12} {took} {row['kernels']:8.0f}"
        f" {row['bytes_a_coordinate']:8.1f} {row['temporary_bytes'] / 1e6:7.0f}"
        f" {row['compile_seconds']:6.1f}"
    )


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--only", nargs="*", default=[""], help="constants whose name has one of these")
    add("--rounds", type=int, default=1)
    add(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds; no run begins later",
    )
    add("--output", type=Path, help="a JSON file to write")
    add(
        "--size",
        nargs=argparse.REMAINDER,
        default=[],
        help="all else is `kernels.py`'s",
    )
    args = parser.parse_args()
    begun, results = time.monotonic(), {"size": args.size, "rows": {}}
    choices = [c for c in CHOICES if any(word in c[0] for word in args.only)]
    for _ in range(args.rounds):
        for name, case, tree, values in choices:
            rows = results["rows"].setdefault(f"{name}: {case}, {tree}", {})
            for value in values:
                if time.monotonic() - begun > args.budget:
                    break
                results["device"], row = run(name, value, case, tree, args.size)
                best = rows.get(str(value), row)
                for key in row.keys() & {"wall_seconds", "busy_seconds"}:
                    row[key] = min(row[key], best[key])
                row["in use"] = value == in_use(name, values)
                rows[str(value)] = row
                if args.output:
                    args.output.write_text(json.dumps(results, indent=1))
    print(f"{results.get('device')}, {' '.join(args.size)}")
    heads = "ms", "kernels", "B/coord", "temp MB", "compile"
    print(" " * 14 + "{:>10}{:>9}{:>9}{:>8}{:>7}".format(*heads))
    for name, rows in results["rows"].items():
        print(name)
        for value, row in rows.items():
            print(line(int(value), row["in use"], row))


if __name__ == "__main__":
    main()
