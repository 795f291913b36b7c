"""The compressor as users meet it: an Optax transformation with a wire format."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efopt.codecs.codec import Codec, Payload, Turn, compute_dtype
from efopt.codecs.conversation import alone, converse
from efopt.codecs.layout import Layout, plan
from efopt.ground import bits

FLOATS = ("float16", "bfloat16", "float32", "float64")


class CompressorState(NamedTuple):
    """State of a compressor chained by itself.

    Attributes:
      count: Steps taken. shape=(), int32.
      memory: The codec's state for each leaf; ``()`` for a stateless codec.
    """

    count: jax.typing.ArrayLike
    memory: Any


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A module-level function bound to a codec: equal, hashable and picklable."""

    function: Callable[..., Any]
    codec: Codec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.codec, *args, **kwargs)


class Compressor(optax.GradientTransformationExtraArgs):
    """A lossy map on arrays with a wire format and a declared contract.

    It is an :class:`optax.GradientTransformation`: chained by itself it replaces each
    leaf by what a receiver would read, without feedback and without workers. Give it to
    :func:`efopt.error_feedback` or :func:`efopt.compress` to send it.

    Compressors are immutable and compare, hash, copy, pickle and print by their
    options. Make one with a factory such as :func:`efopt.scaled_sign`.
    """

    @property
    def codec(self) -> Codec:
        """The codec that does the work: a frozen dataclass."""
        return self.init.codec  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return repr(self.codec)

    @property
    def linear(self) -> bool:
        """Whether payloads may be summed, as ``exchange="all_reduce"`` does."""
        return self.codec.linear

    @property
    def unbiased(self) -> bool:
        """Whether ``E C(x) = x``."""
        return self.codec.unbiased

    @property
    def block_size(self) -> int | None:
        """Coordinates compressed as one unit; ``None``: the whole leaf or more."""
        return self.codec.block_size

    def delta(self, shape: tuple[int, ...]) -> float | None:
        """Contraction factor for a leaf of ``shape``, or ``None`` if it has none.

        ``E|C(x) - x|^2 <= (1 - delta) |x|^2`` for every ``x``.
        """
        if math.prod(shape) == 0:  # an empty leaf loses nothing
            return None if self._codec((1,)).delta((1,)) is None else 1.0
        return self._codec(shape).delta(tuple(shape))

    def omega(self, shape: tuple[int, ...]) -> float | None:
        """Variance factor for a leaf of ``shape``, or ``None`` if it is biased.

        ``E C(x) = x`` and ``E|C(x) - x|^2 <= omega |x|^2`` for every ``x``.
        """
        if math.prod(shape) == 0:
            return None if self._codec((1,)).omega((1,)) is None else 0.0
        return self._codec(shape).omega(tuple(shape))

    def _codec(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Codec:
        """The codec of a tree that is one leaf."""
        return self.codec.assign(jax.ShapeDtypeStruct(tuple(shape), dtype))[0]

    def payload_bits(
        self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
    ) -> int:
        """Bits that one worker hands to the exchange for one leaf, one way.

        The arrays of the payload, padding of blocks included; the carrier may round
        each array up to whole 32-bit words.
        """
        shape, dtype = tuple(shape), jnp.dtype(dtype)
        codec, bits_seen = self._codec(shape, dtype), []
        layout = plan([codec], [shape], [dtype])

        def count(messages):
            arrays = jax.tree.leaves([m.payload for m in messages.values()])
            bits_seen.extend(8 * a.size * a.dtype.itemsize for a in arrays)
            return alone(messages)

        def talk(x, step):
            memory = layout.join_memory([codec.init(shape, dtype)])
            xs = layout.join([x], step)
            converse(layout, xs, memory, _turn(step), count)

        x = jax.ShapeDtypeStruct(shape, compute_dtype(dtype))
        jax.eval_shape(talk, x, jax.ShapeDtypeStruct((), jnp.uint32))
        return sum(bits_seen)

    def compress(self, x: jax.Array, step: jax.typing.ArrayLike = 0) -> Payload:
        """The payload of one array: a pytree of arrays, block axis first.

        Args:
          x: A floating-point array of any shape, not empty.
          step: Selects the random numbers, equal on sender and receiver.

        Raises:
          TypeError: If the compressor speaks in several rounds, or ``x`` is no float.
          ValueError: If ``x`` is empty.
        """
        x = jnp.asarray(x)
        dtype = check_float((), x, "`compress(x)`")
        if x.size == 0:
            raise ValueError(
                f"`compress(x)` needs at least one coordinate, got shape {x.shape}: an "
                "empty leaf sends nothing."
            )
        codec = self._codec(x.shape, dtype)
        layout = plan([codec], [x.shape], [dtype])
        (blocks,) = layout.join([x.astype(compute_dtype(dtype))], jnp.uint32(0))
        return codec.encode(blocks, layout.buckets[0].blocks(), _turn(step))

    def decompress(
        self,
        payload: Payload,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
        step: jax.typing.ArrayLike = 0,
    ) -> jax.Array:
        """What a receiver reads from :meth:`compress`: ``shape``, rounded to ``dtype``.

        Args:
          payload: The payload.
          shape: The shape of the array that was compressed.
          dtype: Its dtype.
          step: The step given to :meth:`compress`.
        """
        codec = self._codec(shape, dtype)
        layout = plan([codec], [tuple(shape)], [jnp.dtype(dtype)])
        blocks = layout.buckets[0].blocks()
        decoded = codec.decode(payload, blocks, _turn(step))
        out = bits.cast(blocks.mask(decoded), dtype)
        return layout.part([out], jnp.uint32(0), [jnp.zeros(shape, dtype)])[0]


def make(codec: Codec) -> Compressor:
    """The compressor of a codec."""
    return Compressor(_Bound(_init, codec), _Bound(_update, codec))  # type: ignore


def check_float(path: Any, leaf: Any, api: str) -> np.dtype:
    """The dtype of a leaf that can be compressed, or a TypeError that names it."""
    dtype = jnp.result_type(leaf)
    if dtype.name not in FLOATS:
        name = jax.tree_util.keystr(path) or "the array"
        raise TypeError(
            f"{api} takes real floating-point leaves ({', '.join(FLOATS)}), got "
            f"{dtype.name} at {name}. Leave such leaves out with `optax.partition`."
        )
    return dtype


def init_memory(codec: Codec, params: Any, api: str) -> Any:
    """The codec's state for every leaf of ``params``, after a check of their dtypes.

    It has the structure of ``params``, as ``optax.tree.map_params`` wants it; ``()``
    for a codec that has none.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    dtypes = [check_float(path, leaf, api) for path, leaf in paths]
    if not codec.stateful:
        return ()
    if not paths:  # a placeholder of `optax.tree.map_params`
        return params
    codecs = codec.assign(params)
    triples = zip(codecs, paths, dtypes, strict=True)
    states = [c.init(jnp.shape(leaf), dtype) for c, (_, leaf), dtype in triples]
    return treedef.unflatten(states)


def open_memory(layout: Layout, treedef: Any, memory: Any) -> list[Any]:
    """One state per bucket from what :func:`init_memory` made."""
    if not any(b.codec.stateful for b in layout.buckets):
        return [()] * len(layout.buckets)
    return layout.join_memory(treedef.flatten_up_to(memory))


def close_memory(layout: Layout, treedef: Any, joined: list[Any], memory: Any) -> Any:
    """Inverse of :func:`open_memory`; ``memory`` is the state before."""
    if not any(b.codec.stateful for b in layout.buckets):
        return memory
    old = treedef.flatten_up_to(memory)
    return treedef.unflatten(layout.part_memory(joined, old))


def _turn(step: jax.typing.ArrayLike) -> Turn:
    return Turn(jnp.asarray(step).astype(jnp.uint32), jnp.uint32(0))


def _init(codec: Codec, params: optax.Params) -> CompressorState:
    memory = init_memory(codec, params, f"`{codec}`")
    return CompressorState(jnp.zeros([], jnp.int32), memory)


def _update(codec, updates, state, params=None, **extra_args):
    del params, extra_args
    paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
    dtypes = [check_float(path, leaf, f"`{codec}`") for path, leaf in paths]
    arrays = [jnp.asarray(x) for _, x in paths]
    layout = plan(codec.assign(updates), [x.shape for x in arrays], dtypes)
    turn = _turn(state.count)
    xs = [x.astype(compute_dtype(x.dtype)) for x in layout.join(arrays, turn.step)]
    memory = open_memory(layout, treedef, state.memory)
    means, _, memory = converse(layout, xs, memory, turn, alone)
    memory = close_memory(layout, treedef, memory, state.memory)
    pairs = zip(means, layout.buckets, strict=True)
    out = [bits.cast(mean.decode(), b.dtype) for mean, b in pairs]
    out = treedef.unflatten(layout.part(out, turn.step, arrays))
    return out, CompressorState(optax.safe_increment(state.count), memory)
