"""Runs tests/float64 in a process of its own: JAX has float64 for all or for none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "float64"


def run(*options, **variables):
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-n", "0", "-q", *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


@pytest.mark.slow
def test_float64():
    # Small programs: compiling them costs more than running them.
    run(JAX_DISABLE_MOST_OPTIMIZATIONS="1")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_float64_slow():
    run("-m", "slow")
