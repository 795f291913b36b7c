"""Compressed training on the GPUs of one host, beside PyTorch, on fast and slow links.

Trains a network of square layers (134 M parameters by default) with every method, on
each number of GPUs, over the fast link and over sockets (peer-to-peer copies, shared
memory and InfiniBand switched off in NCCL), and with DistributedDataParallel of PyTorch
beside it, where that is installed. XLA has a kernel of its own for all-reduces of at
most 4 MB between GPUs of one process, over peer memory, which settings of NCCL do not
reach: over sockets it is switched off. Prints a table, writes gpu.json as rows come and
draws gpu.png:

  step       median milliseconds of a step, and how many times faster than `dense`
  predicted  by `efopt.wire.plan`, from the link that two all-reduces measured
  sent       bytes that leave a worker in a step, from the compiled program
  counted    the same as the loopback interface counted them, which proves the sockets
  passes     cost of compressing on one GPU, in passes over the gradient's memory
  same       whether parameters end bit-identical on all workers

    python examples/benchmarks/gpu.py --gpus 1 2 4
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 NPROC=32 \
        python examples/benchmarks/gpu.py --gpus 2 8 --layers 2 --width 64 --steps 5
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from importlib import util
from pathlib import Path

from gpu_hybrid import free_port, write

XLA_S_OWN = "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel"
SOCKETS = {
    # An own flag, which comes later, counts.
    "XLA_FLAGS": f"{XLA_S_OWN}=false {os.environ.get('XLA_FLAGS', '')}",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
}
LINKS = {"fast": {}, "sockets": SOCKETS}
COMMON = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "NCCL_NVLS_ENABLE": "0"}
JAX = (
    "dense",
    "sign all_gather",
    "sign two_phase",
    "majority_vote",
    "int8 two_phase",
    "random_block 1 %",
    "power_sgd 4",
)
TORCH = ("torch dense", "torch bf16", "torch power_sgd 4")
HERE = Path(__file__).parent
STYLE = HERE.parent / "pictures.mplstyle"


def child(script, settings, link, limit, *arguments):
    """Runs one of the two training scripts; yields what it has found so far.

    It is ended where it is silent for ``limit`` seconds.
    """
    command = [sys.executable, str(HERE / script), json.dumps(settings), *arguments]
    environment = os.environ | COMMON | LINKS[link]
    # In a group of its own, with the processes that it may start.
    p = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    )

    def stop():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(p.pid, signal.SIGKILL)

    def watched():
        late = threading.Timer(limit, stop)
        late.start()
        return late

    late = watched()
    try:
        for line in p.stdout or ():
            if line.startswith("{"):
                late.cancel()
                yield json.loads(line)
                late = watched()
        if p.wait():
            print(f"{script} failed on {link}", file=sys.stderr)
    finally:
        late.cancel()
        stop()
        p.wait()
        if p.stdout:
            p.stdout.close()


def table(run):
    """One run as lines of text."""
    line = "{:18} {:>9} {:>8} {:>18} {:>14} {:>14} {:>7} {:>5}".format
    heads = ("method", "step ms", "speedup", "predicted ms", "sent", "counted")
    heads += ("passes", "same")
    lines = [line(*heads)]
    rows = run["methods"]
    for name, row in rows.items():
        cells = [name, f"{1e3 * row['step_seconds']:.2f}", "", "", "", "", "", ""]
        if "dense" in rows:
            ratio = rows["dense"]["step_seconds"] / row["step_seconds"]
            cells[2] = f"{ratio:.2f}x"
        if "predicted_seconds" in row:
            off = row["predicted_seconds"] / row["step_seconds"] - 1
            cells[3] = f"{1e3 * row['predicted_seconds']:.2f} {off:+.0%}"
            cells[4] = f"{row['bytes_sent']:,.0f}"
            cells[6] = f"{row['compress_passes']:.1f}"
            cells[7] = "yes" if row["identical"] else "NO"
        if row.get("bytes_counted") is not None:
            cells[5] = f"{row['bytes_counted']:,.0f}"
        lines.append(line(*cells))
    return "\n".join(lines)


def draw(runs, title, path):
    """A row of panels for each link, a column for each number of GPUs."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    plt.style.use(STYLE)
    links = list(dict.fromkeys(run["link"] for run in runs))
    counts = sorted({run["gpus"] for run in runs})
    figure, panels = plt.subplots(
        len(links),
        len(counts),
        figsize=(1.5 + 2.9 * len(counts), 0.8 + 2.9 * len(links)),
        sharex="row",
        sharey=True,
        squeeze=False,
    )
    for run in runs:
        axes = panels[links.index(run["link"]), counts.index(run["gpus"])]
        names = list(run["methods"])
        times = [1e3 * row["step_seconds"] for row in run["methods"].values()]
        colours = ["C1" if name.startswith("torch") else "C0" for name in names]
        axes.barh(names, times, color=colours)
        plans = [row.get("predicted_seconds", 0) for row in run["methods"].values()]
        points = [(1e3 * p, name) for p, name in zip(plans, names, strict=True) if p]
        axes.plot(*zip(*points, strict=True), "kd", markersize=4, label="predicted")
        for name, measured, plan in zip(names, times, plans, strict=True):
            end = max(measured, 1e3 * plan)
            axes.text(1.15 * end, name, f"{measured:.1f}", va="center")
        most = max(*times, *(1e3 * p for p in plans))
        axes.set(title=f"{run['gpus']} GPUs, {run['link']}", xscale="log")
        axes.set(xlabel="milliseconds of a step")
        axes.set_xlim(min(times) / 2, max(4 * most, axes.get_xlim()[1]))
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    panels[0, 0].invert_yaxis()
    marks = panels[0, 0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside lower right")
    figure.suptitle(title)
    figure.savefig(path)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[2], help="numbers of GPUs, default: 2")
    add("--links", nargs="+", choices=LINKS, default=[*LINKS])
    add("--methods", nargs="+", choices=JAX + TORCH, default=[*JAX, *TORCH])
    add("--layers", type=int, default=8)
    add("--width", type=int, default=4096)
    add("--batch", type=int, default=256, help="rows of all workers together")
    add("--steps", type=int, default=20, help="that are timed, default: 20")
    add("--limit", type=int, default=150, help="seconds of silence, default: 150")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    args = parser.parse_args()
    if min(*args.gpus, args.layers, args.width, args.steps, 1) < 1:
        parser.error("numbers must be at least 1")
    if any(args.batch % n for n in args.gpus):
        parser.error(f"--batch {args.batch} must divide by every number of GPUs")
    if not args.output.is_dir():
        parser.error(f"--output: no folder {args.output}")

    # Whoever ends this ends the processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    runs = []
    settings = {k: getattr(args, k) for k in ("layers", "width", "batch", "steps")}
    save = lambda runs: write(args.output / "gpu.json", {**settings, "runs": runs})  # noqa: E731
    for gpus in args.gpus:
        for link in args.links if gpus > 1 else args.links[:1]:
            asked = {**settings, "gpus": gpus}
            asked["methods"] = [m for m in args.methods if m in JAX]
            run = {}
            for found in child("gpu_jax.py", asked, link, args.limit):
                run = {**found, "gpus": gpus, "link": link}
                save([*runs, run])
            if not run:  # nor the link's rate
                continue
            own, device = run["methods"], run["device"]
            asked["methods"] = [m for m in args.methods if m in TORCH]
            if asked["methods"] and util.find_spec("torch"):
                port = str(free_port())
                for peer in child("gpu_torch.py", asked, link, args.limit, port):
                    run["methods"] = own | peer["methods"]
                    run["device"] = f"{device}, {peer['device']}"
                    save([*runs, run])
            if not run["methods"]:
                continue
            runs.append(run)
            rate = run["bandwidth"] / 1e9
            print(f"\n{run['device']}, {link}: {rate:.1f} Gbit/s measured")
            print(table(run), flush=True)
    if not runs:
        sys.exit("gpu.py: nothing could be measured")
    if util.find_spec("matplotlib"):
        draw(runs, runs[-1]["device"], args.output / "gpu.png")


if __name__ == "__main__":
    main()
