"""What every test stands on: eight virtual CPU devices and a cache of programs."""

import hashlib
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
# The suite is about eight devices, which a CPU can play anywhere. To run it on
# accelerators instead, say so: JAX_PLATFORMS=cuda pytest -n 0.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

NUM_DEVICES = 8
REPOSITORY = Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
# A residual of shape (d,) that meets a stack of shape (workers, d) must not broadcast
# in silence. The dtype counterpart is not set: Optax itself promotes.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in pytest's own cache: a warm run is much faster.

    Most of the time of the suite is compilation. `pytest --cache-clear` forgets it.

    The workers of xdist share the folder. JAX neither locks nor renames there, so that
    one worker may read what another has half written; the entry is compressed with a
    checksum, the read fails, JAX warns and compiles. That warning alone is ignored, in
    pyproject.toml.
    """
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
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
