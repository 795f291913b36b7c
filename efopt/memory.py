"""What an optimizer's state takes of each worker's memory, from shapes alone."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from efopt.ground import options
from efopt.ground.dtypes import compute_dtype
from efopt.ground.tables import table
from efopt.workers.node import PerWorker


@dataclasses.dataclass(frozen=True)
class MemoryPart:
    """One part of a state, as one worker holds it.

    Attributes:
      name: Where it stands, such as ``"[0].residual"``.
      kind: The state of which transformation it is, such as ``"ErrorFeedbackState"``.
      per_worker: Whether it differs from worker to worker.
      arrays: How many arrays it is.
      bytes: Their bytes on one worker.
      exact: Of a compressed residual: the bytes of leaves that are kept exact.
    """

    name: str
    kind: str
    per_worker: bool
    arrays: int
    bytes: int
    exact: int = 0


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The state of an optimizer in bytes per worker. Printed, it is a table.

    Attributes:
      parts: The parts of the state, in order.
      params_bytes: Bytes of the parameters.
      error_feedback_bytes: Bytes of a residual of plain error feedback.
    """

    parts: tuple[MemoryPart, ...]
    params_bytes: int
    error_feedback_bytes: int

    @property
    def per_worker_bytes(self) -> int:
        """Bytes of what differs from worker to worker, which cannot be shared out."""
        return sum(p.bytes for p in self.parts if p.per_worker)

    @property
    def replicated_bytes(self) -> int:
        """Bytes of what is equal on all workers."""
        return sum(p.bytes for p in self.parts if not p.per_worker)

    @property
    def residual_bytes(self) -> int:
        """Bytes of what the feedback schemes keep of each worker's updates."""
        return sum(p.bytes for p in self.parts if p.name.endswith(".residual"))

    def __str__(self) -> str:
        whole = max(1, self.params_bytes)

        def row(name, kind, where, arrays, size):
            share = f"{size / whole:.3f}"
            return [name, kind, where, arrays, f"{size:,}", share]

        rows = [["part", "state of", "placement", "arrays", "bytes", "of parameters"]]
        notes = []
        for p in self.parts:
            where = "per worker" if p.per_worker else "replicated"
            rows.append(row(p.name, p.kind, where, f"{p.arrays}", p.bytes))
            if p.exact:
                notes.append(f"{p.name}: {p.exact:,} bytes of it are kept exact")
        total = self.per_worker_bytes + self.replicated_bytes
        rows.append(row("total", "", "", "", total))
        plain = self.error_feedback_bytes
        rows += [
            row("residual", "this", "per worker", "", self.residual_bytes),
            row("residual", "error_feedback", "per worker", "", plain),
            row("residual", "no feedback", "per worker", "", 0),
        ]
        return "\n".join([*table(rows, "<<<>>>"), *notes])


def memory_report(tx: optax.GradientTransformation, params: Any) -> MemoryReport:
    """Says what the state of an optimizer takes of each worker's memory.

    Nothing is allocated: the state is traced, and its shapes are counted as one worker
    holds them, per-worker arrays once and ranges that workers share out
    (``exchange="two_phase"``) whole, as for a single worker.

    Args:
      tx: Any Optax transformation, usually a chain with efopt inside.
      params: The parameters: arrays or :class:`jax.ShapeDtypeStruct`.

    Returns:
      A :class:`MemoryReport`. Printed, it is a table, with the residual of plain error
      feedback and of none for comparison.

    Raises:
      TypeError: If ``tx`` is no gradient transformation.

    Examples:
      >>> import jax, optax
      >>> import efopt
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
      >>> feedback = efopt.contractive_error_feedback(
      ...     efopt.random_block(fraction=0.1), memory=efopt.quantize(8),
      ...     axis_name="data")
      >>> print(efopt.memory_report(optax.chain(feedback, optax.sgd(0.1)), params))
      part          state of                       placement   arrays      bytes  of parameters
      [0].count     ContractiveErrorFeedbackState  replicated       1          4          0.000
      [0].residual  ContractiveErrorFeedbackState  per worker       2  1,008,006          0.252
      total                                                            1,008,010          0.252
      residual      this                           per worker          1,008,006          0.252
      residual      error_feedback                 per worker          4,000,000          1.000
      residual      no feedback                    per worker                  0          0.000
    """  # noqa: E501
    structs = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params
    )
    options.check("memory_report", "tx", tx, default=...)
    state = jax.eval_shape(tx.init, structs)
    leaves = jax.tree.leaves(structs)
    plain = sum(math.prod(x.shape) * compute_dtype(x.dtype).itemsize for x in leaves)
    parts = tuple(_parts(state, "", "", structs))
    return MemoryReport(parts, _bytes(leaves), plain)


def _parts(
    x: Any, name: str, kind: str, params: Any, stored: bool = False
) -> Iterator[MemoryPart]:
    """The fields of named tuples, and whatever stands beside them.

    A residual is stored in payloads where its state lays itself out.
    """
    if hasattr(x, "_fields"):
        lays_itself_out = hasattr(x, "placed")
        for field, value in zip(x._fields, x, strict=True):
            stored, kind = lays_itself_out and field == "residual", type(x).__name__
            yield from _parts(value, f"{name}.{field}", kind, params, stored)
    elif isinstance(x, tuple | list):
        for i, value in enumerate(x):
            yield from _parts(value, f"{name}[{i}]", kind, params)
    elif isinstance(x, dict) and _holds_states(x):
        for key, value in x.items():
            yield from _parts(value, f"{name}[{key!r}]", kind, params)
    elif isinstance(x, PerWorker) and _holds_states(x.value):
        for part in _parts(x.value, name, kind, params):
            yield dataclasses.replace(part, per_worker=True)
    elif jax.tree.leaves(x):
        arrays, exact = jax.tree.leaves(x), 0
        if stored:
            exact = _exact(x.value if isinstance(x, PerWorker) else x, params)
        per_worker = isinstance(x, PerWorker)
        name = name or "the state"
        yield MemoryPart(name, kind, per_worker, len(arrays), _bytes(arrays), exact)


def _holds_states(x: Any) -> bool:
    """Whether a named tuple, a state, stands anywhere in a tree."""
    # But for the empty ones, by which Optax marks what is masked out.
    is_state = lambda x: bool(getattr(x, "_fields", ()))  # noqa: E731
    return any(map(is_state, jax.tree.leaves(x, is_leaf=is_state)))


def _exact(residual: Any, params: Any) -> int:
    """Bytes of what is stored of leaves that no memory would make smaller."""
    leaves, treedef = jax.tree.flatten(params)
    total = 0
    for p, payload in zip(leaves, treedef.flatten_up_to(residual), strict=True):
        stored = _bytes(jax.tree.leaves(payload))
        whole = math.prod(p.shape) * compute_dtype(p.dtype).itemsize
        total += stored if stored >= whole else 0
    return total


def _bytes(arrays: Sequence[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
