"""The text of a compiled program as computations, and how often each of them runs."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# `%computation (a: f32[8]) -> f32[8] {` opens a computation, and in it each line reads
# `ROOT %name = type opcode(operands), attributes`.
_OPENING = re.compile(r"(?:ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(
    r"\s*(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<operands>.*?)(?:\)(?P<attributes>, .*)?)?$"
)
_CALL = re.compile(
    r"\b(body|condition|branch_computations|true_computation|false_computation"
    r"|calls|to_apply|called_computations)=(\{[^}]*\}|[%\w.-]+)"
)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")

Instruction = re.Match[str]
Body = Mapping[str, Instruction]
Call = tuple[str, bool, float, float]


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      bodies: Each computation: its instructions by their names.
      callers: Who calls it: caller, whether in a loop or branch, how often (or nan),
        and how often at most (or inf).
      partitions: ``num_partitions`` of the first line, or ``None`` without one.
      replicas: ``replica_count`` of the first line, or 1.
    """

    bodies: Mapping[str, Body]
    callers: Mapping[str, list[Call]]
    partitions: int | None
    replicas: int

    @classmethod
    def parse(cls, text: str) -> Program:
        """Reads a text; one that is no HLO has no instructions."""
        bodies: dict[str, dict[str, Instruction]] = {"": {}}
        computation = ""
        for line in _whole(text.splitlines()):
            if instruction := _INSTRUCTION.match(line):
                bodies[computation][instruction["name"]] = instruction
            elif opening := _OPENING.match(line.strip()):
                computation = opening[1]
                bodies[computation] = {}
        callers: dict[str, list[Call]] = defaultdict(list)
        for caller, body in bodies.items():
            for instruction in body.values():
                for called, inside, runs, most in _calls(instruction, body, bodies):
                    callers[called].append((caller, inside, runs, most))
        return cls(bodies, callers, *_counts(text))

    def entry(self) -> str:
        """The name of the computation that nothing calls."""
        return next(
            name
            for name in reversed(list(self.bodies))
            if self.bodies[name] and not self.callers.get(name)
        )

    def called(self, instruction: Instruction) -> list[tuple[str, str]]:
        """The computations that an instruction names, and in which role."""
        found = _CALL.findall(instruction["attributes"] or "")
        return [
            (name, role)
            for role, called in found
            for name in re.findall(r"[\w.-]+", called)
        ]

    def runs(self, computation: str) -> tuple[bool, float, float]:
        """If in a loop or branch; runs in a step (or nan), and at most (or inf)."""
        if computation not in self.callers:
            return False, 1, 1
        loop, runs, most = False, 0.0, 0.0
        for caller, inside, times, bound in self.callers[computation]:
            outer_loop, outer_runs, outer_most = self.runs(caller)
            loop, runs = loop or inside or outer_loop, runs + times * outer_runs
            most += bound * outer_most if bound else 0.0
        return loop, runs, most


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """Lines, those of an instruction that is printed on several in one."""
    begun = ""
    for line in lines:
        if begun and _INSTRUCTION.match(line):
            yield begun
            begun = ""
        begun = f"{begun} {line}" if begun else line
        if not (_open(begun) and _INSTRUCTION.match(begun)):
            yield begun
            begun = ""
    if begun:
        yield begun


def _open(line: str) -> bool:
    """Whether a brace is opened and not closed, those in quotes left out."""
    if line.count("{") <= line.count("}"):
        return False
    bare = _QUOTED.sub("", line)
    return bare.count("{") > bare.count("}")


def num_devices(text: str) -> int | None:
    """Number of devices of the program of a text, if its first line tells."""
    partitions, replicas = _counts(text)
    return None if partitions is None else partitions * replicas


def _counts(text: str) -> tuple[int | None, int]:
    """Partitions, or ``None`` without a first line, and replicas."""
    header = re.search(r"^HloModule .*", text, re.M)
    if header is None:
        return None, 1
    found = dict(re.findall(r"\b(num_partitions|replica_count)=(\d+)", header[0]))
    return int(found.get("num_partitions", 1)), int(found.get("replica_count", 1))


def names(operands: str) -> list[str]:
    """Names in a list of operands, with or without their types."""
    return re.findall(r"([\w.-]+)(?:,|$)", operands)


