"""Loss against seconds on two GPUs that sockets join: what decides whether to compress.

Trains the decoder of `gpu_hybrid.py` (101 M parameters by default) on the bytes of
Python's own library, one process a GPU, NCCL over sockets. Each method trains, computes
and exchanges against the clock, and now and then the loss of text that is not trained
on is taken, while the clock stands:

  dense f32, bf16       AdamW on the mean of gradients
  sign, int8 two_phase  with error feedback; signs with each worker's own momentum
                        in front and Adam's second moment behind
  power_sgd             low rank with error feedback, then AdamW
  conef block 10 %      a random tenth, the residual in eight bits, then AdamW
  dion                  orthonormalised momentum of low rank, which is what travels
  ef21 + muon           compressed changes of the momentum, orthonormalised behind
  sign outer 30         signs of what 30 steps of AdamW have moved, averaged
  streaming             the same in four fragments, each taken a step late and blended
  torch f32, bf16, power_sgd
                        DistributedDataParallel and its hooks: the same network, AdamW
                        and order of the text (`curve_torch.py`), where it is installed

Rates are constant behind a warm-up, so that a run may end at any time. A seed draws the
parameters and the text's order. `dense f32` trains for `--seconds`, and where it ends
is the common loss; the others end there too, but not before `--least` seconds, or are
given up after 1.5 times as long. The table has the seconds to the common loss as
multiples: how many times sooner than `dense f32`, and than the best of PyTorch.

Rates are found beforehand by `--search STEPS`: every method, at seed 0, with rates a
factor of two apart around `--lr` and `--matrix-lr`, further outward while the last is
the best. That asks for steps and not for seconds, so `--one-host` may have it over the
fast link. What feeds AdamW shares what `dense f32` found: dense ones, 8 bits, PowerSGD,
ConEF, local steps and PyTorch's.

Found results are kept in rates.json and curve.json, and the same command goes on where
it ended: give `--budget` what a call may take. `--join` adds what other calls found.

    python examples/benchmarks/curve.py --search 180 --one-host
    python examples/benchmarks/curve.py --rates rates.json --budget 560
    python examples/benchmarks/curve.py --gpus 1 --search 30  # a small trial
    python examples/benchmarks/curve.py --cpu --layers 1 --width 64 --heads 2 \
        --length 32 --seconds 3 --least 1 --every 10 --warm-up 10
"""

import argparse
import json
import shlex
import signal
import statistics
import sys
import sysconfig
import time
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_hybrid import STYLE, Process, launch_all, serve, write

HERE = Path(__file__).parent
TRAIN_TORCH = HERE / "curve_torch.py"
SCRIPT = "examples/benchmarks/curve.py"
EVERY = 30  # steps from one meeting to the next
METHODS = (
    "dense f32",
    "dense bf16",
    "sign two_phase",
    "int8 two_phase",
    "power_sgd",
    "conef block 10 %",
    "dion",
    "ef21 + muon",
    "sign outer 30",
    "streaming",
)
TORCH = ("torch f32", "torch bf16", "torch power_sgd")
OWN = ("dense f32", "sign two_phase", "dion", "ef21 + muon")  # have rates of their own


# ------------------------------------------------------------------------ the text


