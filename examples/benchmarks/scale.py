"""What training a 7 B model sends, holds and takes on 8 to 1024 chips and 10^5 hosts.

By `efopt.wire.plan`, from shapes alone, for two kinds of worker:

  slices  of TPU v5e, 2 or 4 of them, 8 to 1024 chips in all, four chips a host
  hosts   of 8 H100s, 10^2 to 10^5 of them

Parameters, AdamW's moments and residuals are sharded inside a worker; what the workers
exchange crosses the network cards of hosts, of 10 and of 100 Gbit/s. For each method:

  card       bytes that leave a card in a step (outer steps: in the mean, and at most)
  state      GiB of a device: parameters, optimizer's state, and a gradient
  step       predicted seconds of a step on each card

Layers are stacked, as `jax.lax.scan` has them, and a matrix of each is one leaf. For
PowerSGD they are leaves of their own, planned for one layer and for two: what is
between them is taken as often as there are layers. With `--compile` the whole training
step of a narrow decoder is compiled ahead of time by the TPU compiler, where the `tpu`
extra is installed, and what it sends between slices stands beside the plan of the same
decoder. The last table is of predictions that a measurement has checked: those of the
runs in `results/`. `--resume` keeps what an earlier call has found.

Computation is 6 parameters tokens / (peak rate times `--utilisation`), compressing
takes what it was measured to take on an H100 beside an exact average
(`kernels_h100.json`), in proportion to the memory's bandwidth, and nothing overlaps.
Activations are not counted. Writes scale.json and scale.png.

    python examples/benchmarks/scale.py
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python examples/benchmarks/scale.py --compile
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shlex
import statistics
import sys
import time
from importlib import util
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed here

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt

HERE = Path(__file__).parent
STYLE = HERE.parent / "pictures.mplstyle"
RESULTS = HERE / "results"
AXES = "dcn", "fsdp"
AUTO = (AxisType.Auto,) * 2
EVERY, FRAGMENTS = 30, 4
SIGN = efopt.scaled_sign(1024)


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator: bits and bytes a second, and bytes, as its maker states them."""

    name: str
    platform: str
    flops: float
    memory_bandwidth: float
    memory: float
    a_host: int


V5E = Device("TPU v5e", "tpu", 197e12, 819e9, 16e9, 4)
H100 = Device("H100", "gpu", 989e12, 3.35e12, 80e9, 8)
# Chips in all: slices, and the topology of one.
SLICES = {
    8: (2, "v5e:2x2"),
    32: (2, "v5e:4x4"),
    128: (2, "v5e:8x8"),
    256: (4, "v5e:8x8"),
    1024: (4, "v5e:16x16"),
}

# Name: compressor, exchange, steps between meetings, fragments, and the row of
# kernels_h100.json that tells what compressing takes.
METHODS = {
    "dense float32": (efopt.compressors.identity(), None, 1, 1, None),
    "dense bfloat16": (efopt.compressors.identity(), None, 1, 1, None),
    "int8 two_phase": (efopt.quantize(8), "two_phase", 1, 1, "quantize 8 bits"),
    "sign two_phase": (SIGN, "two_phase", 1, 1, "scaled_sign, 1024"),
    "top_k 1 %": (
        efopt.top_k(fraction=0.01, block_size=1024),
        None,
        1,
        1,
        "top_k 1 % of 1024",
    ),
    "random_block 1 %": (
        efopt.random_block(fraction=0.01),
        None,
        1,
        1,
        "random_block 1 %",
    ),
    "power_sgd 4": (efopt.power_sgd(4), None, 1, 1, "power_sgd rank 4"),
    "sign outer 30": (SIGN, "two_phase", EVERY, 1, "scaled_sign, 1024"),
    "sign streaming 30": (SIGN, "two_phase", EVERY, FRAGMENTS, "scaled_sign, 1024"),
}


