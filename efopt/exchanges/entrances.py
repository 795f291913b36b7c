"""The update of a scheme, from wherever a program calls it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import optax
from jax import lax

from efopt.exchanges import incoming, regions
from efopt.exchanges.all_reduce import mean_in_range
from efopt.exchanges.pieces import Cut, gather
from efopt.workers import node, unreduced

if TYPE_CHECKING:
    from efopt.exchanges.link import Link

Update: TypeAlias = Callable[..., Any]


def entrance(link: "Link", update: Update, own: bool) -> Update:
    """``update_fn`` of a scheme, from wherever it is called.

    It runs on what each device holds. Called on stacked or unreduced gradients in a
    plain jitted step, or inside a function mapped over the workers alone, it opens a
    region that is mapped over the other mesh axes too. With ``start`` the first updates
    are averaged uncompressed: until then nothing is owed and nothing learned, and of
    the state, which has a field ``count``, that alone moves on.

    Args:
      link: The link of the scheme.
      update: The function, of updates, state, parameters and extra arguments.
      own: Whether what comes out is each worker's own still.
    """
    if own and link.fast:
        raise ValueError(
            f"{link.api} hands on what is each worker's own, and cannot average "
            f"over the fast axes {link.fast!r} before. Give it the inner exchange."
        )
    inside = _in_pieces(link, _dense_first(link, update))

    def update_fn(updates, state, params=None, **extra_args):
        if link.axes is None or link.workers is None:
            incoming.check_single(link.api, updates)
            return inside(updates, state, params, **extra_args)
        updates = unreduced.stacked(link.api, link.workers, updates)
        if not node.is_node(updates):
            link.require_bound()
        around = regions.around(link.api, link.workers, link.axes, updates, state)
        if around is None:
            home = regions.home_of(state)
            if home is not None and home.inner:
                home.require_shards(updates)
            return inside(updates, state, params, **extra_args)
        return around(inside, updates, state, own)

    return update_fn


def _in_pieces(link: "Link", update: Update) -> Update:
    """The update on this device's pieces of the mean over the fast axes."""
    if not link.fast:
        return update

    def update_fn(updates, state, params=None, **extra_args):
        home = regions.home_of(state)
        if home is None or home.specs is None:
            raise ValueError(
                f"{link.api} averages over {link.fast!r} by parts, and the state "
                "does not know which: place it with `efopt.distribute(state, mesh, "
                "params_specs)` before the step, also if `params_specs` is None. "
                "`pmap` and `vmap` have no mesh."
            )
        updates = link.scatter(updates, home)
        out, new = update(updates, state, params, **extra_args)
        return out, node.marked_as(new, state)

    return update_fn


def _dense_first(link: "Link", update: Update) -> Update:
    """The first updates, averaged as they are."""
    if not link.start:
        return update

    def update_fn(updates, state, params=None, **extra_args):
        state = node.laid_out(state)

        def dense(updates, state):
            out = updates
            if link.axes is not None:
                out = _whole(link, mean_in_range(updates, link.axes), state)
            return out, state._replace(count=optax.safe_increment(state.count))

        def compressed(updates, state):
            return update(updates, state, params, **extra_args)

        updates = link.receive(updates)
        return lax.cond(state.count < link.start, dense, compressed, updates, state)

    return update_fn


def _whole(link: "Link", tree: Any, state: Any) -> Any:
    """Leaves from what the state keeps in pieces."""
    if not link.fast:
        return tree
    arrays, treedef = jax.tree.flatten(tree)
    home = regions.home_of(state)
    assert home is not None
    cuts = [c if c.kept else Cut(c.shape) for c in home.cuts()]
    return treedef.unflatten(gather(cuts, arrays))
