"""Contractive error feedback's memory: a residual kept in the payloads of a codec."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efopt.codecs.blocks import MOST, Turn, rows
from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.codecs.layout import BUCKET_SIZE, Bucket, Layout, lay_out
from efopt.codecs.states import is_placeholder
from efopt.compressors.identity import Identity
from efopt.exchanges.incoming import require_kept
from efopt.exchanges.link import Link
from efopt.ground import bits, checks, randomness
from efopt.ground.barriers import once
from efopt.ground.dtypes import compute_dtype, wide

DAMPING = 0.9  # of a memory that is linear and noisy
FORMS = ("increment", "rewrite")
PRIVATE = 0x27D4EB2F  # tells the memory's private randomness from the compressor's
SMALL_MATRIX, SMALL_VECTOR = 1 << 8, 1 << 16  # leaves below are kept exact
PIECES = 32  # in which a large leaf is written, at most
PIECE = 1 << 19  # coordinates of a piece, at least: many small ones keep a GPU waiting


@dataclasses.dataclass(frozen=True)
class StoredResidual:
    """A residual in payloads, read and written leaf by leaf.

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
        return lay_out(codecs, shapes, dtypes, side_by_side=False)

    def init(self, params: Any) -> Any:
        """A residual of zero: the structure of ``params``, a payload at every leaf."""
        leaves, treedef = jax.tree.flatten(params)
        if is_placeholder(params):
            return jnp.zeros([])
        layout, turn = self.layout(params), Turn(jnp.uint32(0), jnp.uint32(0))

        payloads: list[Any] = [()] * len(leaves)
        for b in layout.buckets:
            x = jax.ShapeDtypeStruct(b.shape, compute_dtype(b.dtype))
            encode = lambda x, b=b: b.codec.encode(x, b.blocks(), turn)  # noqa: E731
            like = jax.eval_shape(encode, x)
            for i, n in zip(b.leaves, b.num_blocks, strict=True):
                zeros = lambda a, n=n: jnp.zeros((n, *a.shape[1:]), a.dtype)  # noqa: E731
                payloads[i] = jax.tree.map(zeros, like)
        return treedef.unflatten(payloads)

    def marked(self, link: Link, params: Any) -> Any:
        """A residual of zero, marked as the worker's own, and how it is made."""
        marked = link.wrap(self.init(params), rule="stored")
        if link.axes is None:
            return marked
        return dataclasses.replace(marked, store=self, home=None)

    def receive(self, link: Link, updates: Any, residual: Any) -> Any:
        """Updates on their way in, or an error if ``residual`` is not theirs."""
        updates = link.receive(updates)
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
                f"in arrays of shapes {shapes[0]}, and the state holds {shapes[1]}. "
                "Wider gradients than the parameters may be the cause: cast them."
            )
        if link.axes is not None:
            paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
            payloads = map(jax.tree.leaves, treedef.flatten_up_to(residual))
            # An empty leaf has no payload.
            kept = [(p, x) for p, x in zip(paths, payloads, strict=True) if x]
            paths, arrays = [p for p, _ in kept], [x[0] for _, x in kept]
            require_kept(link.api, link.axes, paths, arrays)
        return updates

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

    def recall(self, updates: Any, residual: Any, turn: Turn, ratio: Any) -> Any:
        """``updates`` plus what is recalled of the residual, in the compute dtype.

        Args:
          updates: A tree of arrays.
          residual: The payload of every leaf.
          turn: The step and this worker.
          ratio: Factor on the residual, or ``None``.
        """
        arrays, treedef = jax.tree.flatten(updates)
        payloads = treedef.flatten_up_to(residual)
        layout, quiet, xs = self.layout(updates), still(turn), []
        given = _joined_small(layout, arrays)
        for b, x, payload in zip(
            layout.buckets, given, layout.join_blocked(payloads), strict=True
        ):
            damping = self.damping_of(layout, b)
            factor = 1 - damping if damping else None
            if ratio is not None:
                factor = ratio.astype(x.dtype) * (1 - damping)
            recalled = b.codec.decode(payload, b.blocks(), quiet).astype(x.dtype)
            if _is_large(b):
                recalled = recalled.reshape(-1)[: x.size]
            x = x + (recalled if factor is None else recalled * factor)
            # Once, and not again in everything that reads it; but a GPU reads the two
            # sooner than it writes their sum and reads that.
            one = functools.partial(lax.platform_dependent, cpu=once, tpu=once)
            xs.append(one(x, default=lambda x: x) if _is_large(b) else x)
        structs = [
            jax.ShapeDtypeStruct(x.shape, compute_dtype(x.dtype)) for x in arrays
        ]
        return treedef.unflatten(layout.part(xs, structs))

    def keeper(
        self, updates: Any, residual: Any, turn: Turn, ratio: Any
    ) -> Callable[[Any], Any]:
        """What makes of the tree that is lost the payloads of a new residual.

        Args:
          updates: As for :meth:`recall`, and so are all others.
          residual: The payloads of the residual that was recalled.
          turn: The step and this worker.
          ratio: Factor on the residual, or ``None``.
        """

        def keep(lost: Any) -> Any:
            owed, treedef = jax.tree.flatten(lost)
            payloads = treedef.flatten_up_to(residual)
            layout, quiet, new = self.layout(updates), still(turn), []
            for b, x, payload in zip(
                layout.buckets,
                _joined_small(layout, owed),
                layout.join_blocked(payloads),
                strict=True,
            ):
                if not self.adds(layout, b):
                    if _is_large(b):
                        new.append(_encode_large(x, b, payload, quiet))
                    else:
                        new.append(b.codec.encode(x, b.blocks(), quiet))
                    continue
                if _is_large(b):
                    x = _blocked(x, b)
                kept = 1 - self.damping_of(layout, b)
                fresh = b.codec.increment(payload, x, kept, ratio, b.blocks(), quiet)
                # The wall hangs on the step: else it would keep a copy of the payload.
                new.append(once(fresh, turn.step) if _is_large(b) else fresh)
            fresh = layout.part_blocked(new, payloads)
            return treedef.unflatten(bits.cast_like(fresh, payloads))

        return keep


