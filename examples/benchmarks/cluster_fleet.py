"""The worker processes of `cluster.py`: started, awaited, killed."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster_network import ClusterError, cleaning_up, folder_of_its_own
from cluster_task import Task

LIMIT = 1800  # seconds that all methods of a fleet may take
GRACE = 15  # seconds that the other workers have to end after one has failed
OUTAGE_LIMIT = 120  # seconds after which a worker whose peer is gone counts as hung
PAUSE = 0.05  # seconds between two looks at the workers
LAST_WORDS = 12  # lines that a failed worker is quoted with
OUTAGES = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
HERE = Path(__file__).parent


class Worker:
    """A process, with files for its report and for what it prints."""

    def __init__(self, script, host, task, environment):
        self.rank = task.rank
        self._report = Path(task.report)
        self._log = self._report.with_suffix(".log")
        script, orders = str(HERE / script), json.dumps(dataclasses.asdict(task))
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*host.command, sys.executable, script, orders],
                env=environment,
                stdin=subprocess.PIPE,  # which ends when this process does
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the parent, which cleans up
            )

    @property
    def warm(self):
        return self._report.with_suffix(".ready").exists()

    def results(self):
        return json.loads(self._report.read_text())

    def error(self):
        """The first printed line that names what went wrong."""
        lines = self._log.read_text(errors="replace").splitlines()
        named = [line.strip() for line in lines if "error" in line.lower()]
        return named[0] if named else "nothing printed of an error"

    def __str__(self):
        code = self.process.poll()
        state = "still at work" if code is None else f"ended with {code}"
        last = self._log.read_text(errors="replace").splitlines()[-LAST_WORDS:]
        return "\n  ".join([f"worker {self.rank} {state}, and printed:", *last])

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()


# glibc hands large buffers back to the system after each step and gets them again, page
# by page, in the next. Accelerators do not, and here nobody shall.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


@contextlib.contextmanager
def fleet(script, network, methods, steps, batch, cache):
    """The workers of a network, one on each host, gone when it is left."""
    cores = os.cpu_count() or 1
    threads = str(max(1, cores // len(network.hosts)))
    if script == "cluster_hybrid.py":
        threads = (
            "32"  # virtual devices must not starve each other: see train_digits.py
        )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,  # the next rate runs the same programs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "NPROC": threads,  # XLA's threads, and PyTorch's:
        "OMP_NUM_THREADS": threads,
        **KEEP_MEMORY,
    }
    with cleaning_up() as cleanup:
        folder = cleanup.enter_context(folder_of_its_own())
        if network.owner is not None:  # who the workers are
            for name in (folder, cache):
                os.chown(name, *network.owner)
        workers = []
        for rank, host in enumerate(network.hosts):
            task = Task(
                methods=list(methods),
                rank=rank,
                workers=len(network.hosts),
                address=network.address,
                interface=host.interface,
                steps=steps,
                batch=batch,
                report=str(Path(folder, f"worker-{rank}.json")),
            )
            workers.append(Worker(script, host, task, environment))
            cleanup.callback(workers[-1].end)
        yield workers


def await_results(workers):
    """What every worker reports, once all have ended well."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        codes = [worker.process.poll() for worker in workers]
        if any(codes):  # neither None, still at work, nor 0
            break
        if codes == [0] * len(workers):
            return [worker.results() for worker in workers]
        time.sleep(PAUSE)
    _wait(workers, GRACE)  # the others may know more
    raise ClusterError("\n".join(map(str, workers)))


def outage(workers, how):
    """Takes the last worker away in the middle of a step. What becomes of the others.

    Returns:
      For each other worker the seconds until it ended, its exit code and its error;
      `None` three times if it was still there after `OUTAGE_LIMIT` seconds.
    """
    *others, victim = workers
    deadline = time.monotonic() + LIMIT
    while not all(worker.warm for worker in workers):
        ended = any(worker.process.poll() is not None for worker in workers)
        if ended or time.monotonic() > deadline:
            raise ClusterError("\n".join(map(str, workers)))
        time.sleep(PAUSE)
    time.sleep(1)  # into some step
    victim.process.send_signal(OUTAGES[how])
    start, ends = time.monotonic(), {}
    while len(ends) < len(others) and time.monotonic() < start + OUTAGE_LIMIT:
        for worker in others:
            if worker.rank not in ends and worker.process.poll() is not None:
                seconds = time.monotonic() - start
                ends[worker.rank] = seconds, worker.process.returncode, worker.error()
        time.sleep(PAUSE)
    return [ends.get(worker.rank, (None, None, None)) for worker in others]


def _wait(workers, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(worker.process.poll() is not None for worker in workers):
            return
        time.sleep(PAUSE)
