"""Who exchanges with whom: the groups of a collective, in every form that is printed.

All forms become explicit groups of positions in the program's list of devices, which
for a step on one mesh is ``mesh.devices.flat``. A program for several TPU slices is the
program of one slice, and its positions count the devices of that slice, in the same
order; what crosses between slices is named by the devices' own ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_PAIRS = re.compile(r"source_target_pairs=\"?\{((?:\{\d+,\d+\}[, ]*)*)\}")
_LISTED = re.compile(r"\breplica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}")  # {{0,1},{2,3}}
_IOTA = re.compile(  # [2,4]<=[4,2]T(1,0)
    r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_MESH = re.compile(  # mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y':(1)2}
    r"\breplica_groups=mesh\[(.*?)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{(.*?)\}"
)
_FORMS = re.compile(r"\breplica_groups=.*|source_target_pairs=.*")
_TARGETS = re.compile(  # "{1,2}x{0:7}" or {{100000,200000}} or {{100000->200000}}
    r"\b_xla_megascale_target=(?:\"\{([\d,:]+)\}x\{([\d,:]+)\}\"|\{((?:\{[^{}]*\},?)*)\})"
)
# A device of a slice has this many times the slice's number, from 1, added to its id.
_SLICE = 100_000


def groups(
    operation: str, attributes: str, partitions: int | None, replicas: int = 1
) -> Groups | None:
    """Groups of positions that exchange with one another.

    Args:
      operation: The collective's name.
      attributes: What the text says behind its operands.
      partitions: Number of partitions of the program, or ``None`` if not known.
      replicas: Number of its replicas; position ``r * partitions + p`` is partition
        ``p`` of replica ``r``.

    Returns:
      The groups, or ``None`` if the text cannot be read.
    """
    form = _FORMS.search(attributes)
    total = None if partitions is None else partitions * replicas
    found = _read(form[0], total) if form else None
    if not found or partitions is None or "use_global_device_ids=true" in attributes:
        return found
    numbers = {n for group in found for n in group}
    if "replica_groups={}" in attributes or replicas == 1 and numbers - {0}:
        return found  # everybody; or a flag left out where only one reading is left
    copies, parts = range(replicas), range(partitions)
    if "channel_id=" not in attributes:  # replicas, within each partition
        sets = [[(r, p) for r in group] for p in parts for group in found]
    elif operation in ("all-reduce", "reduce-scatter", "all-gather"):
        sets = [[(r, p) for r in group for p in parts] for group in found]
    else:  # partitions, within each replica
        sets = [[(r, p) for p in group] for r in copies for group in found]
    return tuple(tuple(r * partitions + p for r, p in group) for group in sets)


def _read(form: str, total: int | None) -> Groups | None:
    if pairs := _PAIRS.match(form):
        return linked(re.findall(r"(\d+),(\d+)", pairs[1]))
    if mesh := _MESH.match(form):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        if mesh[4]:
            ids = np.array(_ints(mesh[4]))
        else:
            ids = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3])
        axes = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", mesh[5])
        return _along(ids, sizes, axes)
    if iota := _IOTA.match(form):
        return _tuples(_iota(iota[2], iota[3]).reshape(_ints(iota[1])))
    if listed := _LISTED.match(form):
        found = tuple(
            tuple(_ints(group)) for group in re.findall(r"\{([^}]*)\}", listed[1])
        )
        if found or total is None:
            return found or None
        return (tuple(range(total)),)
    return None


def _along(
    ids: np.ndarray, sizes: dict[str, int], axes: Sequence[tuple[str, str, str]]
) -> Groups:
    """Groups along axes of a mesh, or parts of them: name, size in front, own size."""
    shape, grouped = [], {}
    for name, size in sizes.items():
        cuts = {(int(front), int(own)) for n, front, own in axes if n == name and own}
        if any(n == name and not own for n, _, own in axes):
            cuts = {(1, size)}
        done = 1
        for front, own in sorted(cuts):
            shape += [front // done, own]
            grouped[name, front, own] = len(shape) - 1
            done = front * own
        shape.append(size // done)
    order = [
        grouped[n, int(front or 1), int(own) if own else sizes[n]]
        for n, front, own in axes
    ]
    rest = [i for i in range(len(shape)) if i not in order]
    width = math.prod(shape[i] for i in order)
    return _tuples(ids.reshape(shape).transpose(rest + order).reshape(-1, width))


def between_slices(attributes: str) -> Groups | None:
    """Groups of device ids that a transfer between TPU slices joins, or ``None``."""
    found = _TARGETS.search(attributes)
    if found is None:
        return None
    if found[1]:  # the devices of equal number, of these slices
        return tuple(
            tuple(_SLICE * s + d for s in _ranges(found[1])) for d in _ranges(found[2])
        )
    if "->" in found[3]:
        return linked(re.findall(r"(\d+)->(\d+)", found[3]))
    return tuple(tuple(_ints(g)) for g in re.findall(r"\{([^{}]*)\}", found[3]))


def linked(pairs: Sequence[tuple[str, str]]) -> Groups:
    """The sets that pairs of source and target link."""
    sets: dict[int, set[int]] = {}
    for source, target in ((int(s), int(t)) for s, t in pairs):
        both = sets.get(source, {source}) | sets.get(target, {target})
        sets.update(dict.fromkeys(both, both))
    return tuple(dict.fromkeys(tuple(sorted(both)) for both in sets.values()))


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def _ranges(text: str) -> list[int]:
    found = (part.partition(":") for part in text.split(","))
    return [n for a, _, b in found for n in range(int(a), int(b or a) + 1)]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.replace(" ", "").split(",") if n]


def _tuples(array: np.ndarray) -> Groups:
    return tuple(map(tuple, array.tolist()))
