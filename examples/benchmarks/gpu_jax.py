"""Training with JAX and efopt on the GPUs of one host, for `gpu.py`.

Prints what was found so far, a line of JSON after each method.
"""

import functools
import json
import statistics
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from gpu_hybrid import counted
from jax.sharding import PartitionSpec as P

import efopt

RATE, MOMENTUM = 0.01, 0.9


def with_feedback(compressor, exchange=None):
    return optax.chain(
        efopt.per_worker(optax.trace(MOMENTUM), axis_name="data"),
        efopt.error_feedback(compressor, axis_name="data", exchange=exchange),
        optax.sgd(RATE),
    )


def vote():
    return optax.chain(
        efopt.per_worker(optax.trace(MOMENTUM), axis_name="data"),
        efopt.compress(efopt.sign(), axis_name="data", exchange="majority_vote"),
        optax.sgd(RATE / 1000),
    )


def dense():
    mean = efopt.compress(efopt.compressors.identity(), axis_name="data")
    return optax.chain(mean, optax.sgd(RATE, momentum=MOMENTUM))


# Name: the transformation, and the compressor and exchange that a plan is made of.
SIGN, BLOCK, LOW_RANK = (
    efopt.scaled_sign(1024),
    efopt.random_block(fraction=0.01),
    efopt.power_sgd(4),
)
METHODS = {
    "dense": (dense(), efopt.compressors.identity(), None),
    "sign all_gather": (with_feedback(SIGN, "all_gather"), SIGN, "all_gather"),
    "sign two_phase": (with_feedback(SIGN, "two_phase"), SIGN, "two_phase"),
    "majority_vote": (vote(), efopt.sign(), "majority_vote"),
    "int8 two_phase": (
        with_feedback(efopt.quantize(8), "two_phase"),
        efopt.quantize(8),
        "two_phase",
    ),
    "random_block 1 %": (with_feedback(BLOCK), BLOCK, None),
    "power_sgd 4": (with_feedback(LOW_RANK), LOW_RANK, None),
}


@functools.cache
def network(layers, width):
    """Square matrices and their biases, from NumPy: the same for every method."""
    rng = np.random.default_rng(0)
    scale = np.float32((2 / width) ** 0.5)
    return [
        {
            "w": scale * rng.standard_normal((width, width), dtype=np.float32),
            "b": np.zeros(width, np.float32),
        }
        for _ in range(layers)
    ]


def loss_fn(params, x, y):
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean((x - y) ** 2)


def measured(step, rounds):
    """Median wall seconds of ``step()``, and bytes on the loopback interface each.

    After two rounds of warm-up.
    """
    seconds = []
    for i in range(rounds + 2):
        if i == 2:
            before = counted()
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    sent = None if before is None else (counted() - before) / rounds
    return statistics.median(seconds[2:]), sent


def median_seconds(step, rounds):
    return measured(step, rounds)[0]


def all_reduce_seconds(mesh, size, rounds):
    """Seconds in which the workers add up ``size`` numbers each."""
    over = jax.NamedSharding(mesh, P("data"))
    x = jax.device_put(jnp.ones((mesh.size, size)), over)
    add = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )
    )
    return median_seconds(lambda: add(x), rounds)


def link(mesh, rounds):
    """Bits a second and seconds a message, from a large and a small all-reduce."""
    n, size = mesh.size, 1 << 24
    small = all_reduce_seconds(mesh, 1, rounds)
    large = all_reduce_seconds(mesh, size, rounds)
    sent = 2 * (n - 1) / n * 4 * size
    return 8 * sent / (large - small), small / (2 * (n - 1))


