"""Two-level training on the GPUs of one host, made to look like two hosts.

One process a GPU, on a mesh of 2 x m: parameters and moments are sharded over "fsdp",
inside a half, and gradients are compressed over "dcn", between the halves. NCCL is told
that each half is a host of its own, so that "fsdp" runs over the fast link and "dcn"
over sockets. The model is a decoder-only transformer in Flax (369 M parameters by
default) with float32 parameters, bfloat16 arithmetic and momentum, on random tokens;
the step is a global one, through `efopt.value_and_grad`. PyTorch's fully sharded data
parallelism with hybrid sharding trains the same network in `gpu_hybrid_torch.py`, where
it is installed. Prints a table and writes gpu_hybrid.json, both as results come, and a
picture, gpu_hybrid.png, at the end:

  step      median milliseconds of a step, and how many times faster than `dense f32`;
            of local steps, which meet every 30, the mean of whole rounds
  plan      milliseconds by `efopt.wire.plan`, from the step without any exchange and
            the link that two all-reduces measured; compressing counts as free
  dcn       bytes that leave a device over the slow axis in a step: from the compiled
            program, as planned, and as the loopback interface counted them (all
            traffic of the host, headers included); of local steps their 30th part
  fsdp      bytes that leave a device over the fast axis, from the compiled program
  memory    of a device, in GB: what lies there, and what the step needs besides; of
            PyTorch the peak of its allocator
  same      whether parameters end bit-identical on both halves
  pays      below how many Gbit/s a device, between the halves, a step is faster than
            one of `dense f32`, from what the method costs beside sending

A second table says where the time goes: milliseconds of a step in which a kernel of the
kind runs on the first device, by the profiler over three steps (30, of local steps):

  fsdp, dcn  collectives over either axis; they run beside the rest, and wait for others
  matmul     matrix products and attention
  rest       all other kernels: what compresses, and what a step passes over else
  alone      the part of `dcn` during which nothing else runs
  idle       nothing runs at all

`hierarchical` has all parameters on every device and averages over both axes:
`axis_name=("dcn", "fsdp")`. With `--one-host` the halves are not told apart, and "dcn"
is a fast link too.

    python examples/benchmarks/gpu_hybrid.py --gpus 4
    python examples/benchmarks/gpu_hybrid.py --gpus 4 --one-host
    python examples/benchmarks/gpu_hybrid.py --cpu --gpus 4 --layers 2 --width 128 \
        --heads 2 --vocabulary 512 --length 32
"""

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import util
from pathlib import Path

STYLE = Path(__file__).resolve().parents[1] / "pictures.mplstyle"
METHODS = (
    "no exchange",
    "dense f32",
    "sign two_phase",
    "random_block 1 %",
    "local steps sign",
    "sign two_phase delay",
    "random_block 1 % delay",
    "local steps sign delay",
    "hierarchical sign",
    "power_sgd 4",
    "top_k 1 %",
    "sign all_gather",
    "dense bf16",
    "int8 two_phase",
)
TORCH = ("torch f32", "torch bf16")
TWO = "two_phase"
EVERY = 30  # steps from one meeting to the next
HALVES = {
    "NCCL_IB_DISABLE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
# Processes share the tuning, and wait for one another's programs: not where several are
# compiled at a time, in an order of each process's own.
EACH_ITS_OWN = "--xla_gpu_shard_autotuning=false"
CPU = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "NPROC": "32",
}
MOMENTUM, RATE = 0.9, 0.01
TRAIN_TORCH = Path(__file__).with_name("gpu_hybrid_torch.py")
SCRIPT = "examples/benchmarks/gpu_hybrid.py"
COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


def free_port():
    """A port that is free, and below those that the system gives to connections.

    One of the latter may be given away before the first process listens at it.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def write(path, found):
    """Writes JSON, whole or not at all: a run may be ended at any time."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(found, indent=1))
    beside.replace(path)


