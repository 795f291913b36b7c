"""What a compiled program runs on one device: kernels, and the bytes that they move.

Every instruction of the text that is not free is one kernel, and reads its operands and
writes its result in full, but for slices: of these, and of what is changed in its
place, it moves only what it touches. A measure to compare texts by; caches, and what a
kernel reads more than once, it does not see.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from efopt.hlo.program import Body, Instruction, Program, names
from efopt.hlo.read import arrays_of

_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_CONTROL = {"while", "conditional", "call", "async-start"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_SAME = {"bitcast", "reshape", "copy", "convert"}


class Kernels(NamedTuple):
    """How much one call of a program runs.

    Attributes:
      number: Kernels, those of a loop as often as it runs.
      bytes: What they read and write.
      loops: Loops, each counted once.
    """

    number: float
    bytes: float
    loops: int


def count_kernels(text: str) -> Kernels:
    """Counts the kernels in the optimised HLO text of a CPU, GPU or TPU.

    A loop of unknown length counts once; of a conditional, the branch that moves most.

    Args:
      text: ``jax.jit(f).lower(...).compile().as_text()``.
    """
    program = Program.parse(text)
    return _run(program.entry(), program)


def _run(computation: str, program: Program) -> Kernels:
    body = program.bodies[computation]
    number, moved, loops = 0.0, 0.0, 0
    for instruction in body.values():
        opcode = instruction["opcode"]
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        if opcode in _CONTROL:
            inner = [_run(name, program) for name in _inside(instruction, program)]
            times = 1.0
            if opcode == "while":
                times = _trips(instruction, program)
                loops += 1
            most = max(inner, key=lambda k: k.bytes, default=Kernels(0, 0, 0))
            number += times * most.number
            moved += times * most.bytes
            loops += most.loops
            continue
        number += 1
        moved += _moved(instruction, body, program)
    return Kernels(number, moved, loops)


def _inside(instruction: Instruction, program: Program) -> list[str]:
    """The computations that an instruction runs as they stand."""
    told = program.called(instruction)
    if instruction["opcode"] == "while":
        return [name for name, role in told if role == "body"]
    return [name for name, _ in told if name in program.bodies]


def _trips(instruction: Instruction, program: Program) -> float:
    (body,) = _inside(instruction, program)
    found = [times for _, loop, times, _ in program.callers[body] if loop]
    return found[0] if len(found) == 1 and not math.isnan(found[0]) else 1.0


def _moved(instruction: Instruction, body: Body, program: Program) -> float:
    """Bytes that one kernel reads and writes."""
    given = [body[n] for n in names(instruction["operands"]) if n in body]
    inside = [program.bodies[name] for name, _ in program.called(instruction)]
    if instruction["opcode"] != "fusion" or not inside:
        return _moved_plain(instruction, given)
    return _moved_fused(inside[0], given, instruction)


def _moved_plain(instruction: Instruction, given: list[Instruction]) -> float:
    written = _size(instruction)
    if instruction["opcode"] in _SLICES:
        return 2 * written
    if instruction["opcode"] == "dynamic-update-slice":
        return 2 * _size(given[1])
    return written + sum(map(_size, given))


def _moved_fused(
    fused: Body, given: list[Instruction], instruction: Instruction
) -> float:
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for inner in fused.values():
        for place, name in enumerate(names(inner["operands"])):
            users.setdefault(name, []).append((inner, place))
    total = 0.0
    for inner in fused.values():
        if inner["opcode"] == "parameter":
            whole = _size(given[int(inner["operands"])])
            total += min(whole, _read(inner, users, fused))
    root = next(x for x in fused.values() if x["root"])
    outputs = [root]
    if root["opcode"] == "tuple":
        outputs = [fused[n] for n in names(root["operands"])]
    written = sum(_written(x, fused) for x in outputs)
    return total + min(written, _size(instruction))


def _read(
    value: Instruction,
    users: Mapping[str, list[tuple[Instruction, int]]],
    fused: Body,
) -> float:
    """Bytes of a fusion's operand that it reads."""
    total = 0.0
    for user, place in users.get(value["name"], []):
        if user["opcode"] in _SLICES and place == 0:
            total += _size(user)
        elif user["opcode"] == "dynamic-update-slice" and place == 0:
            continue  # changed in its place
        elif user["opcode"] in _SAME:
            total += _read(user, users, fused) * _size(value) / max(1, _size(user))
        else:
            return _size(value)
    return total


def _written(output: Instruction, fused: Body) -> float:
    while output["opcode"] in _SAME:
        output = fused[names(output["operands"])[0]]
    if output["opcode"] == "dynamic-update-slice":
        return _size(fused[names(output["operands"])[1]])
    return _size(output)


def _size(instruction: Instruction) -> float:
    return sum(n for _, _, n in arrays_of(instruction["type"]))
