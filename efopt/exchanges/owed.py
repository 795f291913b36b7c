"""What is still owed through a link: by owners, by a device, and in flight."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efopt.codecs.layout import Layout
from efopt.exchanges import in_flight, owners
from efopt.exchanges.home import LinkState
from efopt.exchanges.link import Link
from efopt.exchanges.pieces import Cut, gather
from efopt.ground.dtypes import compute_dtype


def owed_by_owners(link: Link, params: Any, server: Any) -> Any:
    """What the owners still owe of each leaf, whole: a tree like ``params``.

    Args:
      link: The link of the state.
      params: The parameters given to :meth:`Link.init`, or their structs.
      server: The server residual, laid out in any way; inside the mapped function it
        is gathered.
    """
    layout = link.layout(params)
    xs = owners.whole(link.api, layout, link.kept(layout), server)
    return _parted(layout, xs, params)


def owed_here(link: Link, residual: Any, state: LinkState) -> Any:
    """What is owed of what a device holds: by workers, in the mean, and by owners.

    What is in flight is owed too. Inside a function that is mapped over all axes of the
    mesh; collectives.

    Args:
      link: The link of the state.
      residual: This worker's residual, a tree of arrays.
      state: The state of the link, placed.
    """
    axes, home = link.axes, state.home
    assert axes is not None
    arrays, treedef = jax.tree.flatten(residual)
    pairs = zip(arrays, home.dtypes, strict=True)
    like = [jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in pairs]
    packing, _ = link.packed(residual, treedef.unflatten(like), home)
    kept = [c if c.kept else Cut(c.shape) for c in packing.cuts]
    owed = treedef.unflatten(gather(kept, axes.pmean(arrays)))
    layout, more = packing.layout, []
    if state.server:
        server = link.kept(layout), state.server
        more.append(owners.whole(link.api, layout, *server))
    if state.flight:
        payloads, made = state.flight
        payloads = payloads.local(link.api)
        xs = in_flight.decoded(layout, payloads, made, packing.valid())
        more.append(axes.pmean(_not_late(link, layout, xs)))
    for xs in more:
        debts = packing.whole(xs, wide=True)
        owed = jax.tree.map(lambda e, d: e + d.astype(e.dtype), owed, debts)
    return owed


def owed_in_flight(link: Link, params: Any, payloads: Any, made: Any) -> Any:
    """What one worker has in flight of each leaf: a tree like ``params``.

    Args:
      link: The link of the state.
      params: The parameters given to :meth:`Link.init`, or their structs.
      payloads: Its payloads, without a worker axis.
      made: The step in which they were written.
    """
    layout = link.layout(params)
    xs = in_flight.decoded(layout, payloads, made)
    if link.axes is not None:
        xs = _not_late(link, layout, xs)
    return _parted(layout, xs, params)


def _not_late(link: Link, layout: Layout, xs: Sequence[jax.Array]) -> list[jax.Array]:
    """What is in flight, but for what under a vote is among the residual still."""
    late = [link.route(b.codec).pays_average for b in layout.buckets]
    return [jnp.zeros_like(x) if y else x for y, x in zip(late, xs, strict=True)]


def _parted(layout: Layout, xs: Sequence[jax.Array], params: Any) -> Any:
    """A tree like ``params``, in the compute dtypes, from one array a bucket."""
    leaves, treedef = jax.tree.flatten(params)
    like = [jax.ShapeDtypeStruct(jnp.shape(x), compute_dtype(x.dtype)) for x in leaves]
    return treedef.unflatten(layout.part(xs, like))
