"""How far one update of every compressor is from the memory's own speed.

Compiles ``error_feedback(...).update`` alone, on one device, for the leaves of a GPT-2:
``many``, as they are, and ``stacked``, all layers of a kind in one leaf; counts the
kernels and their bytes in the compiled program; times calls that follow one another
over a donated state; and divides by the floor: the bytes that have to move (gradient
and residual read, update and residual written, payload written and read once) at the
speed of a plain pass over as much memory, measured in the same run. The last rows are
the average of several workers' payloads: payloads read, average written.

  floor     milliseconds
  wall      median milliseconds of a call, and how many floors
  busy      the same of the kernels alone, from the profiler (GPU, TPU)
  kernels   in the program, loops unrolled; bytes a coordinate they read and write
  temp      megabytes beside arguments and results

    python examples/benchmarks/kernels.py                           # a GPU: 355 M
    python examples/benchmarks/kernels.py --layers 4 --width 256 --vocabulary 4096
    python examples/benchmarks/kernels.py --count                   # compile alone
    XLA_FLAGS=--xla_gpu_autotune_level=0 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
        python examples/benchmarks/kernels.py --target tests/gpu/h100.txtpb

`thresholds.py` runs it with other values of the library's constants (`--set`). The
state is returned first: donated buffers are paired with results in order, and a
residual in the updates' place would be one copy more.
"""

import argparse
import gzip
import importlib
import json
import math
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import efopt
from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Message
from efopt.codecs.layout import lay_out
from efopt.exchanges import carrier
from efopt.exchanges.exchange import decode_mean
from efopt.hlo.kernels import count_kernels

BLOCK = efopt.random_block(fraction=0.01)
SKETCH = efopt.compressors.count_sketch(fraction=0.2)
CASES = {  # what is sent, and what stores the residual
    "identity": (efopt.compressors.identity(), None),
    "sign": (efopt.sign(), None),
    "scaled_sign, whole": (efopt.scaled_sign(), None),
    "scaled_sign, 1024": (efopt.scaled_sign(1024), None),
    "quantize 8 bits": (efopt.quantize(8), None),
    "quantize 4 bits": (efopt.quantize(4, stochastic=False), None),
    "top_k 1 % of 1024": (efopt.top_k(fraction=0.01, block_size=1024), None),
    "top_k 1 % of 4096": (efopt.top_k(fraction=0.01, block_size=4096), None),
    "random_k 1 %": (efopt.random_k(fraction=0.01), None),
    "random_block 1 %": (BLOCK, None),
    "power_sgd rank 4": (efopt.power_sgd(4), None),
    "random_block, in 8 bits": (BLOCK, efopt.quantize(8, stochastic=True)),
    "random_block, in 4 bits": (BLOCK, efopt.quantize(4)),
    "random_block, in a sketch": (BLOCK, SKETCH),
}
PAYLOADS = (2, 8)  # workers whose signs are averaged


def gpt2(layers, width, vocabulary, context, dtype, stacked):
    """Structs of a GPT-2: twelve leaves a layer, and four."""

    def layer(name, *shape):
        return jax.ShapeDtypeStruct(((layers,) if stacked else ()) + shape, dtype)

    def kind():
        w = width
        shapes = [(3 * w,), (w, 3 * w), (w,), (w, w), (w,), (w,), (w,), (w,)]
        shapes += [(4 * w,), (w, 4 * w), (w,), (4 * w, w)]
        return [layer(i, *shape) for i, shape in enumerate(shapes)]

    rest = [(width,), (width,), (context, width), (vocabulary, width)]
    return {
        "layers": kind() if stacked else [kind() for _ in range(layers)],
        "rest": [jax.ShapeDtypeStruct(shape, dtype) for shape in rest],
    }