def shapes(args, layers=None):
    """The parameters of a decoder with gated feed-forward layers, as shapes.

    With a number of layers they are leaves of their own.
    """
    wide, inner = args.width, args.inner
    layer = {
        **{name: (wide, wide) for name in ("q", "k", "v", "out")},
        **{name: (wide, inner) for name in ("gate", "up")},
        "down": (inner, wide),
        **{name: (wide,) for name in ("norm_1", "norm_2")},
    }
    sizes = {"embed": (args.vocabulary, wide), "norm": (wide,)}
    if layers is None:
        sizes["layers"] = {k: (args.layers, *shape) for k, shape in layer.items()}
    else:
        sizes |= {f"layer_{i}": layer for i in range(layers)}
    sizes["logits"] = (wide, args.vocabulary)
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        sizes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def specs(params):
    """Matrices are cut over the devices of a worker, vectors are on all of them."""

    def spec(path, x):
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        if x.ndim - stacked < 2:
            return P()
        return P(None, "fsdp") if stacked else P("fsdp")

    return jax.tree_util.tree_map_with_path(spec, params)


def optimizer(name):
    """AdamW on what a method makes of the gradients."""
    compressor, exchange, every, fragments, _ = METHODS[name]
    adamw = optax.adamw(3e-4, weight_decay=0.1)
    if every > 1:
        return efopt.outer.diloco(
            adamw,
            every=every,
            axis_name="dcn",
            compressor=compressor,
            exchange=exchange,
            **({} if fragments == 1 else {"fragments": fragments, "delay": 1}),
        )
    if name.startswith("dense"):
        mean = efopt.compress(compressor, axis_name="dcn")
        return optax.chain(narrow(name), mean, adamw)
    feedback = efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange)
    return optax.chain(feedback, adamw)


def narrow(name):
    """Gradients in bfloat16 are also added up in it."""
    dtype = jnp.bfloat16 if name == "dense bfloat16" else jnp.float32
    return optax.stateless(lambda g, _: jax.tree.map(lambda x: x.astype(dtype), g))


def described(name, params, mesh):
    """Parameters and the optimizer's state on a mesh, as shapes."""
    tx = optimizer(name)
    state = {"params": params, "opt": jax.eval_shape(tx.init, params)}
    return tx, efopt.distribute(state, mesh, specs(params))


def device_bytes(tree):
    """Bytes of one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


@functools.cache
def kernel_seconds(row):
    """Seconds a coordinate that compressing takes beside an exact average, on an H100.

    Of the run's 355 M parameters; less than none counts as none.
    """
    if row is None:
        return 0.0
    found = json.loads((RESULTS / "kernels_h100.json").read_text())
    rows = found["before"] | found["now"]  # programs that did not change stand in one
    mine, exact = (rows[f"{r}, stacked, float32"] for r in (row, "identity"))
    return max(0.0, mine["busy_seconds"] - exact["busy_seconds"]) / 355e6


@functools.cache
def planned(compressor, exchange, fragments, layers, workers, behind, device, args):
    """The plan of a compressor, without a network.

    Of separate layers without the tiles of a TPU's sums: bytes are then in proportion.
    """
    params = shapes(args, layers)
    rounds = {"every": EVERY, "fragments": fragments} if fragments > 1 else {}
    return efopt.wire.plan(
        compressor,
        params,
        exchange=exchange,
        platform=device.platform if layers is None else None,
        mesh={"dcn": workers, "fsdp": behind},
        axis_name="dcn",
        params_specs=specs(params),
        devices_per_card={"dcn": min(device.a_host, behind)},
        **rounds,
    )


def meetings_of(name, workers, behind, device, args):
    """What leaves a card at each meeting of a round, and the messages' count."""
    compressor, exchange, _, fragments, _ = METHODS[name]
    place = workers, behind, device, args
    if name.startswith("power_sgd"):
        one, two = (planned(compressor, exchange, 1, n, *place) for n in (1, 2))
        first, both = (p.network.bytes_sent(p.report) for p in (one, two))
        sent = first + (args.layers - 1) * (both - first)
        return one, [sent], [counted(two, two.report)]
    plan = planned(compressor, exchange, fragments, None, *place)
    reports = plan.rounds.meetings if plan.rounds else (plan.report,)
    if name == "dense bfloat16":
        reports = (plan.dense_bfloat16,)
    sent = [plan.network.bytes_sent(report) for report in reports]
    return plan, sent, [counted(plan, report) for report in reports]


