"""The methods since the founding papers on one task, beside what they are made of.

A network of 26,122 parameters on scikit-learn's digits (which come with the package),
four workers with 32 images a step each, a quarter of the training images being each
one's own. Every method trains from three seeds at every rate of its grid, under one
schedule, and is shown at the rate that is best for it in the mean. Prints and stores

  loss      over all training images at the end: mean, least and largest of the seeds
  test      share of the test images that are recognised, mean of the seeds
  bytes     that leave a worker in a step, from the compiled program; where steps
            differ, the mean over the run
  memory    of a worker for the optimizer's state, in copies of the parameters
  step      time of a step in that of dense SGD, measured in turns in one process, the
            median of the turns: four virtual devices that share the machine's cores,
            where sending costs nothing and computing does

and draws the first against the third. Rows that are stored already, of methods that
are not named, are kept.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Before jax is imported: see examples/train_digits.py. And LAPACK, which factorises
# Dion's small matrices, on one thread a device: their pools of threads wait for each
# other, and a step takes a hundred times as long.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import efopt

HERE = Path(__file__).parent
STYLE = HERE.parent / "pictures.mplstyle"
WORKERS, BATCH, WIDTH, SEEDS = 4, 32, 128, 3
AXIS = "data"
# Of one-bit momentum: at 1e-8 a bit over the variance of a unit that is hardly ever
# active throws the network away.
EPS = 1e-4


class Method(NamedTuple):
    """One row.

    Attributes:
      family: What it is compared with.
      make: The transformation, of the schedule and the number of steps.
      rates: The grid.
      shares: The share of steps in which a collective of a kind is run; 1 for others.
    """

    family: str
    make: Callable[[Any, int], optax.GradientTransformation]
    rates: tuple[float, ...]
    shares: Callable[[int], dict[str, float]] = lambda steps: {}


def dense(optimizer):
    identity = efopt.compressors.identity()
    return optax.chain(efopt.compress(identity, axis_name=AXIS), optimizer)


def behind_momentum(feedback, schedule):
    momentum = efopt.per_worker(optax.trace(0.9), axis_name=AXIS)
    return optax.chain(momentum, feedback, optax.sgd(schedule))


def tops(fraction=0.05):
    return efopt.top_k(fraction=fraction)


def first_dense(*others):
    """Of a method whose first step is dense."""

    def shares(steps):
        return {"all-reduce": 1 / steps} | dict.fromkeys(others, 1 - 1 / steps)

    return shares


def one_bit_shares(steps):
    warm = steps // 5
    sent = 1 - warm / steps
    return {"all-reduce": warm / steps, "all-to-all": sent, "all-gather": sent}


def refreshes(steps):
    """The steps at which 0/1 Adam below averages dense."""
    out, step = 0, 0
    for j in range(steps):
        step += 2 ** (j // 8)
        out += step <= steps // 2
    return out


def zero_one_shares(longest):
    def shares(steps):
        dense, freeze, every = refreshes(steps), steps // 2, steps // 8
        met = freeze - dense
        for local in range(steps - freeze):
            met += (local + 1) % min(longest, 2 ** (local // every)) == 0
        rare = met / steps
        return {"all-reduce": dense / steps, "all-to-all": rare, "all-gather": rare}

    return shares


def zero_one(longest):
    def make(schedule, steps):
        rare = {"longest": longest, "doubling": steps // 8} if longest > 1 else {}
        return efopt.optimizers.zero_one_adam(
            schedule, freeze=steps // 2, refresh=8, eps=EPS, axis_name=AXIS, **rare
        )

    return make


def dion(schedule, steps):
    return efopt.optimizers.dion(
        schedule,
        rank=8,
        matrices={"b": [False] * 3, "w": [True, True, False]},
        fallback=optax.adam(lambda t: 0.1 * schedule(t)),
        axis_name=AXIS,
    )


def muon(schedule, **options):
    return optax.contrib.muon(schedule, **options)


def ef21_muon(schedule, steps):
    feedback = efopt.feedback.ef21(tops(), beta=0.9, start=1, axis_name=AXIS)
    return optax.chain(feedback, muon(schedule, beta=0.0, nesterov=False))


LION = (0.0003, 0.001, 0.003, 0.01)
ADAM = (0.001, 0.003, 0.01, 0.03)
SGD = (0.03, 0.1, 0.3, 1.0)
MUON = (0.01, 0.03, 0.1, 0.3)
METHODS = {
    "SGD with momentum, dense": Method(
        "SGD", lambda s, n: dense(optax.sgd(s, momentum=0.9)), SGD
    ),
    "error feedback, top 5 %": Method(
        "SGD",
        lambda s, n: behind_momentum(efopt.error_feedback(tops(), axis_name=AXIS), s),
        SGD,
    ),
    "error feedback, signs": Method(
        "SGD", lambda s, n: efopt.dist_ef_sgd(s, momentum=0.9, axis_name=AXIS), SGD
    ),
    "EF21, top 5 %": Method(
        "SGD",
        lambda s, n: behind_momentum(
            efopt.feedback.ef21(tops(), start=1, axis_name=AXIS), s
        ),
        SGD,
        first_dense("all-gather"),
    ),
    "EF21-SGDM, top 5 %": Method(
        "SGD",
        lambda s, n: optax.chain(
            efopt.feedback.ef21(tops(), beta=0.9, start=1, axis_name=AXIS),
            optax.sgd(s),
        ),
        (0.3, 1.0, 3.0, 10.0),
        first_dense("all-gather"),
    ),
    "EControl, top 5 %": Method(
        "SGD",
        lambda s, n: behind_momentum(
            efopt.feedback.econtrol(tops(), gain=0.1, learning_rate=s, axis_name=AXIS),
            s,
        ),
        SGD,
    ),
    "error feedback, ARC-Top-K 5 %": Method(
        "SGD",
        lambda s, n: behind_momentum(
            efopt.error_feedback(
                efopt.compressors.arc_top_k(fraction=0.05), axis_name=AXIS
            ),
            s,
        ),
        SGD,
    ),
    "LoCo, 4 bits": Method(
        "SGD",
        lambda s, n: behind_momentum(efopt.feedback.loco(axis_name=AXIS), s),
        SGD,
    ),
    "Adam, dense": Method("Adam", lambda s, n: dense(optax.adam(s)), ADAM),
    "Adam behind error feedback, signs": Method(
        "Adam",
        lambda s, n: optax.chain(
            efopt.error_feedback(
                efopt.scaled_sign(1024), axis_name=AXIS, exchange="two_phase"
            ),
            optax.adam(s),
        ),
        ADAM,
    ),
    "LoCo, 4 bits, and Adam": Method(
        "Adam",
        lambda s, n: optax.chain(efopt.feedback.loco(axis_name=AXIS), optax.adam(s)),
        ADAM,
    ),
    "1-bit Adam": Method(
        "Adam",
        lambda s, n: efopt.optimizers.one_bit_adam(
            s, warmup=n // 5, eps=EPS, axis_name=AXIS
        ),
        ADAM,
        one_bit_shares,
    ),
    "0/1 Adam": Method("Adam", zero_one(1), ADAM, zero_one_shares(1)),
    "0/1 Adam, local steps": Method("Adam", zero_one(4), ADAM, zero_one_shares(4)),
    "Lion, dense": Method("signs", lambda s, n: dense(optax.lion(s)), LION),
    "Distributed Lion, votes": Method(
        "signs",
        lambda s, n: efopt.optimizers.distributed_lion(s, axis_name=AXIS),
        LION,
    ),
    "Lion Cub, 4 bits": Method(
        "signs",
        lambda s, n: efopt.optimizers.distributed_lion(
            s, compressor=efopt.quantize(4), average_momentum=10, axis_name=AXIS
        ),
        LION,
        lambda n: {"all-reduce": 1 / 10},
    ),
    "DeMo, 4 of 64": Method(
        "signs",
        lambda s, n: efopt.optimizers.demo(s, decay=0.95, k=4, tile=8, axis_name=AXIS),
        LION,
    ),
    "DeMo, mean of senders": Method(
        "signs",
        lambda s, n: efopt.optimizers.demo(
            s,
            decay=0.95,
            k=4,
            tile=8,
            axis_name=AXIS,
            exchange=efopt.exchanges.all_gather(senders=True),
        ),
        LION,
    ),
    "Muon, dense": Method("matrices", lambda s, n: dense(muon(s)), MUON),
    "EF21-Muon, top 5 %": Method(
        "matrices", ef21_muon, MUON, first_dense("all-gather")
    ),
    "Dion, rank 8": Method("matrices", dion, MUON),
}


# ------------------------------------------------------------------------- the task


def images():
    """Training and test images and labels: floats ``(n, 64)`` and ints."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x = (found.data / 16).astype(np.float32)[order]
    y = found.target.astype(np.int32)[order]
    return (x[:1436], y[:1436]), (x[1436:], y[1436:])


