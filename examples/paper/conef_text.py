"""Contractive error feedback (Li et al, 2023) on text: what each memory recovers.

A network that guesses the next character from those before it (an embedding and three
dense layers, in Flax) is trained by SGD on several workers, simulated by `jax.vmap`:

  dense        gradients averaged as they are
  none         a random tenth of them, and nothing owed (GRBS without feedback)
  ef           the same with error feedback
  conef-int8   with its residual in eight bits
  conef-int4   in four
  conef-f32    in a count sketch of a fifth, as published, damped
  conef-f16    the same in float16

`--preset large` trains the transformer of outer_text.py, 57 M parameters, with Adam
behind the feedback; for a GPU. Each method and seed is saved as it ends, and `--resume`
goes on where an earlier call has ended: give `--budget` what a call may take.

    python examples/paper/conef_text.py --preset large --seeds 2 --budget 560 --resume

The loss is that of text that is not trained on, in nats a character. The text is
`--data FILE`, or the Python programs in that folder, the Shakespeare of
`../shared/data/tinyshakespeare` where that is there, or else what Python's own `help()`
says about the language.
"""

import argparse
import json
import statistics
import time
from concurrent import futures
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import outer_text
from text_data import load

import efopt

BLOCK = efopt.random_block(fraction=0.1)
SKETCH = efopt.compressors.count_sketch(fraction=0.2)


def conef(memory, **options):
    return efopt.contractive_error_feedback(
        BLOCK, memory=memory, axis_name="data", **options
    )


METHODS = {
    "dense": efopt.compress(efopt.compressors.identity(), axis_name="data"),
    "none": efopt.compress(BLOCK, axis_name="data"),
    "ef": efopt.error_feedback(BLOCK, axis_name="data"),
    "conef-int8": conef(efopt.quantize(8, stochastic=True)),
    "conef-int4": conef(efopt.quantize(4)),
    "conef-f32": conef(SKETCH),
    "conef-f16": conef(SKETCH, residual_dtype="float16"),
}


class Network(nn.Module):
    characters: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(self.characters, 32)(x)
        x = x.reshape(*x.shape[:-2], -1)
        x = nn.relu(nn.Dense(self.width)(x))
        x = x + nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.characters)(x)


def windows(text, starts, context):
    """Contexts, and the character after each."""
    x = text[starts[:, None] + jnp.arange(context + 1)]
    return x[:, :-1], x[:, -1]


def small(args, data):
    """The first parameters by key, the loss, and an optimizer."""
    model = Network(data[2], args.width)

    def loss_fn(params, starts, text):
        x, y = windows(text, starts, args.context)
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    rate = optax.cosine_decay_schedule(args.lr, args.steps)
    return lambda key: model.init(key, data[0][None, : args.context]), loss_fn, rate