def counted(plan, report):
    """Messages, one after the other, on the network between workers."""
    between = efopt.wire.Network(None, latency=1.0)
    return dataclasses.replace(plan.network, between=between).latencies(report)


def predicted(name, workers, behind, device, args):
    """One row: what a method sends, holds and takes."""
    every, kernel = METHODS[name][2], METHODS[name][4]
    params = shapes(args)
    mesh = AbstractMesh((workers, behind), AXES, axis_types=AUTO)
    plan, sent, messages = meetings_of(name, workers, behind, device, args)
    size = sum(x.size for x in jax.tree.leaves(params))
    compute = 6 * size * args.tokens / (device.flops * args.utilisation)
    faster = H100.memory_bandwidth / device.memory_bandwidth
    compress = kernel_seconds(kernel) * faster * size / behind
    _, state = described(name, params, mesh)
    held = device_bytes(state) + 4 * size // behind  # and a gradient
    step = {}
    for rate in args.gbit:
        exchange = args.latency * sum(messages) + 8 * sum(sent) / (1e9 * rate)
        step[f"{rate:g}"] = compute + (compress + exchange) / every
    return {
        "worker": f"{behind} x {device.name}",
        "workers": workers,
        "devices": workers * behind,
        "method": name,
        "bytes_of_a_device": sum(sent) / every / plan.devices_per_card,
        "bytes_of_a_card": sum(sent) / every,
        "most_of_a_card": max(sent),
        "messages": sum(messages) / every,
        "state_bytes": held,
        "fits": held < device.memory,
        "compute_seconds": compute,
        "compress_seconds": compress / every,
        "step_seconds": step,
    }


