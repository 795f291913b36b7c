"""Arrays on the host, and arrays of which no host holds all."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

COLUMNS = "columns of "  # in front of the names of axes


def on_host(x: Any) -> np.ndarray:
    """An array as NumPy's, whole, wherever it lies."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def by_columns(x: Any, change: Callable[[np.ndarray], np.ndarray], lead: int) -> Any:
    """``change(x)`` on the host, for what works on every column of its own.

    Args:
      x: An array.
      change: From ``(*lead, columns...)`` to the same columns behind other axes.
      lead: How many axes stand in front of the columns.

    Returns:
      NumPy's array; or, of an array that spans processes, a global one, each device
      with the columns that it has.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            "has no values: `resize` takes arrays, `efopt.checkpoints.target` structs"
        )
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        data = by_columns(jax.random.key_data(x), change, lead)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return change(np.asarray(x))
    assert isinstance(x.sharding, NamedSharding)  # a global array on a mesh
    sharding = columns(x.shape, x.sharding.spec, x.sharding.mesh, lead)
    x = jax.device_put(x, sharding)
    parts = [
        jax.device_put(change(np.asarray(shard.data)), shard.device)
        for shard in x.addressable_shards
    ]
    shape = (*parts[0].shape[:lead], *x.shape[lead:])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def columns(shape: tuple[int, ...], spec: P, mesh: Any, lead: int) -> NamedSharding:
    """Where an array lies of which every device has all rows and few columns.

    The mesh of its devices has axes of other names: along these there are no workers,
    and a :class:`efopt.PerWorker` knows that (it puts its own axis in front of specs).

    Args:
      shape: Its shape.
      spec: How it is sharded; of that, what stands behind the leading axes stays.
      mesh: The mesh; the rest of its axes are used where they divide something.
      lead: How many axes stand in front of the columns.
    """
    entries: list[list[str]] = [[] for _ in shape]
    for d, entry in enumerate(spec):
        if d >= lead and entry is not None:
            entries[d] = list(entry) if isinstance(entry, tuple) else [entry]
    used = {name for entry in entries for name in entry}
    largest = sorted(range(lead, len(shape)), key=lambda d: -shape[d])
    for name in mesh.axis_names:
        for d in () if name in used else largest:
            by = math.prod(mesh.shape[a] for a in (name, *entries[d]))
            if shape[d] and shape[d] % by == 0:
                entries[d].append(name)
                break
    renamed = {name: COLUMNS + name.removeprefix(COLUMNS) for name in mesh.axis_names}
    placed = [tuple(renamed[name] for name in entry) or None for entry in entries]
    return NamedSharding(auto(mesh, tuple(renamed.values())), P(*placed))


def auto(mesh: Any, names: tuple[str, ...] | None = None) -> jax.sharding.Mesh:
    """The same mesh with axes that types do not tell of, perhaps of other names."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, names or mesh.axis_names, kinds)
