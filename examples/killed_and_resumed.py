"""Killed and resumed: what a run of weeks does when it loses a worker.

Three JAX processes train over gloo on this machine, with compression, momentum of each
worker's own and a checkpoint every ten steps. Then the last of them is killed, once in
the middle of a step and once while a checkpoint is being written. The others must end
by themselves within seconds; resumed on three workers the run must come to the same
bits as one that was never disturbed; and resumed on two and on four, every worker must
hold the same bits, and the loss must go on falling from where it was.

    python examples/killed_and_resumed.py

Prints a line for each part, and ends with 1 if one of them does not hold.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS, EVERY = 60, 10  # steps of a run, and between two checkpoints
KILLED = {"in a step": 27, "while saving": 30}  # after that many
LIMIT = 300  # seconds that a run may take
# Without these, JAX's exit waits for the dead one for more than a minute and a half.
TIMEOUTS = {"heartbeat_timeout_seconds": 10, "shutdown_timeout_seconds": 10}
GRACE = 60  # seconds in which the others have to be gone
ROWS, SIZE = 96, 512  # of the problem: rows divide by 2, 3 and 4 workers


# ----------------------------------------------------------------------- a worker


def train(rank, workers, port, folder, report, kill=None):
    """One of several processes: restores what there is, and trains to the end."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import PartitionSpec as P

    import efopt

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Nobody from outside joins: without an address to bind to, it listens on all.
    jax.distributed.initialize(
        address, workers, rank, coordinator_bind_address=address, **TIMEOUTS
    )
    mesh = jax.make_mesh((workers,), ("data",), (jax.sharding.AxisType.Auto,))
    tx, (a, b), params = optimizer(), problem(), {"x": np.zeros(SIZE, np.float32)}
    init = lambda params: {"params": params, "opt": tx.init(params)}  # noqa: E731

    with ocp.CheckpointManager(folder) as manager:
        start = manager.latest_step() or 0
        if start:
            state = restored(manager, start, init, params, mesh)
        else:
            state = efopt.distribute(init(params), mesh)
        specs = efopt.partition_specs(state)
        step = jax.shard_map(
            lambda state, a, b: one_step(tx, state, a, b),
            mesh=mesh,
            in_specs=(specs, P("data"), P("data")),
            out_specs=(specs, P()),
        )
        step = jax.jit(step)
        own = jax.NamedSharding(mesh, P("data"))
        a, b = jax.device_put(a, own), jax.device_put(b, own)
        losses = []
        for count in range(start + 1, STEPS + 1):
            state, loss = step(state, a, b)
            if count == kill and count % EVERY:
                os.kill(os.getpid(), signal.SIGKILL)
            losses.append(float(loss))
            if count % EVERY == 0:
                manager.save(count, args=everything(state))
                if count == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
        manager.wait_until_finished()
    found = {"start": start, "first": losses[0], "last": losses[-1]}
    found |= {name: digest(x) for name, x in state.items()}
    Path(report).write_text(json.dumps(found))


def end_with_the_parent():
    """However that ends: its end of the pipe is closed then."""
    while os.read(0, 1):
        pass
    os._exit(1)


def everything(state):
    """What is saved: the arrays, and beside them what they are."""
    import orbax.checkpoint as ocp

    import efopt

    return ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave(efopt.checkpoints.record(state)),
    )


def restored(manager, step, init, params, mesh):
    """The last checkpoint, of whatever number of workers, on those of today."""
    import jax
    import orbax.checkpoint as ocp

    import efopt

    only = ocp.args.Composite(record=ocp.args.JsonRestore())
    record = manager.restore(step, args=only)["record"]
    # Where the old arrays go: spread over today's devices, whole on no host.
    old = efopt.checkpoints.target(jax.eval_shape(init, params), mesh, saved=record)
    only = ocp.args.Composite(state=ocp.args.StandardRestore(old))
    state = manager.restore(step, args=only)["state"]
    return efopt.distribute(efopt.checkpoints.resize(state, mesh.shape), mesh)


def optimizer():
    import optax

    import efopt

    return optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name="data"),
        efopt.error_feedback(
            efopt.scaled_sign(64), axis_name="data", exchange="two_phase"
        ),
        optax.sgd(1e-3),
    )


