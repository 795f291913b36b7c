"""One worker of `cluster.py --outer`, which meets the others every so many steps."""

import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

import cluster_jax
import optax
from cluster_task import LEARNING_RATE, MOMENTUM, WARM_UP, task_of

import efopt

EVERY, SELDOM = 30, 90
FIRST = EVERY + WARM_UP  # steps that do not count, a meeting among them
FEW = WARM_UP + 10  # steps of a method that meets at each
NEVER = 10**9  # steps of a round: that there is none
SIGN, DENSE = efopt.scaled_sign(1024), efopt.compressors.identity()


class Method(NamedTuple):
    """How to make it, and what `efopt.wire.plan` is told of it."""

    make: Callable
    compressor: efopt.Compressor
    every: int
    fragments: int | None = None


def rounds(every, compressor=DENSE, **options):
    """Local SGD with momentum, and meetings."""

    def make():
        return efopt.outer.diloco(
            optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
            axis_name="data",
            every=every,
            compressor=None if compressor is DENSE else compressor,
            **options,
        )

    return Method(make, compressor, every, options.get("fragments"))


METHODS = {
    "alone": rounds(NEVER),
    f"sign, {EVERY}": rounds(EVERY, SIGN),
    f"sign, {SELDOM}": rounds(SELDOM, SIGN),
    f"sign, {EVERY}, streaming": rounds(EVERY, SIGN, fragments=3, delay=1, alpha=0.5),
    f"dense, {EVERY}": rounds(EVERY),
    "sign, 1": Method(lambda: cluster_jax.optimizer("sign"), SIGN, 1),
    "dense, 1": Method(lambda: cluster_jax.optimizer("dense"), DENSE, 1),
}


def add_plans(rate, rows, unlimited, workers):
    """Adds what a step should take at a rate in bit/s: from those on localhost.

    Computation is that of a step alone, there; what a method takes beyond that, there,
    is what compressing costs.
    """
    alone = unlimited["alone"]["step_seconds"]
    for name, row in rows.items():
        method = METHODS[name]
        more = max(0.0, unlimited[name]["step_seconds"] - alone) * method.every
        rounds = cluster_jax.plan_of(
            method.compressor,
            workers,
            bandwidth=rate,
            latency=row["latency"],
            compute_seconds=alone,
            compress_seconds=0.0 if name == "alone" else more,
            every=method.every,
            fragments=method.fragments,
        ).rounds
        row["predicted_seconds"] = rounds.step_seconds
        if name != "alone":
            row["every_within_a_tenth"] = rounds.every_within(0.1)


def table(rows):
    """The rows as lines of text, held against those who never meet."""
    line = "{:20}  {:>8}  {:>8}  {:>9}  {:>15}  {:>11}  {:>6}  {:>8}".format
    heads = (
        "step",
        "of alone",
        "processor",
        "predicted",
        "<= 1.1 from",
        "loss",
        "a step",
    )
    lines = [line("method, every", *heads)]
    alone = rows["alone"]["step_seconds"]
    for name, row in rows.items():
        step, predicted = row["step_seconds"], row.get("predicted_seconds")
        within, sent = row.get("every_within_a_tenth"), row.get("interface_bytes")
        cells = [f"{1e3 * step:,.1f} ms", f"{step / alone:.2f}x"]
        cells.append(f"{1e3 * row['processor_seconds']:,.1f} ms")
        cells.append(
            f"{1e3 * predicted:,.1f} ms {predicted / step - 1:+.0%}"
            if predicted
            else "-"
        )
        cells.append(f"{within:,}" if within else "-")
        cells += [f"{row['loss']:.3f}", f"{sent / 1e3:,.0f} kB" if sent else "-"]
        lines.append(line(name, *cells))
    return "\n".join(lines)


def main():
    task = task_of(sys.argv[1])
    mesh, results = cluster_jax.joined(task), {}
    message = cluster_jax.latency(mesh)
    for name in task.methods:
        method = METHODS[name]
        training = cluster_jax.Training(method.make(), mesh)
        few = dataclasses.replace(task, steps=min(task.steps, FEW))
        orders, first = (few, WARM_UP) if method.every == 1 else (task, FIRST)
        timed = orders.time(training.step, first, lambda: cluster_jax.latency(mesh))
        wire = training.wire(next(task.batches()))
        sent = sum(c.link_bytes for c in wire.collectives)  # of a meeting, if any
        # In the mean: a median would not see the few steps that meet.
        results[name] = {**timed, "step_seconds": timed["mean_seconds"]}
        results[name]["hlo_bytes"] = 0 if name == "alone" else sent
        results[name]["latency"] = message
    task.save(results)


if __name__ == "__main__":
    main()
