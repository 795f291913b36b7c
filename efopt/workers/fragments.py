"""Fragments: which leaves meet together, and at which steps."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efopt.ground import checks


class Labels(NamedTuple):
    """The fragment of every leaf.

    Attributes:
      of: The number of each leaf's fragment, in the order of the leaves.
      number: How many fragments there are.
      treedef: The structure of the parameters.
    """

    of: tuple[int, ...]
    number: int
    treedef: Any


@dataclasses.dataclass(frozen=True)
class Fragments:
    """How leaves are parted, and when each part meets.

    Attributes:
      api: The transformation, for errors.
      every: Steps of a round.
      start: Steps at whose end all meet, before rounds begin.
      delay: Steps from a meeting until its result is taken.
      given: ``None``, a number, labels, or a function that makes them.
    """

    api: str
    every: int
    start: int
    delay: int
    given: Any

    def labels(self, params: Any) -> Labels:
        """The fragment of every leaf, or an error."""
        leaves, treedef = jax.tree.flatten(params)
        if self.given is None:
            return Labels((0,) * len(leaves), 1, treedef)
        if isinstance(self.given, int):
            return Labels(self._even(params), self.given, treedef)
        labels = self.given(params) if callable(self.given) else self.given
        found, structure = jax.tree.flatten(labels)
        if structure != treedef:
            raise ValueError(
                f"`{self.api}(fragments=...)` must give every leaf of the parameters "
                f"one label, an int or a string:\n  got      {structure}\n  expected "
                f"{treedef}"
            )
        if not all(isinstance(x, int | str) for x in found):
            raise TypeError(
                f"`{self.api}(fragments=...)` labels leaves by ints or strings, got "
                f"{[x for x in found if not isinstance(x, int | str)][0]!r}."
            )
        order = sorted(set(found), key=lambda x: (isinstance(x, str), x))
        self._check_number(len(order))
        return Labels(tuple(map(order.index, found)), len(order), treedef)

    def number(self) -> int:
        """How many fragments there are, where that is known without parameters."""
        if callable(self.given):
            raise ValueError(
                f"`{self.api}(fragments=...)` is a function of the parameters here, "
                "and there are none: give it the labels themselves."
            )
        if self.given is None or isinstance(self.given, int):
            return self.given or 1
        return len(set(jax.tree.leaves(self.given)))

    def part(self, labels: Labels, tree: Any, j: int) -> Any:
        """A tree like the parameters, without the leaves of other fragments."""
        if labels.number == 1:
            return tree
        leaves = labels.treedef.flatten_up_to(tree)
        return labels.treedef.unflatten(
            [
                x if i == j else optax.MaskedNode()
                for i, x in zip(labels.of, leaves, strict=True)
            ]
        )

    def join(self, labels: Labels, trees: list[Any]) -> Any:
        """Inverse of :meth:`part`, given all of them."""
        if labels.number == 1:
            return trees[0]
        parts = [labels.treedef.flatten_up_to(tree) for tree in trees]
        return labels.treedef.unflatten([parts[j][i] for i, j in enumerate(labels.of)])

    def due(self, steps: Any, j: int, number: int) -> jax.Array:
        """Whether a fragment meets at the end of a step, the first of which is 1."""
        offset = (j + 1) * self.every // number % self.every
        rounds = (steps - self.start) % self.every == offset
        if self.start:
            return (steps >= 1) & ((steps <= self.start) | rounds)
        return (steps >= 1) & rounds

    def _even(self, params: Any) -> tuple[int, ...]:
        """Leaves that follow one another, in parts of nearly equal size."""
        paths = jax.tree_util.tree_flatten_with_path(params)[0]
        if len(paths) < self.given:
            raise ValueError(
                f"`{self.api}(fragments={self.given})` is more than there are leaves, "
                f"{len(paths)}."
            )
        named = [_natural(jax.tree_util.keystr(path)) for path, _ in paths]
        order = sorted(range(len(paths)), key=lambda i: named[i])
        sizes = np.array([np.prod(jnp.shape(paths[i][1]), dtype=float) for i in order])
        # A leaf belongs where its middle falls; then no part may be left empty.
        middle = (np.cumsum(sizes) - sizes / 2) / max(sizes.sum(), 1)
        of = np.minimum((middle * self.given).astype(int), self.given - 1)
        for i in range(len(of)):
            last = of[i - 1] if i else -1
            of[i] = np.clip(of[i], last, last + 1)
            of[i] = max(of[i], self.given - (len(of) - i))
        out = np.empty(len(paths), int)
        out[order] = of
        return tuple(map(int, out))

    def _check_number(self, number: int) -> None:
        if number > self.every:
            raise ValueError(
                f"`{self.api}(fragments=...)` are {number}, each with a step of its "
                f"own in a round of `every={self.every}`: take fewer, or longer rounds."
            )


def read(api: str, every: Any, start: Any, given: Any, delay: Any) -> Fragments:
    """The fragments that the options tell, or an error."""
    checks.static_int(api, "every", every)
    checks.static_int(api, "start", start, least=0)
    checks.static_int(api, "delay", delay, least=0)
    if delay >= every and delay:
        raise ValueError(
            f"`{api}(delay=...)` must be below `every`, the steps from one meeting of "
            f"a fragment to its next, got delay={delay} with every={every}."
        )
    if start and delay:
        raise ValueError(
            f"`{api}(start={start}, delay={delay})` cannot work: in the first "
            "steps all meet at each, and a delay must be below that interval."
        )
    parts = Fragments(api, every, start, delay, given)
    if isinstance(given, bool) or isinstance(given, float):
        raise TypeError(
            f"`{api}(fragments=...)` is a number of fragments, labels, or a function "
            f"of the parameters that makes them; got {given!r}."
        )
    if isinstance(given, int):
        checks.static_int(api, "fragments", given)
        parts._check_number(given)
    return parts


def _natural(name: str) -> list[Any]:
    """A key by which ``block_10`` stands behind ``block_9``."""
    words = re.split(r"(\d+)", name)
    return [(int(w), "") if w.isdigit() else (-1, w) for w in words]
