"""Which axes of a mesh a collective crosses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from efopt.hlo.report import Collective


class Layout:
    """Where the devices of a program stand in a mesh.

    Args:
      mesh: The mesh.
      num_devices: Number of devices of the program: those of the mesh, or of one of the
        TPU slices that the mesh spans.

    Raises:
      ValueError: If the mesh does not fit the program.
    """

    def __init__(self, mesh: jax.sharding.Mesh, num_devices: int) -> None:
        devices = list(mesh.devices.flat)
        self.axes = tuple(zip(mesh.axis_names, mesh.devices.shape, strict=True))
        self._shape = mesh.devices.shape
        self._positions = {device.id: i for i, device in enumerate(devices)}
        slices: dict[Any, list[int]] = {None: list(range(len(devices)))}
        if num_devices < len(devices):
            slices = {}
            for i, device in enumerate(devices):
                slices.setdefault(getattr(device, "slice_index", None), []).append(i)
        self._slices = list(slices.values())
        if {len(positions) for positions in self._slices} != {num_devices}:
            sizes = ", ".join(f"{name}={size}" for name, size in self.axes)
            raise ValueError(
                f"`measure(mesh=...)` must be the mesh of the step, which is compiled "
                f"for {num_devices} devices (of one slice, on TPU slices); got {sizes}."
            )
        self._known: dict[Any, tuple[tuple[str, ...], tuple[int, ...]]] = {}

    def placed(self, c: Collective) -> Collective:
        """The collective with the axes that it crosses."""
        key = c.between_slices, c.groups
        if key not in self._known:
            each = np.max([self._spans(group) for group in self._members(c)], axis=0)
            names = [name for name, _ in self.axes]
            crossed = [(x, int(n)) for x, n in zip(names, each, strict=True) if n > 1]
            axes, spans = zip(*crossed, strict=True) if crossed else ((), ())
            self._known[key] = axes, spans
        axes, spans = self._known[key]
        return replace(c, axes=axes, spans=spans)

    def _members(self, c: Collective) -> Iterable[list[int]]:
        """Positions in the mesh of each group."""
        if not c.groups:
            return [[0]]
        try:
            if c.between_slices:
                return [[self._positions[i] for i in group] for group in c.groups]
            return [
                [positions[i] for i in group]
                for positions in self._slices
                for group in c.groups
            ]
        except (IndexError, KeyError) as error:
            raise ValueError(
                f"`measure(mesh=...)` must be the mesh of the step: the {c.operation} "
                f"`{c.name}` joins a device, {error}, that it does not have."
            ) from None

    def _spans(self, group: list[int]) -> list[int]:
        """On how many positions of each axis a group stands."""
        coordinates = np.unravel_index(group, self._shape)
        return [len(np.unique(along)) for along in coordinates]


def meshes_of(shardings: Iterable[Any]) -> list[jax.sharding.Mesh]:
    """The meshes of some shardings that differ in more than the types of axes."""
    found: dict[Any, jax.sharding.Mesh] = {}
    for sharding in shardings:
        mesh = getattr(sharding, "mesh", None)
        if isinstance(mesh, jax.sharding.Mesh) and not mesh.empty:
            devices = tuple(device.id for device in mesh.devices.flat)
            key = mesh.axis_names, mesh.devices.shape, devices
            found.setdefault(key, mesh)
    return list(found.values())
