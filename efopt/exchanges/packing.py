"""Packing: how a tree becomes one array a bucket on this device, and back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from efopt.codecs.layout import Layout
from efopt.codecs.states import close_states, open_states
from efopt.exchanges.pieces import Cut, gather
from efopt.ground.dtypes import compute_dtype


@dataclasses.dataclass(frozen=True)
class Packing:
    """The way of a tree into buckets and back.

    Attributes:
      treedef: The structure of the tree.
      cuts: How each leaf is cut in pieces.
      dtypes: In which each leaf is applied, and its payload travels.
      layout: The buckets of the pieces.
    """

    treedef: Any
    cuts: Sequence[Cut]
    dtypes: Sequence[np.dtype]
    layout: Layout

    def pieces(self, tree: Any) -> list[jax.Array]:
        """This device's pieces of a tree's leaves."""
        pairs = zip(self.cuts, jax.tree.leaves(tree), strict=True)
        return [cut.take(x) for cut, x in pairs]

    def valid(self) -> dict[int, jax.Array]:
        """How much of each piece is no padding, by leaf, where devices differ in it."""
        ends = {i: cut.valid() for i, cut in enumerate(self.cuts)}
        return {i: end for i, end in ends.items() if end is not None}

    def whole(self, xs: Sequence[jax.Array], *, wide: bool) -> Any:
        """The tree of one array a bucket, its pieces gathered.

        Args:
          xs: The arrays.
          wide: Whether they are in the compute dtypes, and not in those of the leaves.
        """
        return self._tree(xs, self.cuts, wide)

    def own(self, xs: Sequence[jax.Array]) -> Any:
        """The same of what is kept: what the state has in pieces stays so, and wide."""
        return self._tree(xs, [Cut(c.piece) if c.kept else c for c in self.cuts], True)

    def _tree(self, xs: Sequence[jax.Array], cuts: Sequence[Cut], wide: bool) -> Any:
        pairs = zip(self.cuts, self.dtypes, strict=True)
        like = [
            jax.ShapeDtypeStruct(cut.piece, compute_dtype(dtype) if wide else dtype)
            for cut, dtype in pairs
        ]
        return self.treedef.unflatten(gather(cuts, self.layout.part(xs, like)))

    def open_states(self, states: Any) -> list[Any]:
        """The codec's state of each bucket, of a tree with that of each leaf."""
        return open_states(self.layout, self.treedef, states)

    def close_states(self, opened: Sequence[Any], before: Any) -> Any:
        """Inverse of :meth:`open_states`; ``before`` is what was opened."""
        return close_states(self.layout, self.treedef, opened, before)