def launch(script, methods, args, ends=math.inf):
    """Runs methods, one process a GPU; yields each one's name and what was found.

    No longer than until ``ends`` on the monotonic clock, nor when nothing has been
    heard for `--limit` seconds, nor when one of the processes has failed.
    """
    settings = {k: v for k, v in vars(args).items() if k != "output"}
    settings |= {"methods": methods, "port": free_port()}
    processes = []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(i) for i in range(args.gpus)]
    for i in range(args.gpus):
        env = os.environ | (CPU if args.cpu else HALVES)
        if not args.cpu:
            if getattr(args, "jobs", 2) > 1:
                flags = f"{os.environ.get('XLA_FLAGS', '')} {EACH_ITS_OWN}"
                env |= {"XLA_FLAGS": flags}
            half = 0 if args.one_host else 2 * i // args.gpus
            env |= {"CUDA_VISIBLE_DEVICES": gpus[i], "NCCL_HOSTID": f"half{half}"}
        # Processes tune kernels together: one that reads its program from a cache
        # instead would leave the others waiting.
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, str(script), "--process", str(i)]
        command.append(json.dumps(settings))
        pipe = subprocess.PIPE if i == 0 else subprocess.DEVNULL
        errors = None if i == 0 else subprocess.DEVNULL
        p = subprocess.Popen(command, env=env, stdout=pipe, stderr=errors, text=True)
        processes.append(p)

    def stop():
        for p in processes:
            p.kill()

    heard, over = [time.monotonic()], threading.Event()

    def watch():
        while not over.wait(0.2):
            now, codes = time.monotonic(), [p.poll() for p in processes]
            why = None
            if any(codes):
                why = f"processes ended with {codes}"
            elif now > ends:
                why = "no time is left"
            elif now > heard[0] + args.limit:
                why = f"nothing was heard for {args.limit} s"
            if why:
                print(f"{Path(script).name}: {why}", file=sys.stderr, flush=True)
                stop()
                break

    threading.Thread(target=watch, daemon=True).start()
    try:
        for line in processes[0].stdout:
            if line.startswith("{"):
                heard[0] = time.monotonic()
                found = json.loads(line)
                name = found.pop("method")
                yield name, found
                if name == methods[-1]:
                    break  # nor wait for processes to take leave of each other
    finally:
        over.set()
        stop()
        for p in processes:
            p.wait()
        processes[0].stdout.close()


def launch_all(script, methods, args, ends=math.inf):
    """The same, and starts anew behind a method that ends the processes.

    So does one that stands still.
    """
    while methods and time.monotonic() < ends:
        done = -1
        for name, found in launch(script, methods, args, ends):
            if name is not None:
                done = methods.index(name)
            yield name, found
        methods = methods[done + 2 :]  # the one behind failed, and told why, or stood


def row(name, found, methods):
    """One method as a line of text."""
    ms = 1e3 * found["step_seconds"]
    cells = [name, f"{ms:.2f}", "", "", "", "", "", "", "", "", ""]
    if "dense f32" in methods:
        ratio = methods["dense f32"]["step_seconds"] / found["step_seconds"]
        cells[2] = f"{ratio:.2f}x"
    if "exchange_seconds" in found:
        if "no exchange" in methods:
            plan = methods["no exchange"]["step_seconds"] + found["exchange_seconds"]
            cells[3] = f"{1e3 * plan:.2f}"
        cells[5] = f"{found['dcn_planned']:,.0f}"
    if found["dcn_bytes"] is not None:
        cells[4] = f"{found['dcn_bytes']:,.0f}"
    if found["dcn_counted"] is not None:
        cells[6] = f"{found['dcn_counted']:,.0f}"
    if found["fsdp_bytes"] is not None:
        cells[7] = f"{found['fsdp_bytes']:,.0f}"
    if found["memory"]:
        cells[8] = f"{found['memory'] / 1e9:.2f}"
    if found["identical"] is not None:
        cells[9] = "yes" if found["identical"] else "NO"
    if found.get("pays_below"):
        cells[10] = f"{found['pays_below'] / 1e9:.0f}"
    return LINE(*cells)


