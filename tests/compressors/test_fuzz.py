"""Some thousand random leaves for every compressor; a script takes them further."""

import dataclasses

import fuzz_compressors
import pytest
from registry import COMPRESSORS
from workers_under_test import slow

import efopt


@pytest.mark.parametrize(
    "row", [slow(row, rare=not row.kind, id=row.name) for row in COMPRESSORS]
)
def test_nothing_that_it_promises_fails(row):
    done, failed = fuzz_compressors.fuzz(row, 5000)
    assert done >= 5000 and failed == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top_k_3", "random_k_3"])
def test_a_factor_that_is_too_good_is_found(name, monkeypatch):
    (row,) = (row for row in COMPRESSORS if row.name == name)
    codec = type(row.make().codec)
    kept = codec.delta
    monkeypatch.setattr(
        codec, "delta", lambda self, shape: min(1, 3 * kept(self, shape))
    )
    assert any("keeps" in x for x in fuzz_compressors.fuzz(row, 20_000)[1])


@pytest.mark.slow
def test_a_range_that_is_too_wide_is_found():
    """Rescaled coordinates of float32's largest are beyond it."""
    row = dataclasses.replace(
        next(row for row in COMPRESSORS if row.name == "count_sketch"),
        largest=3.4e38,
    )
    assert any("not finite" in x for x in fuzz_compressors.fuzz(row, 20_000)[1])
    assert isinstance(row.make(), efopt.Compressor)
