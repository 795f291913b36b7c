"""The products of meshes, rows and entrances are too many for every night.

What is slow here is exhaustive, but for what is `meshes.NIGHTLY`.
"""

from pathlib import Path

import meshes
import pytest


def pytest_collection_modifyitems(items):
    here = str(Path(__file__).parent)
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow and slow != meshes.NIGHTLY.mark and str(item.path).startswith(here):
            item.own_markers = [m for m in item.own_markers if m.name != "slow"]
            item.add_marker(pytest.mark.exhaustive)