class Training:
    """One method at work on all GPUs of the mesh."""

    def __init__(self, tx, mesh, settings, average=True):
        params = network(settings["layers"], settings["width"])
        state = efopt.distribute((params, tx.init(params)), mesh)
        specs = efopt.partition_specs(state)
        over = jax.NamedSharding(mesh, P("data"))
        shape = (mesh.size, settings["batch"] // mesh.size, settings["width"])
        rng = np.random.default_rng(1)
        self.batch = [
            jax.device_put(rng.standard_normal(shape, dtype=np.float32), over)
            for _ in range(2)
        ]

        def step(state, x, y):
            params, opt_state = state
            local = efopt.local_params(params, "data")
            loss, grads = jax.value_and_grad(loss_fn)(local, x[0], y[0])
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss[None]

        self.mapped = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(specs, P("data"), P("data")),
                out_specs=(specs, P("data")),
            ),
            donate_argnums=0,
        )
        self.state = state

    def step(self):
        self.state, self.loss = self.mapped(self.state, *self.batch)
        return self.loss

    def wire(self):
        return efopt.wire.measure(self.mapped, self.state, *self.batch)

    def identical(self):
        """Whether every worker holds the same parameters, bit for bit."""
        for x in jax.tree.leaves(self.state[0]):
            first, *others = (s.data for s in x.addressable_shards)
            home = next(iter(first.devices()))
            for other in others:
                if not bool(jnp.array_equal(first, jax.device_put(other, home))):
                    return False
        return True


def compute_seconds(settings, n, rounds):
    """A worker's own part of a dense step, on one GPU: nothing is sent."""
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    alone = {**settings, "batch": settings["batch"] // n}
    return median_seconds(Training(dense(), mesh, alone).step, rounds)


def compress_seconds(compressor, settings, rounds):
    """Compressing, decoding and keeping the residual, on one GPU."""
    params = network(settings["layers"], settings["width"])
    tx = efopt.error_feedback(compressor)
    update = jax.jit(tx.update)
    grads, state = jax.tree.map(jnp.asarray, params), tx.init(params)
    return median_seconds(lambda: update(grads, state), rounds)


def floor_seconds(settings, rounds):
    """One pass over the gradient's memory: read once, written once."""
    params = network(settings["layers"], settings["width"])
    params = jax.tree.map(jnp.asarray, params)
    add = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p))
    return median_seconds(lambda: add(params), rounds)


def trained(name, mesh, settings, found):
    """One method's row."""
    rounds, n = settings["steps"], mesh.size
    tx, compressor, exchange = METHODS[name]
    compress = 0.0
    if name != "dense":
        compress = compress_seconds(compressor, settings, rounds)
    plan = efopt.wire.plan(
        compressor,
        network(settings["layers"], settings["width"]),
        num_workers=n,
        exchange=exchange,
        bandwidth=found["bandwidth"],
        latency=found["latency"],
        compute_seconds=found["compute_seconds"],
        compress_seconds=compress,
    )
    training = Training(tx, mesh, settings)
    wire = training.wire()
    seconds, sent = measured(training.step, max(rounds, 48))
    return {
        "step_seconds": seconds,
        "predicted_seconds": plan.step_seconds,
        "compress_seconds": compress,
        "compress_passes": compress / found["pass_seconds"],
        "operand_bytes": wire.operand_bytes,
        "bytes_sent": wire.bytes_sent_per_worker,
        "bytes_counted": None if sent is None else sent / n,
        "planned_bytes_sent": plan.bytes_sent_per_worker,
        "identical": training.identical(),
        "loss": float(training.loss[0]),
    }


def main():
    settings = json.loads(sys.argv[1])
    rounds, n = settings["steps"], settings["gpus"]
    devices = jax.devices()[:n]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((n,), ("data",), auto, devices=devices)
    bandwidth, latency = link(mesh, rounds)
    found = {
        "device": f"{n} x {devices[0].device_kind}, jax {jax.__version__}",
        "bandwidth": bandwidth,
        "latency": latency,
        "compute_seconds": compute_seconds(settings, n, rounds),
        "pass_seconds": floor_seconds(settings, rounds),
        "methods": {},
    }
    print(json.dumps(found), flush=True)
    for name in settings["methods"]:
        try:
            found["methods"][name] = trained(name, mesh, settings, found)
        except Exception:  # the others may work
            print(f"{name} failed:", file=sys.stderr)
            traceback.print_exc()
            continue
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