def large(args, data):
    """The same of the transformer."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, args.lr, args.steps // 20, args.steps
    )
    return (
        lambda key: outer_text.init(key, data[2], args),
        lambda params, starts, text: outer_text.loss_at(params, starts, text, args),
        rate,
    )


# What each trains, by what, and other defaults.
PRESETS = {
    "small": (small, optax.sgd, {}),
    "large": (
        large,
        lambda rate: optax.adam(rate, b2=0.95),
        {
            "steps": 1500,
            "every": 100,
            "batch": 64,
            "width": 768,
            "layers": 8,
            "context": 128,
            "lr": 5e-4,
        },
    ),
}


class Training:
    """The programs of a method: the first state by a key, a step, and the test."""

    def __init__(self, feedback, args, data, pool):
        train, test, _ = data
        make, optimizer, _ = PRESETS[args.preset]
        init, loss_fn, rate = make(args, data)
        tx = optax.chain(feedback, optimizer(rate))

        def start(key):
            params = init(key)
            return efopt.stack_workers((params, tx.init(params)), args.workers)

        def worker(state, key, train):
            params, opt_state = state
            size = args.batch // args.workers
            starts = jax.random.randint(key, (size,), 0, len(train) - args.context - 1)
            grads = jax.grad(loss_fn)(params, starts, train)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def tested(state, test):
            gap = 7 if args.preset == "small" else 4 * args.context
            whole = jnp.arange(0, len(test) - args.context - 1, gap)
            params = jax.tree.map(lambda p: p[0], state[0])  # all workers' are the same
            return loss_fn(params, whole, test)

        workers = jax.vmap(worker, (0, 0, None), axis_name="data")
        key = jax.random.key(0)
        keys = jax.random.split(key, args.workers)
        state = jax.eval_shape(start, key)
        self.feedback, self.args, self.train, self.test = feedback, args, train, test
        params = jax.eval_shape(init, key)
        self.size = sum(x.size for x in jax.tree.leaves(params))
        self.report = efopt.memory_report(feedback, params)
        step = jax.jit(workers, donate_argnums=0).lower(state, keys, train)
        compiled = (
            jax.jit(start).lower(key),
            step,
            jax.jit(tested).lower(state, test),
        )
        self.programs = [pool.submit(each.compile) for each in compiled]

    def run(self, seed):
        """Losses on the test text, and milliseconds and bytes of a step."""
        args = self.args
        start, step, tested = (each.result() for each in self.programs)
        state = start(jax.random.key(seed))
        losses, times = [], []
        for t in range(args.steps):
            key = jax.random.fold_in(jax.random.key(seed + 1), t)
            keys = jax.random.split(key, args.workers)
            begin = time.perf_counter()
            state = jax.block_until_ready(step(state, keys, self.train))
            times.append(time.perf_counter() - begin)
            if (t + 1) % args.every == 0 or t + 1 == args.steps:
                losses.append((t + 1, float(tested(state, self.test))))
        return {
            "losses": losses,
            "parameters": self.size,
            "residual_bytes": self.report.residual_bytes,
            "error_feedback_bytes": self.report.error_feedback_bytes,
            "step_ms": 1e3 * statistics.median(times[1:] or times),
        }


def mean_of(runs):
    """One row for the seeds of a method: mean losses, and the least of its times."""
    steps = [t for t, _ in runs[0]["losses"]]
    losses = zip(*([loss for _, loss in r["losses"]] for r in runs), strict=True)
    means = [statistics.mean(each) for each in losses]
    step_ms = min(r["step_ms"] for r in runs)
    together = {"losses": list(zip(steps, means, strict=True)), "step_ms": step_ms}
    return {**runs[0], **together}


def print_table(results):
    line = "{:12} {:>9} {:>12} {:>10} {:>10} {:>10}".format
    print(line("method", "loss", "residual", "of ef's", "step", "recovered"))
    last = {name: r["losses"][-1][1] for name, r in results.items()}
    for name, r in results.items():
        share = r["residual_bytes"] / r["error_feedback_bytes"]
        recovered = "-"
        if {"none", "ef"} <= last.keys():
            gap = last["none"] - last["ef"]
            recovered = f"{(last['none'] - last[name]) / gap:.0%}"
        size = f"{r['residual_bytes']:,}"
        cells = f"{last[name]:.4f}", size, f"{share:.3f}", f"{r['step_ms']:.1f} ms"
        print(line(name, *cells, recovered))
    print("recovered: of the way from no feedback to error feedback")


def draw(results, path):
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, r in results.items():
        share = r["residual_bytes"] / r["error_feedback_bytes"]
        axes.plot(*zip(*r["losses"], strict=True), label=f"{name} ({share:.2f})")
    axes.set(xlabel="step", ylabel="nats a character, unseen text")
    axes.set_title("Text with a compressed residual")
    axes.grid(alpha=0.3)
    axes.legend(title="method (residual / parameters)")
    figure.savefig(path, dpi=110)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="default: small")
    add("--data", type=Path, help="a text, .gz or plain, or a folder of programs")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--steps", type=int, default=4000, help="default: 4000")
    add("--every", type=int, default=200, help="steps between tests, default: 200")
    add("--batch", type=int, default=256, help="of all workers, default: 256")
    add("--workers", type=int, default=4, help="default: 4")
    add("--width", type=int, default=512, help="of a layer, default: 512")
    add("--context", type=int, default=24, help="characters, default: 24")
    add("--lr", type=float, default=0.2, help="falls by a cosine, default: 0.2")
    add("--layers", type=int, default=8, help="of the transformer, default: 8")
    add("--seeds", type=int, default=1, help="how many, default: 1")
    add("--resume", action="store_true", help="keep what an earlier call has found")
    add("--budget", type=float, default=1e9, help="seconds after which none begins")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset][2])
    args = parser.parse_args()
    if args.batch % args.workers:
        parser.error("argument --batch: must be a multiple of --workers")
    if not args.output.is_dir():
        parser.error(f"argument --output: no folder: {args.output}")
    return args


def main():
    args = parse_args()
    data = load(args.data)
    kind = jax.devices()[0].device_kind
    print(f"{args.workers} workers on {kind}, {len(data[0]):,} characters of text")
    skipped = ("budget", "resume")
    options = {
        k: v
        for k, v in vars(args).items()
        if isinstance(v, int | float | str) and k not in skipped
    }
    path, began = args.output / "conef_text.json", time.monotonic()
    written = {"device": kind, "options": options, "runs": {}}
    if args.resume and path.exists():
        written = json.loads(path.read_text())
        if written["options"] != options:
            raise SystemExit(f"conef_text.py: {path} is of other options")
    runs = written["runs"]
    left = [n for n in args.methods if len(runs.get(n, [])) < args.seeds]
    with futures.ThreadPoolExecutor() as pool:  # compiled side by side, then timed
        trainings = {n: Training(METHODS[n], args, data, pool) for n in left}
    for seed in range(args.seeds):  # a whole table first, then its repetition
        for name in args.methods:
            found = runs.setdefault(name, [])
            if len(found) == seed and time.monotonic() - began < args.budget:
                found.append(trainings[name].run(seed))
                told = f"seed {seed}, {name}: {found[-1]['losses'][-1][1]:.4f}"
                print(told, flush=True)
                path.write_text(json.dumps(written, indent=1))
    results = {name: mean_of(found) for name, found in runs.items() if found}
    print_table(results)
    draw(results, args.output / "conef_text.png")
    missing = [name for name in args.methods if len(runs[name]) < args.seeds]
    if missing:
        print("Not all seeds of:", ", ".join(missing), "(--resume goes on)")
    print(f"Written: {args.output / 'conef_text.json'}, and the curves beside it")


if __name__ == "__main__":
    main()
