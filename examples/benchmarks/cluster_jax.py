"""One worker of `cluster.py` that trains with JAX, Flax and efopt."""

import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cluster_task import (
    CLASSES,
    LAYERS,
    LEARNING_RATE,
    MOMENTUM,
    PIXELS,
    WIDTH,
    task_of,
)
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import efopt

# A worker that gives no sign of life for so many seconds is dead to the others, and one
# that ends waits so long for them. JAX has 100 and 300.
HEARTBEAT_TIMEOUT = SHUTDOWN_TIMEOUT = 10


# Compressor and exchange of each method.
METHODS = {
    "dense": (efopt.compressors.identity(), None),
    "sign": (efopt.scaled_sign(1024), "all_gather"),
    "sign two-phase": (efopt.scaled_sign(1024), "two_phase"),
    "int8 two-phase": (efopt.quantize(8), "two_phase"),
    "block 1 %": (efopt.random_block(fraction=0.01), None),
    "powersgd-4": (efopt.power_sgd(4), None),
}
# Momentum stands behind the average, as PyTorch has it. What the other methods owe is
# paid in bursts, which momentum behind them would amplify: there it stands in front.
BEHIND = ("dense", "powersgd-4")


def optimizer(name):
    """SGD with momentum around what compresses."""
    compressor, exchange = METHODS[name]
    scheme = efopt.compress if name == "dense" else efopt.error_feedback
    average = scheme(compressor, axis_name="data", exchange=exchange)
    if name in BEHIND:
        return optax.chain(average, optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
    momentum = efopt.per_worker(optax.trace(MOMENTUM), axis_name="data")
    return optax.chain(momentum, average, optax.sgd(LEARNING_RATE))


def plan(name, num_workers, **link):
    """What efopt expects of a method, from shapes alone."""
    compressor, exchange = METHODS[name]
    return plan_of(compressor, num_workers, exchange=exchange, **link)


def plan_of(compressor, num_workers, **options):
    """What efopt expects of a compressor."""
    shapes = jax.eval_shape(Network().init, jax.random.key(0), jnp.zeros((1, PIXELS)))
    return efopt.wire.plan(compressor, shapes, num_workers=num_workers, **options)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(CLASSES)(x)


def train_step(state, batch):
    """The step of one worker. The loss stays its own: averaging it costs a message."""
    images, labels = batch

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    local = efopt.local_params(state.params, "data", state.opt_state)
    loss, grads = jax.value_and_grad(loss_fn)(local)
    return state.apply_gradients(grads=grads), loss[None]


class Training:
    """A method at work on the workers of a mesh, of which this process is one."""

    def __init__(self, tx, mesh):
        model = Network()
        params = model.init(jax.random.key(0), jnp.zeros((1, PIXELS)))["params"]
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        self.state = efopt.distribute(state, mesh)
        specs = efopt.partition_specs(self.state)
        step = jax.shard_map(
            train_step,
            mesh=mesh,
            in_specs=(specs, P("data")),
            out_specs=(specs, P("data")),
        )
        self._step = jax.jit(step, donate_argnums=0)
        self._sharding = jax.NamedSharding(mesh, P("data"))

    def _spread(self, batch):
        place = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: place(self._sharding, x), batch)

    def step(self, batch):
        self.state, loss = self._step(self.state, self._spread(batch))
        return np.asarray(loss.addressable_data(0)).item()

    def wire(self, batch):
        return efopt.wire.measure(self._step, self.state, self._spread(batch))


def latency(mesh):
    """Seconds of a message: the workers add up one number, which takes several."""
    add = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    sharding = jax.NamedSharding(mesh, P("data"))
    one = jax.make_array_from_process_local_data(sharding, np.ones(1, np.float32))
    add, seconds = jax.jit(add), []
    for _ in range(30):
        start = time.perf_counter()
        add(one).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / (2 * (mesh.size - 1))


def joined(task):
    """The mesh of all workers, once they have found one another."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        task.address,
        task.workers,
        task.rank,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        coordinator_bind_address=task.address,  # else it listens on all interfaces
    )
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((task.workers,), ("data",), auto)


def main():
    task = task_of(sys.argv[1])
    mesh = joined(task)
    message, results = latency(mesh), {}
    for name in task.methods:
        training = Training(optimizer(name), mesh)
        wire = training.wire(next(task.batches()))
        results[name] = {
            **task.time(training.step),
            "hlo_bytes": wire.bytes_sent_per_worker,
            "latency": message,
        }
    task.save(results)


if __name__ == "__main__":
    main()