def loss_fn(params, tokens, mesh, heads):
    """That of the next token. Activations say that they are split by sequences."""

    def split(x):
        there = NamedSharding(mesh, P("fsdp"))
        return jax.lax.with_sharding_constraint(x, there)

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    whole = NamedSharding(mesh, P())
    embed = jax.lax.with_sharding_constraint(params["embed"], whole)

    @jax.checkpoint
    def layer(x, p):
        h = norm(x, p["norm_1"])
        q, k, v = (split(h @ p[n]).reshape(*h.shape[:2], heads, -1) for n in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = split(x + split(mixed.reshape(x.shape)) @ p["out"])
        h = norm(x, p["norm_2"])
        h = split(jax.nn.silu(h @ p["gate"]) * (h @ p["up"]))
        return split(x + h @ p["down"]), None

    x, _ = jax.lax.scan(layer, split(embed[tokens[:, :-1]]), params["layers"])
    logits = split(norm(x, params["norm"]) @ params["logits"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def compiled(name, chips, args):
    """A training step by the TPU compiler, beside its plan."""
    from jax.experimental import topologies

    narrow = args.compiled_width  # divides by the chips of a slice, and so do all
    smaller = {"width": narrow, "inner": 3 * narrow, "vocabulary": 8 * narrow}
    smaller["layers"] = 2
    args = Settings(**vars(args) | smaller)
    slices, topology = SLICES[chips]
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, num_slices=slices
    )
    devices = sorted(found.devices, key=lambda d: (d.slice_index, d.id))
    grid = np.array(devices).reshape(slices, -1)
    mesh = jax.sharding.Mesh(grid, AXES, axis_types=AUTO)
    params = shapes(args)
    tx, state = described(name, params, mesh)
    tokens = jax.ShapeDtypeStruct(
        (chips, args.length + 1), jnp.int32, sharding=NamedSharding(mesh, P(AXES))
    )
    heads = max(1, args.width // 128)

    def step(state, tokens):
        def loss_of(params, tokens):
            return loss_fn(params, tokens, mesh, heads)

        grad = efopt.value_and_grad(loss_of, axis_name="dcn")
        own = efopt.local_params(state["params"], "dcn", state["opt"])
        loss, grads = grad(own, tokens)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
        }, loss

    places = jax.tree.map(lambda x: x.sharding, state)
    start = time.perf_counter()
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    program = step.lower(state, tokens).compile()
    seconds = time.perf_counter() - start
    report = efopt.wire.measure(program, mesh=mesh)
    needs = program.memory_analysis()
    plan, sent, _ = meetings_of(name, slices, chips // slices, V5E, args)
    return {
        "chips": chips,
        "slices": slices,
        "topology": topology,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "method": name,
        "sent": report.bytes_over("dcn").link,
        "planned": sum(sent) // plan.devices_per_card,
        "state_bytes": device_bytes(state),
        "argument_bytes": needs.argument_size_in_bytes,
        "temporary_bytes": needs.temp_size_in_bytes,
        "compile_seconds": seconds,
    }


# ------------------------------------------------------------------ measurements


def measured_runs():
    """Predictions of earlier runs, and what was measured: seconds and bytes."""
    found = []

    def note(run, method, predicted, measured, unit):
        found.append((run, method, predicted, measured, unit))

    for run in json.loads((RESULTS / "gpu.json").read_text())["runs"]:
        where = f"{run['gpus']} GPUs, {run['link']}"
        for name, row in run["methods"].items():
            if "predicted_seconds" in row:
                ours = row["predicted_seconds"], row["step_seconds"]
                note(where, name, *ours, "step")
                note(
                    where, name, row["planned_bytes_sent"], row["bytes_sent"], "program"
                )
    for run in json.loads((RESULTS / "gpu_hybrid.json").read_text())["runs"]:
        alone = run["methods"].get("no exchange", {}).get("step_seconds")
        if alone is None:
            continue
        where = f"{run['gpus']} GPUs as two hosts, batch {run['batch']}"
        where += f", {run['dcn_link'][0] / 1e9:.1f} Gbit/s"
        for name, row in run["methods"].items():
            if "exchange_seconds" not in row:
                continue
            expected = alone + row["exchange_seconds"]
            note(where, name, expected, row["step_seconds"], "step")
            note(where, name, row["dcn_planned"], row["dcn_bytes"], "program")
            if row["dcn_counted"] is not None:  # nor another's bytes
                note(where, name, row["dcn_planned"], row["dcn_counted"], "interface")
    rates = json.loads((RESULTS / "cluster.json").read_text())["results"]
    for rate, rows in rates.items():
        where = f"2 hosts in a box, {rate.replace('bit', 'bit/s')}"
        for name, row in rows.items():
            if "predicted_seconds" in row:
                note(where, name, row["predicted_seconds"], row["step_seconds"], "step")
                # Of two workers as much leaves each as it hands to the collectives.
                note(where, name, row["hlo_bytes"], row["interface_bytes"], "interface")
    return found


def checked(found):
    """By run and kind: how many, and the ratios of measured to predicted."""
    rows = []
    for where, unit in dict.fromkeys((run, unit) for run, *_, unit in found):
        ratios = {
            method: measured / expected
            for run, method, expected, measured, kind in found
            if (run, kind) == (where, unit)
        }
        low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
        rows.append(
            {
                "run": where,
                "what": unit,
                "methods": len(ratios),
                "median": statistics.median(ratios.values()),
                "least": [low, ratios[low]],
                "most": [high, ratios[high]],
            }
        )
    return rows


# ------------------------------------------------------------------------ output


def print_rows(rows, args):
    head = "{:>8} {:>8}  {:18} {:>15} {:>15} {:>7}".format
    cells = "".join(f" {f'{r:g} Gbit/s':>12}" for r in args.gbit)
    for worker in dict.fromkeys(row["worker"] for row in rows):
        print(f"\nworkers of {worker}")
        print(head("workers", "devices", "method", "card", "at most", "state") + cells)
        for row in (r for r in rows if r["worker"] == worker):
            state = f"{row['state_bytes'] / 2**30:.1f}" + " !"[not row["fits"]]
            sizes = f"{row['bytes_of_a_card']:,.0f}", f"{row['most_of_a_card']:,}"
            line = head(row["workers"], row["devices"], row["method"], *sizes, state)
            print(
                line + "".join(f" {s:10,.3g} s" for s in row["step_seconds"].values())
            )
    print("!: more than the device's memory")


def print_compiled(rows):
    line = "{:>5} {:>7} {:10} {:18} {:>14} {:>14} {:>8} {:>9}".format
    print("\ncompiled ahead of time: bytes of a device between slices, and GiB")
    print(
        line(
            "chips", "slices", "each", "method", "sent", "planned", "state", "temporary"
        )
    )
    for r in rows:
        sizes = (f"{r[k] / 2**30:.2f}" for k in ("state_bytes", "temporary_bytes"))
        about = r["chips"], r["slices"], r["topology"], r["method"]
        print(line(*about, f"{r['sent']:,}", f"{r['planned']:,}", *sizes))


def print_checked(rows):
    line = "{:34} {:10} {:>7} {:>8}  {:26} {:26}".format
    print("\nmeasured as a multiple of predicted, of earlier runs")
    print(line("run", "what", "methods", "median", "least", "most"))
    for r in rows:
        ends = (f"{ratio:.2f} {method}" for method, ratio in (r["least"], r["most"]))
        about = r["run"], r["what"], r["methods"]
        print(line(*about, f"{r['median']:.2f}", *ends))


def draw(rows, args, path):
    """A row a method, a column a network card, a point a number of hosts."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    rows = [r for r in rows if H100.name in r["worker"]]
    plt.style.use(STYLE)
    names = list(dict.fromkeys(r["method"] for r in rows))
    counts = sorted({r["workers"] for r in rows})
    figure, axes = plt.subplots(
        1, len(args.gbit), figsize=(9, 0.9 + 0.33 * len(names)), sharey=True
    )
    shades = plt.get_cmap("Blues")(np.linspace(0.35, 0.95, len(counts)))
    for ax, rate in zip(np.atleast_1d(axes), args.gbit, strict=True):
        for y, name in enumerate(names):
            mine = {r["workers"]: r for r in rows if r["method"] == name}
            times = [mine[n]["step_seconds"][f"{rate:g}"] for n in counts]
            ax.plot(times, [y] * len(times), color="0.8", zorder=1)
            ax.scatter(times, [y] * len(times), c=shades, s=28, zorder=2)
        alone = rows[0]["compute_seconds"]
        ax.axvline(alone, color="0.5", linestyle="--", linewidth=0.8)
        ax.set(
            xscale="log",
            xlabel="seconds of a step (dashed: nothing exchanged)",
            title=f"{rate:g} Gbit/s a host of {H100.a_host} {H100.name}s",
            yticks=range(len(names)),
            yticklabels=names,
        )
        ax.xaxis.set_major_locator(ticker.LogLocator(numticks=8))
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.grid(axis="y", visible=False)
    np.atleast_1d(axes)[0].invert_yaxis()
    for n, shade in zip(counts, shades, strict=True):
        np.atleast_1d(axes)[-1].scatter([], [], color=shade, s=28, label=f"{n:,} hosts")
    figure.legend(loc="outside lower center", ncols=len(counts))
    figure.savefig(path)
    plt.close(figure)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD")
    add("--chips", type=int, nargs="*", choices=SLICES, default=[*SLICES])
    add("--hosts", type=int, nargs="*", default=[100, 1000, 10_000, 100_000])
    add(
        "--gbit", type=float, nargs="+", default=[10, 100], help="a host's network card"
    )
    add("--latency", type=float, default=1e-5, help="seconds a message, default: 1e-5")
    add("--tokens", type=int, default=4096, help="of a device and step, default: 4096")
    add("--utilisation", type=float, default=0.4, help="of the peak, default: 0.4")
    add("--layers", type=int, default=32)
    add("--width", type=int, default=4096)
    add("--inner", type=int, default=11008)
    add("--vocabulary", type=int, default=32000)
    add("--compile", action="store_true", help="by the TPU compiler, see above")
    add("--compiled-width", type=int, default=256, help="default: 256")
    add("--resume", action="store_true", help="keep what an earlier call has found")
    add("--length", type=int, default=64, help="of compiled sequences, default: 64")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    add("--show", type=Path, help="print and draw an earlier scale.json, no more")
    args = parser.parse_args()
    if not args.output.is_dir():
        parser.error(f"argument --output: no folder: {args.output}")
    if args.compile and not util.find_spec("libtpu"):
        parser.error("argument --compile: needs libtpu: pip install -e '.[tpu]'")
    if min(*args.gbit, args.utilisation, args.layers) <= 0:
        parser.error("numbers must be positive")
    return args


class Settings(argparse.Namespace):
    """Arguments that a cache can hold."""

    def __hash__(self):
        return id(self)


def show(found, args):
    print_rows(found["rows"], args)
    if found["compiled"]:
        print_compiled(found["compiled"])
    print_checked(found["checked"])
    if util.find_spec("matplotlib") and any(
        H100.name in r["worker"] for r in found["rows"]
    ):
        draw(found["rows"], args, args.output / "scale.png")


def main():
    args = Settings(**vars(parse_args()))
    if args.show:
        return show(json.loads(args.show.read_text()), args)
    size = sum(x.size for x in jax.tree.leaves(shapes(args)))
    path = args.output / "scale.json"
    command = shlex.join(["python", "examples/benchmarks/scale.py", *sys.argv[1:]])
    found = {
        "command": command,
        "version": f"jax {jax.__version__}",
        "parameters": size,
        "assumed": {
            "tokens": args.tokens,
            "utilisation": args.utilisation,
            "latency": args.latency,
            "devices": [dataclasses.asdict(d) for d in (V5E, H100)],
        },
        "rows": [],
        "compiled": [],
        "checked": checked(measured_runs()),
    }
    if args.resume and path.exists():
        earlier = json.loads(path.read_text())
        same = ("parameters", "assumed")
        if any(earlier[k] != json.loads(json.dumps(found[k])) for k in same):
            sys.exit(f"scale.py: {path} is of other settings")
        found |= {k: earlier[k] for k in ("rows", "compiled")}
    known = {(r["worker"], r["workers"], r["method"]): r for r in found["rows"]}
    found["rows"] = []
    print(f"{size:,} parameters, {args.tokens:,} tokens a device and step")
    places = [(n, H100.a_host, H100) for n in args.hosts]
    places += [(SLICES[c][0], c // SLICES[c][0], V5E) for c in args.chips]
    for workers, behind, device in places:
        for name in args.methods:
            key = f"{behind} x {device.name}", workers, name
            row = known.get(key) or predicted(name, workers, behind, device, args)
            known.pop(key, None)
            found["rows"].append(row)
            print(f"planned: {workers} x {behind}, {name}", file=sys.stderr)
            kept = found | {"rows": [*found["rows"], *known.values()]}
            path.write_text(json.dumps(kept, indent=1))
    if args.compile:
        # Every method at one size, and one method at every size.
        pairs = [("sign two_phase", c) for c in args.chips]
        pairs += [(m, 128) for m in args.methods if 128 in args.chips]
        pairs = [pair for pair in pairs if not pair[0].startswith("power_sgd")]
        done = {(r["method"], r["chips"]) for r in found["compiled"]}
        for name, chips in (p for p in dict.fromkeys(pairs) if p not in done):
            found["compiled"].append(compiled(name, chips, args))
            print(f"compiled: {chips} chips, {name}", file=sys.stderr)
            path.write_text(json.dumps(found, indent=1))
    show(found, args)
    path.write_text(json.dumps(found, indent=1))
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
