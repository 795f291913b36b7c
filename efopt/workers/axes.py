"""The mapped axes of the workers: the one caller of collectives, by one name or many.

Under ``shard_map`` with its default checks an array's type says over which axes its
value varies. Under ``pmap``, ``vmap`` and without the checks, types say nothing. All
questions about that are asked here and nowhere else.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes along which workers are laid out, the slowest first.

    Several axes are one: workers are numbered as in the flattened mesh, row by row.

    Attributes:
      names: Their names, at least one.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, api: str, axis_name: Any, option: str = "axis_name") -> "Axes":
        """The axes of an ``axis_name=``: a string, or a tuple of them, or an error."""
        names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
        if not names or not all(isinstance(name, str) and name for name in names):
            raise TypeError(
                f"`{api}({option}=...)` must be the name of a mapped axis, or a tuple "
                f"of such names, got {axis_name!r}."
            )
        if len(set(names)) < len(names):
            raise ValueError(
                f"`{api}({option}=...)` names an axis twice, got {axis_name!r}."
            )
        return cls(names)

    @classmethod
    def maybe(cls, api: str, axis_name: Any) -> "Axes | None":
        """The same, or ``None`` for ``None``: a single worker."""
        return None if axis_name is None else cls.of(api, axis_name)

    @property
    def key(self) -> AxisName:
        """The name itself if there is one, else the tuple; for a ``PartitionSpec``."""
        return self.names[0] if len(self.names) == 1 else self.names

    # ------------------------------------------------------------ what is known of them

    def bound(self) -> bool:
        """Whether the trace is inside functions mapped over all of them."""
        return all(map(_is_bound, self.names))

    def typed(self) -> bool:
        """Whether types tell which arrays vary over them."""
        return all(_is_typed(name) for name in self.names)

    def size(self) -> int:
        """The number of workers."""
        return math.prod(self.sizes())

    def sizes(self) -> tuple[int, ...]:
        """The lengths of the axes, one by one."""
        return tuple(lax.axis_size(name) for name in self.names)

    def size_on(self, mesh: Any) -> int:
        """The number of workers on a mesh that has these axes."""
        return math.prod(mesh.shape[name] for name in self.names)

    def index(self) -> jax.Array:
        """The number of this worker: int32, shape=()."""
        index = lax.axis_index(self.names[0])
        for name in self.names[1:]:
            index = index * lax.axis_size(name) + lax.axis_index(name)
        return index

    def require_bound(self, api: str, cure: str = "") -> None:
        """Raises unless the trace is inside functions mapped over all of them."""
        for name in self.names:
            if not _is_bound(name):
                raise ValueError(
                    f"{api} works over the mapped axis {name!r}, and none of that name "
                    "is bound here. Call it inside `jax.shard_map`, `jax.pmap` or "
                    f"`jax.vmap(..., axis_name={name!r})`; in a plain jitted step over "
                    "global arrays take the gradients of `efopt.value_and_grad(..., "
                    f"axis_name={self.key!r})` as they are{cure}."
                )

    def require_local(self, api: str, updates: Any) -> None:
        """Raises if types say that updates are already equal on all workers."""
        typed = [name for name in self.names if _is_typed(name)]
        for path, x in jax.tree_util.tree_flatten_with_path(updates)[0]:
            for name in typed:
                if name in varying(x):
                    continue
                raise ValueError(
                    f"{api} got updates that are already equal on all workers along "
                    f"{name!r}, at {jax.tree_util.keystr(path) or 'the root'}: there "
                    "is nothing left to compress. Inside `jax.shard_map`, `jax.grad` "
                    "sums over workers when parameters are replicated; differentiate "
                    f"with respect to `efopt.local_params(params, {self.key!r})`. To "
                    "gather several mini-batches, use `efopt.accumulate` in place of "
                    "`optax.MultiSteps`."
                )

    # -------------------------------------------------------------------- what they do

    def vary(self, tree: Any) -> Any:
        """Casts every leaf to varying over them, where types are on."""
        return vary(tree, *self.names)

    def may_differ(self, x: Any) -> bool:
        """Whether ``x`` may differ between workers, as far as types tell."""
        return not self.typed() or bool(varying(x) & set(self.names))

    def pmean(self, tree: Any) -> Any:
        """The mean over workers of every leaf."""
        return lax.pmean(tree, self.key)

    def max(self, x: jax.Array) -> jax.Array:
        """The largest over workers."""
        return lax.pmax(self.vary(x), self.key)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over workers."""
        return lax.psum(self.vary(x), self.key)

    def sum_behind(self, x: jax.Array) -> jax.Array:
        """The sum over all mapped axes behind each worker along which ``x`` varies.

        Where types do not tell, over all that are mapped.
        """
        known = varying(x) if self.typed() else manual_axes()
        names = tuple(sorted(set(known) - set(self.names)))
        return lax.psum(x, names) if names else x

    def all_gather(self, x: jax.Array) -> jax.Array:
        """Every worker's ``x`` along a new first axis, typed as equal everywhere."""
        if self.typed():
            return lax.all_gather(x, self.key, to="invarying")
        for name in reversed(self.names):
            x = lax.all_gather(x, name)
        return x.reshape(-1, *x.shape[len(self.names) :])

    def mean_scatter(self, x: jax.Array) -> jax.Array:
        """The mean over workers of ``(workers, ...)``, of which each gets its row.

        The sum is taken in at least float32: one of float16 may be infinite.
        """
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (self.sum_scatter(wide) / self.size()).astype(x.dtype)

    def sum_scatter(self, x: jax.Array) -> jax.Array:
        """The sum over workers of ``(workers, ...)``, of which each gets its row."""
        return lax.psum_scatter(x, self.key, scatter_dimension=0, tiled=True)

    def any(self, x: jax.Array) -> jax.Array:
        """Whether something holds on any worker; equal on all."""
        return lax.psum(self.vary(x.astype(jnp.float32)), self.key) > 0

    def all_to_all(self, x: jax.Array) -> jax.Array:
        """Row ``i`` of ``(workers, ...)`` goes to worker ``i``."""
        if len(self.names) == 1 or self.typed():
            return lax.all_to_all(x, self.key, 0, 0, tiled=True)
        # Not every mapping takes several names at once: one axis after the other.
        sizes = [lax.axis_size(name) for name in self.names]
        y = x.reshape(*sizes, *x.shape[1:])
        for i, name in enumerate(self.names):
            y = lax.all_to_all(y, name, i, i, tiled=True)
        return y.reshape(x.shape)


