"""A residual that is kept compressed, in the payloads of a codec."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efopt.compressors import bits
from efopt.compressors.base import Codec, Turn, compute_dtype
from efopt.compressors.compressor import Compressor
from efopt.compressors.layout import Bucket, Layout, plan
from efopt.compressors.quantize import Quantize

DAMPING = 0.9  # of a memory that is linear and noisy
PRIVATE = 0x27D4EB2F  # tells the memory's private randomness from the compressor's


@dataclasses.dataclass(frozen=True)
class Store:
    """Writes and reads a residual, leaf by leaf, as payloads.

    Attributes:
      api: The transformation it belongs to, for errors.
      codec: Writes it.
      damping: The share that is not recalled; ``None``: what suits each leaf's codec.
      dtype: The dtype it is written in; ``None``: the compute dtype of the leaf.
    """

    api: str
    codec: Codec
    damping: float | None
    dtype: np.dtype | None

    def layout(self, tree: Any) -> Layout:
        """How the leaves of ``tree``, arrays or structs, are cut into buckets."""
        leaves = jax.tree.leaves(tree)
        dtypes = [jnp.result_type(x) for x in leaves]
        dtypes = [
            compute_dtype(d) if self.dtype is None else self.dtype for d in dtypes
        ]
        return plan(self.codec.assign(tree), [jnp.shape(x) for x in leaves], dtypes)

    def init(self, params: Any) -> Any:
        """A residual of zero: the structure of ``params``, a payload at every leaf."""
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # a placeholder of `optax.tree.map_params`
            return params
        layout, turn = self.layout(params), Turn(jnp.uint32(0), jnp.uint32(0))

        def zeros(b: Bucket) -> Any:
            x = jax.ShapeDtypeStruct(b.shape, compute_dtype(b.dtype))
            payload = jax.eval_shape(lambda x: b.codec.encode(x, b.blocks(), turn), x)
            return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), payload)

        payloads = layout.part_memory(
            [zeros(b) for b in layout.buckets], [()] * len(leaves)
        )
        return treedef.unflatten(payloads)

    def check(self, residual: Any, updates: Any) -> None:
        """Raises unless ``residual`` is what :meth:`init` makes for such updates."""
        structs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), updates
        )
        expected, got = jax.eval_shape(self.init, structs), residual
        shapes = [[jnp.shape(x) for x in jax.tree.leaves(t)] for t in (expected, got)]
        if shapes[0] != shapes[1] or (
            jax.tree.structure(expected) != jax.tree.structure(got)
        ):
            raise ValueError(
                f"{self.api} got updates of another structure or other shapes than the "
                "parameters given to `init`: the residual of these updates is stored "
                f"in arrays of shapes {shapes[0]}, and the state holds {shapes[1]}."
            )

    def damping_of(self, layout: Layout, b: Bucket) -> float:
        """What is not recalled of the leaves of a bucket.

        A linear memory that promises no contraction answers with noise, which feedback
        would amplify; all others answer with the residual itself.
        """
        if self.damping is not None:
            return self.damping
        noisy = b.codec.linear and b.codec.delta(layout.shapes[b.leaves[0]]) is None
        return DAMPING if noisy else 0.0

    def adds(self, layout: Layout, b: Bucket) -> bool:
        """Whether what is new is added to a bucket's payload, not written in its place.

        Written anew, a sketch would take its own noise for something owed, multiplied
        by as many coordinates as share a sum. Where nothing is damped or lost, both are
        the same, and writing anew rounds less.
        """
        exact = b.codec.delta(layout.shapes[b.leaves[0]]) == 1
        return b.codec.linear and not (exact and self.damping_of(layout, b) == 0)

    def recall(
        self, layout: Layout, payloads: Sequence[Any], turn: Turn, ratio: Any
    ) -> list[jax.Array]:
        """What is recalled of the residual, one array per bucket.

        Args:
          layout: The layout of this step's updates.
          payloads: The payload of every leaf.
          turn: The step and this worker.
          ratio: Factor on the residual, or ``None``.
        """
        recalled = []
        for b, payload in zip(
            layout.buckets, layout.join_memory(payloads), strict=True
        ):
            blocks = b.blocks()
            x = blocks.mask(b.codec.decode(payload, blocks, _still(turn)))
            if ratio is not None:
                x = x * ratio.astype(x.dtype)
            damping = self.damping_of(layout, b)
            recalled.append(x if damping == 0 else x * (1 - damping))
        return recalled

    def write(
        self,
        layout: Layout,
        payloads: Sequence[Any],
        owed: Sequence[jax.Array],
        recalled: Sequence[jax.Array],
        turn: Turn,
        ratio: Any,
    ) -> list[Any]:
        """The payloads of a new residual.

        Args:
          layout: As for :meth:`recall`.
          payloads: As for :meth:`recall`.
          owed: What is left of recalled residual and update, one array per leaf.
          recalled: What :meth:`recall` returned.
          turn: As for :meth:`recall`.
          ratio: As for :meth:`recall`.
        """
        joined, new = layout.join(owed, turn.step), []
        old = layout.join_memory(payloads)
        for b, x, part, payload in zip(
            layout.buckets, joined, recalled, old, strict=True
        ):
            wide, blocks = compute_dtype(b.dtype), b.blocks()
            x = x.astype(wide)
            if self.adds(layout, b):
                exact = dataclasses.replace(blocks, dtype=wide)
                fresh = b.codec.encode(x - part, exact, _still(turn))
                new.append(jax.tree.map(lambda t, f: _add(t, f, ratio), payload, fresh))
            else:
                new.append(b.codec.encode(x, blocks, _still(turn)))
        return layout.part_memory(new, payloads)


def open_store(api: str, memory: Any, damping: Any, dtype: Any) -> Store:
    """Checks the options of a compressed residual."""
    if not isinstance(memory, Compressor):
        raise TypeError(
            f"`{api}(compressor, memory)` takes an `efopt.Compressor` as memory, such "
            f"as `efopt.quantize(8)`; got {memory!r}."
        )
    if damping is not None:
        if isinstance(damping, bool) or not isinstance(damping, int | float):
            raise TypeError(
                f"`{api}(damping=...)` must be None or a Python number, got "
                f"{type(damping).__name__}."
            )
        if not 0 <= damping <= 1:
            raise ValueError(f"`{api}(damping=...)` must be in [0, 1], got {damping}.")
    for member in memory.codec.members():
        reason = _refusal(member)
        if reason is not None:
            raise ValueError(f"`{api}(memory={member!r})` cannot work: {reason}.")
    label = f"`{api}(memory={memory!r})`"
    return Store(
        label, memory.codec, damping, None if dtype is None else jnp.dtype(dtype)
    )


def _refusal(codec: Codec) -> str | None:
    """Why a codec cannot keep a residual, or ``None``."""
    if type(codec).encode is Codec.encode or codec.stateful:
        return (
            "a memory must have one message a step and no state; store the residual "
            "with `efopt.quantize(8)` or `efopt.count_sketch(fraction=0.2)`"
        )
    if codec.one_bit and codec.delta((1,)) is None:
        return (
            "it forgets all magnitudes; store the residual with `efopt.quantize(4)` or "
            "`efopt.scaled_sign(64)`"
        )
    values = getattr(codec, "values", codec)
    if isinstance(values, Quantize) and not values.stochastic and values.bits <= 6:
        return (
            f"rounded to nearest, {values.bits} bits lose the small coordinates of a "
            "residual at every step, and training stalls or diverges; pass `stochastic=True`, "
            "or use 8 bits"
        )
    return None


def _still(turn: Turn) -> Turn:
    """A turn at which shared randomness stands still and private randomness moves.

    Only what is equal at every step can be read again, and added to.
    """
    private = bits.hash_words(np.uint32(PRIVATE), turn.step, turn.worker)
    return Turn(jnp.uint32(0), private)


def _add(table: jax.Array, fresh: jax.Array, ratio: Any) -> jax.Array:
    wide = table.astype(fresh.dtype)
    if ratio is not None:
        wide = wide * ratio.astype(wide.dtype)
    return bits.cast(wide + fresh, table.dtype)