def pays_below(found, methods):
    """Bits a second, a device, at which a step takes as long as one of `dense f32`.

    What a method costs beside sending is measured: its step, less that without any
    exchange and the time that its bytes take.
    """
    if not {"no exchange", "dense f32"} <= set(methods) or not found.get("dcn_planned"):
        return None
    alone = methods["no exchange"]["step_seconds"]
    cost = found["step_seconds"] - alone - found["exchange_seconds"]
    saved = methods["dense f32"]["dcn_bytes"] - found["dcn_bytes"]
    return 8 * saved / cost if cost > 0 and saved > 0 else None


PRODUCTS = "gemm", "nvjet", "xmma", "cutlass", "flash", "fmha", "cudnn", "dot"
PIECES = "fsdp", "dcn", "matmul", "rest", "alone", "idle", "whole"
LINE = "{:23} {:>9} {:>7} {:>8} {:>14} {:>14} {:>14} {:>14} {:>7} {:>5} {:>6}".format
HEADS = LINE(
    "method",
    "step ms",
    "speedup",
    "plan ms",
    "dcn",
    "dcn planned",
    "dcn counted",
    "fsdp",
    "memory",
    "same",
    "pays",
)


def pieces(name, found):
    """Where the time of one method goes, as a line of text."""
    told = found.get("kernels")
    if not told:
        return None
    given = {"alone": told["alone"], "idle": told["idle"], "whole": told["whole"]}
    given |= told["ms"]
    return PIECE(name, *(f"{given.pop(p, 0.0):.2f}" for p in PIECES), given or "")


PIECE = "{:23} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {}".format