def manual_axes() -> tuple[str, ...]:
    """The mesh axes that are mapped here, those of the workers among them."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varying(x: Any) -> frozenset[str]:
    """The mapped axes over which the type of ``x``, array or struct, says it varies."""
    kind = getattr(x, "manual_axis_type", None)
    if kind is None:
        kind = getattr(jax.typeof(x), "mat", None)
    return frozenset(kind.varying) if kind is not None else frozenset()


def vary(tree: Any, *names: str) -> Any:
    """Casts every leaf to varying over the axes, where types are on."""

    def cast(x):
        missing = tuple(a for a in names if a not in varying(x) and _is_typed(a))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_alike(xs: Sequence[Any]) -> list[Any]:
    """Arrays cast to varying over all axes over which any of them varies."""
    names = frozenset[str]().union(*map(varying, xs))
    return [vary(x, *sorted(names)) for x in xs]


def zeros_like(x: Any) -> jax.Array:
    """Zeros that vary over the same axes as ``x``, array or struct: a loop's start."""
    return vary(jnp.zeros(x.shape, x.dtype), *varying(x))


def _is_bound(name: str) -> bool:
    try:
        lax.axis_index(name)
    except NameError:
        return False
    return True


def _is_typed(name: str) -> bool:
    return _is_bound(name) and name in varying(lax.axis_index(name))
