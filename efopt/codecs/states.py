"""The state that some codecs keep of each leaf, such as PowerSGD's warm start."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efopt.codecs.codec import Codec
from efopt.codecs.layout import Layout
from efopt.ground import bits
from efopt.ground.dtypes import check_float


def init_states(codec: Codec, params: Any, api: str) -> Any:
    """The codec's state for every leaf of ``params``, after a check of their dtypes.

    It has the structure of ``params``, as ``optax.tree.map_params`` wants it; ``()``
    for a codec that has none.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    dtypes = [check_float(path, leaf, api) for path, leaf in paths]
    placeholder = is_placeholder(params)
    codecs = [] if placeholder else codec.assign(params)  # or an error: a leaf is wrong
    if not codec.stateful:
        return ()
    if placeholder:
        return jnp.zeros([])
    triples = zip(codecs, paths, dtypes, strict=True)
    states = [c.init(jnp.shape(leaf), dtype) for c, (_, leaf), dtype in triples]
    return treedef.unflatten(states)


def is_placeholder(params: Any) -> bool:
    """Whether ``optax.tree.map_params`` asks where a state is laid out as params are.

    It calls ``init`` with a node of its own, without leaves. Where that stands in the
    state it maps over the user's trees; an array says that what is there is laid out by
    a rule of its own.
    """
    return "Placeholder" in type(params).__name__


def open_states(layout: Layout, treedef: Any, states: Any) -> list[Any]:
    """One state per bucket from what :func:`init_states` made."""
    if not any(b.codec.stateful for b in layout.buckets):
        return [()] * len(layout.buckets)
    return layout.join_blocked(treedef.flatten_up_to(states))


def close_states(
    layout: Layout, treedef: Any, joined: Sequence[Any], before: Any
) -> Any:
    """Inverse of :func:`open_states`; ``before`` is what was opened, in its dtypes."""
    if not any(b.codec.stateful for b in layout.buckets):
        return before
    old = treedef.flatten_up_to(before)
    return treedef.unflatten(bits.cast_like(layout.part_blocked(joined, old), old))
