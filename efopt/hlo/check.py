"""A promise about the wire that raises when it is broken."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax

from efopt.hlo.algorithms import OPERATIONS
from efopt.hlo.measure import measure
from efopt.hlo.report import Collective, WireReport


def check(
    fn: Callable[..., Any] | jax.stages.Lowered | jax.stages.Compiled,
    /,
    *args: Any,
    at_most: float | None = None,
    carriers: Iterable[str] = ("u8", "u16", "u32"),
    small: int = 64,
    axis: str | Sequence[str] | None = None,
    beyond: WireReport | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **kwargs: Any,
) -> WireReport:
    """Raises if a step sends more than promised, or in wider types.

    For a test of your own training step, with or without efopt in it: a dense
    all-reduce that slipped in, one that runs once per microbatch, a payload that the
    compiler widened, or a gather that it replaced by a reduction of twice the bytes
    break the promise. It is a ``ValueError`` rather than an ``AssertionError`` because
    a program may also ask before it starts to train, and decide.

    ``axis="dcn"`` makes it a promise about what crosses that axis of the mesh, whatever
    travels inside. ``beyond=report, axis="fsdp"`` promises that nothing crosses
    ``fsdp`` that is not in ``report``, such as that of the dense step:
    ``beyond=wire.measure(dense_step, ...)``.

    Args:
      fn: As for :func:`measure`.
      *args: As for :func:`measure`.
      at_most: Bytes that may leave a device in a step, such as the
        ``bytes_sent_per_worker`` of a :func:`plan`; ``None`` for no limit. With
        ``axis`` the link bytes of collectives that cross it, each counted whole. What
        stands in a branch counts as if it were taken: the meeting of local steps. With
        ``beyond`` the bytes more than there, and ``None`` is 0.
      carriers: HLO types that may travel: ``"u32"`` in any collective,
        ``"all-reduce:f32"`` in that one only, as linear payloads are.
      small: Collectives of so many operand bytes or fewer may have any type, for the
        sake of averaged losses and metrics. They do count for ``at_most``.
      axis: The axis of the mesh that the promise is about, or several: what crosses
        any of them. ``None`` for all that travels.
      beyond: What may travel anyhow, beside the promise: collectives equal to one of
        this report, and others of the same operation and type up to its bytes, since a
        compiler may merge or cut them.
      mesh: As for :func:`measure`.
      **kwargs: As for :func:`measure`.

    Returns:
      The :class:`WireReport` of the step, of all axes.

    Raises:
      TypeError: If ``carriers`` is one string, ``beyond`` is no :class:`WireReport`, or
        ``fn`` is none that can be measured.
      ValueError: If the promise is broken; it names the collective. Also if ``at_most``
        is negative, an operation in ``carriers`` is unknown, the mesh is not known or
        has no such axis, or a collective is in a loop of unknown length, so that no
        limit can be promised.

    Examples:
      >>> import jax.numpy as jnp
      >>> from efopt import wire
      >>> print(wire.check(lambda x: x + 1, jnp.zeros(3), at_most=0))
      no collectives: nothing travels between workers

      A step of 4 microbatches that averages its gradients in each of them, instead of
      their sum once. The report of any jitted step shows it, and a promise of one
      dense average, which sends at most twice the gradient's bytes, does not hold::

        report = wire.measure(step, state, batch)
        [c for c in report.over("data").collectives if c.executions != 1]
        wire.check(step, state, batch, axis="data", carriers=["f32"],
                   at_most=2 * 4 * num_parameters)
    """
    allowed = _allowed(carriers, at_most)
    if beyond is not None and not isinstance(beyond, WireReport):
        raise TypeError(
            "`check(beyond=...)` must be a `WireReport`, such as "
            f"`measure(dense_step, ...)`, got {type(beyond).__name__}."
        )
    report = measure(fn, *args, mesh=mesh, **kwargs)
    promised, granted, where, more = report, beyond, "", ""
    if axis is not None:
        promised, where = report.over(axis), f" over {axis!r}"
        granted = beyond and beyond.over(axis)
    found, sent = promised.collectives, promised.bytes_sent_per_worker
    if granted is not None:
        found, sent = _more(promised, granted)
        more = " more than in `beyond`"
        at_most = 0 if at_most is None else at_most
    unknown = [c for c in found if not c.bounded]
    if at_most is not None and unknown:
        raise ValueError(
            f"`check(at_most=...)` cannot be promised: {_described(unknown[0])} runs "
            f"an unknown number of times.\n{report}"
        )
    if at_most is not None and sent > at_most:
        largest = max(found, key=lambda c: c.link_bytes)
        raise ValueError(
            f"`check(at_most={at_most:,})`: {sent:,} bytes{more} leave a worker{where} "
            f"in a step, most of them in {_described(largest)}.\n{report}"
        )
    for c in found:
        wrong = [t for t in c.element_types if not {t, f"{c.operation}:{t}"} & allowed]
        if wrong and c.operand_bytes > small:
            raise ValueError(
                f"`check(carriers=...)` allows {', '.join(sorted(allowed))}, and "
                f"{_described(c)} carries {', '.join(dict.fromkeys(wrong))}.\n{report}"
            )
    return report


def _allowed(carriers: Iterable[str], at_most: float | None) -> set[str]:
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
    return allowed


def _more(
    report: WireReport, granted: WireReport
) -> tuple[tuple[Collective, ...], int]:
    """What a report has more than another: the collectives, and their link bytes.

    Equal ones are struck out first. Of the rest, an operation and type may take as many
    bytes as there, however they are cut into collectives.
    """
    equal = Counter(map(_nameless, report.collectives))
    equal &= Counter(map(_nameless, granted.collectives))
    ours, theirs = (_without(r.collectives, equal) for r in (report, granted))
    sizes: Counter[Any] = Counter()
    for c in ours:
        sizes[_kind(c)] += c.link_bytes
    for c in theirs:
        sizes[_kind(c)] -= c.link_bytes
    found = [c for c in ours if sizes[_kind(c)] > 0 or not c.bounded]
    return tuple(found), sum(n for n in sizes.values() if n > 0)


def _without(
    collectives: Sequence[Collective], struck: Counter[Collective]
) -> list[Collective]:
    left, rest = Counter(struck), []
    for c in collectives:
        if left[_nameless(c)]:
            left[_nameless(c)] -= 1
        else:
            rest.append(c)
    return rest


def _nameless(c: Collective) -> Collective:
    return replace(c, name="")


def _kind(c: Collective) -> tuple[str, frozenset[str]]:
    return c.operation, frozenset(c.element_types)


def _described(c: Collective) -> str:
    instead = f", which the compiler put in place of an {c.instead_of}"
    often = f", {c.executions} times" if (c.executions or 1) > 1 else ""
    over = f" over {', '.join(c.axes)}" if c.axes else ""
    return (
        f"the {c.operation} `{c.name}`{over} ({c.operand_bytes:,} operand bytes, "
        f"{c.link_bytes:,} on the link{often}{instead if c.instead_of else ''})"
    )
