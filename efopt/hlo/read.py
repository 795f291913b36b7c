"""Reads the collectives out of the HLO text of a compiled program.

The compiler has the last word on the wire: it widens narrow types, merges collectives
and replaces one by another. What its text says is what travels.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from efopt.hlo import links
from efopt.hlo.report import Collective

_Callers = dict[str, list[tuple[str, bool, float]]]
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


def read_hlo(text: str, num_partitions: int | None = None) -> tuple[Collective, ...]:
    """Reads every collective out of the optimised HLO text of a CPU, GPU or TPU.

    A start and its done are one collective, and so is the reduction of a whole tuple.
    A loop multiplies by its trip count where the text states it; all branches of a
    conditional count. What the compiler puts in a collective's place is reported as
    what it is, and ``instead_of`` names what stood there, where that shows.

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
      >>> from efopt.wire import WireReport, read_hlo
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
        if instruction["opcode"].removesuffix("-start") in links.OPERATIONS
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
        link_bytes=links.link_bytes(operation, given, size) * times,
        loop=loop,
        executions=None if math.isnan(runs) else times,
        instead_of=_replaced(operation, operands, body),
    )


def _replaced(
    operation: str, operands: str, body: Mapping[str, re.Match[str]]
) -> str | None:
    """What a TPU's compiler had before it wrote this collective, if that shows.

    It may turn an all-gather into the all-reduce of a buffer of zeros into which every
    worker has written its own part.
    """
    given = body.get(operands.lstrip("%"))
    if operation != "all-reduce" or given is None:
        return None
    if given["opcode"] != "dynamic-update-slice":
        return None
    buffer = body.get(given["operands"].split(",")[0].lstrip("%"))
    zeros = buffer is not None and buffer["opcode"] == "broadcast"
    return "all-gather" if zeros else None


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
