"""What each collective sends: bytes that leave a device, and messages in sequence.

The algorithms are those that :mod:`efopt.wire` lists.
"""

from collections.abc import Callable

# Operation: bytes that leave a worker with `b` operand bytes, and messages in sequence.
_ALGORITHMS: dict[str, tuple[Callable[[int, int], int], Callable[[int], int]]] = {
    "all-reduce": (lambda b, n: -(-2 * (n - 1) * b // n), lambda n: 2 * (n - 1)),
    "reduce-scatter": (lambda b, n: -(-(n - 1) * b // n), lambda n: n - 1),
    "all-gather": (lambda b, n: (n - 1) * b, lambda n: n - 1),
    "all-to-all": (lambda b, n: -(-(n - 1) * b // n), lambda n: n - 1),
    "ragged-all-to-all": (lambda b, n: -(-(n - 1) * b // n), lambda n: n - 1),
    "collective-permute": (lambda b, n: b, lambda n: 1),
    "collective-broadcast": (lambda b, n: b, lambda n: n - 1),
}
OPERATIONS = frozenset(_ALGORITHMS)


def link_bytes(operation: str, operand_bytes: int, group_size: int) -> int:
    """Bytes that leave one worker of ``group_size``."""
    if group_size == 1:
        return 0
    return _ALGORITHMS[operation][0](operand_bytes, group_size)


def messages(operation: str, group_size: int) -> int:
    """Messages that one worker sends one after the other."""
    return _ALGORITHMS[operation][1](group_size) if group_size > 1 else 0
