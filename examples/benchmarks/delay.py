"""What an exchange of the step before hides: steps with `delay=0` and `delay=1`.

Trains a network of square layers on all GPUs of one host, over the fast link and over
sockets, and prints the milliseconds of a step: with nothing exchanged, dense, and with
compressors at once and one step late. Only what a step computes before its gradients
are there can hide an exchange; `--batch` says how much that is.

    python examples/benchmarks/delay.py --output delay.json
    XLA_FLAGS=--xla_gpu_collective_inflation_factor=30 \
        python examples/benchmarks/delay.py --links sockets --only signs vote
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 NPROC=32 \
        python examples/benchmarks/delay.py --layers 2 --width 64 --batch 32
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gpu import COMMON, LINKS
from gpu_hybrid import write


def methods():
    """Name, and the transformation in front of SGD."""
    import efopt

    def feedback(compressor, exchange, delay):
        return efopt.error_feedback(
            compressor, axis_name="data", exchange=exchange, delay=delay
        )

    signs, blocks = efopt.scaled_sign(1024), efopt.random_block(fraction=0.01)
    yield "nothing exchanged", efopt.per_worker(_nothing(), axis_name="data")
    yield "dense", efopt.compress(efopt.compressors.identity(), axis_name="data")
    for delay in (0, 1):
        late = ", a step late" if delay else ""
        yield f"signs, all_gather{late}", feedback(signs, "all_gather", delay)
        yield f"signs, two_phase{late}", feedback(signs, "two_phase", delay)
        yield f"vote{late}", feedback(efopt.sign(), "majority_vote", delay)
        yield f"int8, two_phase{late}", feedback(efopt.quantize(8), "two_phase", delay)
        yield f"random_block 1 %{late}", feedback(blocks, None, delay)
    yield "power_sgd 4", feedback(efopt.power_sgd(4), None, 0)


def _nothing():
    import optax

    return optax.identity()


def measure(settings):
    """Milliseconds of a step of every method, as JSON lines."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import PartitionSpec as P

    import efopt

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)
    width, n = settings["width"], mesh.size
    keys = jax.random.split(jax.random.key(0), settings["layers"] + 1)
    over = jax.NamedSharding(mesh, P("data"))
    shape = (n, settings["batch"], width)
    x = jax.jit(lambda k: jax.random.normal(k, shape, jnp.bfloat16), out_shardings=over)
    x = x(keys[-1])

    def loss_fn(params, x):
        for w in params:
            x = jax.nn.relu(x @ w.astype(jnp.bfloat16))
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    for name, inner in methods():
        if not any(word in name for word in ["nothing", *settings["only"]]):
            continue
        tx = optax.chain(inner, optax.sgd(1e-4))
        params = [
            (2 / width) ** 0.5 * jax.random.normal(key, (width, width))
            for key in keys[:-1]
        ]
        state = efopt.distribute((params, tx.init(params)), mesh)
        specs = efopt.partition_specs(state)
        alone = name == "nothing exchanged"

        def step(state, x, tx=tx):
            params, opt = state
            local = efopt.local_params(params, "data")
            loss, grads = jax.value_and_grad(loss_fn)(local, x[0])
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), loss[None]

        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, P("data")),
            out_specs=(specs, P("data")),
            **({"check_vma": False} if alone else {}),  # workers drift apart
        )
        step = jax.jit(mapped, donate_argnums=0)
        took = []
        for _ in range(settings["steps"] + 3):
            start = time.perf_counter()
            state, loss = step(state, x)
            jax.block_until_ready((state, loss))
            took.append(1e3 * (time.perf_counter() - start))
        ms = statistics.median(took[3:])
        row = {"name": name, "ms": ms, "device": jax.devices()[0].device_kind}
        print(json.dumps(row), flush=True)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=[*LINKS])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8192, help="rows of a worker")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--only", nargs="+", default=[""], help="words of names")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {k: getattr(args, k) for k in ("layers", "width", "batch", "steps")}
    settings["only"] = args.only
    if min(args.layers, args.width, args.batch, args.steps) < 1:
        parser.error("numbers must be at least 1")
    if args.child:
        measure(settings)
        return
    flags = os.environ.get("XLA_FLAGS", "")
    results = {**settings, "xla_flags": flags, "links": {}}
    for link in args.links:
        command = [sys.executable, __file__, "--child"]
        for key, value in settings.items():
            many = value if isinstance(value, list) else [value]
            command += [f"--{key}", *map(str, many)]
        environment = os.environ | COMMON | LINKS[link]
        print(f"\n{link}", flush=True)
        rows = results["links"][link] = {}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                row = json.loads(line)
                rows[row["name"]] = row["ms"]
                least = rows["nothing exchanged"]
                ratio = row["ms"] / least
                print(f"{row['name']:34} {row['ms']:8.2f} ms {ratio:6.2f}x", flush=True)
                if args.output:
                    write(args.output, results)
        if child.returncode:
            sys.exit(f"delay.py: the run over {link} failed")


if __name__ == "__main__":
    main()