def placing(target):
    """What puts structs on a device, and its name; there or, by description, not."""
    if target is None:
        return (lambda tree: tree), jax.devices()[0].device_kind
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="one",
        target_config=target.read_text(),
        topology="1x1x1",
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def put(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    return put, topology.devices[0].device_kind


def set_constant(text):
    """``efopt.compressors.top_k.FEW=0``: a constant, or what a function returns."""
    name, _, value = text.partition("=")
    module, _, name = name.rpartition(".")
    home, value = importlib.import_module(module), int(value)
    old = getattr(home, name)  # an error where there is none
    setattr(home, name, (lambda *_: value) if callable(old) else value)


def size(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def payload_bytes(compressor, tree):
    bits = {}
    for x in jax.tree.leaves(tree):
        if (x.shape, x.dtype) not in bits:
            bits[x.shape, x.dtype] = compressor.payload_bits(x.shape, x.dtype)
    return sum(bits[x.shape, x.dtype] for x in jax.tree.leaves(tree)) / 8


def least_bytes(case, tree, state):
    """Gradient and residual in, update and residual out, the payload out and in."""
    return 2 * nbytes(tree) + 2 * nbytes(state.residual) + 2 * payload_bytes(case, tree)


def filled(structs):
    """Normal numbers, each leaf at a scale of its own."""

    def one(key, x):
        scale, values = jax.random.split(key)
        scale = 1e-3 * jnp.exp(jax.random.normal(scale))
        return (scale * jax.random.normal(values, x.shape)).astype(x.dtype)

    makers = {}
    leaves, treedef = jax.tree.flatten(structs)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    for x in leaves:
        makers.setdefault((x.shape, x.dtype), jax.jit(lambda key, x=x: one(key, x)))
    pairs = zip(keys, leaves, strict=True)
    return treedef.unflatten([makers[x.shape, x.dtype](key) for key, x in pairs])


def prepared(compressor, memory, tree):
    """An update that returns its state first, and the structs of that."""
    tx = efopt.error_feedback(compressor, memory=memory)

    def update(state, grads):
        updates, state = tx.update(grads, state)
        return state, updates

    return tx, jax.jit(update, donate_argnums=0), jax.eval_shape(tx.init, tree)


def averaging(number, tree):
    """The mean of the signs of some workers, as exchanges decode it."""
    codec = efopt.scaled_sign(1024).codec
    leaves = [x for x in jax.tree.leaves(tree) if len(x.shape) > 1]
    shapes, dtypes = [x.shape for x in leaves], [x.dtype for x in leaves]
    layout = lay_out([codec] * len(leaves), shapes, dtypes)
    turn = Turn(jnp.uint32(0), jnp.uint32(0))
    payloads = [
        jax.eval_shape(lambda b=b: b.codec.encode(jnp.zeros(b.shape), b.blocks(), turn))
        for b in layout.buckets
    ]
    words = jax.eval_shape(lambda ps: carrier.pack(ps, 1), payloads).shape[1]

    @jax.jit
    def mean(carriers):
        turn = Turn(jnp.uint32(0), jnp.uint32(0))
        pairs = zip(layout.buckets, payloads, strict=True)
        messages = [Message(b.codec, p, b.blocks(), turn) for b, p in pairs]
        return decode_mean(carriers, messages)

    least = 4 * number * words + 4 * sum(math.prod(b.shape) for b in layout.buckets)
    return mean, jax.ShapeDtypeStruct((number, words), jnp.uint32), least


def counted(compiled, coordinates):
    found = count_kernels(compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "kernels": found.number,
        "loops": found.loops,
        "bytes_a_coordinate": found.bytes / coordinates,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def timed(call, budget):
    """Median seconds of a call; ``call(n)`` makes ``n`` one after the other."""
    call(2)
    start = time.perf_counter()
    call(1)
    once = time.perf_counter() - start
    rounds = 5
    number = max(1, min(20, int(budget / rounds / max(once, 1e-5))))
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        call(number)
        took.append((time.perf_counter() - start) / number)
    return statistics.median(took)


def busy(call, dearest, number=3):
    """Seconds a call that kernels take, by the profiler; the dearest kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call(number)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
        total, kinds, launched = 0.0, {}, 0
        for plane in data.planes:
            if not plane.name.startswith(("/device:GPU", "/device:TPU")):
                continue
            for line in plane.lines:
                if not line.name.startswith(("Stream", "XLA Ops")):
                    continue
                for event in line.events:
                    kind = event.name.split(" ")[0]
                    launched += 1
                    total += event.duration_ns
                    kinds[kind] = kinds.get(kind, 0.0) + event.duration_ns
    first = sorted(kinds.items(), key=lambda item: -item[1])[:dearest]
    return {
        "busy_seconds": 1e-9 * total / number,
        "launched": launched / number,
        "dearest_ms": {kind: 1e-6 * ns / number for kind, ns in first},
    }


def bandwidth(coordinates, budget):
    """Bytes a second of a plain pass over an array: read, and written in its place."""
    n = min(coordinates, 1 << 28)
    more = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [jnp.zeros(n, jnp.float32)]

    def call(number):
        for _ in range(number):
            held[0] = more(held[0])
        jax.block_until_ready(held)

    return 8 * n / timed(call, budget)


def measured(compiled, held, more, budget, dearest):
    """Times of a compiled program; ``held`` is its first argument, donated if alone."""

    def call(number):
        out = None
        for _ in range(number):
            out = compiled(held[0], *more)
            if more:
                held[0] = out[0]
        jax.block_until_ready(out)

    row = {"wall_seconds": timed(call, budget)}
    if jax.default_backend() in ("gpu", "tpu"):
        row |= busy(call, dearest)
    return row


HEAD = (
    f"{'':28} {'floor':>7} {'wall':>8} {'':>6} {'busy':>8} {'':>6} {'kernels':>8}"
    f" {'loops':>5} {'B/coord':>8} {'temp':>6} {'compile':>7}"
)


def line(name, row):
    def ms(key):
        if key not in row or "floor_seconds" not in row:
            return f"{'':>8} {'':>6}"
        return f"{1e3 * row[key]:8.2f} {row[key] / row['floor_seconds']:5.2f}x"

    floor = f"{1e3 * row['floor_seconds']:7.2f}" if "floor_seconds" in row else " " * 7
    return (
        f"{name:28} {floor} {ms('wall_seconds')} {ms('busy_seconds')} "
        f"{row['kernels']:8.0f} {row['loops']:5d} {row['bytes_a_coordinate']:8.1f} "
        f"{row['temporary_bytes'] / 1e6:6.0f} {row['compile_seconds']:6.1f}s"
    )


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--layers", type=int, default=24)
    add("--width", type=int, default=1024)
    add("--vocabulary", type=int, default=50257)
    add("--context", type=int, default=1024)
    add("--trees", nargs="+", choices=("many", "stacked"), default=["many", "stacked"])
    add("--dtypes", nargs="+", default=["float32"], help="of the gradients")
    add("--only", nargs="*", default=[""], help="cases whose name has one of these")
    add("--seconds", type=float, default=1.0, help="of timing a case, default: 1")
    add("--jobs", type=int, default=8, help="programs compiled at a time, default: 8")
    add("--count", action="store_true", help="compile and count, time nothing")
    add("--target", type=Path, help="count for the GPU of this description, not there")
    add("--dearest", type=int, default=6, help="kernels named in the JSON file")
    add("--keep", type=Path, help="a folder for the programs' texts")
    add("--set", nargs="*", default=[], help="constants, `efopt.module.NAME=value`")
    add("--output", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if min(args.layers, args.width, args.vocabulary, args.context, args.jobs) < 1:
        parser.error("sizes and --jobs must be at least 1")

    for text in args.set:
        set_constant(text)
    placed, device = placing(args.target)
    args.count = args.count or args.target is not None
    results = {"device": device, "jax": jax.__version__, "rows": {}}
    sizes = args.layers, args.width, args.vocabulary, args.context
    asked = lambda name: any(word in name for word in args.only)  # noqa: E731

    def write():
        if args.output:
            args.output.write_text(json.dumps(results, indent=1))

    def compiled(name, lower):
        """A compiled program, and what its text tells."""
        start = time.perf_counter()
        program = lower().compile()
        took = time.perf_counter() - start
        if args.keep:
            args.keep.mkdir(exist_ok=True)
            path = args.keep / (name.replace(" ", "_").replace("/", "-") + ".hlo.gz")
            path.write_bytes(gzip.compress(program.as_text().encode()))
        return program, took

    for dtype in args.dtypes:
        for kind in args.trees:
            tree = gpt2(*sizes, jnp.dtype(dtype), kind == "stacked")
            coordinates = size(tree)
            print(f"\n{kind}, {dtype}: {coordinates:,} coordinates in ", end="")
            print(f"{len(jax.tree.leaves(tree))} leaves, {device}")
            if not args.count:
                speed = bandwidth(coordinates, args.seconds)
                print(f"a plain pass: {1e-9 * speed:,.0f} GB/s")
                results[f"{kind}, {dtype}: bytes a second"] = speed
            print(HEAD, flush=True)
            grads = None if args.count else filled(tree)
            cases = {name: case for name, case in CASES.items() if asked(name)}
            with ThreadPoolExecutor(args.jobs) as pool:
                begun = {}
                for name, (compressor, memory) in cases.items():
                    tx, update, state = prepared(compressor, memory, tree)
                    given = placed((state, tree))
                    lower = lambda u=update, given=given: u.lower(*given)  # noqa: E731
                    label = f"{name}, {kind}, {dtype}"
                    begun[name] = tx, state, pool.submit(compiled, label, lower)
                for number in PAYLOADS:
                    name = f"mean of {number} signs"
                    if asked(name) and dtype == "float32":
                        mean, carriers, least = averaging(number, tree)
                        lower = lambda m=mean, c=carriers: m.lower(placed(c))  # noqa: E731
                        job = pool.submit(compiled, f"{name}, {kind}", lower)
                        begun[name] = carriers, least, job
                ready = {name: job[2].result() for name, job in begun.items()}
            for name, (program, took) in ready.items():
                row = counted(program, coordinates) | {"compile_seconds": took}
                first, second, _ = begun[name]
                if not args.count:
                    if name in cases:
                        least = least_bytes(cases[name][0], tree, second)
                        held, more = [jax.jit(first.init)(grads)], (grads,)
                    else:
                        least, more = second, ()
                        held = [jnp.ones(first.shape, first.dtype)]
                    row |= measured(program, held, more, args.seconds, args.dearest)
                    row["floor_seconds"] = least / speed
                    del held
                results["rows"][f"{name}, {kind}, {dtype}"] = row
                print(line(name, row), flush=True)
                write()


if __name__ == "__main__":
    main()
