"""Set-up of the tests that compile for a GPU, ahead of time and without one.

A plain `pytest` leaves this folder out (`norecursedirs` in pyproject.toml).
`pytest tests/gpu -n 0` runs it, where JAX's plugin for CUDA is installed.
"""

import importlib.util
import os

import pytest

# Nothing is tried out on a card that is not there, and no driver is asked for.
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
    raise pytest.UsageError(
        "tests/gpu compiles with the GPU compiler: pip install jax-cuda12-plugin "
        "jax-cuda12-pjrt, in the version of jax"
    )
