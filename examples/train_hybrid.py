"""Trains a small transformer on two slices: sharded inside, compressed in between.

The mesh is `("dcn", "fsdp")`, 2 x 4: a slow link joins two slices of four devices. Each
parameter, with its Adam moments and residual, is cut over `fsdp`. GSPMD computes inside
a slice; between slices each device sends the gradient of the shard that it holds:

  dense            averaged uncompressed
  sign-two-phase   one bit a coordinate, each device of a slice its shard
  top-k            the largest 1 %
  power-sgd        matrices of rank 4
  int8-two-phase   eight bits a coordinate

A decoder of characters, in Flax, says how its activations lie, and learns from the
Shakespeare of `../shared/data/tinyshakespeare`, where that is there, or else from what
Python's own `help()` says about the language. There are two ways to write the step:

  global   `efopt.value_and_grad` in a plain jitted step, no `shard_map`
  nested   the step is manual over `dcn` alone

The devices are 8 virtual ones of a CPU, or all devices where there are at least four.
"""

import argparse
import gzip
import json
import os
import time
from pathlib import Path

# This has to stand before jax is imported: see train_digits.py.
os.environ.setdefault("NPROC", "32")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt

SHAKESPEARE = Path("data/tinyshakespeare/input.txt.gz")
HEADS = 4


def dense(lr):
    mean = efopt.compress(efopt.compressors.identity(), axis_name="dcn")
    return optax.chain(mean, optax.adam(lr))


def power_sgd(lr):
    feedback = efopt.error_feedback(efopt.power_sgd(4), axis_name="dcn")
    return optax.chain(feedback, optax.adam(lr))


def with_feedback(compressor, lr, exchange=None):
    # What is owed comes in bursts. Adam behind them would count each many times over;
    # in front, each slice scales its own gradient, and its moments stay sharded.
    return optax.chain(
        efopt.per_worker(optax.scale_by_adam(), axis_name="dcn"),
        efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange),
        optax.scale_by_learning_rate(lr),
    )


METHODS = {
    "dense": dense,
    "sign-two-phase": lambda lr: with_feedback(
        efopt.scaled_sign(1024), lr, exchange="two_phase"
    ),
    "top-k": lambda lr: with_feedback(efopt.top_k(fraction=0.01, block_size=1024), lr),
    "power-sgd": power_sgd,
    "int8-two-phase": lambda lr: with_feedback(
        efopt.quantize(8), lr, exchange="two_phase"
    ),
}


def by_text(x):
    """Activations lie by texts on the devices of a slice.

    Left to itself, the compiler cuts some of them like the parameters, and sends some
    from slice to slice.
    """
    return jax.lax.with_sharding_constraint(x, P("fsdp"))


