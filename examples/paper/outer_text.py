"""Meeting rarely on text: what compressed outer steps lose, send and take.

A character transformer is trained by AdamW on several workers, simulated by `jax.vmap`
on one device, each with text of its own. Between meetings, `--round` steps apart,
nothing is exchanged:

  dense         gradients averaged at every step, uncompressed
  ef-sign       signs of them with error feedback, at every step
  average       local steps, then parameters averaged
  diloco        local steps, then Nesterov's momentum on the mean
  sign          signs of the pseudo-gradients, error feedback that fades, averaged
  sign-kept     the same, and what is owed does not fade
  sign-diloco   the same before Nesterov's momentum
  sparse-6      SparseLoCo: 256 of 4096 coordinates, two bits each
  sparse-6-kept the same, and what is owed does not fade
  sparse        64 of 4096 (1.6 %)
  sparse-grid   the same in the three values of `quantize(2)`, the default
  sparse-f32    the same in float32
  sparse-none   the same in two bits, and nothing owed
  streaming     sign-diloco in four fragments, each taken one step late and blended

The loss is that of text that is not trained on, in nats a character, at the common
parameters; the table has the mean over seeds, and beside it the least of the run's.
Seconds are those of a link of 100 Mbit/s and of 1 Gbit/s a worker: what
`efopt.wire.plan` says of the bytes, and a computation of `--compute-ms` a step. The
text is chosen as in conef_text.py.

With several of `--batch`, `--lr` and `--schedule` all their settings are run, those of
one batch side by side. A run with the same options goes on where one before it stopped;
one with others asks for another folder.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib import ticker
from text_data import load

import efopt

AXIS = "data"
SIGN = efopt.scaled_sign(4096)
LINKS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9}


def chunks(k, values):
    top = efopt.top_k(k=k, tile=(64, 64))
    return top if values is None else efopt.compose(top, values)


TWO_BITS = efopt.compressors.two_magnitudes()
IDENTITY = efopt.compressors.identity()


def at_every_step(scheme):
    return lambda inner, every: optax.chain(scheme, inner)


def averaged(scheme):
    outer = optax.chain(scheme, optax.scale(-1.0))
    return lambda inner, every: efopt.local_steps(
        inner, outer, every=every, axis_name=AXIS
    )


def diloco(**options):
    return lambda inner, every: efopt.outer.diloco(
        inner, every=every, axis_name=AXIS, **options
    )


def sparse_loco(compressor, decay=0.95):
    return lambda inner, every: efopt.outer.sparse_loco(
        inner, every=every, axis_name=AXIS, compressor=compressor, decay=decay
    )


def fading(compressor):
    return efopt.feedback.damped_error_feedback(
        compressor, alpha=0.95, beta=0.95, axis_name=AXIS
    )


def forgetful(compressor):
    return efopt.compress(compressor, axis_name=AXIS)


# What is sent, in how many fragments (0: at every step), and the optimizer.
METHODS = {
    "dense": (IDENTITY, 0, at_every_step(forgetful(IDENTITY))),
    "ef-sign": (
        SIGN,
        0,
        at_every_step(efopt.error_feedback(SIGN, axis_name=AXIS)),
    ),
    "average": (IDENTITY, 1, averaged(forgetful(IDENTITY))),
    "diloco": (IDENTITY, 1, diloco()),
    "sign": (SIGN, 1, averaged(fading(SIGN))),
    "sign-kept": (SIGN, 1, averaged(efopt.error_feedback(SIGN, axis_name=AXIS))),
    "sign-diloco": (SIGN, 1, diloco(compressor=SIGN)),
    "sparse-6": (chunks(256, TWO_BITS), 1, sparse_loco(chunks(256, TWO_BITS))),
    "sparse-6-kept": (
        chunks(256, TWO_BITS),
        1,
        sparse_loco(chunks(256, TWO_BITS), decay=1.0),
    ),
    "sparse": (chunks(64, TWO_BITS), 1, sparse_loco(chunks(64, TWO_BITS))),
    "sparse-grid": (
        chunks(64, efopt.quantize(2)),
        1,
        sparse_loco(chunks(64, efopt.quantize(2))),
    ),
    "sparse-f32": (chunks(64, None), 1, sparse_loco(chunks(64, None))),
    "sparse-none": (
        chunks(64, TWO_BITS),
        1,
        averaged(forgetful(chunks(64, TWO_BITS))),
    ),
    "streaming": (
        SIGN,
        4,
        diloco(compressor=SIGN, fragments=4, delay=1, alpha=0.5),
    ),
}


def init(key, characters, args):
    """The parameters of a transformer."""

    def normal(i, *shape):
        scale = shape[0] ** -0.5
        return scale * jax.random.normal(jax.random.fold_in(key, i), shape)

    wide = args.width
    params = {
        "characters": 0.02 * normal(0, characters, wide) * characters**0.5,
        "places": 0.02 * normal(1, args.context, wide) * args.context**0.5,
        "scale": jnp.ones(wide),
        "logits": normal(2, wide, characters),
    }
    for layer in range(args.layers):
        at = 10 * (layer + 1)
        params[f"layer_{layer}"] = {
            "qkv": normal(at, wide, 3 * wide),
            "out": normal(at + 1, wide, wide) / (2 * args.layers) ** 0.5,
            "up": normal(at + 2, wide, 4 * wide),
            "down": normal(at + 3, 4 * wide, wide) / (2 * args.layers) ** 0.5,
            "scale_1": jnp.ones(wide),
            "scale_2": jnp.ones(wide),
        }
    return params


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def apply(params, x, args):
    """The logits of the character after each, ``(batch, context, characters)``."""
    heads = args.width // 32
    y = params["characters"][x] + params["places"][None, : x.shape[1]]
    for layer in range(args.layers):
        p = params[f"layer_{layer}"]
        qkv = (norm(y, p["scale_1"]) @ p["qkv"]).reshape(*y.shape[:2], 3, heads, 32)
        q, k, v = (qkv[:, :, i] for i in range(3))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        y = y + attended.reshape(y.shape) @ p["out"]
        y = y + jax.nn.gelu(norm(y, p["scale_2"]) @ p["up"]) @ p["down"]
    return norm(y, params["scale"]) @ params["logits"]


def loss_at(params, starts, text, args):
    window = text[starts[:, None] + jnp.arange(args.context + 1)]
    logits = apply(params, window[:, :-1], args)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])
    return losses.mean()


def axes_of(state, axis):
    """Where `vmap` finds workers, or runs: on an axis of all but the count of steps.

    What is not mapped over is known to be one: the branch of a meeting stays a branch,
    where one condition a worker would have both sides computed at every step.
    """
    if not isinstance(state, efopt.outer.LocalStepsState):
        return axis
    return state._replace(count=None, local=axis, outer=axis)


def rates(lr, schedule, args):
    """The learning rate of every step."""
    warm = min(100, -(-args.steps // 10))
    if schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, lr, warm, args.steps)
    else:
        rate = optax.warmup_constant_schedule(0.0, lr, warm)
    return jax.vmap(rate)(jnp.arange(args.steps))


def run(name, args, batch, kinds, data):
    """Runs every kind, a rate and a schedule, with every seed, side by side.

    Of each kind: losses on the test text by step and seed, and milliseconds of a step.
    """
    train, test, characters = data
    _, _, make = METHODS[name]
    seeds = jnp.tile(jnp.arange(args.seeds), len(kinds))
    table = [rates(lr, schedule, args) for lr, schedule in kinds]
    table = jnp.repeat(jnp.stack(table), args.seeds, axis=0)

    def optimizer(rates):
        adamw = optax.adamw(lambda count: rates[count], b2=0.99, weight_decay=0.01)
        return make(adamw, args.round)

    described = jax.eval_shape(lambda: init(jax.random.key(0), characters, args))
    described = jax.eval_shape(optimizer(table[0]).init, described)
    one, each = (axes_of(described, axis) for axis in (0, 1))

    def start(seed):
        params = init(jax.random.fold_in(jax.random.key(7), seed), characters, args)
        state = optimizer(table[0]).init(params)
        stacked = efopt.stack_workers((params, state), args.workers)
        if one == 0:
            return stacked
        params, state = stacked
        return params, state._replace(count=jnp.zeros([], jnp.int32))

    def steps(carry, seed, rates, begin):
        tx = optimizer(rates)

        def worker(carry, key):
            params, state = carry
            starts = jax.random.randint(key, (batch,), 0, len(train) - args.context - 1)
            own = efopt.local_params(params, AXIS, state)
            grads = jax.grad(loss_at)(own, starts, train, args)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        workers = jax.vmap(worker, ((0, one), 0), (0, one), axis_name=AXIS)

        def step(carry, t):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), t)
            return workers(carry, jax.random.split(key, args.workers)), None

        return jax.lax.scan(step, carry, begin + jnp.arange(args.every))[0]

    whole = jnp.arange(0, len(test) - args.context - 1, args.context)
    whole = whole[: len(whole) // 8 * 8].reshape(8, -1)

    def tested(carry):
        params = jax.tree.map(lambda p: p[0], carry[0])  # all workers' are the same
        parts = jax.lax.map(lambda some: loss_at(params, some, test, args), whole)
        return parts.mean()

    carries = jax.jit(jax.vmap(start, out_axes=(1, each)))(seeds)
    axes = ((1, each), 0, 0, None)
    train_some = jax.jit(jax.vmap(steps, axes, (1, each)), donate_argnums=0)
    test_all = jax.jit(jax.vmap(tested, ((1, each),)))
    losses, times = [], []
    for begin in range(0, args.steps, args.every):
        clock = time.perf_counter()
        carries = jax.block_until_ready(train_some(carries, seeds, table, begin))
        times.append(time.perf_counter() - clock)
        found = np.asarray(test_all(carries)).reshape(len(kinds), -1).tolist()
        losses.append((begin + args.every, found))
    typical = statistics.median(times[1:] or times) / args.every / len(seeds)
    return [
        {"losses": [(t, found[i]) for t, found in losses], "step_ms": 1e3 * typical}
        for i in range(len(kinds))
    ]


def planned(name, args, characters, compute):
    """Bits of a coordinate and meeting, bytes of a step, and seconds on each link."""
    compressor, fragments, _ = METHODS[name]
    params = jax.eval_shape(lambda: init(jax.random.key(0), characters, args))
    options = {"num_workers": args.workers, "compute_seconds": compute}
    if fragments:
        options |= {"every": args.round, "fragments": fragments}
    out = {}
    for link, bandwidth in LINKS.items():
        plan = efopt.wire.plan(compressor, params, bandwidth=bandwidth, **options)
        told = plan.rounds or plan
        out[link] = args.steps * told.step_seconds
    sent = plan.rounds.bytes_per_step if plan.rounds else plan.bytes_sent_per_worker
    peak = plan.rounds.peak_bytes if plan.rounds else plan.bytes_sent_per_worker
    size = sum(x.size for x in jax.tree.leaves(params))
    return {
        "bits": plan.payload_bits / size,
        "bytes": sent,
        "peak": peak,
        "seconds": out,
    }


def print_table(setting):
    line = "{:13} {:>8} {:>8} {:>8} {:>8} {:>12} {:>12} {:>11} {:>10}".format
    print("\nbatch {batch}, AdamW at {lr:g}, {schedule}".format(**setting))
    heads = "method", "loss", "spread", "least", "bits", "bytes a step", "at most"
    print(line(*heads, *LINKS))
    for name, r in setting["results"].items():
        last, least = r["losses"][-1][1], min(np.mean(x) for _, x in r["losses"])
        cells = f"{np.mean(last):.4f}", f"{np.ptp(last):.4f}", f"{least:.4f}"
        sizes = f"{r['bits']:.3f}", f"{r['bytes']:,.0f}", f"{r['peak']:,}"
        print(
            line(name, *cells, *sizes, *(f"{s:,.1f} s" for s in r["seconds"].values()))
        )


def draw(setting, args, path):
    plt.style.use(Path(__file__).parents[1] / "pictures.mplstyle")
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    for ax in axes:
        ax.set_prop_cycle(color=plt.colormaps["tab10"].colors)
    for name, r in setting["results"].items():
        steps = np.array([t for t, _ in r["losses"]])
        losses = [np.mean(each) for _, each in r["losses"]]
        seconds = r["seconds"]["100 Mbit/s"] / args.steps
        for ax, scale in zip(axes, (1, r["bytes"] / 1e6, seconds), strict=True):
            ax.plot(steps * scale, losses, label=name)
    names = "step", "megabytes sent by a worker", "seconds at 100 Mbit/s"
    for ax, label in zip(axes, names, strict=True):
        ax.set(xlabel=label)
        if label != "step":
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes[0].set(ylabel="nats a character, unseen text")
    axes[0].legend()
    figure.savefig(path)
    plt.close(figure)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--data", type=Path, help="a text, .gz or plain; default: see above")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--steps", type=int, default=2400, help="default: 2400")
    add("--every", type=int, default=240, help="steps between tests, default: 240")
    add("--round", type=int, default=30, help="steps between meetings, default: 30")
    add("--batch", type=int, nargs="+", default=[8], help="of a worker, default: 8")
    add("--workers", type=int, default=8, help="default: 8")
    add("--width", type=int, default=256, help="a multiple of 32, default: 256")
    add("--layers", type=int, default=4, help="default: 4")
    add("--context", type=int, default=128, help="characters, default: 128")
    add("--lr", type=float, nargs="+", default=[1e-3], help="of AdamW, default: 0.001")
    kinds = "cosine", "constant"
    add("--schedule", nargs="+", choices=kinds, default=["cosine"], help="of the rate")
    add("--seeds", type=int, default=1, help="how many, side by side, default: 1")
    add("--limit", type=float, help="seconds, after which no other run is begun")
    add("--compute-ms", type=float, default=100.0, help="of a step, default: 100")
    add("--output", type=Path, default=Path("."), help="folder, default: this one")
    args = parser.parse_args()
    if args.steps % args.every:
        parser.error("argument --steps: must be a multiple of --every")
    if args.width % 32:
        parser.error("argument --width: must be a multiple of 32")
    if not args.output.is_dir():
        parser.error(f"argument --output: no folder: {args.output}")
    return args


def found_before(path, head):
    """The settings of a file, whose head must be that of this run."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    settings = before.pop("settings", [])
    if before != head:
        sys.exit(f"outer_text.py: {path} is of other options: choose another folder")
    return settings