def library(limit=1 << 24):
    """The bytes of Python's own library, to train on and to test with."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p for p in folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
    paths = [p for p in paths if "site-packages" not in p.parts]
    parts, size = [], 0
    for path in paths:
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size > limit:
            break
    held = parts[::20]  # every twentieth file
    rest = [part for i, part in enumerate(parts) if i % 20]
    return tuple(np.frombuffer(b"".join(p), np.uint8) for p in (rest, held))


class Text:
    """Windows of the text: the same for every method, by seed and step."""

    def __init__(self, settings):
        self.train, self.test = library(settings["text"])
        self.length, self.seed = settings["length"], settings["seed"]
        self.rows = settings["gpus"] * settings["batch"]

    def windows(self, text, starts):
        return text[starts[:, None] + np.arange(self.length + 1)].astype(np.int32)

    def batch(self, step):
        """Of all workers: the rows of a worker are next to each other."""
        draws = np.random.default_rng([self.seed, step])
        starts = draws.integers(len(self.train) - self.length - 1, size=self.rows)
        return self.windows(self.train, starts)

    def unseen(self, batches):
        """The same windows at every test."""
        draws = np.random.default_rng(0)
        size = batches, self.rows
        starts = draws.integers(len(self.test) - self.length - 1, size=size)
        return [self.windows(self.test, s) for s in starts]


def curve(settings, step, tested, latest):
    """Losses by seconds: `step(t)` trains, `tested()` is a loss, `latest` agrees.

    The clock runs while steps are taken, and only then. Workers end together: the time
    that counts is that of the slowest.
    """
    target, seconds = settings.get("target"), settings["seconds"]
    step(0)()  # compiled, and connections made
    points, clock, t = [(1, 0.0, tested())], 0.0, 1

    def done():
        if target is None:
            return clock >= seconds
        there = reached(points, target) is not None and clock >= settings["least"]
        return there or clock >= 1.5 * seconds

    while not done():
        start = time.perf_counter()
        for _ in range(settings["every"]):
            wait = step(t)
            t += 1
        wait()
        clock = latest(clock + time.perf_counter() - start)
        points.append((t, clock, tested()))
    return points


def reached(points, target):
    """Seconds until the loss is at most the target, on a line between two tests."""
    for (_, before, high), (_, after, low) in zip(points, points[1:], strict=False):
        if low <= target:
            share = (high - target) / (high - low) if high > low else 0.0
            return before + min(1.0, max(0.0, share)) * (after - before)
    return None


def search(loss_at):
    """Losses by rate, as multiples: outward from one, while the last is the best."""
    tried = {}

    def take(factor):
        loss = loss_at(factor)
        tried[factor] = loss if loss < 99 else 99.0  # nor NaN

    for factor in (1.0, 2.0, 0.5):
        take(factor)
    for _ in range(2):
        best = min(tried, key=lambda factor: tried[factor])
        if best == max(tried):
            take(2 * best)
        elif best == min(tried):
            take(best / 2)
    return tried


# ------------------------------------------------------------------------ with JAX


class Held(NamedTuple):
    """A rate that the state holds: another one is no other program."""

    count: Any
    held_rate: Any


def at_rate(state, factor):
    """Another rate for all that a state holds."""
    import jax

    def other(path, x):
        held = getattr(path[-1], "name", None) == "held_rate"
        return x * np.float32(factor) if held else x

    return jax.tree_util.tree_map_with_path(other, state)


def transformation(method, settings):
    """A method's transformation."""
    import jax
    import jax.numpy as jnp
    import optax

    import efopt

    def held(rate):
        def init(params):
            return Held(jnp.zeros([], jnp.int32), jnp.full([], rate, jnp.float32))

        def update(updates, state, params=None):
            warm = jnp.minimum(1.0, state.count / settings["warm_up"])
            scale = warm * state.held_rate
            updates = jax.tree.map(lambda u: scale * u, updates)
            return updates, state._replace(count=state.count + 1)

        return optax.GradientTransformation(init, update)

    def hidden(params):
        """Matrices that are neither the embedding nor places."""
        outer = ("embed", "place")
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x.ndim == 2 and path[0].key not in outer, params
        )

    def adamw_of(b1):
        adamw = optax.adamw(1.0, b1=b1, b2=0.95, weight_decay=0.1)
        return optax.chain(adamw, held(settings["lr"]))

    adamw = adamw_of(0.9)
    share = settings["lr"] / settings["matrix_lr"]
    at = {"axis_name": "dcn"}
    sign, two = efopt.scaled_sign(1024), {"exchange": "two_phase"}
    if method.startswith("dense"):
        half = method == "dense bf16"
        cast = efopt.compressors.cast(jnp.bfloat16) if half else None
        mean = efopt.compress(cast or efopt.compressors.identity(), **at)
        return optax.chain(mean, adamw)
    if method == "sign two_phase":
        return optax.chain(
            efopt.per_worker(optax.ema(0.9), **at),
            efopt.error_feedback(sign, **at, **two),
            adamw_of(0.0),
        )
    if method == "int8 two_phase":
        return optax.chain(efopt.error_feedback(efopt.quantize(8), **at, **two), adamw)
    if method == "conef block 10 %":
        return optax.chain(
            efopt.contractive_error_feedback(
                efopt.random_block(fraction=0.1),
                memory=efopt.quantize(8, stochastic=True),
                **at,
            ),
            adamw,
        )
    rank = settings["rank"]
    if method == "power_sgd":
        return optax.chain(efopt.error_feedback(efopt.power_sgd(rank), **at), adamw)

    if method == "dion":
        dion = efopt.optimizers.dion(
            1.0,
            rank=rank,
            fallback=optax.adamw(share, b1=0.9, b2=0.95, weight_decay=0.1),
            matrices=hidden,
            weight_decay=0.1,
            **at,
        )
        return optax.chain(dion, held(settings["matrix_lr"]))
    if method == "ef21 + muon":
        top = efopt.top_k(fraction=0.05, block_size=1024)
        return optax.chain(
            efopt.feedback.ef21(top, beta=0.95, start=1, **at, **two),
            optax.contrib.muon(
                1.0,
                beta=0.0,
                nesterov=False,
                weight_decay=0.1,
                adam_b1=0.0,
                adam_b2=0.95,
                adam_learning_rate=share,
                muon_weight_dimension_numbers=lambda params: jax.tree.map(
                    lambda yes: optax.contrib.MuonDimensionNumbers() if yes else None,
                    hidden(params),
                ),
            ),
            held(settings["matrix_lr"]),
        )
    fading = efopt.feedback.damped_error_feedback(
        efopt.scaled_sign(4096), alpha=0.95, beta=0.95, **at, **two
    )
    streams = {"fragments": 4, "delay": 1, "alpha": 0.5}
    return efopt.local_steps(
        adamw,
        optax.chain(fading, optax.scale(-1.0)),
        every=EVERY,
        **at,
        **(streams if method == "streaming" else {}),
    )