class Process:
    """One of the processes, with one GPU."""

    def __init__(self, index, settings):
        import jax

        self.index, self.settings, self.ready, self.first = index, settings, {}, {}
        self.dcn_link = settings.get("dcn_link")
        n = settings["gpus"]
        # This process sees one GPU; without the list, all of the host are looked for.
        local = {} if settings["cpu"] else {"local_device_ids": [0]}
        address = f"127.0.0.1:{settings['port']}"
        jax.distributed.initialize(address, n, index, **local)
        devices = sorted(jax.devices(), key=lambda d: d.process_index)
        auto = (jax.sharding.AxisType.Auto,) * 2
        shape = (2, n // 2) if n > 1 else (1, 1)
        self.mesh = jax.make_mesh(shape, ("dcn", "fsdp"), auto, devices=devices)

    def placed(self, *names):
        import jax

        return jax.NamedSharding(self.mesh, jax.P(*names))

    def wait(self):
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("step")

    def seconds(self, step, rounds, warm_up=3):
        """Wall seconds of each of ``rounds``, and bytes on the loopback interface."""
        import jax

        for _ in range(warm_up):
            jax.block_until_ready(step())
        self.wait()
        sent, seconds = counted(), []
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(step())
            seconds.append(time.perf_counter() - start)
        self.wait()
        return seconds, None if sent is None else counted() - sent

    def all_reduce_seconds(self, axis, size):
        import jax
        import jax.numpy as jnp

        shape, over = (*self.mesh.devices.shape, size), self.placed("dcn", "fsdp")
        x = jax.jit(lambda: jnp.ones(shape), out_shardings=over)()
        add = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.psum(x, axis),
                mesh=self.mesh,
                in_specs=over.spec,
                out_specs=jax.P(*(a for a in over.spec if a != axis)),
            )
        )
        return statistics.median(self.seconds(lambda: add(x), 7)[0])

    def link(self, axis):
        """Bits a second and seconds a message, from a large and a small all-reduce."""
        n, size = self.mesh.shape[axis], 1 << (22 if self.settings["cpu"] else 25)
        if n == 1:
            return None
        small = self.all_reduce_seconds(axis, 1)
        large = self.all_reduce_seconds(axis, size)
        sent = 2 * (n - 1) / n * 4 * size
        return 8 * sent / (large - small), small / (2 * (n - 1))

    def training(self, tx, axis, sharded_parameters, *, stands_still=False):
        """A jitted step, what it takes, how that begins, parameters' shapes, specs."""
        import jax
        import jax.numpy as jnp
        import optax

        import efopt

        settings, mesh = self.settings, self.mesh
        model = self.model(sharded_parameters)
        example = jnp.zeros((mesh.shape["fsdp"], settings["length"]), jnp.int32)
        init = lambda key: model.init(key, example)["params"]  # noqa: E731
        shapes = jax.eval_shape(init, jax.random.key(0))
        m = mesh.shape["fsdp"] if sharded_parameters else 1
        specs = jax.tree.map(lambda x: sharded(x, m), shapes)

        # Laid out in one program: each array by itself would be compiled for long.
        state = {"params": shapes, "opt": jax.eval_shape(tx.init, shapes)}
        state = efopt.distribute(state, mesh, specs)
        places = jax.tree.map(lambda x: x.sharding, state)
        # Numbers are drawn by one program for all methods: it takes long to compile.
        first = jax.jit(init, out_shardings=places["params"])
        first = self.first.setdefault(sharded_parameters, first)

        def fill(params):
            filled = {"params": params, "opt": tx.init(params)}
            return efopt.distribute(filled, mesh, specs)

        fill = jax.jit(fill, out_shardings=places, donate_argnums=0)

        def begin(key):
            return fill(first(key))

        def compiled(key):  # while others are compiled, too
            first.lower(key).compile()
            fill.lower(state["params"]).compile()
            return begin

        def step(state, tokens):
            grad = efopt.value_and_grad(self.loss_fn(model), axis_name=axis)
            params = efopt.local_params(state["params"], axis, state["opt"])
            loss, grads = grad(params, tokens)
            updates, opt = tx.update(grads, state["opt"], state["params"])
            if stands_still:
                return state | {"opt": opt}, loss
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "opt": opt}, loss

        step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        return step, state, compiled, shapes, specs

    def model(self, sharded_parameters=True):
        return transformer(self.settings, self.mesh if sharded_parameters else None)

    def loss_fn(self, model):
        """That of the next token, in the mean."""
        import jax.numpy as jnp
        import optax

        def loss_fn(params, tokens):
            logits = model.apply({"params": params}, tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits.astype(jnp.float32), tokens[:, 1:]).mean()

        return loss_fn

    def lower(self, method):
        """A method's step, lowered; what else it takes to train and to describe it."""
        import jax

        settings = self.settings
        axis = ("dcn", "fsdp") if method.startswith("hierarchical") else "dcn"
        tx, compressor, exchange = transformation(method)
        step, state, compiled, shapes, specs = self.training(
            tx, axis, axis == "dcn", stands_still=compressor is None
        )
        rows = settings["gpus"] * settings["batch"]
        over = self.placed(("dcn", "fsdp"))

        def tokens(key):
            shape = rows, settings["length"] + 1
            return jax.random.randint(key, shape, 0, settings["vocabulary"])

        tokens = jax.jit(tokens, out_shardings=over)
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowered = step.lower(state, tokens.eval_shape(key))
        begin = compiled(jax.random.key(0))
        planned = None
        if compressor is not None:
            planned = compressor, shapes, exchange, axis, specs
        parameters = sum(x.size for x in jax.tree.leaves(shapes))
        return lowered, begin, tokens, parameters, planned

    def compile(self, method):
        """The same, compiled, and the seconds that it took; or what went wrong."""
        start = time.perf_counter()
        try:
            lowered, *rest = self.lower(method)
            return lowered.compile(), *rest, time.perf_counter() - start
        except Exception as error:  # the others may work
            return error

    def prepare(self, method):
        """Compiles a method and those behind it, `jobs` at a time, before one is timed.

        The first is compiled by itself: what is tuned for it, its matrix products, is
        known to the others.
        """
        names = self.settings["methods"]
        at = names.index(method)
        some = names[at : at + self.settings["jobs"]] if at else names[:1]
        with ThreadPoolExecutor(len(some)) as pool:
            jobs = {pool.submit(self.compile, name): name for name in some}
            for job in as_completed(jobs):
                self.ready[jobs[job]] = job.result()
                report = {"method": None, "compiled": jobs[job]}
                print(json.dumps(report), flush=True)  # a sign of life

    def train(self, method):
        """Trains by a method, and describes it."""
        import jax

        import efopt

        if method not in self.ready:
            self.prepare(method)
        ready = self.ready.pop(method)
        if isinstance(ready, Exception):
            raise ready
        step, begin, tokens, parameters, planned, compile_seconds = ready
        settings, mesh = self.settings, self.mesh
        every = EVERY if method.startswith("local") else 1
        wire = efopt.wire.measure(step, mesh=mesh)
        tokens = tokens(jax.random.key(1))
        cell = [begin(jax.random.key(0))]

        def once():
            cell[0], loss = step(cell[0], tokens)
            return loss

        steps = -(-settings["steps"] // every) * every
        seconds, sent = self.seconds(once, steps)
        memory = jax.local_devices()[0].memory_stats() or {}
        in_use, needs = memory.get("bytes_in_use"), step.memory_analysis()
        spread = lambda axis: wire.bytes_over(axis).link / every  # noqa: E731
        middle = statistics.mean if every > 1 else statistics.median
        trained = planned is not None
        identical = self.identical(cell[0]["params"]) if trained else None
        found = {
            "step_seconds": middle(seconds),
            "seconds": seconds,
            "dcn_bytes": spread("dcn"),
            "dcn_counted": None if sent is None else sent / len(seconds) / mesh.size,
            "fsdp_bytes": spread("fsdp") * every if mesh.shape["fsdp"] > 1 else 0,
            "memory": in_use and in_use + needs.temp_size_in_bytes,
            "memory_in_use": in_use,
            "temporary_memory": needs.temp_size_in_bytes,
            "loss": float(once()),
            "identical": identical,
            "compile_seconds": compile_seconds,
            "parameters": parameters,
            "device": jax.local_devices()[0].device_kind,
            "version": f"jax {jax.__version__}",
        }
        if not settings["cpu"]:
            steps = 3 if every == 1 else every
            found["kernels"] = self.profile(once, steps, wire)
        if not trained:
            self.dcn_link = self.link("dcn")
            return found | {
                "dcn_link": self.dcn_link,
                "fsdp_link": self.link("fsdp"),
            }
        if self.dcn_link is None:
            return found
        compressor, shapes, exchange, axis, specs = planned
        plan = efopt.wire.plan(
            compressor,
            shapes,
            exchange=exchange,
            platform="cpu" if settings["cpu"] else "gpu",
            mesh=dict(mesh.shape),
            axis_name=axis,
            params_specs=specs,
            networks={"dcn": efopt.wire.Network(*self.dcn_link)},
        )
        return found | {
            "dcn_planned": plan.bytes_per_device / every,
            "exchange_seconds": plan.step_seconds / every,
        }

    def profile(self, once, steps, wire):
        """Milliseconds of a step by kinds of kernels, on the first device."""
        import jax

        self.wait()
        told, mine = None, self.index == 0
        with tempfile.TemporaryDirectory() as folder:
            try:
                with jax.profiler.trace(folder) if mine else contextlib.nullcontext():
                    for _ in range(steps):
                        jax.block_until_ready(once())
                if mine:
                    told = where_time_goes(kernels(folder), steps, wire)
            except Exception:  # what was timed before is worth more
                traceback.print_exc()
        self.wait()  # the others do so, whatever happened here
        return told

    def identical(self, params):
        """Whether both halves hold the same parameters, bit for bit."""
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        digest = hashlib.sha256()
        for x in jax.tree.leaves(params):
            digest.update(np.asarray(x.addressable_data(0)).tobytes())
        mine = np.frombuffer(digest.digest(), np.uint32)
        everyone = multihost_utils.process_allgather(mine)
        first, second = np.split(np.asarray(everyone), 2)
        return bool(np.array_equal(first, second))


def kernels(folder):
    """What ran on the device: start, end in ns, the kernel and its HLO operation."""
    import jax

    (path,) = Path(folder).rglob("*.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                told = {k: v for k, v in event.stats if isinstance(v, str)}
                ends = event.start_ns, event.start_ns + event.duration_ns
                found.append((*ends, event.name, told.get("hlo_op", "")))
    return sorted(found)


def kind_of(kernel, operation, axes):
    """Collectives by the axis they cross, matrix products, or the rest."""
    if "nccl" in kernel.lower() or plain(operation) in axes:
        return axes.get(plain(operation)) or level_of(kernel, operation)
    told = f"{kernel} {operation}".lower()
    return "matmul" if any(word in told for word in PRODUCTS) else "rest"


def level_of(kernel, operation):
    """The axis of a collective whose name in the profile is not that in the program.

    The partitioner names its own, over the fast axis, as HLO does; those that efopt
    asks for are named as in JAX. Gradients are reduced in bfloat16 inside a half.
    """
    asked = any(word in operation for word in ("psum", "all_to_all", "all_gather"))
    if asked or "SendRecv" in kernel or "AllReduce_Sum_f32" in kernel:
        return "dcn"
    return "fsdp"


def plain(operation):
    return operation.replace("-start", "").replace("-done", "")


def covered(spans):
    """How long at least one of sorted spans lasts."""
    total, until = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def where_time_goes(events, steps, wire):
    """Milliseconds of a step by kind, alone and idle, and the dearest kernels."""
    axes = {plain(c.name): "+".join(c.axes or ()) for c in wire.collectives}
    spans, each = {}, {}
    for start, end, kernel, operation in events:
        kind = kind_of(kernel, operation, axes)
        spans.setdefault(kind, []).append((start, end))
        took = each.setdefault((kind, kernel[:60], operation[:40]), [0.0, 0])
        took[0] += end - start
        took[1] += 1
    ms = lambda ns: 1e-6 * ns / steps  # noqa: E731
    busy = ms(covered([(a, b) for a, b, *_ in events]))
    others = [span for kind in spans if kind != "dcn" for span in spans[kind]]
    whole = ms(max(b for _, b, *_ in events) - events[0][0])
    dearest = sorted(each.items(), key=lambda item: -item[1][0])[:25]
    return {
        "ms": {kind: ms(covered(some)) for kind, some in spans.items()},
        "alone": busy - ms(covered(sorted(others))),
        "idle": whole - busy,
        "whole": whole,
        "launched": len(events) / steps,
        "dearest": [[*key, ms(ns), n / steps] for key, (ns, n) in dearest],
    }


def counted():
    """Bytes that the loopback interface has sent, or None where nothing counts them."""
    return int(COUNTER.read_text()) if COUNTER.exists() else None


def sharded(x, m):
    """The longest axis of a parameter over "fsdp", if it divides."""
    import jax

    longest = max(range(x.ndim), key=lambda i: x.shape[i])
    if m == 1 or x.ndim < 2 or x.shape[longest] % m:
        return jax.P()
    return jax.P(*("fsdp" if i == longest else None for i in range(x.ndim)))


def transformer(settings, mesh):
    """A decoder of blocks with pre-normalisation; the embedding is also the output.

    On a mesh over which parameters are sharded, activations say that they are split by
    sequences: left to itself, the compiler cuts some of them like the parameters and
    sends them from half to half.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    width, heads = settings["width"], settings["heads"]
    half = jnp.bfloat16

    def lying(x, *names):
        if mesh is None:
            return x
        there = jax.NamedSharding(mesh, jax.P(*names))
        return jax.lax.with_sharding_constraint(x, there)

    split = lambda x: lying(x, "fsdp")  # noqa: E731

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = lambda n, name: nn.Dense(n, use_bias=False, dtype=half, name=name)  # noqa: E731
            h = nn.RMSNorm(dtype=half)(x)
            qkv = split(dense(3 * width, "qkv")(h))
            qkv = qkv.reshape(*h.shape[:-1], 3, heads, width // heads)
            q, k, v = (qkv[..., i, :, :] for i in range(3))
            h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = split(x + dense(width, "out")(split(h.reshape(x.shape))))
            h = nn.RMSNorm(dtype=half)(x)
            h = split(nn.gelu(dense(4 * width, "up")(h)))
            return split(x + dense(width, "down")(h))

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            init = nn.initializers.normal(0.02)
            embed = self.param("embed", init, (settings["vocabulary"], width))
            place = self.param("place", init, (settings["length"], width))
            embed = lying(embed.astype(half))
            x = split(embed[split(tokens)] + place.astype(half))
            for _ in range(settings["layers"]):
                x = Block()(x)
            return split(nn.RMSNorm(dtype=half)(x) @ embed.T)

    return Decoder()


def transformation(method):
    """A method's transformation, and the compressor and exchange of its plan."""
    import jax.numpy as jnp
    import optax

    import efopt

    own = efopt.per_worker(optax.trace(MOMENTUM), axis_name="dcn")
    if method == "no exchange":
        return own, None, None
    if method.startswith("dense"):
        wide = efopt.compressors.identity()
        c = efopt.compressors.cast(jnp.bfloat16) if method == "dense bf16" else wide
        mean = efopt.compress(c, axis_name="dcn")
        return optax.chain(mean, optax.sgd(RATE, momentum=MOMENTUM)), c, None
    sign = efopt.scaled_sign(1024)
    if method.startswith("hierarchical"):
        both, way = ("dcn", "fsdp"), efopt.exchanges.hierarchical("fsdp", exchange=TWO)
        own = efopt.per_worker(optax.trace(MOMENTUM), axis_name=both)
        feedback = efopt.error_feedback(sign, axis_name=both, exchange=way)
        return optax.chain(own, feedback, optax.sgd(RATE)), sign, way
    if method.startswith("local"):
        feedback = efopt.error_feedback(sign, axis_name="dcn", exchange=TWO)
        rounds = efopt.local_steps(
            optax.sgd(RATE, momentum=MOMENTUM),
            optax.chain(feedback, optax.sgd(1.0)),
            every=EVERY,
            axis_name="dcn",
            delay=1 if method.endswith("delay") else 0,
        )
        return rounds, sign, TWO
    delay = int(method.endswith("delay"))
    c, exchange = {
        "sign all_gather": (sign, "all_gather"),
        "sign two_phase": (sign, TWO),
        "int8 two_phase": (efopt.quantize(8), TWO),
        "top_k 1 %": (efopt.top_k(fraction=0.01, block_size=1024), None),
        "random_block 1 %": (efopt.random_block(fraction=0.01), None),
        "power_sgd 4": (efopt.power_sgd(4), None),
    }[method.removesuffix(" delay")]
    feedback = efopt.error_feedback(c, axis_name="dcn", exchange=exchange, delay=delay)
    return optax.chain(own, feedback, optax.sgd(RATE)), c, exchange


def serve(process):
    """Prints what is found of each method, a line of JSON each."""
    for method in process.settings["methods"]:
        try:
            print(json.dumps({"method": method, **process.train(method)}), flush=True)
        except Exception:  # the others may work
            print(f"{method} failed:", file=sys.stderr)
            traceback.print_exc()
        gc.collect()


def draw(run, path):
    """A row a method: the time of a step, what the plan expects, and what is sent."""
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    methods = {n: m for n, m in run["methods"].items() if n != "no exchange"}
    names = sorted(methods, key=lambda name: methods[name]["step_seconds"])
    alone = run["methods"].get("no exchange", {}).get("step_seconds")
    plt.style.use(STYLE)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.33 * len(names)))
    for y, name in enumerate(names):
        found = methods[name]
        ms = 1e3 * found["step_seconds"]
        axes.plot(
            ms, y, "s" if name in TORCH else "o", color="C1" if name in TORCH else "C0"
        )
        if alone is not None and "exchange_seconds" in found:
            planned = 1e3 * (alone + found["exchange_seconds"])
            axes.plot(planned, y, "|", color="0.3", markersize=12)
        sent = (found["dcn_bytes"] or found["dcn_counted"] or 0) / 1e6
        about = f"{ms:.0f} ms, {sent:,.3g} MB"
        axes.annotate(about, (1.02, y), xycoords=("axes fraction", "data"), va="center")
    if alone is not None:
        axes.axvline(1e3 * alone, color="0.5", linestyle="--", linewidth=0.8)
    axes.set(
        xscale="log",
        xlabel="milliseconds of a step (bar: the plan; dashed: nothing exchanged)",
        yticks=range(len(names)),
        yticklabels=names,
        title=f"{run['machine']}, {run['parameters'] / 1e6:.0f} M parameters",
    )
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def measured(names, others, args):
    """Each method's name, and what was found."""
    began = time.monotonic()
    for script, some in (__file__, names), (TRAIN_TORCH, others):
        for name, found in launch_all(script, some, args, began + args.budget):
            if name is None:
                after = time.monotonic() - began
                print(f"{after:5.0f} s: compiled {found['compiled']}", flush=True)
            else:
                args.dcn_link = found.get("dcn_link", args.dcn_link)
                yield name, found


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--gpus", type=int, default=4, help="an even number, default: 4")
    add("--cpu", action="store_true", help="processes of one CPU device each")
    every = [*METHODS, *(TORCH if util.find_spec("torch") else ())]
    add("--methods", nargs="+", choices=[*METHODS, *TORCH], default=every)
    add("--one-host", action="store_true", help="halves that are not told apart")
    add("--layers", type=int, default=6)
    add("--width", type=int, default=2048)
    add("--heads", type=int, default=16)
    add("--vocabulary", type=int, default=32768)
    add("--length", type=int, default=512, help="of a sequence, default: 512")
    add("--batch", type=int, default=4, help="sequences of a device, default: 4")
    add("--steps", type=int, default=50, help="that are timed, default: 50")
    add("--limit", type=int, default=100, help="seconds of silence, default: 100")
    add("--budget", type=int, default=3600, help="seconds in all, default: 3600")
    add("--jobs", type=int, default=1, help="programs compiled at a time, default: 1")
    add("--output", type=Path, default=Path("gpu_hybrid.json"))
    parser.set_defaults(dcn_link=None)
    args = parser.parse_args()
    if args.gpus < 2 or args.gpus % 2:
        parser.error("--gpus must be even")
    if min(args.layers, args.heads, args.length, args.batch, args.steps) < 1:
        parser.error("numbers must be at least 1")
    if args.width % args.heads:
        parser.error("--heads must divide --width")

    # Whoever ends this ends the processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # First what plans are made of, then what others are compared with.
    names = [m for m in METHODS if m in args.methods]
    others = [m for m in TORCH if m in args.methods]
    command = shlex.join(["python", SCRIPT, *sys.argv[1:]])
    run = {"command": command, "machine": None, "methods": {}}
    run |= {k: v for k, v in vars(args).items() if isinstance(v, int)}
    for name, found in measured(names, others, args):
        device = found.pop("device"), found.pop("version"), found.pop("parameters")
        if not run["machine"]:
            run["machine"] = f"{args.gpus} x {device[0]}, {device[1]}"
            print(f"{run['machine']}; {device[2]:,} parameters")
            run["parameters"] = device[2]
            print(HEADS)
        if name in TORCH:
            run["torch"] = device[1]
        assert device[2] == run["parameters"]
        if "dcn_link" in found:
            run["dcn_link"] = found.pop("dcn_link")
            run["fsdp_link"] = found.pop("fsdp_link")
        run["methods"][name] = found
        found["pays_below"] = pays_below(found, run["methods"])
        print(row(name, found, run["methods"]), flush=True)
        write(args.output, {"runs": [run]})
    if not run["methods"]:
        sys.exit("gpu_hybrid.py: nothing could be measured")
    lines = [pieces(name, found) for name, found in run["methods"].items()]
    if any(lines):
        print("", PIECE("", *PIECES, ""), *filter(None, lines), sep="\n")
    if util.find_spec("matplotlib"):
        draw(run, args.output.with_suffix(".png"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        serve(Process(int(sys.argv[2]), json.loads(sys.argv[3])))
    else:
        main()
