"""One worker of `cluster.py --outer`, which meets the others every thirtieth step."""

import sys

import cluster_jax
import optax
from cluster_task import LEARNING_RATE, MOMENTUM, WARM_UP, task_of

import efopt

EVERY = 30
FIRST = EVERY + WARM_UP  # steps that do not count, a meeting among them
NEVER = 10**9  # steps of a round: that there is none
SIGN = efopt.scaled_sign(1024)


def rounds(every, compressor=None, **options):
    """Local SGD with momentum, and meetings."""
    inner = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    return efopt.outer.diloco(
        inner, axis_name="data", every=every, compressor=compressor, **options
    )


METHODS = {
    "alone": lambda: rounds(NEVER),
    "dense": lambda: cluster_jax.optimizer("dense"),
    "sign": lambda: cluster_jax.optimizer("sign"),
    "DiLoCo": lambda: rounds(EVERY),
    "DiLoCo sign": lambda: rounds(EVERY, SIGN),
    "streaming sign": lambda: rounds(EVERY, SIGN, fragments=3, delay=1, alpha=0.5),
}


def main():
    task = task_of(sys.argv[1])
    mesh, results = cluster_jax.joined(task), {}
    for name in task.methods:
        training = cluster_jax.Training(METHODS[name](), mesh)
        timed = task.time(training.step, FIRST)
        wire = training.wire(next(task.batches()))
        sent = sum(c.link_bytes for c in wire.collectives)  # of a meeting, if any
        # In the mean: a median would not see the few steps that meet.
        results[name] = {**timed, "step_seconds": timed["mean_seconds"]}
        results[name]["hlo_bytes"] = 0 if name == "alone" else sent
    task.save(results)


if __name__ == "__main__":
    main()