class Trained(Process):
    """One of the processes, with one GPU."""

    def __init__(self, index, settings):
        import jax

        super().__init__(index, settings)
        self.measure = jax.jit(self.loss_fn(self.model()))
        self.text, self.over = Text(settings), self.placed(("dcn", "fsdp"))

    def compile(self, method):
        """Step, first state by a key, parameters, seconds taken; or what went wrong."""
        import jax
        import jax.numpy as jnp

        start = time.perf_counter()
        try:
            tx = transformation(method, self.settings)
            step, state, compiled, shapes, _ = self.training(tx, "dcn", True)
            rows = (self.text.rows, self.text.length + 1)
            tokens = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=self.over)
            step = step.lower(state, tokens).compile()
            begin = compiled(jax.random.key(0))
        except Exception as error:  # the others may work
            return error
        size = sum(x.size for x in jax.tree.leaves(shapes))
        return step, begin, size, time.perf_counter() - start

    def train(self, method):
        """Trains by a method, and tells its curve, or its losses by rates."""
        import jax
        from jax.experimental import multihost_utils

        import efopt

        settings, text = self.settings, self.text
        if method not in self.ready:
            self.prepare(method)
        ready = self.ready.pop(method)
        if isinstance(ready, Exception):
            raise ready
        step, begin, size, compile_seconds = ready

        def first(factor):
            return at_rate(begin(jax.random.key(settings["seed"])), factor)

        def placed(rows):
            return jax.make_array_from_callback(
                rows.shape, self.over, lambda i: rows[i]
            )

        unseen = [placed(rows) for rows in text.unseen(settings["tests"])]
        own = method if method in OWN else "dense f32"
        factor = settings["rates"].get(own, 1.0)
        cell = [first(factor)]
        sent = efopt.wire.measure(step, mesh=self.mesh).bytes_over("dcn").link

        def once(t):
            cell[0], loss = step(cell[0], placed(text.batch(t)))
            return loss.block_until_ready

        def tested():
            losses = [self.measure(cell[0]["params"], rows) for rows in unseen]
            return float(np.mean([float(loss) for loss in losses]))

        def latest(clock):
            return float(multihost_utils.process_allgather(np.float64(clock)).max())

        def loss_at(factor):
            cell[0] = None
            cell[0] = first(factor)
            for t in range(settings["search"]):
                once(t)
            return tested()

        if settings["search"]:
            found = {"tried": search(loss_at)}
        else:
            points = curve(settings, once, tested, latest)
            if method == "dense f32":
                settings["target"] = points[-1][-1]
            found = {"points": points, "factor": factor, "sent": sent}
        needs = step.memory_analysis()
        return found | {
            "compile_seconds": compile_seconds,
            "memory": needs.argument_size_in_bytes + needs.temp_size_in_bytes,
            "parameters": size,
            "device": jax.local_devices()[0].device_kind,
            "version": f"jax {jax.__version__}",
        }


# ------------------------------------------------------------------------ output


def summary(runs):
    """By method: the last loss, milliseconds of a step, and seconds to the target.

    The target of a seed is what `dense f32` ends at.
    """
    out = {}
    for seed, rows in runs.items():
        if "dense f32" not in rows:
            continue
        target = rows["dense f32"]["points"][-1][-1]
        for name, row in rows.items():
            steps, clock, loss = row["points"][-1]
            about = {
                "seed": seed,
                "target": target,
                "loss": loss,
                "step_seconds": clock / max(1, steps - 1),
                "seconds": reached(row["points"], target),
                "sent": row.get("sent"),
            }
            out.setdefault(name, []).append(about)
    return out