def _calls(
    instruction: Instruction, body: Body, bodies: Mapping[str, Body]
) -> Iterator[Call]:
    """Yields what it calls: name, if a loop or branch, runs (or nan), at most."""
    if instruction["opcode"].endswith(("-update", "-done")):
        return  # they repeat the call of their start
    calls = _CALL.findall(instruction["attributes"] or "")
    trips, most = math.nan, math.inf
    if instruction["opcode"] == "while":
        trips = _trips(instruction, body, bodies, dict(calls))
        once = math.isnan(trips) and _once(bodies, dict(calls))
        most = 1 if once else math.inf if math.isnan(trips) else trips
    looped = {"body": (trips, most), "condition": (trips + 1, most + 1)}
    for role, called in calls:
        plain = role in ("calls", "to_apply", "called_computations")
        runs, bound = (1, 1) if plain else looped.get(role, (math.nan, 1))
        for name in re.findall(r"[\w.-]+", called):
            yield name, not plain, runs, bound


def _trips(
    loop: Instruction, body: Body, bodies: Mapping[str, Body], calls: Mapping[str, str]
) -> float:
    """How often a loop runs: as the text states it, or as its counter shows, or nan.

    A counter is an element of the loop's tuple that starts at a constant, is raised by
    a constant and is compared, as less, with a constant.
    """
    if found := _TRIPS.search(loop["attributes"]):
        return int(found[1])
    condition = bodies.get(calls.get("condition", "").lstrip("%"), {})
    inside = bodies.get(calls.get("body", "").lstrip("%"), {})
    test, after = _root(condition), _root(inside)
    if not (test and after and test["opcode"] == "compare"):
        return math.nan
    if "direction=LT" not in (test["attributes"] or "") or after["opcode"] != "tuple":
        return math.nan
    start, steps = names(loop["operands"]), names(after["operands"])
    before = body.get(start[0]) if start else None
    if before is None or before["opcode"] != "tuple":
        return math.nan
    starts = names(before["operands"])

    def constant(name: str, where: Body) -> int | None:
        """The integer that a name stands for, also one that the loop carries along."""
        value = _source(name, where)
        if value is None:
            return None
        if value["opcode"] == "constant" and re.fullmatch(r"-?\d+", value["operands"]):
            return int(value["operands"])
        i = None if where is body else _element(value)
        if i is None or max(len(starts), len(steps)) <= i:
            return None
        kept = _source(steps[i], inside)
        if kept is None or _element(kept) != i:
            return None
        return constant(starts[i], body)

    counter, limit = names(test["operands"])
    i = _element(_source(counter, condition))
    if i is None or max(len(starts), len(steps)) <= i:
        return math.nan
    raised = _source(steps[i], inside)
    if raised is None or raised["opcode"] != "add":
        return math.nan
    terms = names(raised["operands"])
    by = [constant(t, inside) for t in terms if _element(_source(t, inside)) != i]
    first, last = constant(starts[i], body), constant(limit, condition)
    if len(by) != 1 or by[0] is None or by[0] <= 0 or first is None or last is None:
        return math.nan
    return max(0, -(-(last - first) // by[0]))


def _once(bodies: Mapping[str, Body], calls: Mapping[str, str]) -> bool:
    """Whether an element of a loop's tuple says if it goes on, and each turn denies."""
    condition, inside = (
        bodies.get(calls.get(role, "").lstrip("%"), {})
        for role in ("condition", "body")
    )
    test, after = _root(condition), _root(inside)
    if test is None or after is None or after["opcode"] != "tuple":
        return False
    i, steps = _element(_source(test["name"], condition)), names(after["operands"])
    denied = None if i is None or len(steps) <= i else _source(steps[i], inside)
    return denied is not None and (denied["opcode"], denied["operands"]) == (
        "constant",
        "false",
    )


def _root(body: Body) -> Instruction | None:
    return next((x for x in body.values() if x["root"]), None)


def _source(name: str, body: Body) -> Instruction | None:
    """The instruction behind a name, through copies."""
    found = body.get(name)
    while found is not None and found["opcode"] in ("copy", "bitcast", "copy-done"):
        found = body.get(names(found["operands"])[0])
        if found is not None and found["opcode"] == "copy-start":
            found = body.get(names(found["operands"])[0])
    return found


def _element(value: Instruction | None) -> int | None:
    """Which element of the loop's tuple a value is, if it is one."""
    if value is None or value["opcode"] != "get-tuple-element":
        return None
    found = re.search(r"\bindex=(\d+)", value["attributes"] or "")
    return int(found[1]) if found else None
