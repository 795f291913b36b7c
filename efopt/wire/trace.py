"""What the exchange layer would send, from its trace: no device, no compiler.

The real conversation is traced with abstract values and its collectives are counted, so
that there is no second description of payloads, carriers and padding to go stale.
"""

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from efopt.codecs.compressor import Compressor
from efopt.exchanges.link import Link
from efopt.exchanges.opening import open_link
from efopt.hlo import algorithms
from efopt.hlo.report import Collective

AXIS = "workers"
_OPERATIONS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "reduce_scatter": "reduce-scatter",
}
_SILENT = ("axis_index", "pvary", "pcast")  # move nothing


def exchanged(
    compressor: Compressor,
    tree: Any,
    num_workers: int,
    exchange: Any = None,
    sums: Mapping[str, str] | None = None,
) -> list[Collective]:
    """The collectives of one step of ``compressor`` on a tree of structs.

    Args:
      compressor: The compressor.
      tree: The tree.
      num_workers: Number of workers.
      exchange: The exchange; ``None`` for the compressor's own.
      sums: The dtype in which a platform sums another, by their names.
    """
    link = open_link("plan", compressor, axis_name=AXIS, exchange=exchange)
    return list(_on_a_line(link, *_key(tree, sums), num_workers))


def exchanged_on(
    mesh: AbstractMesh,
    compressor: Compressor,
    tree: Any,
    specs: Sequence[P],
    axis_name: Any,
    exchange: Any = None,
    sums: Mapping[str, str] | None = None,
) -> list[Collective]:
    """The collectives of one step on a mesh, with parameters sharded behind workers.

    Traced in a region over all axes, as schemes open one: what is sharded is compressed
    by shard, what is equal on the devices of a worker in pieces.

    Args:
      mesh: The mesh.
      compressor: The compressor.
      tree: A tree of structs, of global shapes.
      specs: The spec of each leaf.
      axis_name: The axes of the workers.
      exchange: As for :func:`exchanged`.
      sums: As for :func:`exchanged`.
    """
    link = open_link("plan", compressor, axis_name=axis_name, exchange=exchange)
    return list(_on_a_mesh(link, *_key(tree, sums), mesh, tuple(specs)))


def _key(tree: Any, sums: Mapping[str, str] | None) -> tuple[Hashable, ...]:
    """A tree of structs and what else a trace depends on, to remember it by."""
    leaves, treedef = jax.tree.flatten(tree)
    widest = jnp.result_type(float)  # that of 64 bits, or not
    return treedef, tuple(leaves), tuple((sums or {}).items()), widest


# A trace takes most of a plan's time, and knows no bandwidth: plans for several links,
# and the advice of one, ask for the same few.
@functools.lru_cache(maxsize=256)
def _on_a_line(
    link: Link, treedef: Any, leaves: Any, sums: Any, widest: Any, num_workers: int
) -> Sequence[Collective]:
    del widest

    def step(tree):
        return link.average(link.receive(tree), link.init(tree), jnp.int32(0)).mean

    trace = jax.make_jaxpr(step, axis_env=[(AXIS, num_workers)])
    jaxpr = trace(treedef.unflatten(leaves)).jaxpr
    return [c for _, c in _collected(jaxpr, {AXIS: num_workers}, dict(sums))]


@functools.lru_cache(maxsize=256)
def _on_a_mesh(
    link: Link,
    treedef: Any,
    leaves: Any,
    sums: Any,
    widest: Any,
    mesh: AbstractMesh,
    specs: Sequence[P],
) -> Sequence[Collective]:
    del widest
    tree = treedef.unflatten(leaves)
    assert link.axes is not None and link.workers is not None
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    known = {
        jax.tree_util.keystr(path): spec
        for (path, _), spec in zip(paths, specs, strict=True)
    }

    def step(stacked):
        grads = jax.tree.map(lambda x: x.reshape(x.shape[1:]), stacked)
        state = link.init(tree).placed(mesh, lambda path, _: known[path])
        grads = link.scatter(grads, state.home)
        link.average(link.receive(grads), state, jnp.int32(0))
        return ()

    key, n = link.workers.key, link.workers.size_on(mesh)
    around = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(treedef.unflatten([P(key, *spec) for spec in specs]),),
        out_specs=(),
    )
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), tree)
    jaxpr = jax.make_jaxpr(around)(stacked).jaxpr
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    found = []
    for names, c in _collected(jaxpr, sizes, dict(sums)):
        crossed = [name for name in sizes if name in names and sizes[name] > 1]
        if crossed:
            spans = tuple(sizes[name] for name in crossed)
            found.append(replace(c, axes=tuple(crossed), spans=spans))
    return found


def _collected(
    jaxpr: Any, sizes: Mapping[str, int], sums: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], Collective]]:
    """The collectives over axes of these sizes, each with the names of its axes.

    All-reduces that do not wait for one another and sum one dtype are one: compilers
    combine them.
    """
    merged: dict[Any, list[Any]] = {}
    for i, (operation, names, stage, operand) in enumerate(_walk(jaxpr, sizes)):
        if operation == "all-reduce":
            dtype = np.dtype(sums.get(operand.dtype.name, operand.dtype))
            operand, i = jax.ShapeDtypeStruct(operand.shape, dtype), None
        key = operation, names, stage, operand.dtype, i
        merged.setdefault(key, []).append(operand)
    for (operation, names, *_), operands in merged.items():
        size = math.prod(sizes[name] for name in names)
        yield names, _collective(operation, operands, size)


def _collective(operation: str, operands: Sequence[Any], group_size: int) -> Collective:
    given = sum(x.size * x.dtype.itemsize for x in operands)
    return Collective(
        operation,
        name="",
        element_types=tuple(hlo_type(x.dtype) for x in operands),
        shapes=tuple(x.shape for x in operands),
        group_size=group_size,
        operand_bytes=given,
        link_bytes=algorithms.link_bytes(operation, given, group_size),
    )


def hlo_type(dtype: np.dtype) -> str:
    """What HLO calls a numeric dtype: ``"f32"``, ``"bf16"``, ``"u8"``."""
    short = dtype.name.replace("bfloat", "bf").replace("float", "f").replace("_", "")
    return short.replace("uint", "u").replace("int", "s")


def _walk(
    jaxpr: Any, sizes: Mapping[str, int]
) -> Iterator[tuple[str, tuple[str, ...], int, Any]]:
    """Yields operation, axes, stage and operand of each collective.

    The stage is the number of collectives that it has to wait for, one after the other.
    """
    stages: dict[Any, int] = {}
    for eqn in jaxpr.eqns:
        inputs = [stages.get(v, 0) for v in eqn.invars if not isinstance(v, Literal)]
        stage = max(inputs, default=0)
        ours = tuple(name for name in _axes(eqn.params) if name in sizes)
        name = eqn.primitive.name
        if name in _OPERATIONS and ours:
            for v in eqn.invars:
                if math.prod(v.aval.shape):
                    yield _OPERATIONS[name], ours, stage, v.aval
            stage += 1
        elif ours and name not in _SILENT:
            raise ValueError(f"`plan` does not know the collective `{name}`.")
        inner = [
            found for sub in jaxprs_in_params(eqn.params) for found in _walk(sub, sizes)
        ]
        for operation, names, depth, operand in inner:
            yield operation, names, stage + depth, operand
        stage += max((depth + 1 for _, _, depth, _ in inner), default=0)
        stages.update(dict.fromkeys(eqn.outvars, stage))


def _axes(params: Any) -> tuple[Any, ...]:
    names = params.get("axes", params.get("axis_name", ()))
    return names if isinstance(names, tuple) else (names,)
