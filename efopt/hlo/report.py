"""What was found on the wire, and how it prints."""

from collections import Counter
from dataclasses import dataclass, field, replace

from efopt.ground.tables import table

_COLUMNS = ["operation", "type", "shape", "count", "group"]
_COLUMNS += ["operand bytes", "link bytes"]


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one worker sees it.

    Attributes:
      operation: A name from the list in :mod:`efopt.wire`, such as ``"all-gather"``;
        asynchronous forms carry the same name.
      name: Name of the HLO instruction.
      element_types: HLO type of each operand's elements, for example ``("u32",)``.
      shapes: Shape of each operand on one worker.
      group_size: Number of workers that exchange with one another.
      operand_bytes: Bytes this worker gives to the collective, in all executions.
      link_bytes: Bytes that leave this worker, in all executions.
      loop: Whether it stands in a loop or a branch.
      executions: How often a step runs it, or ``None`` where the text does not tell;
        then the bytes are those of one execution.
      instead_of: The operation that the compiler has replaced by this one, if that can
        be seen: ``"all-gather"`` for the all-reduce of a zero-padded buffer.
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
    instead_of: str | None = None


@dataclass(frozen=True)
class WireReport:
    """The collectives of one step. Printed, it is a table in bytes per worker.

    Attributes:
      collectives: The collectives, in the order of the program.
      note: What to know about a program that has none.
    """

    collectives: tuple[Collective, ...]
    note: str = field(default="", compare=False)

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
            return "no collectives: nothing travels between workers" + self.note
        rows: list[list[str]] = [_COLUMNS]
        notes: dict[str, None] = {}
        for c, n in Counter(replace(c, name="") for c in self.collectives).items():
            count = f"{n}*" if c.executions is None else f"{n * c.executions}"
            if c.executions is None:
                notes["* in a loop or branch, run unknown times: counted once"] = None
            operation = c.operation + ("+" if c.instead_of else "")
            if c.instead_of:
                notes[
                    f"+ the compiler's, in place of an {c.instead_of} of "
                    f"{c.operand_bytes // c.group_size:,} bytes: the {c.operation} of "
                    "a zero-padded buffer, twice the bytes on the link"
                ] = None
            types, shape = ",".join(dict.fromkeys(c.element_types)), _brief(c.shapes)
            sizes = f"{n * c.operand_bytes:,}", f"{n * c.link_bytes:,}"
            rows.append([operation, types, shape, count, f"{c.group_size}", *sizes])
        sizes = f"{self.operand_bytes:,}", f"{self.bytes_sent_per_worker:,}"
        rows.append(["total", "", "", "", "", *sizes])
        return "\n".join([*table(rows, "<<<>>>>"), *notes])


def _brief(shapes: tuple[tuple[int, ...], ...]) -> str:
    first = str(list(shapes[0])).replace(" ", "")
    if len(set(shapes)) > 1:
        return f"{first} + {len(shapes) - 1} more"
    return first if len(shapes) == 1 else f"{len(shapes)} x {first}"
