"""Payloads in flight, read as what each worker owes."""

from typing import Any

import jax
import jax.numpy as jnp

from efopt.exchanges.owed import owed_in_flight
from efopt.workers.node import PerWorker


def in_flight(api: str, feedback: Any, like: Any) -> Any:
    """What every worker has in flight: a tree of arrays ``(workers, *shape)``.

    Args:
      api: Who asks, for errors.
      feedback: A state with payloads in flight, over an axis and outside of it.
      like: One worker's parameters, arrays or structs.
    """
    payloads, made = feedback.link.flight
    if payloads.shards:
        raise ValueError(
            f"{api} does not read payloads in flight on a mesh with axes behind each "
            "worker, where every device has its own. Save and restore them as they "
            "are, on as many workers; or end the run with `delay=0`."
        )
    made = jnp.reshape(made, -1)[0]  # stacked: one a worker, all equal
    link = feedback.link.home.link

    def read(payloads):
        return owed_in_flight(link, like, payloads, made)

    return jax.jit(jax.vmap(read))(payloads.value)


def landed(api: str, state: Any) -> Any:
    """A state in which what was in flight is owed instead, and nothing is in flight.

    Nothing is lost: parameters minus rate times what is owed stay where they are, and
    the next update is zero, as the first of a run is.

    Args:
      api: Who asks, for errors.
      state: Anything that holds states of :func:`efopt.error_feedback`, over an axis
        and outside of it.
    """

    def one(x):
        if not _flies(x) or x.link.home == ():
            return x
        if not isinstance(x.residual, PerWorker) or x.residual.rule != "mean":
            raise ValueError(
                f"{api} cannot add what is in flight to a residual that is stored "
                "compressed: save and restore both as they are, on as many workers."
            )
        like = jax.tree.map(
            lambda e: jax.ShapeDtypeStruct(e.shape[1:], e.dtype), x.residual.value
        )
        home = x.link.home
        dtypes = home.treedef.unflatten(home.dtypes)
        like = jax.tree.map(lambda s, d: s.update(dtype=d), like, dtypes)
        owed = jax.tree.map(
            lambda e, f: (e + f).astype(e.dtype),
            x.residual.value,
            in_flight(api, x, like),
        )
        payloads, made = x.link.flight
        flight = x.link.flight._replace(
            payloads=payloads.with_value(jax.tree.map(jnp.zeros_like, payloads.value)),
            made=jnp.full_like(made, -1),
        )
        link = x.link._replace(flight=flight)
        return x._replace(residual=x.residual.with_value(owed), link=link)

    return jax.tree.map(one, state, is_leaf=_flies)


def _flies(x: Any) -> bool:
    if isinstance(x, PerWorker) or not {"residual", "link"} <= {
        *getattr(x, "_fields", ())
    }:
        return False
    return isinstance(getattr(x.link, "flight", ()), tuple) and bool(x.link.flight)
