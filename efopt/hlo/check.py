"""A promise about the wire that raises when it is broken."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from efopt.hlo.links import OPERATIONS
from efopt.hlo.measure import measure
from efopt.hlo.report import Collective, WireReport


def check(
    fn: Callable[..., Any] | jax.stages.Lowered | jax.stages.Compiled,
    /,
    *args: Any,
    at_most: float | None = None,
    carriers: Iterable[str] = ("u8", "u16", "u32"),
    small: int = 64,
    **kwargs: Any,
) -> WireReport:
    """Raises if a step sends more than promised, or in wider types.

    For a test of your own training step: a dense all-reduce that slipped in, a payload
    that the compiler widened, or a gather that it replaced by a reduction of twice the
    bytes break the promise. It is a ``ValueError`` rather than an ``AssertionError``
    because a program may also ask before it starts to train, and decide.

    Args:
      fn: As for :func:`measure`.
      *args: As for :func:`measure`.
      at_most: Bytes that may leave a worker in a step, such as the
        ``bytes_sent_per_worker`` of a :func:`plan`; ``None`` for no limit.
      carriers: HLO types that may travel: ``"u32"`` in any collective,
        ``"all-reduce:f32"`` in that one only, as linear payloads are.
      small: Collectives of so many operand bytes or fewer may have any type, for the
        sake of averaged losses and metrics. They do count for ``at_most``.
      **kwargs: As for :func:`measure`.

    Returns:
      The :class:`WireReport` of the step.

    Raises:
      TypeError: If ``carriers`` is one string, or ``fn`` is none that can be measured.
      ValueError: If the promise is broken; it names the collective. Also if ``at_most``
        is negative, an operation in ``carriers`` is unknown, or a collective runs an
        unknown number of times, so that no limit can be promised.

    Examples:
      >>> import jax.numpy as jnp
      >>> from efopt import wire
      >>> print(wire.check(lambda x: x + 1, jnp.zeros(3), at_most=0))
      no collectives: nothing travels between workers
    """
    if isinstance(carriers, str):
        raise TypeError(
            "`check(carriers=...)` must be several HLO types, such as "
            f'("u8", "all-reduce:f32"), got the string {carriers!r}.'
        )
    if at_most is not None and not at_most >= 0:
        raise ValueError(f"`check(at_most=...)` must not be negative, got {at_most!r}.")
    allowed = set(carriers)
    for operation in (a.partition(":")[0] for a in allowed if ":" in a):
        if operation not in OPERATIONS:
            raise ValueError(
                f"`check(carriers=...)` names the operation {operation!r}; there are "
                f"{', '.join(sorted(OPERATIONS))}."
            )
    report = measure(fn, *args, **kwargs)
    for c in report.collectives:
        wrong = [t for t in c.element_types if not {t, f"{c.operation}:{t}"} & allowed]
        if wrong and c.operand_bytes > small:
            raise ValueError(
                f"`check(carriers=...)` allows {', '.join(sorted(allowed))}, and "
                f"{_described(c)} carries {', '.join(dict.fromkeys(wrong))}.\n{report}"
            )
        if at_most is not None and c.executions is None:
            raise ValueError(
                f"`check(at_most=...)` cannot be promised: {_described(c)} runs an "
                f"unknown number of times.\n{report}"
            )
    if at_most is not None and report.bytes_sent_per_worker > at_most:
        largest = max(report.collectives, key=lambda c: c.link_bytes)
        raise ValueError(
            f"`check(at_most={at_most:,})`: {report.bytes_sent_per_worker:,} bytes "
            f"leave a worker in a step, most of them in {_described(largest)}."
            f"\n{report}"
        )
    return report


def _described(c: Collective) -> str:
    instead = f", which the compiler put in place of an {c.instead_of}"
    return (
        f"the {c.operation} `{c.name}` ({c.operand_bytes:,} operand bytes, "
        f"{c.link_bytes:,} on the link{instead if c.instead_of else ''})"
    )
