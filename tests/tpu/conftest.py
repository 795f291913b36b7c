"""Set-up of the tests that compile for a TPU, ahead of time and without one.

A plain `pytest` leaves this folder out (`norecursedirs` in pyproject.toml).
`pytest tests/tpu -n 0` runs it, where the `tpu` extra is installed: in one process,
since only one at a time may hold the TPU library.
"""

import importlib.util
import os

import pytest

# Without it the TPU library asks the cloud's metadata server which TPU this is, and
# waits for the answer.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

if importlib.util.find_spec("libtpu") is None:
    raise pytest.UsageError(
        "tests/tpu compiles with the TPU compiler: pip install -e '.[tpu]'"
    )
