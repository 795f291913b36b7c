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

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
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
_Callers = dict[str, list[tuple[str, bool, float]]]
_COLUMNS = ["operation", "type", "shape", "count", "group"]
_COLUMNS += ["operand bytes", "link bytes"]

# `%computation (a: f32[8]) -> f32[8] {` opens a computation, and in it each line reads
# `ROOT %name = type opcode(operands), attributes`.
_OPENING = re.compile(r"(?:ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<operands>.*?)(?:\)(?P<attributes>, .*)?)?$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALL = re.compile(
    r"\b(body|condition|branch_computations|true_computation|false_computation"
    r"|calls|to_apply|called_computations)=(\{[^}]*\}|[%\w.-]+)"
)
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
# A TPU may spread a collective over several fusions. All of them print it, but only the
# fusion that starts it has the flag -1.
_LATER_STEP = re.compile(r'async_collective_fusion_config\W+flag_start[\\":]+\d')
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\}[, ]*)*)\}")
_LISTED = re.compile(r"\breplica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}")  # {{0,1},{2,3}}
_IOTA = re.compile(r"\breplica_groups=\[[\d,]*?(\d+)\]<=")  # [2,4]<=[4,2]T(1,0)
_MESH = re.compile(  # mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y':(1)2}
    r"\breplica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}"
)


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, as one worker sees it.

    Attributes:
      operation: A name from the list at the top of this module, such as
        ``"all-gather"``; asynchronous forms carry the same name.
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
        rows: list[list[str]] = [_COLUMNS]
        notes: set[str] = set()
        for c, n in Counter(replace(c, name="") for c in self.collectives).items():
            count = f"{n}*" if c.executions is None else f"{n * c.executions}"
            if c.executions is None:
                notes.add("* in a loop or branch, run unknown times: counted once")
            types, shape = ",".join(dict.fromkeys(c.element_types)), _brief(c.shapes)
            sizes = f"{n * c.operand_bytes:,}", f"{n * c.link_bytes:,}"
            rows.append([c.operation, types, shape, count, f"{c.group_size}", *sizes])
        sizes = f"{self.operand_bytes:,}", f"{self.bytes_sent_per_worker:,}"
        rows.append(["total", "", "", "", "", *sizes])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map("{:{}{}}".format, r, "<<<>>>>", widths)) for r in rows)
        return "\n".join([*lines, *notes])


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
      TypeError: If ``fn`` is not callable.
      ValueError: If the backend gives no HLO text, or :func:`read_hlo` cannot read it.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(measure(lambda x: x + 1, jnp.zeros(3)))
      no collectives: nothing travels between workers
    """
    if not callable(fn):
        raise TypeError(
            f"`measure(fn, ...)` must be given a function, got {type(fn).__name__}; "
            "a text is read by `read_hlo(text)`."
        )
    lower = getattr(fn, "lower", None) or jax.jit(fn).lower
    text = lower(*args, **kwargs).compile().as_text()
    if text is None:
        raise ValueError(
            "`measure(fn, ...)` needs the HLO text of the compiled step, but this "
            "backend gives none; compile for a CPU or, ahead of time, for a TPU."
        )
    return WireReport(read_hlo(text))


def read_hlo(text: str, num_partitions: int | None = None) -> tuple[Collective, ...]:
    """Reads every collective out of the optimised HLO text of a CPU, GPU or TPU.

    A start and its done are one collective, and so is the reduction of a whole tuple.
    A loop multiplies by its trip count where the text states it; all branches of a
    conditional count. What the compiler puts in a collective's place is reported as
    what it is.

    Args:
      text: ``jax.jit(f).lower(...).compile().as_text()``, also for absent devices.
      num_partitions: Number of workers in all, for groups that are printed empty and
        mean everybody. Default: as the ``HloModule`` line says.

    Returns:
      The collectives in the order of the text, with sizes in bytes.

    Raises:
      TypeError: If ``text`` is not a string.
      ValueError: If ``num_partitions`` is not a positive int, the text is not HLO, or
        it holds a collective that cannot be read: none is passed over.

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
            f"`read_hlo(text)` must be a string, got {type(text).__name__}; pass "
            "`compiled.as_text()`."
        )
    if num_partitions is None and (header := re.search(r"^HloModule .*", text, re.M)):
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header[0])
        num_partitions = math.prod(map(int, counts))
    elif num_partitions is not None and not (
        type(num_partitions) is int and num_partitions > 0
    ):
        raise ValueError(
            "`read_hlo(num_partitions=...)` must be a positive int, "
            f"got {num_partitions!r}."
        )
    bodies: dict[str, dict[str, re.Match[str]]] = {"": {}}
    callers: _Callers = defaultdict(list)
    computation = ""
    for line in text.splitlines():
        if instruction := _INSTRUCTION.match(line):
            bodies[computation][instruction["name"]] = instruction
            for called, role, times in _calls(instruction):
                callers[called].append((computation, role, times))
        elif opening := _OPENING.match(line.strip()):
            computation = opening[1]
            bodies[computation] = {}
    if not any(bodies.values()):
        raise ValueError(
            "`read_hlo(text)` must be the HLO text of a compiled program, got a text "
            "without any HLO instruction; pass `.lower(...).compile().as_text()`, not "
            "`.lower(...).as_text()`."
        )
    return tuple(
        _collective(instruction, body, num_partitions, *_runs(computation, callers))
        for computation, body in bodies.items()
        for instruction in body.values()
        if instruction["opcode"].removesuffix("-start") in _LINK_BYTES
        and not _LATER_STEP.search(instruction["attributes"] or "")
    )