def problem():
    """Least squares, of which every worker has a contiguous share of the rows."""
    import numpy as np

    rng = np.random.default_rng(0)
    a = rng.standard_normal((ROWS, SIZE)).astype(np.float32)
    return a, rng.standard_normal(ROWS).astype(np.float32)


def one_step(tx, state, a, b):
    import jax
    import jax.numpy as jnp
    import optax

    import efopt

    def loss_fn(params):
        return jnp.mean((a @ params["x"] - b) ** 2)

    local = efopt.local_params(state["params"], "data")
    loss, grads = jax.value_and_grad(loss_fn)(local)
    updates, opt = tx.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt}, jax.lax.pmean(loss, "data")


def digest(tree):
    """A hash of the bits that this process has."""
    import jax

    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            found.update(shard.data.tobytes())
    return found.hexdigest()[:16]


# ----------------------------------------------------------------- all of them


class Fleet:
    """Worker processes on this machine, gone when it is left."""

    def __init__(self, workers, folder, kill=None):
        self._scratch = tempfile.TemporaryDirectory()
        self.reports = [Path(self._scratch.name, f"{i}.json") for i in range(workers)]
        port, self._processes = free_port(), []
        self._log = Path(self._scratch.name, "log").open("w+")
        for rank, report in enumerate(self.reports):
            order = {
                "rank": rank,
                "workers": workers,
                "port": port,
                "folder": str(folder),
                "report": str(report),
                "kill": kill if rank == workers - 1 else None,
            }
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--worker", json.dumps(order)],
                    env={**os.environ, "JAX_PLATFORMS": "cpu"},
                    stdin=subprocess.PIPE,  # which ends when this process does
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self._processes:
            process.kill()
            process.wait()
            process.stdin.close()
        self._log.close()
        self._scratch.cleanup()

    def results(self):
        """What every worker reports, once all have ended well."""
        self._wait(self._processes, LIMIT)
        codes = [process.poll() for process in self._processes]
        if any(codes):
            self._log.seek(0)
            raise SystemExit(f"workers ended with {codes}:\n{self._log.read()[-4000:]}")
        return [json.loads(report.read_text()) for report in self.reports]

    def seconds_after_the_last(self):
        """How long the others took to end after the last worker was gone."""
        *others, victim = self._processes
        self._wait([victim], LIMIT)
        start = time.monotonic()
        self._wait(others, GRACE)
        ended = all(process.poll() is not None for process in others)
        return time.monotonic() - start if ended else None

    def _wait(self, processes, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(process.poll() is not None for process in processes):
                return
            time.sleep(0.05)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(workers, folder):
    with Fleet(workers, folder) as fleet:
        return fleet.results()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return train(**json.loads(options.worker))
    failures = 0

    def say(holds, text):
        nonlocal failures
        failures += not holds
        print(f"{'ok    ' if holds else 'FAILED'} {text}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = run(3, Path(scratch, "undisturbed"))
        say(same(undisturbed), f"3 workers agree after {STEPS} steps")
        for how, step in KILLED.items():
            left = Path(scratch, f"killed-{step}")
            with Fleet(3, left, kill=step) as fleet:
                seconds = fleet.seconds_after_the_last()
            gone = "still there" if seconds is None else f"gone in {seconds:.1f} s"
            say(seconds is not None, f"killed {how} {step}: the others are {gone}")
            for workers in (3,) if how == "while saving" else (3, 2, 4):
                folder = Path(scratch, f"{step}-{workers}")
                shutil.copytree(left, folder)
                found = run(workers, folder)
                text = f"resumed on {workers} from step {found[0]['start']}"
                if workers == 3:
                    bits = ("params", "opt")
                    holds = all(
                        [new[x] == old[x] for x in bits]
                        for new, old in zip(found, undisturbed, strict=True)
                    )
                    say(holds, f"{text}: the bits of the undisturbed run")
                else:
                    falls = found[0]["last"] < found[0]["first"]
                    first, last = found[0]["first"], found[0]["last"]
                    text += f": all agree, loss {first:.4f} to {last:.4f}"
                    say(same(found) and falls, text)
    sys.exit(failures > 0)


def same(found):
    """Whether all workers have the same parameters, to the bit."""
    return len({x["params"] for x in found}) == 1


if __name__ == "__main__":
    main()
