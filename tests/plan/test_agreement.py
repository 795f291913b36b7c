"""Plan and compiled step, for every compressor, exchange and number of workers."""

import pytest
from registry import COMPRESSORS
from test_wire_plan import agree

pytestmark = pytest.mark.slow
CASES = {
    f"{row.name}-{exchange}-{n}": (row.make(), exchange, n)
    for row in COMPRESSORS
    for exchange in row.exchanges
    for n in (2, 4, 8)
}


@pytest.mark.parametrize(("compressor", "exchange", "n"), CASES.values(), ids=CASES)
def test_plan_agrees_with_the_compiled_step(compressor, exchange, n):
    agree(compressor, exchange, n)