def _calls(instruction: re.Match[str]) -> Iterator[tuple[str, bool, float]]:
    """Yields what it calls: name, whether that is a loop or branch, runs (or nan)."""
    if instruction["opcode"].endswith(("-update", "-done")):
        return  # they repeat the call of their start
    attributes = instruction["attributes"] or ""
    trips = int(found[1]) if (found := _TRIPS.search(attributes)) else math.nan
    for role, names in _CALL.findall(attributes):
        plain = role in ("calls", "to_apply", "called_computations")
        looped = {"body": trips, "condition": trips + 1}
        for name in re.findall(r"[\w.-]+", names):
            yield name, not plain, 1 if plain else looped.get(role, math.nan)


def _runs(computation: str, callers: _Callers) -> tuple[bool, float]:
    """Whether a computation is in a loop or branch, and how often it runs (or nan)."""
    if computation not in callers:
        return False, 1
    loop, runs = False, 0.0
    for caller, inside, times in callers[computation]:
        outer_loop, outer_runs = _runs(caller, callers)
        loop, runs = loop or inside or outer_loop, runs + times * outer_runs
    return loop, runs


def _collective(
    instruction: re.Match[str],
    body: Mapping[str, re.Match[str]],
    num_partitions: int | None,
    loop: bool,
    runs: float,
) -> Collective:
    name, operands = instruction["name"], instruction["operands"]
    operation = instruction["opcode"].removesuffix("-start")
    arrays = _arrays(operands)  # older texts print the types, newer ones names alone
    if not arrays:
        names = re.findall(r"([\w.-]+)(?:,|$)", operands)
        types = [body[n]["type"] for n in names if n in body]
        arrays = [array for type_ in types for array in _arrays(type_)]
        if not types or len(types) < len(names):
            raise ValueError(
                f"`read_hlo(text)` cannot find the operands of `{name}`, got "
                f"`{operands}`; pass the whole text, as the compiler prints it."
            )
    if operation == "ragged-all-to-all":
        arrays = arrays[:1]  # the others are the output buffer, offsets and sizes
    size = _group_size(instruction["attributes"] or "", num_partitions)
    if size is None:
        raise ValueError(
            f"`read_hlo(text)` cannot tell the group size of `{name}`, got "
            f"`{instruction['attributes']}`; if `replica_groups={{}}`, which means "
            "everybody, pass `num_partitions=...`."
        )
    given = sum(nbytes for _, _, nbytes in arrays)
    times = 1 if math.isnan(runs) else int(runs)
    return Collective(
        operation,
        name,
        element_types=tuple(element for element, _, _ in arrays),
        shapes=tuple(shape for _, shape, _ in arrays),
        group_size=size,
        operand_bytes=given * times,
        link_bytes=_LINK_BYTES[operation](given, size) * times if size > 1 else 0,
        loop=loop,
        executions=None if math.isnan(runs) else times,
    )


def _arrays(text: str) -> list[tuple[str, tuple[int, ...], int]]:
    """Element type, shape and bytes of every array type in ``text``."""
    arrays = []
    for element, digits, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(dim.strip("<=")) for dim in dims.split(",") if dim)
        packed = re.search(r"E\((\d+)\)", layout)  # several elements to the byte
        bits = int(packed[1]) if packed else max(8, int(digits or 8))
        arrays.append((element, shape, -(-math.prod(shape) * bits // 8)))
    return arrays


def _group_size(attributes: str, num_partitions: int | None) -> int | None:
    if pairs := _PAIRS.search(attributes):  # the largest set of workers they link
        linked: dict[str, set[str]] = {}
        for source, target in re.findall(r"(\d+),(\d+)", pairs[1]):
            both = linked.get(source, {source}) | linked.get(target, {target})
            linked.update(dict.fromkeys(both, both))
        return max(map(len, linked.values()), default=1)
    if mesh := _MESH.search(attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := _IOTA.search(attributes):
        return int(iota[1])
    if listed := _LISTED.search(attributes):
        groups = re.findall(r"\{([^}]*)\}", listed[1])
        return max((g.count(",") + 1 for g in groups), default=num_partitions)
    return None


def _brief(shapes: tuple[tuple[int, ...], ...]) -> str:
    first = str(list(shapes[0])).replace(" ", "")
    if len(set(shapes)) > 1:
        return f"{first} + {len(shapes) - 1} more"
    return first if len(shapes) == 1 else f"{len(shapes)} x {first}"