def sooner(rows, than):
    """How many times sooner than another method, by seed; None where one is not."""
    pairs = [
        (a["seconds"], b["seconds"])
        for a in rows
        for b in than
        if a["seed"] == b["seed"]
    ]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    return [b / max(a, 1e-9) for a, b in pairs]


def print_table(found):
    rows = summary(found["runs"])
    line = "{:16} {:>6} {:>9} {:>9} {:>14} {:>11} {:>18} {:>18}".format
    heads = "seeds", "loss", "step ms", "sent", "seconds"
    print("\n" + line("method", *heads, "sooner than dense", "than PyTorch"))
    torches = [n for n in TORCH if n in rows]
    timed = {n: [r["seconds"] for r in rows[n]] for n in torches}
    whole = [n for n in torches if None not in timed[n]]
    best = min(whole, key=lambda n: statistics.mean(timed[n]), default=None)
    for name, mine in rows.items():
        times = [r["seconds"] for r in mine]
        cells = ["never" if None in times else f"{statistics.mean(times):.1f}"]
        for other in ("dense f32", best):
            ratios = sooner(mine, rows[other]) if other else None
            cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-")
        loss = statistics.mean(r["loss"] for r in mine)
        ms = 1e3 * statistics.mean(r["step_seconds"] for r in mine)
        sent = f"{mine[0]['sent']:,.0f}" if mine[0]["sent"] is not None else "-"
        print(line(name, len(mine), f"{loss:.4f}", f"{ms:.1f}", sent, *cells))
    print("sent: of a device in a step with a meeting; PyTorch's best:", best)


