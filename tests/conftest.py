"""What every test stands on: eight virtual CPU devices and a cache of programs."""

import collections
import gc
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

# All of this has to stand before jax is imported.
#
# XLA runs the virtual devices of a CPU on one pool of threads, as many as there are
# devices here. Independent collectives of one step can then starve each other: each
# holds some of the threads and waits for the rest, until XLA aborts the process after
# 40 seconds. XLA takes the size of the pool from NPROC; 32 threads are enough.
os.environ.setdefault("NPROC", "32")
# Eight devices that factorise matrices at once, each on all processors, wait for each
# other most of the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# The suite is about eight devices, which a CPU can play anywhere. To run it on
# accelerators instead, say so: JAX_PLATFORMS=cuda pytest -n 0.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
AS_USERS_COMPILE = "XLA_FLAGS" in os.environ

import jax  # noqa: E402
import pytest  # noqa: E402

NUM_DEVICES = 8
REPOSITORY = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
# A residual of shape (d,) that meets a stack of shape (workers, d) must not broadcast
# in silence. The dtype counterpart is not set: Optax itself promotes.
jax.config.update("jax_numpy_rank_promotion", "raise")


# Most of the time of the suite is compilation, of programs that run once and briefly:
# code that is made quickly beats code that runs quickly. What XLA does before it makes
# code (collectives, fusion, buffers) stays. XLA_FLAGS= pytest: as users compile.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=1"]
# A kernel by the emitters of old, and all of them at once: half of what is left. What
# follows 0.10 aborts at the first of these flags.
QUICKER = [
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]


def pytest_configure(config: pytest.Config) -> None:
    """Has programs compiled quickly, and keeps them."""
    if not AS_USERS_COMPILE:  # XLA reads it before its first program
        flags, old = QUICK, importlib.metadata.version("jaxlib").startswith("0.10.")
        if old and _is_default(config):
            flags = QUICK + QUICKER
        os.environ["XLA_FLAGS"] = " ".join(flags)
    _keep_programs(config)


def _keep_programs(config: pytest.Config) -> None:
    """Keeps compiled programs in pytest's own cache: a warm run is much faster.

    Most of the time of the suite is compilation. `pytest --cache-clear` forgets it.

    The workers of xdist share the folder. JAX neither locks nor renames there, so that
    one worker may read what another has half written; the entry is compressed with a
    checksum, the read fails, JAX warns and compiles. That warning alone is ignored, in
    pyproject.toml.
    """
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
        folder = config.cache.mkdir(f"jax-{_instruction_set()}")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _instruction_set() -> str:
    """Names the processor's instructions: programs for a CPU are its machine code."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    words = [platform.machine(), platform.processor(), *flags[:1]]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


# Tracing makes millions of small objects, and what is imported and collected stays
# until the end: the collector of garbage walked through it for a tenth of the time.
gc.set_threshold(50_000, 10, 10)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Has it look at what tests make alone."""
    del session
    gc.freeze()


# --------------------------------------------------------------- eager operations

# JAX compiles every operation outside `jit` as a program of its own, for each shape and
# dtype: they were most of what this suite compiled. A test that computes with `jnp`
# what NumPy can, or calls `update` without `jit`, costs more than it looks.
EAGER_BUDGET = 2700  # in a run of the default suite, all of its processes together
eager: collections.Counter[str] = collections.Counter()
running = ["collection"]


def _is_operation(name: str) -> bool:
    """Whether a program is a single operation of JAX, by its name."""
    name = name.removeprefix("jit(").removesuffix(")")
    public = name.strip("_")
    rooms = jax.numpy, jax.lax, jax.random
    return any(hasattr(room, public) for room in rooms) or "threefry" in name


def _count(event: str, duration: float, fun_name: str = "", **details: object) -> None:
    del duration, details
    # What is lowered is counted, whether or not a cache holds the machine code.
    if event.endswith("jaxpr_to_mlir_module_duration") and _is_operation(fun_name):
        eager[running[0]] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    running[0] = item.nodeid.partition("::")[0]
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Adds what a worker of xdist has counted."""
    del error
    eager.update(getattr(node, "workeroutput", {}).get("eager", {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["eager"] = dict(eager)
    elif _is_over_budget(session.config) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    total = sum(eager.values())
    terminalreporter.write_line(f"{total} eager operations compiled")
    if _is_over_budget(config):
        most = ", ".join(f"{file}: {n}" for file, n in eager.most_common(5))
        terminalreporter.write_line(
            f"FAILED: at most {EAGER_BUDGET} are allowed (see tests/conftest.py); most "
            f"of them in {most}",
            red=True,
        )


def _is_over_budget(config: pytest.Config) -> bool:
    """The budget is that of the default suite, whatever part of it runs."""
    return _is_default(config) and sum(eager.values()) > EAGER_BUDGET


def _is_default(config: pytest.Config) -> bool:
    return config.getoption("markexpr").startswith("not slow")


@pytest.fixture(scope="session")
def mesh() -> jax.sharding.Mesh:
    """All devices on one Auto axis, `data`."""
    assert jax.device_count() == NUM_DEVICES, (
        f"the suite needs {NUM_DEVICES} devices, got {jax.devices()}"
    )
    return jax.make_mesh(
        (NUM_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )


@pytest.fixture(scope="session")
def data_dir() -> Path | None:
    """The folder of real data sets beside the checkout, where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None
