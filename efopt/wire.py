"""Reads what travels between workers out of the compiled program.

The compiler has the last word on the wire: it widens narrow types, merges collectives
and replaces one by another. So :func:`measure` compiles a step and :func:`read_hlo`
reads the collectives out of its optimised HLO text. Two sizes, in bytes, are kept
apart: a worker gives ``b`` *operand bytes* to a collective of ``n`` workers, and then
this many *link bytes* leave it, rounded up (none if ``n = 1``):

* all-reduce, ring: ``2 (n-1)/n b``; reduce-scatter, ring: ``(n-1)/n b``;
* all-gather, ring: ``(n-1) b``; collective-permute, one message: ``b``;
* all-to-all, pairwise, and ragged-all-to-all, taken as equal shares: ``(n-1)/n b``;
* collective-broadcast, a chain: ``b``.

Not seen are send and recv, and what a custom kernel moves by itself.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

_LINK_BYTES: dict[str, Callable[[int, int], int]] = {
    "all-reduce": lambda b, n: -(-2 * (n - 1) * b // n),
    "reduce-scatter": lambda b, n: -(-(n - 1) * b // n),
    "all-gather": lambda b, n: (n - 1) * b,
    "all-to-all": lambda b, n: -(-(n - 1) * b // n),
    "ragged-all-to-all": lambda b, n: -(-(n - 1) * b // n),
    "collective-permute": lambda b, n: b,
    "collective-broadcast": lambda b, n: b,
}
_COLUMNS = "operation,type,shape,count,group,operand bytes,link bytes".split(",")

# `%computation (a: f32[8]) -> f32[8] {` opens a computation, and in it each line reads
# `ROOT %name = type opcode(operands), attributes`.
_OPENING = re.compile(r"(?:ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<operands>.*?)(?:\)(?:, (?P<attributes>.*))?)?$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_CALL = re.compile(
    r"\b(body|condition|branch_computations|true_computation|false_computation"
    r"|calls|to_apply|called_computations)=(\{[^}]*\}|[%\w.-]+)"
)
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
# A TPU may spread a collective over several fusions. All of them print it, but only the
# fusion that starts it has the flag -1.
_LATER_STEP = re.compile(r'async_collective_fusion_config\W+flag_start[\\":]+\d')
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\}[, ]*)*)\}")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}")  # {{0,1},{2,3}}
_IOTA = re.compile(r"replica_groups=\[[\d,]*?(\d+)\]<=")  # [2,4]<=[4,2]T(1,0)
_MESH = re.compile(  # mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y':(1)2}
    r"replica_groups=@?mesh[\[<]([^\]>]*)[\]>]"
    r"(?:, device_ids=\((?:[^()]|\([^()]*\))*\))? ?\{([^}]*)\}"
)


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, as one worker sees it.

    Attributes:
      operation: ``"all-reduce"``, ``"all-gather"``, ``"all-to-all"``,
        ``"reduce-scatter"``, ``"collective-permute"``, ``"collective-broadcast"`` or
        ``"ragged-all-to-all"``, also for their asynchronous forms.
      name: Name of the HLO instruction.
      element_types: HLO type of each operand's elements, for example ``("u32",)``.
      shapes: Shape of each operand on one worker.
      group_size: Number of workers that exchange with one another.
      operand_bytes: Bytes this worker gives to the collective, in all executions.
      link_bytes: Bytes that leave this worker, in all executions.
      loop: Whether it stands in a loop or a branch.
      executions: How often a step runs it, or ``None`` where the text does not tell;
        then the bytes are those of one execution.
    """

    operation: str
    name: str
    element_types: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group_size: int
    operand_bytes: int
    link_bytes: int
    loop: bool = False
    executions: int | None = 1


@dataclass(frozen=True)
class WireReport:
    """The collectives of one step. Printed, it is a table in bytes per worker."""

    collectives: tuple[Collective, ...]

    @property
    def operand_bytes(self) -> int:
        """Bytes one worker gives to collectives in a step."""
        return sum(c.operand_bytes for c in self.collectives)

    @property
    def bytes_sent_per_worker(self) -> int:
        """Bytes that leave one worker in a step."""
        return sum(c.link_bytes for c in self.collectives)

    def __str__(self) -> str:
        if not self.collectives:
            return "no collectives: nothing travels between workers"
        alike: dict[Collective, int] = defaultdict(int)
        for c in self.collectives:
            alike[replace(c, name="")] += 1
        rows = [_COLUMNS]
        for c, n in alike.items():
            types, shape = ",".join(dict.fromkeys(c.element_types)), _brief(c.shapes)
            count = f"{n}*" if c.executions is None else f"{n * c.executions}"
            sizes = f"{n * c.operand_bytes:,}", f"{n * c.link_bytes:,}"
            rows.append([c.operation, types, shape, count, f"{c.group_size}", *sizes])
        sizes = f"{self.operand_bytes:,}", f"{self.bytes_sent_per_worker:,}"
        rows.append(["total", "", "", "", "", *sizes])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(map("{:{}{}}".format, row, "<<<>>>>", widths)) for row in rows
        ]
        if any(c.executions is None for c in self.collectives):
            lines.append("* in a loop or branch, run unknown times: counted once")
        return "\n".join(lines)