class Embed(nn.Module):
    """Rows of a table, which is gathered inside the slice before they are looked up.

    Of a table that stays cut, the compiler looks rows up for both slices at once.
    """

    rows: int
    width: int

    @nn.compact
    def __call__(self, index):
        shape, normal = (self.rows, self.width), nn.initializers.normal(0.02)
        table = self.param("table", normal, shape)
        return jax.lax.with_sharding_constraint(table, P())[index]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        batch, length, width = x.shape
        heads = by_text(nn.Dense(3 * width, use_bias=False)(nn.LayerNorm()(x)))
        q, k, v = jnp.split(heads.reshape(batch, length, HEADS, -1), 3, axis=-1)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        mixed = by_text(mixed.reshape(x.shape))
        x = by_text(x + nn.Dense(width, use_bias=False)(mixed))
        wide = by_text(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
        return by_text(x + nn.Dense(width)(wide))


class Decoder(nn.Module):
    characters: int
    width: int
    layers: int

    @nn.compact
    def __call__(self, text):
        x = Embed(self.characters, self.width)(by_text(text))
        x += Embed(text.shape[1], self.width)(jnp.arange(text.shape[1]))
        x = by_text(x)
        for _ in range(self.layers):
            x = Block()(x)
        return by_text(nn.Dense(self.characters)(nn.LayerNorm()(x)))


def fsdp_specs(params, size):
    """The largest axis that `size` divides goes over `fsdp`; vectors go everywhere."""

    def spec(x):
        fits = [i for i, n in enumerate(x.shape) if n % size == 0]
        if x.ndim < 2 or not fits:
            return P()
        cut = max(fits, key=lambda i: x.shape[i])
        return P(*["fsdp" if i == cut else None for i in range(x.ndim)])

    return jax.tree.map(spec, params)


def global_step(loss_fn, tx, state, specs, mesh):
    """Over global arrays: the gradients come marked as each slice's own."""

    def step(state, batch):
        gradient = efopt.value_and_grad(loss_fn, axis_name="dcn")
        loss, grads = gradient(state["params"], batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "opt": opt,
        }, loss

    return step


def nested_step(loss_fn, tx, state, specs, mesh):
    """Manual over `dcn`: a slice sees its own part, and `fsdp` is the compiler's."""

    def step(state, batch):
        local = efopt.local_params(state["params"], "dcn")
        loss, grads = jax.value_and_grad(loss_fn)(local, batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, jax.lax.pmean(loss, "dcn")

    # What is manual may be named alone.
    manual = jax.tree.map(
        lambda spec: P(*[name if name == "dcn" else None for name in spec]),
        efopt.partition_specs(state, specs),
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(manual, P("dcn")),
        out_specs=(manual, P()),
        axis_names={"dcn"},
    )


ENTRANCES = {"global": global_step, "nested": nested_step}


def residual_bytes(state):
    """Bytes that one device holds of what its slice still owes."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return sum(
        x.addressable_shards[0].data.nbytes
        for path, x in leaves
        if "residual" in jax.tree_util.keystr(path)
    )


def train(name, entrance, model, params, text, mesh, args):
    tx = METHODS[name](args.lr)
    specs = fsdp_specs(params, mesh.shape["fsdp"])
    state = {"params": params, "opt": tx.init(params)}
    state = efopt.distribute(state, mesh, specs)

    def loss_fn(params, text):
        logits = model.apply({"params": params}, text[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return losses.mean()

    step = ENTRANCES[entrance](loss_fn, tx, state, specs, mesh)
    # The compiler may lay out results as it likes; here the state stays where it is.
    places = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, P())
    step = jax.jit(step, donate_argnums=0, out_shardings=places)
    starts = np.random.default_rng(0).integers(
        len(text) - args.length, size=(args.steps, args.batch)
    )
    place = NamedSharding(mesh, P(("dcn", "fsdp")))
    batches = (
        jax.device_put(text[at[:, None] + np.arange(args.length + 1)], place)
        for at in starts
    )
    batch = next(batches)
    start = time.perf_counter()
    step = step.lower(state, batch).compile()
    wire, owed, losses = efopt.wire.measure(step), residual_bytes(state), []
    while batch is not None:
        state, loss = step(state, batch)
        losses.append(float(loss))  # read at every step: devices stay together
        batch = next(batches, None)
    if args.check:  # once, at the end: what has parted stays parted
        efopt.watch.require_agreement(state)
    return {
        "losses": losses,
        "loss": float(np.mean(losses[-5:])),
        "dcn_bytes": wire.bytes_over("dcn").link,
        "fsdp_bytes": wire.bytes_over("fsdp").link,
        "residual_bytes": owed,
        "seconds": time.perf_counter() - start,
    }


def load(path):
    """A text as indices into its characters, and how many of those there are."""
    if path is None:
        known = Path(__file__).resolve().parents[2] / "shared" / SHAKESPEARE
        path = known if known.exists() else None
    if path is None:
        from pydoc_data import topics

        whole = "\n".join(topics.topics.values()).encode()
    else:
        whole = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    characters, text = np.unique(np.frombuffer(whole, np.uint8), return_inverse=True)
    return text.astype(np.int32), len(characters)


def draw(results, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, row in results.items():
        axes.plot(row["losses"], label=f"{name}: {row['dcn_bytes']:,} bytes a step")
    axes.set(xlabel="step", ylabel="training loss, nats a character")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--entrance", choices=ENTRANCES, default="global", help="default: global")
    add("--steps", type=int, default=40, help="default: 40")
    add("--layers", type=int, default=2, help="default: 2")
    add("--width", type=int, default=128, help="of a layer, default: 128")
    add("--length", type=int, default=32, help="of a text, default: 32")
    add("--batch", type=int, default=32, help="texts in a step, default: 32")
    add("--lr", type=float, default=0.003, help="learning rate, default: 0.003")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    add("--data", type=Path, help="a text, .gz or plain; default: see above")
    add(
        "--check",
        action="store_true",
        help="at the end, whether all devices hold the same bits",
    )
    add("--json", type=Path, help="file for what was found")
    add("--picture", type=Path, help="file for the losses, drawn")
    args = parser.parse_args()
    for name in ("steps", "layers", "width", "length", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be at least 1")
    if args.width % HEADS:
        parser.error(f"argument --width: must be a multiple of {HEADS} heads")
    return parser, args


def main():
    parser, args = parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices() if jax.device_count() >= 4 else jax.devices("cpu")
    fast = len(devices) // 2
    if args.batch % (2 * fast):
        parser.error(f"argument --batch: must be a multiple of {2 * fast} devices")
    mesh = jax.make_mesh(
        (2, fast),
        ("dcn", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices[: 2 * fast],
    )
    jax.set_mesh(mesh)
    text, characters = load(args.data)
    model = Decoder(characters, args.width, args.layers)
    example = jnp.zeros((fast, args.length), jnp.int32)
    params = jax.device_get(model.init(jax.random.key(0), example)["params"])
    size = sum(x.size for x in jax.tree.leaves(params))
    print(f"2 x {fast} {devices[0].platform} devices, {size:,} parameters", end=", ")
    print(f"{len(text):,} characters of text, {args.entrance} entrance")
    line = "{:14}  {:>6}  {:>12}  {:>6}  {:>13}  {:>14}  {:>7}".format
    heads = "bytes on dcn", "ratio", "bytes on fsdp", "residual bytes", "seconds"
    print(line("method", "loss", *heads))
    results = {}
    for name in args.methods:
        row = train(name, args.entrance, model, params, text, mesh, args)
        results[name] = row
        first = results.get("dense")
        ratio = f"{first['dcn_bytes'] / row['dcn_bytes']:.1f}" if first else "-"
        sizes = f"{row['dcn_bytes']:,}", ratio, f"{row['fsdp_bytes']:,}"
        sizes = *sizes, f"{row['residual_bytes']:,}"
        print(line(name, f"{row['loss']:.3f}", *sizes, f"{row['seconds']:.1f}"))
    print(
        "Bytes per device and step, read from the compiled program. Averaging the loss"
    )
    print("is included. The loss is the mean of the last five steps.")
    if args.check:
        print(f"{len(results)} runs: all workers hold the same bits")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
