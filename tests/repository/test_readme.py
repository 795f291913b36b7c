"""The code of the README runs, block after block, as one program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def program(text):
    """The python blocks alone, each on the line where it stands in the text."""
    lines, inside = [], False
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line.startswith("```python") or (inside and not fence)
    return "\n".join(lines) + "\n"


def test_program_keeps_python_blocks_and_line_numbers():
    text = "a\n```python\nb\n```\nc\n```\nd\n```\n```python\ne\n```\n"
    assert program(text) == "\n\nb\n\n\n\n\n\n\ne\n\n"


@pytest.mark.slow
def test_readme_runs_on_eight_virtual_devices(tmp_path):
    script = tmp_path / "README.py"
    script.write_text(program(README.read_text()))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "NPROC": "32",
    }
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "the README prints what a step sends"
    assert done.stdout.strip() in README.read_text(), done.stdout