def measure(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> WireReport:
    """Compiles ``fn`` for these arguments and reports what one call puts on the wire.

    Nothing is run, and donated arguments stay alive.

    Args:
      fn: The step, under ``jax.jit``, ``jax.pmap`` or plain (then it is jitted).
      *args: Arguments of ``fn``: arrays, or :class:`jax.ShapeDtypeStruct` with
        shardings, which may lie on devices that are not there.
      **kwargs: Keyword arguments of ``fn``.

    Returns:
      A :class:`WireReport`, in bytes per worker.

    Raises:
      TypeError: If ``fn`` is not callable, or the backend gives no HLO text.
      ValueError: If the text holds a collective that cannot be read.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(measure(lambda x: x + 1, jnp.zeros(3)))
      no collectives: nothing travels between workers
    """
    if not callable(fn):
        raise TypeError(
            "`measure(fn, ...)` must be given a function, got "
            f"{type(fn).__name__}; a text is read by `read_hlo(text)`."
        )
    lower = fn.lower if hasattr(fn, "lower") else jax.jit(fn).lower
    return WireReport(read_hlo(lower(*args, **kwargs).compile().as_text()))


def read_hlo(text: str, num_partitions: int | None = None) -> tuple[Collective, ...]:
    """Reads every collective out of the optimised HLO text of a CPU, GPU or TPU.

    A start and its done are one collective, and so is the reduction of a whole tuple.
    A loop multiplies by its trip count where the text states it; all branches of a
    conditional count. What the compiler has put in a collective's place is reported
    as what it is.

    Args:
      text: ``jax.jit(f).lower(...).compile().as_text()``, also for absent devices.
      num_partitions: Number of workers in all, for groups printed empty, which mean
        everybody. Default: as the ``HloModule`` line says.

    Returns:
      The collectives in the order of the text, with sizes in bytes.

    Raises:
      TypeError: If ``text`` is not a string.
      ValueError: If ``num_partitions`` is not a positive int, if the text is not HLO,
        or if it holds a collective that cannot be read: none is passed over.

    Examples:
      >>> text = '''
      ... %x = u32[64]{0} parameter(0)
      ... %y = u32[512]{0} all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}
      ... '''
      >>> print(WireReport(read_hlo(text)))
      operation   type  shape  count  group  operand bytes  link bytes
      all-gather  u32   [64]       1      8            256       1,792
      total                                            256       1,792
    """
    if not isinstance(text, str):
        raise TypeError(
            "`read_hlo(text)` must be a string, as `compiled.as_text()` gives it on a "
            f"CPU, GPU or TPU; got {type(text).__name__}."
        )
    if num_partitions is not None and not (
        type(num_partitions) is int and num_partitions > 0
    ):
        raise ValueError(
            f"`read_hlo(num_partitions=...)` must be a positive int, {num_partitions=}."
        )
    if num_partitions is None and (header := re.search(r"^HloModule .*", text, re.M)):
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header[0])
        num_partitions = math.prod(map(int, counts))

    computations: dict[str, dict[str, re.Match[str]]] = {"": {}}
    body = computations[""]
    for line in text.splitlines():
        if instruction := _INSTRUCTION.match(line):
            body[instruction["name"]] = instruction
        elif opening := _OPENING.match(line.strip()):
            body = computations.setdefault(opening[1], {})
    if not any(computations.values()):
        raise ValueError(
            "`read_hlo(text)` must be the HLO text of a compiled program, got a text "
            "without any HLO instruction; pass `.lower(...).compile().as_text()`, not "
            "`.lower(...).as_text()`."
        )
    executions = _executions(computations)
    return tuple(
        _collective(instruction, body, num_partitions, *executions(computation))
        for computation, body in computations.items()
        for instruction in body.values()
        if instruction["opcode"].removesuffix("-start") in _LINK_BYTES
        and not _LATER_STEP.search(instruction["attributes"] or "")
    )


def _executions(
    computations: Mapping[str, Mapping[str, re.Match[str]]],
) -> Callable[[str], tuple[bool, int | None]]:
    """Answers for a computation: is it in a loop or branch, how often is it run?"""
    sites: dict[str, list[tuple[str, bool, int | None]]] = defaultdict(list)
    for caller, body in computations.items():
        for instruction in body.values():
            attributes = instruction["attributes"] or ""
            if instruction["opcode"].endswith(("-update", "-done")):
                continue  # its start has already called the computation
            trips = int(found[1]) if (found := _TRIPS.search(attributes)) else None
            for role, names in _CALL.findall(_unquoted(attributes)):
                times = 1 if role.startswith("call") or role == "to_apply" else None
                if role in ("body", "condition") and trips is not None:
                    times = trips + (role == "condition")
                inside = role not in ("calls", "to_apply", "called_computations")
                for called in re.findall(r"[\w.-]+", names):
                    sites[called].append((caller, inside, times))

    @functools.cache
    def executions(computation: str) -> tuple[bool, int | None]:
        loop, total = False, 0
        for caller, inside, times in sites.get(computation, [("", False, 1)]):
            outer_loop, outer = executions(caller) if caller else (False, 1)
            loop |= inside or outer_loop
            known = total is not None and times is not None and outer is not None
            total = total + times * outer if known else None
        return loop, total

    return executions
