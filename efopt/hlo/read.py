"""Reads the collectives out of the HLO text of a compiled program.

The compiler has the last word on the wire: it widens narrow types, merges collectives
and replaces one by another. What its text says is what travels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from efopt.hlo import algorithms, groups
from efopt.hlo.program import Body, Instruction, Program, names
from efopt.hlo.report import Collective

_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
# A TPU may spread a collective over several fusions. All of them print it, but only the
# fusion that starts it has the flag -1.
_LATER_STEP = re.compile(r'async_collective_fusion_config\W+flag_start[\\":]+\d')

# Between the slices of a TPU a collective is a send and a recv, by way of the hosts.
_SLICE_RUNTIME = '"xla_megascale_runtime"'
_BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "ALL_TO_ALL": "all-to-all",
    "REDUCE_SCATTER": "reduce-scatter",
    "ONE_TO_ONE": "collective-permute",
}
# A GPU may cut a collective-permute into a send and a recv.
_CUT_PERMUTE = "_xla_send_recv_source_target_pairs="
# To and from a device's own host, for `jax.debug.print` and other callbacks.
_CALLBACK = '"pjrt_rendezvous"'

# What shows that an instruction may move data between devices, whatever it is called.
_MOVES = re.compile(
    r"\b(?:replica_groups|source_target_pairs|channel_id|is_host_transfer)="
)
_MOVING_NAMES = re.compile(
    r"(?:all-|collective-|reduce-scatter|ragged-all|send|recv|infeed|outfeed)"
)
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_MOVING_TARGETS = re.compile(
    r"collective|all_?(?:reduce|gather|to_?all)|reduce_?scatter|permute|send_?recv|nccl"
    r"|nvshmem|(?:^|_)mpi_|megascale",
    re.I,
)
_MOVING_KERNELS = re.compile(r'\\?"has_communication\\?":\s*true')
# The computation that these stand in holds the collective itself.
_MARKS = ("AsyncCollectiveStart", "AsyncCollectiveDone")


def read_hlo(text: str, num_partitions: int | None = None) -> tuple[Collective, ...]:
    """Reads every collective out of the optimised HLO text of a CPU, GPU or TPU.

    A start and its done are one collective, and so are a send and its recv, and the
    reduction of a whole tuple. A loop multiplies by its trip count where the text
    states it or shows a counter; all branches of a conditional count, and a loop that
    each turn ends, as that of a meeting of local steps, once. What the compiler
    puts in a collective's place is reported as what it is, and ``instead_of`` names
    what stood there, where that shows. What passes between a device and its own host
    (callbacks) is not counted.

    Args:
      text: ``jax.jit(f).lower(...).compile().as_text()``, also for absent devices.
      num_partitions: Number of devices in all, for groups that are printed empty and
        mean everybody. Default: as the ``HloModule`` line says.

    Returns:
      The collectives in the order of the text, with sizes in bytes. Their ``axes`` are
      ``None``, since a text does not tell the mesh: :func:`measure` knows it.

    Raises:
      TypeError: If ``text`` is not a string.
      ValueError: If ``num_partitions`` is not a positive int, the text is not HLO, or
        it holds something that moves data between devices and cannot be read: nothing
        is passed over.

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
    if num_partitions is not None and not (
        type(num_partitions) is int and num_partitions > 0
    ):
        raise ValueError(
            "`read_hlo(num_partitions=...)` must be a positive int, "
            f"got {num_partitions!r}."
        )
    program = Program.parse(text)
    if not any(program.bodies.values()):
        raise ValueError(
            "`read_hlo(text)` must be the HLO text of a compiled program, got a text "
            "without any HLO instruction; pass `.lower(...).compile().as_text()`, not "
            "`.lower(...).as_text()`."
        )
    return tuple(collectives(program, num_partitions))


def collectives(
    program: Program, num_partitions: int | None = None
) -> Iterator[Collective]:
    """Yields every collective of a program; the rest as :func:`read_hlo`."""
    sent = {
        _meeting(instruction)
        for body in program.bodies.values()
        for instruction in body.values()
        if instruction["opcode"] == "send"
    }
    for computation, body in program.bodies.items():
        for instruction in body.values():
            operation = _operation(instruction, sent)
            later = _LATER_STEP.search(instruction["attributes"] or "")
            if operation is not None and not later:
                found = _collective(
                    instruction, operation, body, program, num_partitions
                )
                yield _repeated(found, *program.runs(computation))