def network(seed):
    """He's start for three layers."""
    rng, sizes = np.random.default_rng(seed), (64, WIDTH, WIDTH, 10)
    pairs = list(zip(sizes, sizes[1:], strict=False))
    draw = lambda i, o: rng.standard_normal((i, o)) * np.sqrt(2 / i)  # noqa: E731
    return {
        "b": [np.zeros(o, np.float32) for _, o in pairs],
        "w": [draw(i, o).astype(np.float32) for i, o in pairs],
    }


def logits(params, x):
    *hidden, last = zip(params["w"], params["b"], strict=True)
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ last[0] + last[1]


def loss_fn(params, batch):
    x, y = batch
    each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
    return each.mean()


def batches(seed, steps, size):
    """The images of every step and worker, ``(steps, workers, batch)``: its own."""
    rng, own = np.random.default_rng(1000 + seed), size // WORKERS
    drawn = rng.integers(own, size=(steps, WORKERS, BATCH))
    return drawn + own * np.arange(WORKERS)[:, None]


def one_step(tx, params, state, batch):
    """What each worker does, mapped over the axis."""
    own = efopt.local_params(params, AXIS, state)
    updates, state = tx.update(jax.grad(loss_fn)(own, batch), state, params)
    return optax.apply_updates(params, updates), state


