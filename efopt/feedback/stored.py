"""A residual that is kept compressed, in the payloads of a codec."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.codec import Codec, Turn, compute_dtype, rows
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.layout import BUCKET_SIZE, Bucket, Layout, plan
from efopt.compressors.identity import Identity
from efopt.compressors.quantize import Quantize
from efopt.ground.barriers import fence
from efopt.ground.randomness import hash_words

DAMPING = 0.9  # of a memory that is linear and noisy
FORMS = ("increment", "rewrite")
PRIVATE = 0x27D4EB2F  # tells the memory's private randomness from the compressor's
SMALL_MATRIX, SMALL_VECTOR = 1 << 8, 1 << 16  # leaves below are kept exact
PIECES = 32  # in which a large leaf is written, at most


@dataclasses.dataclass(frozen=True)
class Store:
    """Reads and writes a residual, leaf by leaf, as payloads.

    Attributes:
      api: The transformation it belongs to, for errors.
      codec: Writes it.
      damping: The share that is not recalled; ``None``: what suits each leaf's codec.
      form: How it is written; ``None``: what suits each leaf's codec.
      dtype: The dtype it is written in; ``None``: the compute dtype of the leaf.
    """

    api: str
    codec: Codec
    damping: float | None
    form: str | None
    dtype: np.dtype | None

    def layout(self, tree: Any) -> Layout:
        """How the leaves of ``tree``, arrays or structs, are cut into buckets."""
        codecs, shapes, dtypes = [], [], []
        leaves = jax.tree.leaves(tree)
        for codec, leaf in zip(self.codec.assign(tree), leaves, strict=True):
            shape, wide = jnp.shape(leaf), compute_dtype(jnp.result_type(leaf))
            dtype = wide if self.dtype is None else self.dtype
            if _is_kept_exact(codec, shape, dtype, wide):
                codec, dtype = Identity(), wide
            codecs.append(codec)
            shapes.append(shape)
            dtypes.append(dtype)
        return plan(codecs, shapes, dtypes)

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
        return DAMPING if _is_noisy(b.codec, layout.shapes[b.leaves[0]]) else 0.0

    def adds(self, layout: Layout, b: Bucket) -> bool:
        """Whether what is new is added to a bucket's payload, not written in its place.

        Where nothing is damped or lost, both are the same, and writing anew rounds
        less.
        """
        if self.form is not None:
            return self.form == "increment" and b.codec.linear
        exact = b.codec.delta(layout.shapes[b.leaves[0]]) == 1
        return b.codec.linear and not (exact and self.damping_of(layout, b) == 0)

    def recall(
        self,
        layout: Layout,
        payloads: Sequence[Any],
        arrays: Sequence[jax.Array],
        turn: Turn,
        ratio: Any,
    ) -> list[jax.Array]:
        """``arrays`` plus what is recalled of the residual, in the compute dtype.

        Args:
          layout: The layout of this step's updates.
          payloads: The payload of every leaf.
          arrays: One array per leaf.
          turn: The step and this worker.
          ratio: Factor on the residual, or ``None``.
        """
        wide = [x.astype(compute_dtype(x.dtype)) for x in arrays]
        still, xs = _still(turn), []
        given = layout.join(wide, turn.step)
        for b, x, payload in zip(
            layout.buckets, given, layout.join_memory(payloads), strict=True
        ):
            damping = self.damping_of(layout, b)
            factor = 1 - damping if damping else None
            if ratio is not None:
                factor = ratio.astype(x.dtype) * (1 - damping)
            recalled = b.codec.decode(payload, b.blocks(), still).astype(x.dtype)
            if _is_large(b):
                x = wide[b.leaves[0]].reshape(-1)
                recalled = recalled.reshape(-1)[: x.size]
            x = x + (recalled if factor is None else recalled * factor)
            # Once, and not again in everything that reads it.
            xs.append(fence(x, turn.step)[0] if _is_large(b) else x)
        return layout.part(xs, turn.step, wide)

    def write(
        self,
        layout: Layout,
        payloads: Sequence[Any],
        owed: Sequence[jax.Array],
        turn: Turn,
        ratio: Any,
    ) -> list[Any]:
        """The payloads of a new residual.

        Args:
          layout: As for :meth:`recall`.
          payloads: As for :meth:`recall`.
          owed: What is left of recalled residual and update, one array per leaf.
          turn: As for :meth:`recall`.
          ratio: As for :meth:`recall`.
        """
        still, new = _still(turn), []
        joined = layout.join(owed, turn.step)
        for b, x, payload in zip(
            layout.buckets, joined, layout.join_memory(payloads), strict=True
        ):
            blocks, wide = b.blocks(), compute_dtype(b.dtype)
            if not self.adds(layout, b):
                if _is_large(b):
                    leaf = owed[b.leaves[0]].reshape(-1).astype(wide)
                    new.append(_encode_in_pieces(leaf, b, payload, still))
                else:
                    new.append(b.codec.encode(x.astype(wide), blocks, still))
                continue
            kept = 1 - self.damping_of(layout, b)
            x = x.astype(wide)
            fresh = b.codec.increment(payload, x, kept, ratio, blocks, still)
            new.append(fence(fresh, turn.step)[0] if _is_large(b) else fresh)
        return layout.part_memory(new, payloads)


def open_store(api: str, memory: Any, damping: Any, form: Any, dtype: Any) -> Store:
    """Checks the options of a compressed residual."""
    if not isinstance(memory, Compressor):
        raise TypeError(
            f"`{api}(compressor, memory)` takes an `efopt.Compressor` as memory, such "
            f"as `efopt.quantize(8)`; got {memory!r}."
        )
    if damping is not None:
        if isinstance(damping, bool) or not isinstance(damping, int | float):
            raise TypeError(
                f"`{api}(damping=...)` must be None or a Python number, because it "
                f"chooses the program; got {type(damping).__name__}. With "
                "`optax.inject_hyperparams` pass `static_args=('damping',)`."
            )
        if not 0 <= damping <= 1:
            raise ValueError(f"`{api}(damping=...)` must be in [0, 1], got {damping}.")
    if form is not None and form not in FORMS:
        raise ValueError(
            f"`{api}(form=...)` must be None or one of "
            f"{', '.join(map(repr, FORMS))}, got {form!r}."
        )
    for member in memory.codec.members():
        reason = _refusal(member, form)
        if reason is not None:
            raise ValueError(f"`{api}(memory={member!r})` cannot work: {reason}.")
    label = f"`{api}(memory={memory!r})`"
    dtype = None if dtype is None else jnp.dtype(dtype)
    return Store(label, memory.codec, damping, form, dtype)


def _refusal(codec: Codec, form: str | None) -> str | None:
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
    if isinstance(values, Quantize) and not values.stochastic and values.bits <= 4:
        return (
            f"rounded to the nearest, {values.bits} bits lose the small coordinates of "
            "a residual at every step, and training stalls or diverges; pass "
            "`stochastic=True`, or use 8 bits"
        )
    if form == "rewrite" and _is_noisy(codec, (1 << 20,)):
        return (
            "written anew at every step, it takes its own noise for something owed, "
            "multiplied by as many coordinates as share a sum, and diverges within "
            'some steps; leave `form` out or pass form="increment"'
        )
    if form == "increment" and not codec.linear:
        return (
            "its payloads may not be summed (it is not linear), so nothing can be "
            'added to them; leave `form` out or pass form="rewrite"'
        )
    return None


def _is_noisy(codec: Codec, shape: tuple[int, ...]) -> bool:
    """Whether what is read is not a part of what was written, as from a sketch."""
    return codec.linear and codec.delta(shape) is None


@functools.lru_cache(maxsize=4096)
def _is_kept_exact(
    codec: Codec, shape: tuple[int, ...], dtype: np.dtype, wide: np.dtype
) -> bool:
    """Whether a leaf is too small for its compressed residual to save anything."""
    size = math.prod(shape)
    if size < (SMALL_VECTOR if len(shape) < 2 else SMALL_MATRIX):
        return True
    return make(codec).payload_bits(shape, dtype) >= 8 * size * wide.itemsize


def _is_large(b: Bucket) -> bool:
    """Whether a bucket is one leaf, of which no copy should be made."""
    return len(b.leaves) == 1 and b.sizes[0] > BUCKET_SIZE


def _encode_in_pieces(x: jax.Array, b: Bucket, payload: Any, turn: Turn) -> Any:
    """The payload of a flat leaf, in the place of an older one.

    What is computed of a whole leaf at once may need several more of its size. In a
    loop only what belongs to one piece is there at a time.
    """
    blocks = b.blocks()
    number = -(-x.size // (PIECES * blocks.size))
    length = number * blocks.size
    if number == len(blocks.index):
        padded = jnp.pad(x, (0, length - x.size)).reshape(number, *blocks.shape)
        return b.codec.encode(padded, blocks, turn)

    def body(i, payload):
        first = jnp.minimum(i * number, len(blocks.index) - number)
        start = jnp.minimum(first * blocks.size, x.size - length)
        part = lax.dynamic_slice(x, (start,), (length,))
        # The last block may reach beyond the leaf.
        part = jnp.pad(part, (0, blocks.size))
        part = lax.dynamic_slice(part, (first * blocks.size - start,), (length,))
        part = part.reshape(number, *blocks.shape)
        part, _ = fence(part, i.astype(jnp.uint32))  # once, not in all that reads it
        fresh = b.codec.encode(part, rows(blocks, first, number), turn)
        return jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, first, 0),
            payload,
            fresh,
        )

    return lax.fori_loop(0, -(-x.size // length), body, payload)


def _still(turn: Turn) -> Turn:
    """A turn at which shared randomness stands still and private randomness moves.

    Only what is equal at every step can be read again, and added to.
    """
    private = hash_words(np.uint32(PRIVATE), turn.step, turn.worker)
    return Turn(jnp.uint32(0), private)
