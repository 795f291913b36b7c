"""Per-leaf choice: leaves with different compressors in one exchange."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make


@dataclasses.dataclass(frozen=True)
class Partition(Codec):
    """The codec of each leaf by its label."""

    codecs: tuple[tuple[Hashable, Codec], ...]
    labels: Callable[[Any], Any]

    def __repr__(self):
        inside = ", ".join(f"{label!r}: {codec}" for label, codec in self.codecs)
        return f"partition({{{inside}}}, {self.labels!r})"

    def members(self):
        return tuple(codec for _, codec in self.codecs)

    @property
    def linear(self) -> bool:  # type: ignore[override]
        return all(codec.linear for codec in self.members())

    @property
    def one_message(self) -> bool:  # type: ignore[override]
        return False

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return all(codec.unbiased for codec in self.members())

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        return any(codec.stateful for codec in self.members())

    def assign(self, tree):
        codecs, chosen = dict(self.codecs), []
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        try:
            labels = jax.tree.map(_spread, self.labels(tree), tree)
        except ValueError as error:
            raise ValueError(
                "`partition(compressors, labels)`: the labels have another structure "
                f"than the tree to compress: {error}"
            ) from error
        for (path, leaf), label in zip(leaves, jax.tree.leaves(labels), strict=True):
            if label not in codecs:
                raise ValueError(
                    f"`partition(compressors, labels)` has no compressor for the label "
                    f"{label!r} of {jax.tree_util.keystr(path) or 'the leaf'}; there "
                    f"are {', '.join(map(repr, codecs))}."
                )
            chosen.append(codecs[label].assign(leaf)[0])
        return chosen


def _spread(label, part):
    return jax.tree.map(lambda _: label, part)


def _is_function(labels: Any) -> bool:
    """Whether labels are to be asked for, and not a tree that holds them.

    Modules of some libraries are both: trees, here of labels, that can be called.
    """
    if not callable(labels):
        return False
    treedef = jax.tree.structure(labels)
    is_bound = isinstance(labels, jax.tree_util.Partial)
    return is_bound or treedef.num_leaves == 0 or jax.tree_util.treedef_is_leaf(treedef)


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A tree of labels as a function, to be compared and hashed."""

    treedef: Any
    labels: tuple[Hashable, ...]

    def __call__(self, tree: Any) -> Any:
        del tree
        return self.treedef.unflatten(self.labels)

    def __repr__(self) -> str:
        return repr(self(None))


def partition(
    compressors: Mapping[Hashable, Compressor], labels: Callable[[Any], Any] | Any
) -> Compressor:
    """Gives each leaf the compressor of its label, all in one exchange.

    As :func:`optax.partition` does for transformations, but what leaves share, they
    share: one feedback, one residual tree and, for all groups that travel by the same
    exchange, one collective a round. Matrices by PowerSGD, vectors and norms dense:

    ``partition({"matrix": power_sgd(4), "rest": identity()}, lambda params:
    jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "rest", params))``

    ``exchange=`` of the scheme around it names the exchange of every group that it can
    carry; the others, and all of them by default, travel by their own: identity by
    ``"all_reduce"``, for example, beside signs in ``"two_phase"``.

    Shapes: each leaf ``(...)`` -> same shape and dtype.
    Payload: per leaf, that of its compressor.
    Cost: the sum of theirs in bits.
    Properties: per leaf, those of its compressor, contraction and variance too:
    ``delta``, ``omega`` and ``payload_bits`` of a shape ask ``labels`` about a tree
    that is one such leaf; linear if all are, else not linear.
    Placement: the state of each leaf is that of its compressor.

    Args:
      compressors: One for each label.
      labels: A tree of labels with the structure of the parameters or a prefix of it,
        or a function from a tree of arrays (parameters or updates) to one. A tree that
        can be called, such as a module with a label in the place of each array, is a
        tree. Static.

    Returns:
      A :class:`efopt.Compressor`.

    Raises:
      TypeError: If ``compressors`` is no mapping, or a value of it no
        :class:`efopt.Compressor`, or itself a partition.
      ValueError: If there are none; at trace time, if a leaf has an unknown label or
        the labels do not fit the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.compressors.partition(
      ...     {"kernel": efopt.top_k(k=1), "bias": efopt.compressors.identity()},
      ...     {"w": "kernel", "b": "bias"},
      ... )
      >>> grads = {"w": jnp.array([1.0, -3.0]), "b": jnp.array([0.5, 0.25])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> print(updates["w"], updates["b"])
      [ 0. -3.] [0.5  0.25]
    """
    if not isinstance(compressors, Mapping):
        raise TypeError(
            "`partition(compressors)` takes a mapping from labels to compressors, got "
            f"{compressors!r}."
        )
    if not compressors:
        raise ValueError("`partition(compressors)` needs at least one compressor.")
    for label, value in compressors.items():
        if not isinstance(value, Compressor) or isinstance(value.codec, Partition):
            raise TypeError(
                "`partition(compressors)` takes an `efopt.Compressor` for each label, "
                f"and no other partition; got {value!r} for {label!r}."
            )
    if not _is_function(labels):
        leaves, treedef = jax.tree.flatten(labels)
        labels = _Fixed(treedef, tuple(leaves))
    codecs = tuple((label, value.codec) for label, value in compressors.items())
    return make(Partition(codecs, labels))
