"""One worker of `cluster.py --outer`, which meets the others every so many steps."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import cluster_jax
import optax
from cluster_task import LEARNING_RATE, MOMENTUM, task_of

import efopt

EVERY, SELDOM = 30, 90
FEW = 3  # steps of a stretch of those that meet at each
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
    """Adds what a step should take at a rate in bit/s.

    Computation is that of a step alone, which needs no link; what a method takes beyond
    that on localhost is what compressing costs.
    """
    alone = rows["alone"]["step_seconds"]
    free = {name: row["step_seconds"] for name, row in unlimited.items()}
    for name, row in rows.items():
        method = METHODS[name]
        more = max(0.0, free[name] - free["alone"]) * method.every
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


class Run:
    """A method at work, stretch by stretch: a whole number of its rounds each."""

    def __init__(self, task, method, mesh):
        self.method, self.losses, self.stretches = method, [], []
        self.length = {NEVER: EVERY, 1: FEW}.get(method.every, method.every)
        self._training = cluster_jax.Training(method.make(), mesh)
        self._wait = lambda: cluster_jax.latency(mesh)
        self._task, self._batches = task, itertools.cycle(task.batches())

    def stretch(self):
        """All workers begin it together, and it ends when the last of them is done."""
        self._wait()
        begin = time.perf_counter(), time.process_time(), self._task.sent()
        for batch in itertools.islice(self._batches, self.length):
            self.losses.append(self._training.step(batch))
        work, sent = time.process_time() - begin[1], self._task.sent() - begin[2]
        self._wait()
        spent = time.perf_counter() - begin[0], work, sent
        self.stretches.append([x / self.length for x in spent])

    def results(self):
        """Medians of all stretches but the first, which compiles and takes memory."""
        counted = self.stretches[1:] or self.stretches
        seconds, work, sent = (statistics.median(x) for x in zip(*counted, strict=True))
        wire = self._training.wire(next(self._batches))
        return {
            "step_seconds": seconds,
            "processor_seconds": work,
            "losses": self.losses,
            "interface_bytes": None if self._task.interface == "lo" else sent,
            # Of a meeting, if any.
            "hlo_bytes": sum(c.link_bytes for c in wire.collectives)
            * (self.method.every < NEVER),
        }


def main():
    task = task_of(sys.argv[1])
    mesh = cluster_jax.joined(task)
    message = cluster_jax.latency(mesh)
    runs = {name: Run(task, METHODS[name], mesh) for name in task.methods}
    # In turns, stretch by stretch: a neighbour's minute is then no method's own.
    for turn in range(1 + task.steps // EVERY):
        for run in runs.values():
            if turn % max(1, run.length // EVERY) == 0:
                run.stretch()
    task.save(
        {name: {**run.results(), "latency": message} for name, run in runs.items()}
    )


if __name__ == "__main__":
    main()
