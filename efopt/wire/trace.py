"""What the exchange layer would send, from its trace: no device, no compiler.

The real conversation is traced with abstract values and its collectives are counted, so
that there is no second description of payloads, carriers and padding to go stale.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

from efopt.codecs.compressor import Compressor
from efopt.exchanges.link import open_link
from efopt.hlo import algorithms
from efopt.hlo.report import Collective

AXIS = "workers"
_OPERATIONS = {
    "psum": "all-reduce",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
}


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

    def step(tree):
        return link.average(link.receive(tree), link.init(tree), jnp.int32(0)).mean

    return traced(step, tree, num_workers, sums or {})


def traced(
    fn: Callable[..., Any], x: Any, num_workers: int, sums: Mapping[str, str]
) -> list[Collective]:
    """The collectives of ``fn(x)`` over the mapped axis :data:`AXIS`.

    All-reduces that do not wait for one another and sum one dtype are one: compilers
    combine them.
    """
    jaxpr = jax.make_jaxpr(fn, axis_env=[(AXIS, num_workers)])(x).jaxpr
    merged: dict[Any, list[Any]] = {}
    for i, (operation, stage, operand) in enumerate(_walk(jaxpr)):
        if operation == "all-reduce":
            dtype = np.dtype(sums.get(operand.dtype.name, operand.dtype))
            operand, i = jax.ShapeDtypeStruct(operand.shape, dtype), None
        merged.setdefault((operation, stage, operand.dtype, i), []).append(operand)
    return [
        _collective(operation, operands, num_workers)
        for (operation, *_), operands in merged.items()
    ]


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


def _walk(jaxpr: Any) -> Iterator[tuple[str, int, Any]]:
    """Yields operation, stage and operand of each collective.

    The stage is the number of collectives that it has to wait for, one after the other.
    """
    stages: dict[Any, int] = {}
    for eqn in jaxpr.eqns:
        inputs = [stages.get(v, 0) for v in eqn.invars if not isinstance(v, Literal)]
        stage = max(inputs, default=0)
        ours = AXIS in _axes(eqn.params)
        name = eqn.primitive.name
        if name in _OPERATIONS and ours:
            for v in eqn.invars:
                if math.prod(v.aval.shape):
                    yield _OPERATIONS[name], stage, v.aval
            stage += 1
        elif ours and name != "axis_index":
            raise ValueError(f"`plan` does not know the collective `{name}`.")
        inner = [found for sub in jaxprs_in_params(eqn.params) for found in _walk(sub)]
        for operation, depth, operand in inner:
            yield operation, stage + depth, operand
        stage += max((depth + 1 for _, depth, _ in inner), default=0)
        stages.update(dict.fromkeys(eqn.outvars, stage))


def _axes(params: Any) -> tuple[Any, ...]:
    names = params.get("axes", params.get("axis_name", ()))
    return names if isinstance(names, tuple) else (names,)