def draw(found, path):
    """Loss by seconds, a line a method, a thin one a seed."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    plt.style.use(STYLE)
    names = [
        n for n in (*METHODS, *TORCH) if any(n in r for r in found["runs"].values())
    ]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    for name in names:
        style = {"color": colours[name], "ls": "--" if name in TORCH else "-"}
        label = name
        for rows in found["runs"].values():
            if name not in rows:
                continue
            points = [p for p in rows[name]["points"] if p[1] > 0]
            axes.plot(
                [p[1] for p in points], [p[2] for p in points], label=label, **style
            )
            label = None
    axes.set(xscale="log", xlabel="seconds of training", ylabel="loss of unseen text")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(f"{found['machine']}, {found['parameters'] / 1e6:.3g} M parameters")
    figure.legend(loc="outside right upper")
    figure.savefig(path)
    plt.close(figure)


def print_rates(tried):
    for name, each in tried.items():
        losses = {float(f): loss for f, loss in each.items()}
        best = min(losses, key=lambda factor: losses[factor])
        told = ", ".join(f"x {f:g}: {losses[f]:.4f}" for f in sorted(losses))
        print(f"{name:16} {told}; best: x {best:g}")


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    every = [*METHODS, *(TORCH if util.find_spec("torch") else ())]
    add("--methods", nargs="+", choices=every, default=every, metavar="METHOD")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    add("--seconds", type=float, default=40, help="of dense f32, default: 40")
    add("--least", type=float, default=10, help="seconds of others, default: 10")
    add("--search", type=int, default=0, help="steps, to find rates; see above")
    add("--rates", type=Path, nargs="+", default=[], help="what --search has written")
    add("--join", type=Path, nargs="+", default=[], help="curve.json of other calls")
    add("--budget", type=float, default=3600, help="seconds in all, default: 3600")
    add("--gpus", type=int, default=2, help="1 or an even number, default: 2")
    add("--one-host", action="store_true", help="over the fast link instead")
    add("--cpu", action="store_true", help="processes of one CPU device each")
    add("--jobs", type=int, default=1, help="programs compiled at a time, default: 1")
    add("--layers", type=int, default=8)
    add("--width", type=int, default=1024)
    add("--heads", type=int, default=8)
    add("--length", type=int, default=256, help="of a sequence, default: 256")
    add("--batch", type=int, default=16, help="sequences of a device, default: 16")
    add("--every", type=int, default=30, help="steps between tests, default: 30")
    add("--tests", type=int, default=4, help="batches of a test, default: 4")
    add("--lr", type=float, default=5e-4, help="of AdamW, default: 5e-4")
    add("--matrix-lr", type=float, default=0.01, help="of Dion and Muon, default: 0.01")
    add("--rank", type=int, default=32, help="of PowerSGD and Dion, default: 32")
    add("--warm-up", type=int, default=60, help="steps, default: 60")
    add("--text", type=int, default=1 << 24, help="bytes of it, default: 16 MiB")
    add("--limit", type=int, default=150, help="seconds for a method, default: 150")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    args = parser.parse_args()
    if args.gpus < 1 or args.gpus > 1 and args.gpus % 2:
        parser.error("--gpus must be 1 or even")
    if args.every < 1 or EVERY % args.every:
        parser.error(f"--every must divide {EVERY}: common parameters meet then")
    if args.search % EVERY:
        parser.error(f"--search must be a multiple of {EVERY}")
    if args.width % args.heads:
        parser.error("--heads must divide --width")
    if not args.output.is_dir():
        parser.error(f"argument --output: no folder: {args.output}")
    return args


class Found:
    """What was found, in a file: earlier calls' too."""

    def __init__(self, args, name, rows):
        self.args, self.path = args, args.output / name
        command = shlex.join(["python", SCRIPT, *sys.argv[1:]])
        about = {k: v for k, v in vars(args).items() if isinstance(v, int | float)}
        for key in ("budget", "limit", "jobs"):
            about.pop(key)
        head = {"command": command, "machine": None, "settings": about}
        self.all, self.rows = {**head, rows: {}}, rows
        for path in (self.path, *(args.join if rows == "runs" else ())):
            if path.exists():
                self.add(path)

    def add(self, path):
        earlier = json.loads(path.read_text())
        if earlier["settings"] != self.all["settings"]:
            sys.exit(f"curve.py: {path} is of other settings: choose another folder")
        for name, found in earlier.pop(self.rows).items():
            self.all[self.rows].setdefault(name, {}).update(found)
        self.all |= {k: v for k, v in earlier.items() if k != "command"}

    def write(self):
        write(self.path, self.all)

    def train(self, names, into, **more):
        """Trains by methods that are not there yet, and writes each as it ends."""
        ours = argparse.Namespace(**{**vars(self.args), **more}, vocabulary=256)
        for name in ("seeds", "join", "output"):
            delattr(ours, name)
        for script, known in ((__file__, METHODS), (TRAIN_TORCH, TORCH)):
            left = [n for n in names if n in known and n not in into]
            ours.target = target_of(into)
            ends = BEGAN + self.args.budget
            for name, row in launch_all(script, left, ours, ends):
                if name is None:
                    after = time.monotonic() - BEGAN
                    print(f"{after:5.0f} s: compiled {row['compiled']}", flush=True)
                    continue
                kind, version = row.pop("device"), row.pop("version")
                self.all["parameters"] = row.pop("parameters")
                if not self.all["machine"]:
                    self.all["machine"] = f"{self.args.gpus} x {kind}, {version}"
                into[name] = row
                ours.target = target_of(into)  # of processes that start anew
                self.write()
                yield name, row


BEGAN = time.monotonic()


def target_of(rows):
    return rows["dense f32"]["points"][-1][-1] if "dense f32" in rows else None


def find_rates(args):
    found = Found(args, "rates.json", "tried")
    into, names = found.all["tried"], [n for n in args.methods if n in OWN]
    for name, row in found.train(names, into, rates={}, seed=0):
        into[name] = row.pop("tried")
        found.write()
        print(name, row, flush=True)
    print_rates(into)


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.search:
        return find_rates(args)
    rates = {}
    for path in args.rates:
        tried = json.loads(path.read_text())["tried"]
        rates |= {n: float(min(t, key=lambda f: t[f])) for n, t in tried.items()}
    found = Found(args, "curve.json", "runs")
    for seed in args.seeds:
        rows = found.all["runs"].setdefault(str(seed), {})
        for name, row in found.train(args.methods, rows, rates=rates, seed=seed):
            _, clock, loss = row["points"][-1]
            print(f"seed {seed}, {name}: {loss:.4f} after {clock:.1f} s", flush=True)
    if not any(found.all["runs"].values()):
        sys.exit("curve.py: nothing could be measured")
    found.write()
    print_table(found.all)
    if util.find_spec("matplotlib"):
        draw(found.all, args.output / "curve.png")
    missing = [
        f"{name}, seed {seed}"
        for seed in args.seeds
        for name in args.methods
        if name not in found.all["runs"][str(seed)]
    ]
    if missing:
        print("missing, for the next call:", "; ".join(missing))
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        serve(Trained(int(sys.argv[2]), json.loads(sys.argv[3])))
    else:
        main()