def _operation(instruction: Instruction, sent: set[str]) -> str | None:
    """Which collective an instruction is or starts; ``None`` if none.

    Raises if it moves data between devices in a way that is not known.
    """
    opcode, attributes = instruction["opcode"], instruction["attributes"] or ""
    if opcode.removesuffix("-start") in algorithms.OPERATIONS:
        return opcode.removesuffix("-start")
    if opcode.endswith(("-done", "-update")):
        return None  # what they end has been met
    if opcode == "send":
        if _CALLBACK in attributes:
            return None
        if _CUT_PERMUTE in attributes:
            return "collective-permute"
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
        if _SLICE_RUNTIME in attributes and kind and kind[1] in _BETWEEN_SLICES:
            return _BETWEEN_SLICES[kind[1]]
        raise _unknown(instruction, opcode)
    if opcode == "recv":
        if _CALLBACK in attributes or _meeting(instruction) in sent:
            return None
        raise _unknown(instruction, "recv without its send")
    if opcode.startswith("custom-call"):
        target = _TARGET.search(attributes)
        target = target[1] if target else ""
        if target not in _MARKS and (
            _MOVING_TARGETS.search(target) or _MOVING_KERNELS.search(attributes)
        ):
            raise _unknown(instruction, f"custom-call {target}")
    plain = re.sub(r'"[^"]*"', "", attributes)
    if _MOVING_NAMES.match(opcode) or _MOVES.search(plain):
        raise _unknown(instruction, opcode)
    return None


def _unknown(instruction: Instruction, what: str) -> ValueError:
    return ValueError(
        f"`read_hlo(text)` does not know how many bytes the {what} "
        f"`{instruction['name']}` moves between devices, got "
        f"`{(instruction['attributes'] or '')[:200]}`; measure the step without it, or "
        "use a collective of `jax.lax`."
    )


def _meeting(instruction: Instruction) -> str:
    """What a send and its recv have in common."""
    attributes = instruction["attributes"] or ""
    for form in (
        r'_xla_host_transfer_rendezvous="([^"]*)"',
        rf"{_CUT_PERMUTE}\"?(\{{(?:\{{[^}}]*\}},? ?)*\}})",
        r"channel_id=(\d+)",
    ):
        if found := re.search(form, attributes):
            return found[1]
    return ""


def _collective(
    instruction: Instruction,
    operation: str,
    body: Body,
    program: Program,
    num_partitions: int | None,
) -> Collective:
    """One execution of it."""
    name, operands = instruction["name"], instruction["operands"]
    arrays = arrays_of(operands)  # older texts print the types, newer ones names alone
    if not arrays:
        given = names(operands)
        types = [body[n]["type"] for n in given if n in body]
        arrays = [array for type_ in types for array in arrays_of(type_)]
        if not types or len(types) < len(given):
            raise ValueError(
                f"`read_hlo(text)` cannot find the operands of `{name}`, got "
                f"`{operands}`; pass the whole text, as the compiler prints it."
            )
    if operation == "ragged-all-to-all":
        arrays = arrays[:1]  # the others are the output buffer, offsets and sizes
    attributes = instruction["attributes"] or ""
    between = _SLICE_RUNTIME in attributes
    if between:
        found = groups.between_slices(attributes)
    elif num_partitions is None:
        counts = program.partitions, program.replicas
        found = groups.groups(operation, attributes, *counts)
    else:
        found = groups.groups(operation, attributes, num_partitions)
    if found is None:
        raise ValueError(
            f"`read_hlo(text)` cannot tell the group size of `{name}`, got "
            f"`{attributes}`; if `replica_groups={{}}`, which means everybody, pass "
            "`num_partitions=...`."
        )
    size = max(map(len, found), default=1)
    nbytes = sum(n for _, _, n in arrays)
    return Collective(
        operation,
        name,
        element_types=tuple(element for element, _, _ in arrays),
        shapes=tuple(shape for _, shape, _ in arrays),
        group_size=size,
        operand_bytes=nbytes,
        link_bytes=algorithms.link_bytes(operation, nbytes, size),
        instead_of=_replaced(operation, operands, body),
        between_slices=between,
        groups=found,
    )


def _repeated(c: Collective, loop: bool, runs: float, most: float) -> Collective:
    """All executions of it in a step; one where their number is not known."""
    times = 1 if math.isnan(runs) else int(runs)
    return replace(
        c,
        operand_bytes=c.operand_bytes * times,
        link_bytes=c.link_bytes * times,
        loop=loop,
        executions=None if math.isnan(runs) else times,
        bounded=most <= times,
    )


def _replaced(
    operation: str, operands: str, body: Mapping[str, Instruction]
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


def arrays_of(text: str) -> list[tuple[str, tuple[int, ...], int]]:
    """Element type, shape and bytes of every array type in ``text``."""
    arrays = []
    for element, digits, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(dim.strip("<=")) for dim in dims.split(",") if dim)
        packed = re.search(r"E\((\d+)\)", layout)  # several elements to the byte
        bits = int(packed[1]) if packed else max(8, int(digits or 8))
        arrays.append((element, shape, -(-math.prod(shape) * bits // 8)))
    return arrays
