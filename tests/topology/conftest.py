"""The products of meshes, rows and entrances are too many for every night."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("slow"):
            item.own_markers = [m for m in item.own_markers if m.name != "slow"]
            item.add_marker(pytest.mark.exhaustive)
