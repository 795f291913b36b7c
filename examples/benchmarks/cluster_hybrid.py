"""One host of `cluster.py --hybrid`: four devices, among which it shards."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cluster_jax import HEARTBEAT_TIMEOUT, SHUTDOWN_TIMEOUT, Network
from cluster_task import LEARNING_RATE, MOMENTUM, PIXELS, task_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt

DEVICES = 4  # of a host
METHODS = {
    "dense": (efopt.compressors.identity(), None),
    "sign two-phase": (efopt.scaled_sign(1024), "two_phase"),
    "top-k 1 %": (efopt.top_k(fraction=0.01, block_size=1024), None),
    "block 1 %": (efopt.random_block(fraction=0.01), None),
}


def optimizer(name):
    """SGD with momentum, in front of what is owed: see `cluster_jax.py`."""
    compressor, exchange = METHODS[name]
    if name == "dense":
        mean = efopt.compress(compressor, axis_name="dcn", exchange=exchange)
        return optax.chain(mean, optax.sgd(LEARNING_RATE, momentum=MOMENTUM))
    momentum = efopt.per_worker(optax.trace(MOMENTUM), axis_name="dcn")
    average = efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange)
    return optax.chain(momentum, average, optax.sgd(LEARNING_RATE))


def specs_of(params):
    """Matrices are cut along their first axis, biases are everywhere."""
    return jax.tree.map(lambda x: P("fsdp", None) if x.ndim == 2 else P(), params)


class Training:
    """A method at work on all hosts, of which this process is one."""

    def __init__(self, tx, mesh):
        model = Network()
        params = model.init(jax.random.key(0), jnp.zeros((1, PIXELS)))["params"]
        params = jax.device_get(params)
        state = {"params": params, "opt": tx.init(params)}
        self.state = efopt.distribute(state, mesh, specs_of(params))
        self._sharding = NamedSharding(mesh, P(("dcn", "fsdp")))

        def loss_fn(params, batch):
            images, labels = batch
            logits = model.apply({"params": params}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        def step(state, batch):
            gradient = efopt.value_and_grad(loss_fn, axis_name="dcn")
            loss, grads = gradient(state["params"], batch)
            updates, opt = tx.update(grads, state["opt"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "opt": opt}, loss

        self._step = jax.jit(step, donate_argnums=0)

    def _spread(self, batch):
        place = jax.make_array_from_process_local_data
        return jax.tree.map(lambda x: place(self._sharding, x), batch)

    def step(self, batch):
        self.state, loss = self._step(self.state, self._spread(batch))
        return np.asarray(loss.addressable_data(0)).item()

    def wire(self, batch):
        return efopt.wire.measure(self._step, self.state, self._spread(batch))


def main():
    task = task_of(sys.argv[1])
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        task.address,
        task.workers,
        task.rank,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        coordinator_bind_address=task.address,
    )
    shape, auto = (task.workers, DEVICES), (AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ("dcn", "fsdp"), axis_types=auto)
    for slice_ in mesh.devices:
        assert (
            len({device.process_index for device in slice_}) == 1
        )  # a host is a slice
    results = {}
    for name in task.methods:
        start = time.perf_counter()
        training = Training(optimizer(name), mesh)
        wire = training.wire(next(task.batches()))
        results[name] = {
            **task.time(training.step),
            "hlo_bytes": DEVICES * wire.bytes_over("dcn").link,  # all devices of a host
            "total_seconds": time.perf_counter() - start,
        }
        print(name, results[name]["step_seconds"], flush=True)
    task.save(results)


if __name__ == "__main__":
    main()