def stored_residual(
    api: str, memory: Any, damping: Any, form: Any, dtype: Any
) -> StoredResidual:
    """Checks the options of a compressed residual."""
    if not isinstance(memory, Compressor):
        raise TypeError(
            f"`{api}(memory=...)` takes an `efopt.Compressor`, such as "
            f"`efopt.quantize(8, stochastic=True)`; got {memory!r}."
        )
    if damping is not None:
        checks.share(api, "damping", damping)
    if form is not None:
        checks.choice(api, "form", form, FORMS)
    for member in memory.codec.members():
        reason = _refusal(member, form)
        if reason is not None:
            raise ValueError(f"`{api}(memory={member!r})` cannot work: {reason}.")
    label = f"`{api}(memory={memory!r})`"
    dtype = None if dtype is None else jnp.dtype(dtype)
    return StoredResidual(label, memory.codec, damping, form, dtype)


def _refusal(codec: Codec, form: str | None) -> str | None:
    """Why a codec cannot keep a residual, or ``None``."""
    if not codec.one_message or codec.stateful:
        return (
            "a memory must have one message a step and no state; store the residual "
            "with `efopt.quantize(8)` or `efopt.compressors.count_sketch(fraction=0.2)`"
        )
    reason = codec.keeps_no_residual()
    if reason is not None:
        return reason
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


def _joined_small(layout: Layout, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """One array a bucket, computed in: small leaves joined, large ones flat."""
    small = [b for b in layout.buckets if not _is_large(b)]
    joined = iter(dataclasses.replace(layout, buckets=tuple(small)).join(arrays))
    return [
        wide(arrays[b.leaves[0]]).reshape(-1) if _is_large(b) else next(joined)
        for b in layout.buckets
    ]


def _blocked(x: jax.Array, b: Bucket) -> jax.Array:
    """A flat leaf as padded blocks."""
    return jnp.pad(x, (0, math.prod(b.shape) - x.size)).reshape(b.shape)


def _encode_large(x: jax.Array, b: Bucket, payload: Any, turn: Turn) -> Any:
    """The payload of a flat leaf, in the place of an older one.

    A GPU computes what is read coordinate by coordinate where it is read: it needs no
    room for a whole leaf, and would wait for pieces.
    """

    def whole(x, payload):
        del payload
        return b.codec.encode(_blocked(x, b), b.blocks(), turn)

    def in_pieces(x, payload):
        return _encode_in_pieces(x, b, payload, turn)

    if not b.codec.pointwise:
        return in_pieces(x, payload)
    return lax.platform_dependent(x, payload, cuda=whole, rocm=whole, default=in_pieces)


def _encode_in_pieces(x: jax.Array, b: Bucket, payload: Any, turn: Turn) -> Any:
    """The payload of a flat leaf, in the place of an older one.

    What is computed of a whole leaf at once may need several more of its size. In a
    loop only what belongs to one piece is there at a time.
    """
    blocks = b.blocks()
    piece = max(-(-x.size // PIECES), min(PIECE, x.size))
    number = -(-piece // blocks.size)
    length = number * blocks.size
    if x.size > MOST:
        return b.codec.encode(_blocked(x, b), blocks, turn)
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
        fresh = b.codec.encode(once(part), rows(blocks, first, number), turn)
        return jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, first, 0),
            payload,
            fresh,
        )

    return lax.fori_loop(0, -(-x.size // length), body, payload)


def still(turn: Turn) -> Turn:
    """A turn at which shared randomness stands still and private randomness moves.

    Only what is equal at every step can be read again, and added to.
    """
    private = randomness.hash_words(np.uint32(PRIVATE), turn.step, turn.worker)
    return Turn(jnp.uint32(0), private, PRIVATE)