def trainer(method, steps, known):
    """Trains at a rate from a start on drawn images; returns the parameters."""
    shape = optax.warmup_cosine_decay_schedule(0.1, 1.0, steps // 10, steps, 0.0)

    @jax.jit
    def train(rate, params, drawn):
        tx = method.make(lambda t: rate * shape(t), steps)

        def step(carry, chosen):
            batch = known[0][chosen], known[1][chosen]
            mapped = jax.vmap(lambda p, s, b: one_step(tx, p, s, b), axis_name=AXIS)
            return mapped(*carry, batch), None

        carry = efopt.stack_workers((params, tx.init(params)), WORKERS)
        (params, _), _ = jax.lax.scan(step, carry, drawn)
        return jax.tree.map(lambda x: x[0], params)

    return train


def trained(method, steps):
    """Losses and shares recognised of every seed at the best rate, and that rate."""
    known, unknown = images()
    known = jax.tree.map(jnp.asarray, known)
    train, found = trainer(method, steps, known), []

    @jax.jit
    def judge(params):
        guess = logits(params, unknown[0]).argmax(-1)
        return loss_fn(params, known), (guess == unknown[1]).mean()

    for rate in method.rates:
        ends = []
        for seed in range(SEEDS):
            drawn = batches(seed, steps, len(known[1]))
            loss, share = judge(train(np.float32(rate), network(seed), drawn))
            ends.append((float(loss), float(share)))
        mean = statistics.mean(loss for loss, _ in ends)
        found.append((mean if np.isfinite(mean) else np.inf, rate, ends))
    mean, rate, ends = min(found)
    return {
        "rate": rate,
        "grid": list(method.rates),
        "losses": [loss for loss, _ in ends],
        "recognised": [share for _, share in ends],
    }


# ------------------------------------------------------------- the compiled program


class Program(NamedTuple):
    """A step on a mesh, compiled; its state, a batch, and the transformation."""

    step: Any
    carry: Any
    batch: Any
    tx: Any


def compiled(method, steps):
    """The step of all workers on a device each."""
    mesh = jax.make_mesh((WORKERS,), (AXIS,), devices=jax.devices()[:WORKERS])
    tx, params = method.make(lambda t: 1e-3 + 0 * t, steps), network(0)
    carry = efopt.distribute((params, tx.init(params)), mesh)
    (x, y), _ = images()
    batch = jax.device_put(
        (x[: WORKERS * BATCH], y[: WORKERS * BATCH]),
        jax.NamedSharding(mesh, jax.P(AXIS)),
    )
    specs = efopt.partition_specs(carry)
    fn = jax.shard_map(
        lambda carry, batch: one_step(tx, *carry, batch),
        mesh=mesh,
        in_specs=(specs, jax.P(AXIS)),
        out_specs=specs,
    )
    return Program(jax.jit(fn).lower(carry, batch).compile(), carry, batch, tx)


def bytes_sent(program, shares):
    """That leave a worker in a step of the run's mean."""
    found = efopt.wire.measure(program.step).collectives
    return sum(c.link_bytes * shares.get(c.operation, 1) for c in found)


def memory(program):
    report = efopt.memory_report(program.tx, network(0))
    total = report.per_worker_bytes + report.replicated_bytes
    return total / report.params_bytes


def step_times(programs, rounds, turn=5):
    """Times of a step in those of the first program: medians over rounds."""
    carries = {name: p.carry for name, p in programs.items()}
    ratios = {name: [] for name in programs}
    for i in range(rounds + 1):
        took = {}
        for name, p in programs.items():
            carry, start = carries[name], time.perf_counter()
            for _ in range(turn):
                carry = jax.block_until_ready(p.step(carry, p.batch))
            took[name], carries[name] = time.perf_counter() - start, carry
        if i:  # the first warms up
            first = next(iter(took.values()))
            for name, seconds in took.items():
                ratios[name].append(seconds / first)
    return {name: statistics.median(r) for name, r in ratios.items()}


# ------------------------------------------------------------------------- what came


def draw(rows, path):
    """Loss against bytes: a panel a family, in front of all others."""
    plt.style.use(STYLE)
    families = list(dict.fromkeys(row["family"] for row in rows.values()))
    figure, panels = plt.subplots(
        2, 2, figsize=(9, 6.4), sharex=True, sharey=True, squeeze=False
    )
    means = {name: statistics.mean(row["losses"]) for name, row in rows.items()}
    everywhere = [row["bytes"] for row in rows.values()]
    for panel, family in zip(panels.flat, families, strict=False):
        panel.scatter(everywhere, means.values(), color="0.85", zorder=1)
        some = {n: r for n, r in rows.items() if r["family"] == family}
        some = sorted(some.items(), key=lambda item: means[item[0]])
        for i, (name, row) in enumerate(some):
            x, y = row["bytes"], means[name]
            low, high = y - min(row["losses"]), max(row["losses"]) - y
            mark = panel.errorbar(x, y, [[low], [high]], fmt="o", zorder=2)
            room = len(name) < 22  # between the axis and the first marks
            left = x > 1e5 or (i % 2 if x > 1e4 else room)
            panel.annotate(
                name,
                (x, y),
                xytext=(-6 if left else 6, -2),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7,
                color=mark[0].get_color(),
            )
        panel.set(title=f"steps of {family}", xscale="log", yscale="log")
    figure.supxlabel("bytes that leave a worker in a step")
    figure.supylabel("training loss at the end")
    panels[0, 0].set_xlim(1e3, 4e5)
    figure.savefig(path)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    results = HERE / "results" / "methods.json"
    parser.add_argument("--steps", type=int, default=200, help="of every run")
    parser.add_argument("--rounds", type=int, default=15, help="of the clock")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, default=results, help="what is stored")
    default = Path("methods.png")
    parser.add_argument("--output", type=Path, default=default, help="the picture")
    parser.add_argument("--draw", action="store_true", help="only draw what is stored")
    args = parser.parse_args()
    if args.steps < 8:
        parser.error("--steps must be at least 8: the schedules are shares of it")
    if args.draw:
        draw(json.loads(args.results.read_text())["methods"], args.output)
        return
    jax.config.update("jax_num_cpu_devices", WORKERS)
    about = {"steps": args.steps, "workers": WORKERS, "jax": jax.__version__}
    known = {}
    if args.results.exists():
        stored = json.loads(args.results.read_text())
        known = stored.pop("methods")
        if stored != about:
            parser.error(f"{args.results} is of {stored}, and this of {about}")
    rows, programs = {}, {}
    for name in args.methods:
        method = METHODS[name]
        programs[name] = compiled(method, args.steps)
        rows[name] = {
            "family": method.family,
            **trained(method, args.steps),
            "bytes": bytes_sent(programs[name], method.shares(args.steps)),
            "memory": memory(programs[name]),
        }
        print(f"{name}: {rows[name]['losses']} at {rows[name]['rate']}", flush=True)
    for name, ratio in step_times(programs, args.rounds).items():
        rows[name]["step"] = ratio
    line = "{:34} {:>7} {:>17} {:>6} {:>9} {:>7} {:>6}".format
    print(line("method", "loss", "of three seeds", "test", "bytes", "memory", "step"))
    for name, row in rows.items():
        losses = row["losses"]
        seeds = f"{min(losses):.4f} - {max(losses):.4f}"
        numbers = f"{statistics.mean(losses):.4f}", seeds
        test = f"{statistics.mean(row['recognised']):.1%}"
        sent, kept = f"{row['bytes']:,.0f}", f"{row['memory']:.2f}"
        print(line(name, *numbers, test, sent, kept, f"{row['step']:.2f}"))
    rows = {name: rows.get(name, known.get(name)) for name in METHODS}
    rows = {name: row for name, row in rows.items() if row is not None}
    args.results.write_text(json.dumps({**about, "methods": rows}, indent=1) + "\n")
    draw(rows, args.output)
    print(f"Written: {args.results}, {args.output}")


if __name__ == "__main__":
    main()