def main():
    args, began = parse_args(), time.perf_counter()
    data = load(args.data)
    kind = jax.devices()[0].device_kind
    print(f"{args.workers} workers on {kind}, {len(data[0]):,} characters of text")
    told = {"steps", "every", "round", "workers", "width", "layers", "context", "seeds"}
    options = {k: v for k, v in vars(args).items() if k in told | {"compute_ms"}}
    head = {"device": kind, "options": options, "characters": len(data[0])}
    path = args.output / "outer_text.json"
    settings = found_before(path, head)

    def setting(**given):
        """What was found at a setting."""
        there = [s for s in settings if given.items() <= s.items()]
        if not there:
            there = [{**given, "results": {}}]
            settings.extend(there)
        return there[0]

    kinds = list(itertools.product(args.lr, args.schedule))
    longest, failed = 0.0, []
    for batch, name in itertools.product(args.batch, args.methods):
        ours = [setting(batch=batch, lr=lr, schedule=shape) for lr, shape in kinds]
        missing = [i for i, s in enumerate(ours) if name not in s["results"]]
        clock = time.perf_counter()
        if not missing or (args.limit and clock - began + longest > args.limit):
            continue
        try:
            plan = planned(name, args, data[2], args.compute_ms / 1e3)
            runs = run(name, args, batch, [kinds[i] for i in missing], data)
        except Exception:  # the others may work
            traceback.print_exc()
            failed.append(name)
            continue
        took = time.perf_counter() - clock
        longest = max(longest, took)
        for i, result in zip(missing, runs, strict=True):
            ours[i]["results"][name] = {**result, **plan, "run_seconds": took}
            loss, lr, shape = np.mean(result["losses"][-1][1]), *kinds[i]
            print(f"  {name}, batch {batch}, {lr:g} {shape}: {loss:.4f}", flush=True)
        # Whole or not at all: the run may be ended at any time.
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps({**head, "settings": settings}, indent=1))
        beside.replace(path)
    settings = [s for s in settings if s["results"]]
    for some in settings:
        print_table(some)
    print(
        "spread: largest minus smallest of the seeds; bits: of a coordinate, a meeting"
    )
    for i, some in enumerate(settings):
        more = f"_{i}" if i else ""
        draw(some, args, args.output / f"outer_text{more}.png")
    if settings:
        print(f"Written: {path}, and the curves beside it")
    if failed:
        sys.exit(f"outer_text.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
