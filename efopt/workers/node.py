"""The pytree node that marks what differs from worker to worker."""

import dataclasses
import sys
from typing import Any

import jax

from efopt.workers.axes import Axes, AxisName, vary, varying


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PerWorker:
    """State that differs from worker to worker along a mapped axis.

    Every array inside has a leading worker axis: of length 1 inside the mapped function
    and on a state fresh from ``init``, of length ``n`` as a global array placed by
    :func:`efopt.distribute`. The node marks itself, so the placement helpers find it in
    any pytree: an Optax chain, a Flax ``TrainState``, a checkpoint. Orbax takes it as
    it is, ``flax.serialization`` too (from the first node built after its import).

    Attributes:
      value: Pytree of arrays ``(1 or n, ...)``.
      axis_name: The mapped axis of the workers, or a tuple of axes. Static.
      split: ``None``: each worker owns a copy of its own (residuals). An int: the
        workers own consecutive ranges of that many blocks, which stand on the second
        axis; fresh from ``init`` one holds all of them (server residuals). Static.
      shards: The mesh axes behind each worker along which values differ as well, where
        they are laid out by shard; these have an array axis of their own, behind that
        of the workers. Static.
      remake: Of what is laid out by shard: makes a fresh value from the shards of the
        parameters, a tree of structs. Static.
    """

    value: Any
    axis_name: AxisName = dataclasses.field(metadata={"static": True})
    split: int | None = dataclasses.field(default=None, metadata={"static": True})
    shards: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    remake: Any = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        _register_with_flax()

    def local(self, api: str, extent: int | None = None) -> Any:
        """The value without its worker axis, inside the mapped function.

        Args:
          api: The caller, for the error.
          extent: The length that a split value must have on this worker.
        """
        axes = Axes.of(api, self.axis_name)
        typed = {*axes.names, *self.shards} if axes.typed() else set()
        lead = 2 if self.shards else 1
        for path, x in jax.tree_util.tree_flatten_with_path(self.value)[0]:
            placed = x.shape[:lead] == (1,) * lead
            if placed and extent is not None:
                placed = x.shape[lead] == extent
            placed = placed and typed <= varying(x)
            if not placed:
                raise ValueError(
                    f"{api} got per-worker state that is not laid out over the "
                    f"workers: {jax.tree_util.keystr(path) or 'its value'} has shape "
                    f"{x.shape} inside the function mapped over {self.axis_name!r}. "
                    "Place the state with `efopt.distribute(state, mesh)` and pass "
                    "`efopt.partition_specs(state)` as in_specs and out_specs of "
                    "`jax.shard_map`; for `pmap` and `vmap` use "
                    "`efopt.stack_workers(state, n)`."
                )
        return jax.tree.map(lambda x: x.reshape(x.shape[lead:]), self.value)

    @classmethod
    def wrap(
        cls,
        value: Any,
        axes: Axes,
        split: int | None = None,
        shards: tuple[str, ...] = (),
    ) -> "PerWorker":
        """The node around one worker's value, given without its worker axis."""
        value = vary(axes.vary(value), *shards)
        lead = (1, 1) if shards else (1,)
        value = jax.tree.map(lambda x: x.reshape(*lead, *x.shape), value)
        return cls(value, axes.key, split, shards)


def wrap(value: Any, axes: Axes | None) -> Any:
    """Marks what is each worker's own, if there are several workers."""
    return value if axes is None else PerWorker.wrap(value, axes)


def unwrap(api: str, value: Any) -> Any:
    """Inverse of :func:`wrap`, inside the mapped function."""
    return value.local(api) if is_node(value) else value


def is_node(x: Any) -> bool:
    """Whether ``x`` is a :class:`PerWorker`; for ``is_leaf``."""
    return isinstance(x, PerWorker)


def _register_with_flax() -> None:
    """Teaches ``flax.serialization`` the node, once Flax has been imported.

    Unknown nodes are stored whole by Flax, static fields and all, and come back as
    opaque objects. Flax is no dependency of efopt, so it is never imported from here.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is None or getattr(_register_with_flax, "done", False):
        return
    _register_with_flax.done = True

    def restore(target: PerWorker, state: Any) -> PerWorker:
        value = serialization.from_state_dict(target.value, state["value"])
        return dataclasses.replace(target, value=value)

    serialization.register_serialization_state(
        PerWorker, lambda x: {"value": serialization.to_state_dict(x.value)}, restore
    )
