"""What was found on the wire, and how it prints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from efopt.ground.tables import table
from efopt.hlo import algorithms

_COLUMNS = ["operation", "type", "shape", "count", "axes", "group"]
_COLUMNS += ["operand bytes", "link bytes"]
_AXES = _COLUMNS.index("axes")


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it.

    Attributes:
      operation: A name from the list in :mod:`efopt.wire`, such as ``"all-gather"``;
        asynchronous forms carry the same name, and so does what is sent and received
        between TPU slices.
      name: Name of the HLO instruction.
      element_types: HLO type of each operand's elements, for example ``("u32",)``.
      shapes: Shape of each operand on one device.
      group_size: Number of devices that exchange with one another.
      operand_bytes: Bytes this device gives to the collective, in all executions.
      link_bytes: Bytes that leave this device, in all executions.
      loop: Whether it stands in a loop or a branch.
      executions: How often a step runs it, or ``None`` where the text does not tell;
        then the bytes are those of one execution.
      bounded: Whether a step runs it no more often than that: also in a branch, and in
        a loop that every turn ends.
      instead_of: The operation that the compiler has replaced by this one, if that can
        be seen: ``"all-gather"`` for the all-reduce of a zero-padded buffer.
      between_slices: Whether it joins TPU slices, by way of their hosts: a ``send`` and
        a ``recv`` in the text.
      groups: The devices that exchange with one another, as positions in the program's
        list of devices: in ``mesh.devices.flat``, for one of several TPU slices in its
        devices alone. Ids of the devices if ``between_slices``. Those that pairs of
        source and target link are a group.
      axes: The axes of the mesh that it crosses: those along which devices of a group
        differ, in the order of the mesh. ``None`` where no mesh is known.
      spans: On how many positions of each of the ``axes`` a group stands.
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
    bounded: bool = True
    instead_of: str | None = None
    between_slices: bool = False
    groups: tuple[tuple[int, ...], ...] = field(default=(), compare=False, repr=False)
    axes: tuple[str, ...] | None = None
    spans: tuple[int, ...] = ()

    def bytes_across(self, axis: str | Sequence[str]) -> int:
        """Bytes a device that have to pass from one position of an axis to another.

        The least that the algorithms in :mod:`efopt.wire` can do, one position being
        one participant and its devices sharing the work: a sum is formed inside each
        position first and its parts are exchanged by different devices. The TPU
        compiler does so between slices; others need not.

        Args:
          axis: Name of an axis of the mesh, or several that count as one.

        Returns:
          The bytes, in all executions; 0 if it does not cross the axis.
        """
        names = (axis,) if isinstance(axis, str) else axis
        crossed = zip(self.axes or (), self.spans, strict=True)
        positions = math.prod(n for name, n in crossed if name in names)
        together = max(1, self.group_size // positions)  # devices of one position
        times = self.executions or 1
        given = self.operand_bytes // times
        if self.operation in ("all-reduce", "reduce-scatter", "collective-broadcast"):
            given = -(-given // together)
        return algorithms.link_bytes(self.operation, given, positions) * times


@dataclass(frozen=True)
class AxisBytes:
    """What crosses one axis of a mesh in a step, in bytes a device.

    A collective over several axes is in the first two sums of each of them whole,
    since its text does not say what takes which way; :attr:`least` is the part that
    cannot stay inside.

    Attributes:
      operand: Bytes that one device gives to collectives that cross the axis.
      link: Bytes that leave one device in those collectives, wherever they go.
      least: Bytes that have to pass between positions of the axis
        (:meth:`Collective.bytes_across`).
    """

    operand: int
    link: int
    least: int


@dataclass(frozen=True)
class WireReport:
    """The collectives of one step. Printed, it is a table in bytes per device.

    Attributes:
      collectives: The collectives, in the order of the program.
      note: What to know about a program that has none.
      mesh: Names and sizes of the axes of the mesh; empty where none is known.
    """

    collectives: tuple[Collective, ...]
    note: str = field(default="", compare=False)
    mesh: tuple[tuple[str, int], ...] = ()

    @property
    def operand_bytes(self) -> int:
        """Bytes one device gives to collectives in a step."""
        return sum(c.operand_bytes for c in self.collectives)

    @property
    def bytes_sent_per_worker(self) -> int:
        """Bytes that leave one device in a step."""
        return sum(c.link_bytes for c in self.collectives)

    def over(self, axis: str | Sequence[str]) -> WireReport:
        """The report of those collectives alone that cross an axis of the mesh.

        Args:
          axis: Name of the axis, or several: what crosses any of them.

        Returns:
          A report like this one.

        Raises:
          ValueError: If no mesh is known, or it has no such axis.

        Examples:
          >>> from efopt.wire import Collective, WireReport
          >>> mean = Collective("all-reduce", "mean", ("f32",), ((64,),), 8, 256, 448,
          ...                   axes=("dcn", "fsdp"), spans=(2, 4))
          >>> weights = Collective("all-gather", "w", ("f32",), ((8,),), 4, 32, 96,
          ...                      axes=("fsdp",), spans=(4,))
          >>> report = WireReport((mean, weights), mesh=(("dcn", 2), ("fsdp", 4)))
          >>> report.over("dcn").collectives == (mean,)
          True
          >>> report.bytes_over("dcn")
          AxisBytes(operand=256, link=448, least=64)
        """
        names = self._known((axis,) if isinstance(axis, str) else tuple(axis))
        crossing = (c for c in self.collectives if set(names) & set(c.axes or ()))
        return replace(self, collectives=tuple(crossing))

    def bytes_over(self, axis: str | Sequence[str]) -> AxisBytes:
        """What crosses an axis of the mesh in a step, in bytes a device.

        Args:
          axis: Name of the axis, or several that count as one.

        Returns:
          An :class:`AxisBytes`.

        Raises:
          ValueError: If no mesh is known, or it has no such axis.
        """
        crossing = self.over(axis)
        least = sum(c.bytes_across(axis) for c in crossing.collectives)
        return AxisBytes(crossing.operand_bytes, crossing.bytes_sent_per_worker, least)

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        sizes = ", ".join(f"{name}={size}" for name, size in self.mesh)
        if not self.mesh:
            raise ValueError(
                "`WireReport.over(axis)` needs to know the mesh, and nothing tells it; "
                "place the arguments of the step on it, or pass `mesh=...` to `measure`"
                " or `check`."
            )
        if not names or not set(names) <= {name for name, _ in self.mesh}:
            raise ValueError(
                f"`WireReport.over(axis)` must name an axis of the mesh, {sizes}; got "
                f"{', '.join(map(repr, names)) or 'none'}."
            )
        return names

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
            operation += "^" if c.between_slices else ""
            if c.instead_of:
                notes[
                    f"+ the compiler's, in place of an {c.instead_of} of "
                    f"{c.operand_bytes // c.group_size:,} bytes: the {c.operation} of "
                    "a zero-padded buffer, twice the bytes on the link"
                ] = None
            if c.between_slices:
                notes["^ between slices, sent and received by their hosts"] = None
            types, shape = ",".join(dict.fromkeys(c.element_types)), _brief(c.shapes)
            sizes = f"{n * c.operand_bytes:,}", f"{n * c.link_bytes:,}"
            axes = ",".join(c.axes or ("-",))
            row = [operation, types, shape, count, axes, f"{c.group_size}", *sizes]
            rows.append(row)
        sizes = f"{self.operand_bytes:,}", f"{self.bytes_sent_per_worker:,}"
        rows.append(["total", "", "", "", "", "", *sizes])
        for name, _ in self.mesh:
            over = self.bytes_over(name)
            sizes = f"{over.operand:,}", f"{over.link:,}"
            rows.append([f"over {name}", "", "", "", "", "", *sizes])
            if over.least != over.link:
                least = f"{name}: {over.least:,} of its link bytes have to cross it"
                notes[least] = None
        alignment = "<<<><>>>"
        if not self.mesh:
            rows = [row[:_AXES] + row[_AXES + 1 :] for row in rows]
            alignment = "<<<>>>>"
        return "\n".join([*table(rows, alignment), *notes])


def _brief(shapes: tuple[tuple[int, ...], ...]) -> str:
    first = str(list(shapes[0])).replace(" ", "")
    if len(set(shapes)) > 1:
        return f"{first} + {len(shapes) - 1} more"
    return first if len(shapes) == 1 else f"{len(shapes)} x {first}"
