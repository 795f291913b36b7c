"""A cluster in a box: compressed training on links of limited rate, beside PyTorch.

Starts a few JAX processes, joined by `jax.distributed` over gloo, each in a network
namespace of its own, on a link that `tc` limits. They train one Flax network of 4 M
parameters on scikit-learn's digits, with one method after the other; then PyTorch's
DistributedDataParallel trains the same network on the same batches and links. Before
that all of them meet on plain localhost, which shows what computing and compressing
cost. Prints a table for every rate, writes cluster.json and draws cluster.png:

  step       median seconds of a step, in the median of several rounds of all methods,
             and how many times faster that is than `dense`
  predicted  what `efopt.wire.plan` makes of the step on localhost, the latency and the
             rate, and how far off that is
  loss       mean over the workers and the last five steps
  HLO        bytes that leave a worker in a step, according to the compiled program
  interface  bytes that did leave, counted by its network interface, headers included

Limiting links takes root and iproute2; without them localhost is all there is. PyTorch
is left out where it is not installed (`pip install torch`).

    python examples/benchmarks/cluster.py --rates 100mbit 1gbit
    python examples/benchmarks/cluster.py --kill  # and what becomes of the others
    python examples/benchmarks/cluster.py --hybrid --rates 100mbit 1gbit
    python examples/benchmarks/cluster.py --outer --rates 100mbit --batch 8 64 256

With `--outer` workers meet at every thirtieth or ninetieth step, beside those that do
at every one and those that never do: in turns, a round each, which all begin together
and which ends when the last is done. Seconds of a step are means of a round, in the
median of all rounds, held against a step alone; HLO bytes are those of a meeting, and
the file is cluster_outer.json. `processor` is what a worker's own threads
computed in a step: what is left of it was waiting, for the link and for the other.
`<= 1.1 from` are the steps of a round that make a step a tenth longer than alone,
according to `efopt.wire.plan`. Several `--batch` are steps of several lengths.

With `--hybrid` a host has four virtual devices and parameters are sharded over them:
two hosts are a mesh of `dcn` 2 x `fsdp` 4, compressed over `dcn` alone. HLO bytes are
then those that leave all devices of a host, and the file is cluster_hybrid.json.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
from importlib import metadata, util
from pathlib import Path

import cluster_fleet
import cluster_hybrid
import cluster_jax
import cluster_network
import cluster_outer
import matplotlib.pyplot as plt
from cluster_network import RATES, ClusterError
from cluster_task import WARM_UP
from matplotlib.ticker import EngFormatter, NullFormatter

SCRIPTS = dict.fromkeys(cluster_jax.METHODS, "cluster_jax.py")  # of each method
TORCH = util.find_spec("torch") is not None
if TORCH:
    import cluster_torch

    SCRIPTS |= dict.fromkeys(cluster_torch.METHODS, "cluster_torch.py")
STYLE = Path(__file__).parents[1] / "pictures.mplstyle"
LOCALHOST = "localhost"  # in place of a rate
MAX_WORKERS = 4
ENDLESS = 10**6  # steps


def benchmark(rate, batch, options, cache):
    """Trains with every method on links of one rate: method -> measurements.

    The median of several rounds of all methods: a neighbour that takes the processor
    for some seconds must not decide between two of them.
    """
    rounds = {name: [] for name in options.methods}
    with network_of(rate, options) as network:
        for script in options.rounds * [*dict.fromkeys(map(SCRIPTS.get, rounds))]:
            own = [name for name in options.methods if SCRIPTS[name] == script]
            arguments = script, network, own, options.steps, batch, cache
            with cluster_fleet.fleet(*arguments) as workers:
                reports = cluster_fleet.await_results(workers)
            for name in own:
                rounds[name].append(merge([report[name] for report in reports]))
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in rounds.items()
    }


def add_predictions(rate, rows, unlimited, workers):
    """Adds what a step of each JAX method should take, from its step on localhost."""
    for name, row in rows.items():
        if name in cluster_jax.METHODS:
            plan = cluster_jax.plan(
                name,
                workers,
                bandwidth=RATES[rate],
                latency=row["latency"],
                compute_seconds=unlimited[name]["step_seconds"],
            )
            row["predicted_seconds"] = plan.step_seconds


def outages(rate, options, cache):
    """Takes a worker away and prints what becomes of the others. Whether all ended."""
    everybody_ended = True
    for how in cluster_fleet.OUTAGES:
        with (
            network_of(rate, options) as network,
            cluster_fleet.fleet(
                "cluster_jax.py", network, ["dense"], ENDLESS, options.batch[0], cache
            ) as workers,
        ):
            ends = cluster_fleet.outage(workers, how)
        print(f"worker {len(ends)} {how} during a step, {rate}:")
        for rank, (seconds, code, error) in enumerate(ends):
            if seconds is None:
                everybody_ended = False
                limit = cluster_fleet.OUTAGE_LIMIT
                print(f"  worker {rank} is still there after {limit} s")
            else:
                print(
                    f"  worker {rank} ended with {code} after {seconds:.1f} s: {error}"
                )
    return everybody_ended


def network_of(rate, options):
    """Hosts on links of that rate, for a `with`."""
    if rate == LOCALHOST:
        network = cluster_network.localhost(options.workers, options.port)
        return contextlib.nullcontext(network)
    return cluster_network.limited(rate, options.workers)


def merge(reports):
    """One row from what the workers say of a method: means, the loss of the end."""
    row = {
        key: statistics.mean(report[key] for report in reports)
        for key, value in reports[0].items()
        if isinstance(value, (int, float))
    }
    losses = [statistics.mean(report["losses"][-5:]) for report in reports]
    return {**row, "loss": statistics.mean(losses)}


def table(rows):
    """The rows as lines of text."""
    line = "{:18}  {:>9}  {:>7}  {:>14}  {:>6}  {:>9}  {:>9}  {:>5}".format
    heads = (
        "method",
        "step",
        "speedup",
        "predicted",
        "loss",
        "HLO",
        "interface",
        "ratio",
    )
    lines = [line(*heads)]
    dense = rows["dense"]["step_seconds"] if "dense" in rows else None
    for name, row in rows.items():
        step, predicted = row["step_seconds"], row.get("predicted_seconds")
        hlo, interface = row.get("hlo_bytes"), row.get("interface_bytes")
        cells = [name, f"{1e3 * step:,.0f} ms"]
        cells.append(f"{dense / step:.1f}x" if dense else "-")
        cells.append(
            f"{1e3 * predicted:,.0f} ms {predicted / step - 1:+.0%}"
            if predicted
            else "-"
        )
        cells.append(f"{row['loss']:.3f}")
        cells += [f"{size / 1e3:,.0f} kB" if size else "-" for size in (hlo, interface)]
        cells.append(f"{interface / hlo:.2f}" if interface and hlo else "-")
        lines.append(line(*cells))
    return "\n".join(lines)


def draw(results, title, path):
    """Saves the seconds of a step, measured and predicted, for each rate."""
    plt.style.use(STYLE)
    size = 1.5 + 2.4 * len(results), 3.8
    figure, panels = plt.subplots(
        1, len(results), figsize=size, sharey=True, squeeze=False
    )
    for axes, (rate, rows) in zip(panels[0], results.items(), strict=True):
        seconds = [row["step_seconds"] for row in rows.values()]
        colours = ["C1" if name.startswith("torch") else "C0" for name in rows]
        axes.barh(list(rows), seconds, color=colours)
        predicted = [row.get("predicted_seconds") for row in rows.values()]
        points = [(p, n) for p, n in zip(predicted, rows, strict=True) if p]
        if points:
            axes.plot(*zip(*points, strict=True), "kd", markersize=4, label="predicted")
        ends = [max(s, p or 0) for s, p in zip(seconds, predicted, strict=True)]
        for name, measured, end in zip(rows, seconds, ends, strict=True):
            # Behind the mark as well, wherever that is.
            axes.text(1.12 * end, name, f"{1e3 * measured:,.0f} ms", va="center")
        axes.set(title=rate, xscale="log", xlabel="median seconds of a step")
        axes.set_xlim(min(seconds) / 2, 5 * max(ends))
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].invert_yaxis()
    marks = panels[0, -1].get_legend_handles_labels()
    if marks[0]:
        figure.legend(*marks, loc="outside lower right")
    figure.suptitle(title)
    figure.savefig(path)
    plt.close(figure)


def machine(workers):
    """The machine, named by what matters here."""
    model = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = os.cpu_count() or 1
    versions = " ".join(
        f"{name} {metadata.version(name)}"
        for name in ("jax", "torch")
        if util.find_spec(name)
    )
    return f"{workers} workers on {cores} cores ({model}), {versions}"


def parse_args(arguments=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    known = ", ".join(RATES)
    scripts = ", ".join(SCRIPTS).replace("%", "%%")
    add("--rates", nargs="*", metavar="RATE", help=f"of {known}; default: all")
    add("--workers", type=int, default=2, help=f"2 to {MAX_WORKERS}, default: 2")
    add("--methods", nargs="+", metavar="METHOD", help=f"of {scripts}")
    add("--steps", type=int, help="of a method in a round, default: 20 (outer: 240)")
    add("--rounds", type=int, default=3, help="of all methods, default: 3")
    add("--batch", type=int, nargs="+", help="images of a worker, default: 8")
    add("--port", type=int, default=0, help="on localhost, default: one that is free")
    add("--hybrid", action="store_true", help="hosts of four devices, sharded inside")
    add("--outer", action="store_true", help="local steps, and meetings")
    add("--kill", action="store_true", help="take a worker away instead of timing")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    args = parser.parse_args(arguments)
    args.batch = args.batch or [8]
    if len(args.batch) > 1 and not args.outer:
        parser.error("argument --batch: several go with --outer alone")
    if args.outer:
        SCRIPTS.clear()
        SCRIPTS.update(dict.fromkeys(cluster_outer.METHODS, "cluster_outer.py"))
        if args.kill or args.hybrid:
            parser.error("argument --outer: with neither --kill nor --hybrid")
    if args.hybrid:
        SCRIPTS.clear()
        SCRIPTS.update(dict.fromkeys(cluster_hybrid.METHODS, "cluster_hybrid.py"))
        if args.kill:
            parser.error("argument --hybrid: not with --kill")
        if any(batch % cluster_hybrid.DEVICES for batch in args.batch):
            parser.error(
                f"argument --batch: must be a multiple of {cluster_hybrid.DEVICES} "
                "devices with --hybrid"
            )
    for name, choices in {"rates": [*RATES], "methods": [*SCRIPTS]}.items():
        for value in getattr(args, name) or []:
            if value not in choices:
                known = ", ".join(choices)
                parser.error(f"argument --{name}: no {value!r}, choose from {known}")
    if not 2 <= args.workers <= MAX_WORKERS:
        parser.error(
            f"argument --workers: must be 2 to {MAX_WORKERS}, got {args.workers}"
        )
    if not 0 <= args.port <= 65535:
        parser.error(f"argument --port: must be 0 to 65535, got {args.port}")
    if args.steps is None:
        args.steps = 240 if args.outer else 20
    steps = cluster_outer.EVERY if args.outer else WARM_UP + 1
    for name, least in {"steps": steps, "rounds": 1, "batch": 1}.items():
        value = getattr(args, name)
        value = min(value) if name == "batch" else value
        if value < least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")
    if not args.output.is_dir():
        parser.error(f"argument --output: no folder {args.output}")
    args.rates = [*RATES] if args.rates is None else args.rates
    args.methods = args.methods or [*SCRIPTS]
    if args.outer and "alone" not in args.methods:  # which all are held against
        args.methods.insert(0, "alone")
    return args


def stop(number, frame):
    """Ends the program by an exception, so that everything is cleaned up."""
    sys.exit(128 + number)


def measured(batch, options, cache):
    """All rates, of which each is printed when it is done: rate -> rows."""
    results = {}
    for rate in (LOCALHOST, *options.rates):
        rows = benchmark(rate, batch, options, cache)
        before = results.get(LOCALHOST)
        if before and options.outer:
            cluster_outer.add_plans(RATES[rate], rows, before, options.workers)
        elif before and not options.hybrid:
            add_predictions(rate, rows, before, options.workers)
        results[rate] = rows
        lines = cluster_outer.table(rows) if options.outer else table(rows)
        print(f"\n{rate}, batch {batch}\n{lines}", flush=True)
    if len(options.batch) == 1:
        return results
    return {f"{rate}, batch {batch}": rows for rate, rows in results.items()}


def main():
    options = parse_args()
    for number in cluster_network.STOP_SIGNALS:
        signal.signal(number, stop)
    if reason := cluster_network.obstacle():
        print(f"The link is not limited, workers meet on localhost alone: {reason}.")
        options.rates = []
    title = machine(options.workers)
    print(title)
    if not TORCH:
        print("PyTorch is not installed (`pip install torch`), so it is left out.")

    try:
        with cluster_network.folder_of_its_own() as cache:
            if options.kill:
                rate = options.rates[0] if options.rates else LOCALHOST
                sys.exit(0 if outages(rate, options, cache) else 1)
            results = {}
            for batch in options.batch:
                results |= measured(batch, options, cache)
    except ClusterError as error:
        sys.exit(f"cluster.py: {error}")
    names = "workers", "steps", "rounds", "batch"
    settings = {name: getattr(options, name) for name in names}
    everything = {"machine": title, **settings, "results": results}
    stem = "cluster_hybrid" if options.hybrid else "cluster"
    stem = "cluster_outer" if options.outer else stem
    data, picture = options.output / f"{stem}.json", options.output / f"{stem}.png"
    data.write_text(json.dumps(everything, indent=2) + "\n")
    draw(results, title, picture)
    print(f"\nWritten: {data}, {picture}")


if __name__ == "__main__":
    main()
