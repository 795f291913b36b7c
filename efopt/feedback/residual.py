"""Two kinds of memory for what a worker owes: exact, and stored compressed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efopt.codecs.blocks import Turn
from efopt.exchanges.home import require_fresh
from efopt.exchanges.link import Link
from efopt.feedback.stored import StoredResidual, stored_residual
from efopt.ground import bits
from efopt.ground.dtypes import check_float_dtype, compute_dtype
from efopt.workers.node import PerWorker


@dataclasses.dataclass(frozen=True)
class ExactResidual:
    """A tree like the parameters, in at least float32 unless ``dtype`` says less."""

    dtype: Any

    def init(self, params: Any) -> Any:
        """A residual of zero."""

        def zeros(p):
            dtype = self.dtype or compute_dtype(jnp.result_type(p))
            return jnp.zeros(jnp.shape(p), dtype)

        return jax.tree.map(zeros, params)

    def marked(self, link: Link, params: Any) -> Any:
        """A residual of zero, marked as the worker's own."""
        return link.wrap(self.init(params), rule="mean")

    def receive(self, link: Link, updates: Any, residual: Any) -> Any:
        """Updates on their way in, or an error if ``residual`` is not theirs."""
        return link.receive(updates, residual)

    def recall(self, updates: Any, residual: Any, turn: Turn, ratio: Any) -> Any:
        """``updates + ratio * residual`` in the compute dtypes."""
        del turn

        def add(g, e):
            wide = compute_dtype(g.dtype)
            e = e.astype(wide)
            return g.astype(wide) + (e if ratio is None else e * ratio.astype(wide))

        return jax.tree.map(add, updates, residual)

    def keeper(
        self, updates: Any, residual: Any, turn: Turn, ratio: Any
    ) -> Callable[[Any], Any] | None:
        """What makes of the tree that is lost the new residual; ``None``: nothing.

        It keeps the dtypes of the residual that was given, whoever chose them.
        """
        del turn, ratio
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(residual), strict=True)
        if all(e.dtype == compute_dtype(g.dtype) for g, e in pairs):
            return None
        return lambda lost: bits.cast_like(lost, residual)


def open_residual(
    api: str, dtype: Any, memory: Any, damping: Any, form: Any
) -> ExactResidual | StoredResidual:
    """Checks the options of a residual, and chooses its memory."""
    check_float_dtype(api, "residual_dtype", dtype)
    if memory is not None:
        return stored_residual(api, memory, damping, form, dtype)
    for name, value in (("damping", damping), ("form", form)):
        if value is not None:
            raise ValueError(
                f"`{api}({name}={value!r})` needs `memory`: an exact residual is "
                "recalled whole."
            )
    return ExactResidual(dtype)


def placed(state: Any, mesh: Any, spec_of: Any) -> Any:
    """A state with a ``residual``, laid out for a mesh.

    Where it is stored, its payloads are those of shards, made anew; else it lies as
    anything of a worker's own does.
    """
    link = state.link.placed(mesh, spec_of)
    if state.link.home == () or state.link.home.specs is not None:
        return state._replace(link=link)
    home, residual = link.home, state.residual
    if residual.store is None:
        residual = residual.placed(mesh, spec_of)
    elif home.inner:
        require_fresh(home.link.api, residual)
        store, axes = residual.store, home.link.axes
        made = home.treedef.flatten_up_to(store.init(home.pieces()))
        marked = [
            PerWorker.wrap(payload, axes, None, home.axes_of(i), rule="stored")
            for i, payload in enumerate(made)
        ]
        marked = [dataclasses.replace(x, store=store) for x in marked]
        residual = home.treedef.unflatten(marked)
    return state._replace(residual=residual, link=link)
