"""What every worker of the cluster does, whether it computes in JAX or in PyTorch."""

import dataclasses
import json
import os
import statistics
import threading
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

WARM_UP = 3  # first steps of a method, which compile or compress nothing yet
PIXELS, WIDTH, LAYERS, CLASSES = 64, 1408, 3, 10  # 4,073,354 parameters
LEARNING_RATE, MOMENTUM, RANK = 0.02, 0.9, 4


@dataclasses.dataclass(frozen=True)
class Task:
    """The orders of one worker, which travel as JSON on its command line.

    Attributes:
      methods: Names of what to time, one after the other.
      rank: Which worker this is, from 0.
      workers: How many there are.
      address: Host and port at which worker 0 lets the others join.
      interface: Network interface of this worker.
      steps: Steps of each method, warm-up included.
      batch: Images of one worker in a step.
      report: File for the results. As soon as a method is warm, one beside it with the
        suffix `.ready` says so.
    """

    methods: list[str]
    rank: int
    workers: int
    address: str
    interface: str
    steps: int
    batch: int
    report: str

    def batches(self):
        """This worker's images and labels, step by step: a share of common draws."""
        images, labels = load_digits(return_X_y=True)
        images, labels = (images / 8 - 1).astype(np.float32), labels.astype(np.int32)
        draws = np.random.default_rng(0)
        for _ in range(self.steps):
            picks = draws.integers(len(labels), size=(self.workers, self.batch))
            yield images[picks[self.rank]], labels[picks[self.rank]]

    def time(self, step):
        """Runs `step`, which takes a batch and returns the loss, on every batch."""
        seconds, losses, sent = [], [], 0
        for i, batch in enumerate(self.batches()):
            if i == WARM_UP:
                Path(self.report).with_suffix(".ready").touch()
                sent = self.sent()
            start = time.perf_counter()
            losses.append(step(batch))
            seconds.append(time.perf_counter() - start)
        sent = (self.sent() - sent) / (self.steps - WARM_UP)
        return {
            "step_seconds": statistics.median(seconds[WARM_UP:]),
            "losses": losses,
            # The loopback interface carries the bytes of all workers, and others'.
            "interface_bytes": None if self.interface == "lo" else sent,
        }

    def sent(self):
        """Bytes that have left through the interface."""
        counter = Path("/sys/class/net", self.interface, "statistics/tx_bytes")
        return int(counter.read_text())

    def save(self, results):
        Path(self.report).write_text(json.dumps(results))


def task_of(argument):
    """The task that a command line holds; from here on this ends with its parent."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    return Task(**json.loads(argument))


def _end_with_the_parent():
    """However that ends: its end of the pipe is closed then."""
    while os.read(0, 1):
        pass
    os._exit(1)
